"""How much of each tensor reaches the score: all of it, nothing, or only the first slices along an axis.

Behind the last attention of a transformer that classifies by its class token, the other tokens have no way to the
score: their gradient is zero by structure. The search goes from the score to the image; what it cannot tell reaches.
So does the search for the tensors that hold the scores already, each channel those of one class.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.nodes import axes_of, permutation, slices
from graphgbp.symbols import product

_ELEMENTWISE = {
    "Abs", "Add", "Cast", "Celu", "Clip", "DequantizeLinear", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Mean", "Min", "Mish", "Mul", "Neg", "PRelu",
    "Pow", "QuantizeLinear", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Sqrt", "Sub", "Sum",
    "Swish", "Tanh", "ThresholdedRelu", "Where",
}  # fmt: skip
_ALONG_AN_AXIS = {"Hardmax", "LogSoftmax", "LpNormalization", "Softmax"}
_FROM_AN_AXIS_ON = {"LayerNormalization", "RMSNormalization"}
_RESHAPING = {"Flatten", "Reshape", "Squeeze", "Unsqueeze"}
_CHANNEL_BY_CHANNEL = {
    "AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GridSample", "InstanceNormalization",
    "LpPool", "MaxPool",
}  # fmt: skip
_CONVOLUTIONS = {"Conv", "ConvTranspose"}


class Extent(NamedTuple):
    """The first `size` slices along `axis`."""

    axis: int
    size: float


ALL, NOTHING = Extent(0, np.inf), Extent(0, 0)
Extents = dict[str, Extent]


def reaching(nodes: Iterable[gs.Node], score: gs.Tensor) -> Extents:
    """For every tensor on a path through the nodes, given in topological order, how much of it reaches the score."""
    found: Extents = {score.name: ALL}
    for node, index, x, y in _ways_back(nodes, found):
        extent = _needed(node, index, y, found[y.name])
        found[x.name] = _union(found[x.name], extent) if x.name in found else extent
    return found


def one_to_one(nodes: Iterable[gs.Node], score: gs.Tensor, class_axis: int) -> dict[str, int]:
    """The tensors of whose slices along an axis each reaches the scores of one class alone, with that axis."""
    found: dict[str, int | None] = {score.name: class_axis}
    for node, index, x, y in _ways_back(nodes, found):
        axis = _same_slices(node, index, y, found[y.name])
        found[x.name] = axis if found.get(x.name, axis) == axis else None
    return {name: axis for name, axis in found.items() if axis is not None}


def _ways_back(
    nodes: Iterable[gs.Node], found: Collection[str]
) -> Iterator[tuple[gs.Node, int, gs.Variable, gs.Tensor]]:
    """(node, position of x, x, y) from the last node to the first, for every y that is found by then."""
    for node in reversed(list(nodes)):
        for y in node.outputs:
            if y.name in found:
                for index, x in enumerate(node.inputs):
                    if isinstance(x, gs.Variable) and not x.is_empty():
                        yield node, index, x, y


def _same_slices(node: gs.Node, index: int, y: gs.Tensor, axis: int | None) -> int | None:
    """The axis of input `index` whose slices are those of the output's, as many, each made of its own alone.

    A Softmax over the classes is passed: what it takes are their scores too.
    """
    x = node.inputs[index]
    if axis is None or x.shape is None or y.shape is None:
        return None
    if node.op in _ALONG_AN_AXIS:
        return axis
    place = _source_axis(node, index, x, y, axis)
    return place if place is not None and x.shape[place] == y.shape[axis] else None


def _union(a: Extent, b: Extent) -> Extent:
    if NOTHING in (a, b):
        return b if a == NOTHING else a
    return Extent(a.axis, max(a.size, b.size)) if a.axis == b.axis else ALL


def _needed(node: gs.Node, index: int, y: gs.Tensor, extent: Extent) -> Extent:
    """What of input `index` the given extent of output `y` needs."""
    x = node.inputs[index]
    if extent == NOTHING or x.shape is None or y.shape is None:
        return NOTHING if extent == NOTHING else ALL
    if index == 0 and node.op in _SELECTS and (selected := _SELECTS[node.op](node, y)) is not None:
        return selected
    if extent == ALL:
        return ALL
    if node.op == "Concat":
        return _part(node, index, extent)
    axis = _source_axis(node, index, x, y, extent.axis)
    return ALL if axis is None else Extent(axis, extent.size)


def _part(node: gs.Node, index: int, extent: Extent) -> Extent:
    """What the first slices of a concatenation need of one of its parts."""
    if extent.axis != node.attrs["axis"] % len(node.inputs[index].shape):
        return extent
    before = _known_sum(node.inputs[:index], extent.axis)
    if before is None:
        return ALL
    return Extent(extent.axis, extent.size - before) if extent.size > before else NOTHING


# -- where slices are picked out ----------------------------------------------------------------------------


def _gathered(node: gs.Node, y: gs.Tensor) -> Extent | None:
    indices = node.inputs[1]
    known = isinstance(indices, gs.Constant) and indices.values.size and indices.values.min() >= 0
    return Extent(node.attrs["axis"] % len(node.inputs[0].shape), int(indices.values.max()) + 1) if known else None


def _sliced(node: gs.Node, y: gs.Tensor) -> Extent | None:
    if not all(isinstance(x, gs.Constant) for x in node.inputs[1:] if not x.is_empty()):
        return None
    cut = [(axis, end) for axis, start, end, step in slices(node) if start >= 0 and step > 0 and 0 <= end < np.inf]
    shorter = [Extent(axis, end) for axis, end in cut if end != node.inputs[0].shape[axis]]
    return shorter[0] if shorter else None


def _split(node: gs.Node, y: gs.Tensor) -> Extent | None:
    axis = node.attrs.get("axis", 0) % len(y.shape)
    upto = node.outputs[: next(i for i, part in enumerate(node.outputs) if part is y) + 1]
    size = _known_sum(upto, axis)
    return Extent(axis, size) if size is not None and y is not node.outputs[-1] else None


def _known_sum(parts: Iterable[gs.Tensor], axis: int) -> int | None:
    """The sizes of the parts along an axis, together; None where one is open."""
    sizes = [part.shape[axis] if part.shape is not None else None for part in parts]
    known = [size for size in sizes if isinstance(size, int)]
    return sum(known) if len(known) == len(sizes) else None


_SELECTS: dict[str, Callable[[gs.Node, gs.Tensor], Extent | None]] = {
    "Gather": _gathered,
    "Slice": _sliced,
    "Split": _split,
}


# -- where an axis is carried along -------------------------------------------------------------------------


def _source_axis(node: gs.Node, index: int, x: gs.Tensor, y: gs.Tensor, axis: int) -> int | None:
    """The axis of an input whose slices are those of the output's axis, one to one; None where they are mixed."""
    shift = len(y.shape) - len(x.shape)
    if node.op in _ELEMENTWISE:
        return axis - shift if axis >= shift else None
    if node.op == "MatMul":
        return _factor_axis(index, axis, x, y)
    if index > 0:
        return None
    if node.op in _ALONG_AN_AXIS:
        return axis if axis != node.attrs["axis"] % len(x.shape) else None
    if node.op in _FROM_AN_AXIS_ON:
        return axis if axis < node.attrs["axis"] % len(x.shape) else None
    if node.op == "Transpose":
        return permutation(node)[axis]
    if node.op in _RESHAPING:
        return _same_place(x, y, axis)
    if node.op.startswith("Reduce"):
        return _spared_axis(axes_of(node, len(x.shape)), len(x.shape), len(y.shape), axis)
    return axis if _keeps_slices(node, x, y, axis) else None


def _spared_axis(reduced: list[int], rank: int, left: int, axis: int) -> int | None:
    """The axis of what is reduced, to some axes that stay in place or go."""
    kept = [place for place in range(rank) if place not in reduced]
    if left == rank:
        return axis if reduced and axis in kept else None
    return kept[axis] if len(kept) == left else None


def _keeps_slices(node: gs.Node, x: gs.Tensor, y: gs.Tensor, axis: int) -> bool:
    """Whether the slices along an axis are kept apart and in place."""
    if node.op in _CONVOLUTIONS:
        return axis == 0 or (axis == 1 and node.attrs.get("group", 1) == x.shape[1] == y.shape[1])
    if node.op == "Resize":
        crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        return x.shape[axis] == y.shape[axis] and not crops
    if node.op == "Slice":
        known = all(isinstance(bound, gs.Constant) for bound in node.inputs[1:] if not bound.is_empty())
        return known and axis not in [cut for cut, *_ in slices(node)]
    return node.op == "BatchNormalization" or (node.op in _CHANNEL_BY_CHANNEL and axis < 2)


def _factor_axis(index: int, axis: int, x: gs.Tensor, y: gs.Tensor) -> int | None:
    """The rows of a product are those of its first factor, its columns those of the second."""
    rank = len(y.shape)
    if axis < rank - 2:
        return axis if len(x.shape) == rank else None
    return len(x.shape) - 2 + index if axis == rank - 2 + index and len(x.shape) > 1 else None


def _same_place(x: gs.Tensor, y: gs.Tensor, axis: int) -> int | None:
    """The axis of a reshaped tensor that stands between the same sizes as before."""
    before, after = list(y.shape[:axis]), list(y.shape[axis + 1 :])
    for place, size in enumerate(x.shape):
        same = size == y.shape[axis] and isinstance(size, int)
        if same and (product(x.shape[:place]) == product(before) or product(x.shape[place + 1 :]) == product(after)):
            return place
    return None
