"""Grad-CAM's target layer: which tensors can serve, and the choice among them.

A candidate is a spatial tensor that every path from the input to the score crosses: no later decision of the network
goes around it. `auto` takes the last of them, after its activation, before the pooling.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphgbp.backward import RuleFor, active_nodes, is_float, varied_tensors
from graphgbp.contract import RECOMPUTED
from graphgbp.errors import RequestError
from graphgbp.nodes import input_names, label
from graphgbp.prepare import View

_CHANNELS_FIRST = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool",
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Gather", "Einsum", "Expand", "MatMul", "Gemm"}
_SAME_VALUES = {"Identity", "Dropout", "Cast", "Transpose"}
_POOLING = {"AveragePool", "GlobalAveragePool", "ReduceMean"}


@dataclass(frozen=True)
class Layer:
    """A tensor [N, C, ...] (channels at `channel_axis`) that Grad-CAM can be taken at, and why."""

    tensor: gs.Tensor
    channel_axis: int
    reason: str

    @property
    def node(self) -> gs.Node:
        return self.tensor.inputs[0]

    @property
    def spatial_axes(self) -> list[int]:
        return [axis for axis in range(1, len(self.tensor.shape)) if axis != self.channel_axis]

    def describe(self) -> dict[str, object]:
        return {
            "tensor": self.tensor.name,
            "node": label(self.node),
            "op": self.node.op,
            "shape": list(self.tensor.shape),
            "channel_axis": self.channel_axis,
            "reason": self.reason,
        }


def channel_axes(view: View, image: gs.Tensor, layout: str | None) -> dict[str, int]:
    """The channel axis of every tensor whose layout is known: set by convolutions, moved by Transpose, else kept.

    First from what makes a tensor, then, where that does not tell, from what reads it.
    """
    axes = {} if layout is None else {image.name: layout.index("C")}
    for node in view.graph.nodes:
        axis = _channel_axis(node, axes)
        if axis is not None:
            axes.update((output.name, axis) for output in node.outputs if output.name)
    for node in reversed(view.graph.nodes):
        for x, axis in _told_by_reader(node, axes):
            axes.setdefault(x.name, axis)
    return axes


def _told_by_reader(node: gs.Node, axes: dict[str, int]) -> list[tuple[gs.Tensor, int]]:
    """The inputs whose channel axis follows from the node that reads them."""
    x = node.inputs[0] if node.inputs else None
    if x is None or not isinstance(x, gs.Variable) or not node.outputs:
        return []
    if node.op in _CHANNELS_FIRST:
        return [(x, 1)]
    axis = axes.get(node.outputs[0].name)
    if axis is None or node.op in _RESHAPING:
        return []
    if node.op == "Transpose":
        return [(x, _perm(node)[axis])]
    return [(x, axis) for x in node.inputs if isinstance(x, gs.Variable) and _same_rank(x, node.outputs[0])]


def _channel_axis(node: gs.Node, axes: dict[str, int]) -> int | None:
    if node.op in _CHANNELS_FIRST:
        return 1
    known = [(x, axes[x.name]) for x in node.inputs if x.name in axes]
    if known and node.op == "MatMul" and known[0][0] is node.inputs[0] and known[0][1] == len(known[0][0].shape) - 1:
        return known[0][1]  # a dense layer over channels that stand last
    if not known or node.op in _RESHAPING or not node.outputs:
        return None
    x, axis = known[0]
    if node.op == "Transpose":
        return _perm(node).index(axis)
    return axis if _same_rank(x, node.outputs[0]) else None


def _perm(node: gs.Node) -> list[int]:
    return node.attrs.get("perm") or list(range(len(node.inputs[0].shape)))[::-1]


def _same_rank(x: gs.Tensor, y: gs.Tensor) -> bool:
    return x.shape is not None and y.shape is not None and len(x.shape) == len(y.shape)


def candidates(view: View, image: gs.Tensor, layout: str | None, score: gs.Tensor, rule_for: RuleFor) -> list[Layer]:
    """Every tensor that can serve as target layer, from input to score."""
    axes = channel_axes(view, image, layout)
    nodes = active_nodes(view, [image.name], [score.name], rule_for)
    crossed = [tensor for tensor in separators(nodes, image) if tensor.name != score.name]
    return [
        Layer(tensor, axes[tensor.name], _reason(tensor, nodes))
        for tensor in crossed
        if tensor.name in axes and is_spatial(tensor, axes[tensor.name])
    ]


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


def is_spatial(tensor: gs.Tensor, channel_axis: int) -> bool:
    """Whether the tensor has positions: axes behind batch and channels that are not all known to be 1."""
    if tensor.shape is None or len(tensor.shape) < 3:
        return False
    return any(size != 1 for axis, size in enumerate(tensor.shape) if axis not in (0, channel_axis))


def choose(
    view: View,
    layers: Sequence[Layer],
    request: str,
    score: gs.Tensor,
    axes: dict[str, int],
    rule_for: RuleFor,
) -> Layer:
    """The target layer for a request: 'auto', a tensor's name or a node's name."""
    if request == "auto":
        return _last(layers)
    tensor = find_tensor(view, request, layers)
    if tensor.shape is None or len(tensor.shape) < 3 or not is_float(tensor):
        raise RequestError(f"'{request}' has no spatial positions (shape {tensor.shape}); {_advice(layers)}")
    if score.name not in varied_tensors(view, [tensor.name], rule_for):
        raise RequestError(f"the score does not depend on '{request}', so its gradient is zero; {_advice(layers)}")
    if not tensor.inputs:
        raise RequestError(f"'{request}' is an input or a constant, no layer; {_advice(layers)}")
    if tensor.name not in axes:
        raise RequestError(
            f"nothing tells which axis of '{request}' {list(tensor.shape)} holds the channels: no convolution or "
            f"pooling makes or reads it; {_advice(layers)}"
        )
    return Layer(tensor, axes[tensor.name], "as asked")


def _last(layers: Sequence[Layer]) -> Layer:
    if not layers:
        raise RequestError(
            "no spatial tensor lies on every path from the input to the score, so target_layer='auto' finds none; "
            "name a tensor or node, or leave gradcam and guided_gradcam out"
        )
    index = len(layers) - 1
    names = {layer.tensor.name: position for position, layer in enumerate(layers)}
    while layers[index].node.op in _SAME_VALUES | _POOLING and layers[index].node.inputs[0].name in names:
        index = names[layers[index].node.inputs[0].name]
    return layers[index]


def find_tensor(view: View, name: str, layers: Sequence[Layer] = ()) -> gs.Tensor:
    """The tensor of that name, or the first output of the node of that name; RequestError where there is none."""
    for names, key in ((view.tensors, name), (view.named, name), (view.tensors, f"{RECOMPUTED}/{name}")):
        if key in names:
            return names[key]
    near = difflib.get_close_matches(name, [*view.tensors, *view.named], n=4, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}" if near else _advice(layers)
    raise RequestError(f"the model has no tensor or node named '{name}'; {hint}")


def _advice(layers: Iterable[Layer]) -> str:
    names = [layer.tensor.name for layer in layers][-3:]
    return f"candidates are {', '.join(names)}" if names else "see `graphgbp inspect` for the candidates"


def _reason(tensor: gs.Tensor, nodes: Sequence[gs.Node]) -> str:
    after = tensor.inputs[0]
    readers = [node for node in nodes if tensor.name in input_names(node)]
    before = f", before {readers[0].op} '{label(readers[0])}'" if len(readers) == 1 else ""
    return f"every path from the input to the score crosses it; after {after.op} '{label(after)}'{before}"
