"""The target layer of a CAM: which tensors can serve, and the choice among them.

A candidate is a spatial tensor that every path from the input to the score crosses: no later decision of the network
goes around it. `auto` takes the last of them, after its activation, before the pooling. The blocks of a transformer go
around everything but their sums; there the normalizations that feed attention are candidates too, and `auto` takes
the last of those. A tensor of whose positions none reaches the score is no candidate. One whose channels are the
classes is none for `auto`: a class has no gradient but in its own channel, and Grad-CAM would be that channel.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import onnx_graphsurgeon as gs

from graphgbp import attention
from graphgbp.backward import RuleFor, active_nodes, is_float, varied_tensors
from graphgbp.contract import RECOMPUTED
from graphgbp.errors import RequestError
from graphgbp.extents import ALL, NOTHING, Extents, one_to_one, reaching
from graphgbp.layouts import Layout, Layouts
from graphgbp.nodes import input_names, label
from graphgbp.stored import counts_steps, real_of
from graphgbp.view import View

_SAME_VALUES = {"Identity", "Dropout", "Cast", "Transpose"}
_POOLING = {"AveragePool", "GlobalAveragePool", "ReduceMean"}


@dataclass(frozen=True)
class Layer:
    """A tensor that a CAM can be taken at, where it has its channels and positions, and why it was chosen."""

    tensor: gs.Tensor
    layout: Layout
    reason: str
    feeds_attention: bool = False

    @property
    def node(self) -> gs.Node:
        return self.tensor.inputs[0]

    @property
    def sizes(self) -> list[int | str]:
        """How many positions there are along each direction."""
        return self.layout.sizes

    def describe(self) -> dict[str, object]:
        """Plain data; `grid` has the sizes of what tokens stand for, `prefix_tokens` is how many stand for no position.

        Both are None where the layer has no tokens, the latter also where the file leaves it open.
        """
        folded = self.layout.folded
        return {
            "tensor": self.tensor.name,
            "node": label(self.node),
            "op": self.node.op,
            "shape": list(self.tensor.shape),
            "channel_axis": self.layout.channel_axis,
            "grid": self.sizes if folded else None,
            "prefix_tokens": self.layout.prefix(self.tensor) if folded else None,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class LayerSearch:
    """The search for target layers between an image and a score, whose classes stand along `class_axis`."""

    view: View
    image: gs.Tensor
    score: gs.Tensor
    class_axis: int | None
    layouts: Layouts
    rule_for: RuleFor

    @cached_property
    def nodes(self) -> list[gs.Node]:
        return active_nodes(self.view, [self.image.name], [self.score.name], self.rule_for)

    @cached_property
    def extents(self) -> Extents:
        return reaching(self.nodes, self.score)

    @cached_property
    def _class_maps(self) -> set[str]:
        """The tensors whose channels are the classes, one to one."""
        if self.class_axis is None:
            return set()
        found = one_to_one(self.nodes, self.score, self.class_axis)
        return {
            name for name, axis in found.items() if name in self.layouts and self.layouts[name].channel_axis == axis
        }

    @cached_property
    def candidates(self) -> list[Layer]:
        """Every tensor that can serve as target layer, from input to score."""
        crossed = {tensor.name for tensor in separators(self.nodes, self.image)} - {self.score.name}
        attending = {tensor.name for tensor in self._attending}
        eligible = crossed | attending
        return [
            Layer(
                tensor,
                self.layouts[tensor.name],
                self._reason(tensor, tensor.name in attending),
                tensor.name in attending,
            )
            for node in self.nodes
            for tensor in node.outputs
            if tensor.name in eligible
            and not counts_steps(tensor, self.view.stored)
            and self._is_spatial(tensor)
            and self._positions_reach(tensor)
        ]

    @cached_property
    def _attending(self) -> list[gs.Tensor]:
        """What normalizations put out for attention, where no convolution follows to make feature maps of it."""
        if attention.convolves_after_attention(self.nodes):
            return []
        found = attention.attending(self.nodes, attention.normalizations(self.nodes))
        return [normalization.output for normalization in found]

    def choose(self, request: str) -> Layer:
        """The target layer for a request: 'auto', a tensor's name or a node's name.

        Raises RequestError where there is none of that name, or where it cannot serve.
        """
        return self._auto() if request == "auto" else self._named(request)

    def _auto(self) -> Layer:
        last = self._attending[-1] if self._attending else None
        if last is None:
            return self._last()
        if last.name not in self.layouts:
            raise RequestError(
                f"the network attends last behind '{last.name}' {list(last.shape or ())}, and which positions it holds "
                f"cannot be traced back to a feature map, so target_layer='auto' finds none; {_advice(self.candidates)}"
            )
        layers = [layer for layer in self.candidates if layer.feeds_attention]
        return replace(layers[-1], reason=f"the last of its kind: {layers[-1].reason}") if layers else self._last()

    def _last(self) -> Layer:
        """The last candidate that does not hold the scores themselves."""
        layers = [layer for layer in self.candidates if layer.tensor.name not in self._class_maps]
        if self.candidates and not layers:
            raise RequestError(
                "the channels of every spatial tensor on the way to the score are the classes: Grad-CAM of a class "
                f"would be its own channel, so target_layer='auto' takes none; {_advice(self.candidates)}"
            )
        last = _last(layers)
        passed = len(layers) < len(self.candidates)
        return replace(last, reason=f"{last.reason}; behind it the channels are the classes") if passed else last

    def _named(self, request: str) -> Layer:
        tensor, advice = find_tensor(self.view, request, self.candidates), _advice(self.candidates)
        if counts_steps(tensor, self.view.stored):
            tensor = self._real_of(tensor, request)
        if tensor.shape is None or len(tensor.shape) < 3 or not is_float(tensor):
            raise RequestError(f"'{request}' has no spatial positions (shape {tensor.shape}); {advice}")
        if self.score.name not in varied_tensors(self.view, [tensor.name], self.rule_for):
            raise RequestError(f"the score does not depend on '{request}', so its gradient is zero; {advice}")
        if not tensor.inputs:
            raise RequestError(f"'{request}' is an input or a constant, no layer; {advice}")
        if tensor.name not in self.layouts:
            raise RequestError(
                f"nothing tells which axis of '{request}' {list(tensor.shape)} holds the channels and which the "
                f"positions: it is not made or read by a convolution or pooling, nor by tokens made of one; {advice}"
            )
        if not self._positions_reach(tensor):
            raise RequestError(
                f"only the class token and its like reach the score from '{request}': the gradient at its positions "
                f"is zero, and so would Grad-CAM be; {advice}"
            )
        return Layer(tensor, self.layouts[tensor.name], "as asked")

    def _real_of(self, quantised: gs.Tensor, request: str) -> gs.Tensor:
        found = real_of(quantised, self.view.stored)
        if found is None:
            raise RequestError(
                f"'{request}' is quantised: its integers count steps from a zero point, and nothing behind it "
                f"dequantises them; {_advice(self.candidates)}"
            )
        return found

    def _is_spatial(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor has positions: more than one, as far as is known."""
        layout = self.layouts.get(tensor.name)
        return layout is not None and any(size != 1 for size in layout.sizes)

    def _positions_reach(self, tensor: gs.Tensor) -> bool:
        """Whether the score depends on more than the tokens that stand for no position."""
        layout, extent = self.layouts[tensor.name], self.extents.get(tensor.name, ALL)
        if extent.axis != layout.others:
            return extent != NOTHING
        prefix = layout.prefix(tensor)
        return prefix is not None and extent.size > prefix

    @cached_property
    def _readers(self) -> dict[str, list[gs.Node]]:
        readers: dict[str, list[gs.Node]] = defaultdict(list)
        for node in self.nodes:
            for name in input_names(node):
                readers[name].append(node)
        return readers

    def _reason(self, tensor: gs.Tensor, feeds_attention: bool) -> str:
        after = f"after {tensor.inputs[0].op} '{label(tensor.inputs[0])}'"
        if feeds_attention:
            return f"a normalization that feeds attention; {after}{_tokens(self.layouts[tensor.name], tensor)}"
        readers = self._readers[tensor.name]
        before = f", before {readers[0].op} '{label(readers[0])}'" if len(readers) == 1 else ""
        tokens = _tokens(self.layouts[tensor.name], tensor)
        classes = "; its channels are the classes" if tensor.name in self._class_maps else ""
        return f"every path from the input to the score crosses it; {after}{before}{tokens}{classes}"


def _tokens(layout: Layout, tensor: gs.Tensor) -> str:
    """What the tokens stand for, where there are any."""
    if not layout.folded:
        return ""
    prefix = layout.prefix(tensor)
    others = {0: "", 1: " behind one other", None: " behind others"}.get(prefix, f" behind {prefix} others")
    return f", tokens of a {'x'.join(map(str, layout.sizes))} grid{others}"


def separators(nodes: Sequence[gs.Node], source: gs.Tensor) -> list[gs.Tensor]:
    """The tensors that every path through the nodes crosses, in order: alone alive when they are made."""
    last_use = {name: index for index, node in enumerate(nodes) for name in input_names(node)}
    alive = {source.name}
    found = []
    for index, node in enumerate(nodes):
        alive.difference_update(name for name in input_names(node) if last_use[name] == index)
        outputs = [
            output for output in node.outputs if last_use.get(output.name, -1) > index or index == len(nodes) - 1
        ]
        alive.update(output.name for output in outputs)
        if len(alive) == 1 and len(outputs) == 1:
            found.append(outputs[0])
    return found


def _last(layers: Sequence[Layer]) -> Layer:
    """The last one before the pooling; of a normalized concatenation, as DenseNet ends in, that before its ReLU."""
    if not layers:
        raise RequestError(
            "no spatial tensor lies on every path from the input to the score, so target_layer='auto' finds none; "
            "name a tensor or node, or leave the CAMs out"
        )
    named = {layer.tensor.name: layer for layer in layers}
    last = layers[-1]
    while last.node.op in _SAME_VALUES | _POOLING and last.node.inputs[0].name in named:
        last = named[last.node.inputs[0].name]
    makers = _makers(last.tensor, 3)
    if [node.op for node in makers] == ["Relu", "BatchNormalization", "Concat"]:
        normalized = named.get(makers[1].outputs[0].name)
        return replace(normalized, reason=f"{normalized.reason}; it normalizes a concatenation") if normalized else last
    return last


def _makers(tensor: gs.Tensor, count: int) -> list[gs.Node]:
    """The node that makes a tensor, the one that makes that node's first input, and so on."""
    found: list[gs.Node] = []
    while len(found) < count and tensor.inputs and tensor.inputs[0].inputs:
        found.append(tensor.inputs[0])
        tensor = tensor.inputs[0].inputs[0]
    return found


def find_tensor(view: View, name: str, layers: Sequence[Layer] = ()) -> gs.Tensor:
    """The tensor of that name, or the first output of the node of that name; RequestError where there is none."""
    for names, key in ((view.tensors, name), (view.named, name), (view.tensors, f"{RECOMPUTED}/{name}")):
        if key in names:
            return names[key]
    made = [name for name, tensor in view.tensors.items() if not isinstance(tensor, gs.Constant)]
    near = difflib.get_close_matches(name, dict.fromkeys([*made, *view.named]), n=4, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}" if near else _advice(layers)
    raise RequestError(f"the model has no tensor or node named '{name}'; {hint}")


def _advice(layers: Iterable[Layer]) -> str:
    names = [layer.tensor.name for layer in layers][-3:]
    return f"candidates are {', '.join(names)}" if names else "see `graphgbp inspect` for the candidates"
