"""Is every rectifier masked as its policy wants, in the graph and in numbers?

The guided rule lets relu(dy) through where x > 0, the deconvnet lets relu(dy) through. At each rectifier the appended
graph is searched for the tensors in which that happens; then their values are compared.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from graphgbp import contract
from graphgbp.equivalence import RunError
from graphgbp.nodes import label
from graphgbp.smooth import Activation
from graphgbp.verification.parts import part_for
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject

_GATES = {
    "HardSigmoid", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal", "And", "Or", "Not", "Cast",
}  # fmt: skip
GUIDED, DECONVNET = "guided", "deconvnet"
_TOLERANCE = 1e-5  # of the largest cotangent


@dataclass(frozen=True)
class Mask:
    """An activation y of x in a backward pass: the cotangent that arrives, after Relu, and as it is passed on to x."""

    x: str
    y: str
    arrived: str
    rectified: str
    passed_on: str


def find_masks(subject: Subject, rectifiers: Sequence[Activation], policy: str) -> dict[str, list[Mask]]:
    """The masks of each rectifier, by its output: none where the graph has none, several where it has several gates."""
    flow = _Flow(subject.appended, policy, subject.view.twins)
    find = _guided if policy == GUIDED else _deconvnet
    found = {rectifier.node.outputs[0].name: list(find(flow, rectifier)) for rectifier in rectifiers}
    if policy == DECONVNET:
        _share(found, rectifiers)
    return found


def check_masks(
    subject: Subject, rectifiers: Sequence[Activation], smooth: Sequence[Activation], policy: str
) -> tuple[Check, list[Mask]]:
    """The check, and the mask that does what the policy wants at each rectifier, and at each smooth activation."""
    name = f"{policy} masks"
    found = find_masks(subject, [*rectifiers, *smooth], policy)
    if not found:
        return passed(name, "there is no rectifier: the map is the plain gradient", masks=0), []
    without = [tensor for tensor, masks in found.items() if not masks]
    if without:
        what = "mask both ways" if policy == GUIDED else "Relu on their cotangent"
        return failed(name, f"{len(without)} of {len(found)} rectifiers have no {what}: {without}"), []
    if subject.obstacle:
        return unchecked(name, f"all {len(found)} masks are in the graph, but {subject.obstacle}"), []
    try:
        every = [mask for masks in found.values() for mask in masks]
        right = _right(subject, every, {activation.node.outputs[0].name for activation in smooth}, policy)
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run the file: {error}"), []
    wrong = [tensor for tensor in found if tensor not in right]
    if wrong:
        return failed(name, f"{len(wrong)} of {len(found)} masks let other cotangents through: {wrong}"), []
    how = "where x > 0 and dy > 0" if policy == GUIDED else "where dy > 0"
    return (
        passed(name, f"at all {len(found)} rectifiers a cotangent passes {how} alone", masks=len(found)),
        list(right.values()),
    )


def masked_maps(subject: Subject, policy: str) -> dict[str, str]:
    """Of each explained input the tensor that carries the map of a policy: its own, or a factor of Guided Grad-CAM."""
    method = contract.GUIDED_BACKPROP if policy == GUIDED else contract.DECONVNET
    return subject.by_input(method) or subject.factors(contract.GUIDED_GRADCAM)


def _is_copy(node: onnx.NodeProto) -> bool:
    """Whether the node is how float16 is read: the Sum of one tensor."""
    return node.op_type == "Sum" and len(node.input) == 1


class _Flow:
    """The appended nodes of a backward pass, by what they make and by what they read."""

    def __init__(self, nodes: Sequence[onnx.NodeProto], policy: str, twins: Mapping[str, str]) -> None:
        self._twins = twins
        self.scopes = tuple(f"{contract.SCOPE}/{name}/" for name in dict.fromkeys((policy, GUIDED)))
        self._maker = {output: node for node in nodes for output in node.output if output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for tensor in set(node.input):
                self._readers.setdefault(tensor, []).append(node)

    def gated(self, *tensors: str) -> Iterator[onnx.NodeProto]:
        """The products and choices that read a gate made of the tensors, or of those that are read instead of them."""
        waiting = [*tensors, *(self._twins[tensor] for tensor in tensors if tensor in self._twins)]
        seen = set(waiting)
        while waiting:
            tensor = waiting.pop()
            for node in self._readers.get(tensor, []):
                if node.op_type in ("Mul", "Where") and node.name.startswith(self.scopes):
                    yield node
                elif (node.op_type in _GATES or _is_copy(node)) and not seen.issuperset(node.output):
                    seen.update(node.output)
                    waiting.extend(node.output)

    def relu_behind(self, tensor: str, scope: str) -> onnx.NodeProto | None:
        """The Relu of this pass that a tensor comes from, by nodes of one scope."""
        node = self._maker.get(tensor)
        if node is None or not node.name.startswith(self.scopes):
            return None
        if node.op_type == "Relu":
            return node
        if _scope(node) != scope:
            return None
        return next((relu for x in node.input if (relu := self.relu_behind(x, scope))), None)

    def relus(self, name: str) -> Iterator[onnx.NodeProto]:
        """The Relus that this pass made for the rectifier of that name."""
        for node in self._maker.values():
            if node.op_type == "Relu" and _scope(node) in [f"{scope}{name}" for scope in self.scopes]:
                yield node


def _guided(flow: _Flow, rectifier: Activation) -> Iterator[Mask]:
    """Where a cotangent that went through a Relu is gated by the rectifier's own x or y."""
    x, y = rectifier.x.name, rectifier.node.outputs[0].name
    for node in flow.gated(x, y):
        for operand in node.input:
            relu = flow.relu_behind(operand, _scope(node))
            if relu is not None:
                yield Mask(x, y, relu.input[0], relu.output[0], node.output[0])


def _deconvnet(flow: _Flow, rectifier: Activation) -> Iterator[Mask]:
    for relu in flow.relus(label(rectifier.node)):
        yield Mask(rectifier.x.name, rectifier.node.outputs[0].name, relu.input[0], relu.output[0], relu.output[0])


def _share(found: dict[str, list[Mask]], rectifiers: Sequence[Activation]) -> None:
    """Activations that the same node reads may have the same cotangent, and then one Relu."""
    for rectifier in rectifiers:
        y = rectifier.node.outputs[0]
        readers = {id(reader) for reader in y.outputs}
        for other in rectifiers if not found[y.name] else []:
            if not readers.isdisjoint(map(id, other.node.outputs[0].outputs)):
                shared = found[other.node.outputs[0].name]
                found[y.name] = [replace(mask, x=rectifier.x.name, y=y.name) for mask in shared]


def _scope(node: onnx.NodeProto) -> str:
    return node.name.rpartition("/")[0]


def _right(subject: Subject, masks: Sequence[Mask], smooth: Collection[str], policy: str) -> dict[str, Mask]:
    """By the rectifier's output, the mask whose values are those of the policy; without it where none is."""
    if policy == DECONVNET:
        return {mask.y: mask for mask in masks}  # the Relu is the whole of it
    made = {name for node in subject.file.graph.node for name in node.output}
    copies = {name: copy for name, copy in subject.view.twins.items() if copy in made}
    masks = [replace(mask, x=copies.get(mask.x, mask.x), y=copies.get(mask.y, mask.y)) for mask in masks]
    own = {copy: name for name, copy in copies.items()}
    wanted = {name for mask in masks for name in (mask.rectified, mask.passed_on, mask.x, mask.y)}
    values = subject.run(part_for(subject.file, sorted(wanted)), {**subject.point, **subject.targets})
    right = [mask for mask in masks if _is_right(mask, values, own.get(mask.y, mask.y) in smooth)]
    back = [replace(mask, x=own.get(mask.x, mask.x), y=own.get(mask.y, mask.y)) for mask in right]
    return {mask.y: mask for mask in back}


def _is_right(mask: Mask, values: dict[str, np.ndarray], smooth: bool) -> bool:
    """Whether relu(dy) passes where x > 0 and the rectifier passes x, and nothing passes elsewhere.

    Where the activation is a smooth one, its own derivative is not worked out: nothing passes at x <= 0 or dy <= 0.
    """
    x, y, rectified, passed_on = (values[name] for name in (mask.x, mask.y, mask.rectified, mask.passed_on))
    if not x.shape == y.shape == rectified.shape == passed_on.shape:
        return False
    if smooth:
        return not passed_on[(x <= 0) | (rectified <= 0)].any()
    expected = np.where((x > 0) & (y == x), rectified, 0)
    at_bound = (y == x) & (y == y.max(initial=0)) & (passed_on == 0)  # where a Clip's derivative is 0
    return bool(np.abs(passed_on - expected)[~at_bound].max(initial=0) <= _TOLERANCE * np.abs(rectified).max(initial=0))
