"""Which axis of a tensor holds features: what a dense layer or a convolution wrote side by side.

A contraction with weights writes them on an axis of its own. That is followed from there: moved by Transpose, kept by
arithmetic and by what picks positions, found again behind a Reshape by the place where it ends. Of features that a
Reshape splits, such as the classes of several anchors, the inner ones count.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphgbp.nodes import axes_of, permutation
from graphgbp.shapes import Dim
from graphgbp.symbols import product
from graphgbp.view import View

_CHANNELS_SECOND = {"Conv", "ConvTranspose", "DepthToSpace", "SpaceToDepth", "BatchNormalization", "RoiAlign"}
_RESHAPING = {"Reshape", "Flatten", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Features:
    """The axis of the features; None where there is one feature alone, whose axis was squeezed away."""

    axis: int | None


def find_features(view: View, tensor: gs.Tensor) -> Features | None:
    """The features of a tensor; None where no contraction with weights tells."""
    found: dict[str, Features | None] = {}
    for node in view.graph.nodes:
        for y in node.outputs:
            found[y.name] = _features(node, y, found)
        if any(y is tensor for y in node.outputs):
            break
    return found.get(tensor.name)


def _features(node: gs.Node, y: gs.Tensor, known: Mapping[str, Features | None]) -> Features | None:
    if y.shape is None or node.domain not in (None, "", "ai.onnx"):
        return None
    rank = len(y.shape)
    if node.op in _CHANNELS_SECOND or node.op == "Gemm":
        return Features(1) if rank > 1 else None
    if node.op == "MatMul":
        return _written_by_product(node, rank)
    if node.op == "Einsum":
        return _written_by_einsum(node)
    follow = _FOLLOWED.get(node.op, _elementwise)
    sources = [(x, known[x.name]) for x in node.inputs if known.get(x.name) and x.shape is not None]
    made = [follow(node, x, y, found) for x, found in sources if found is not None]
    told = [features for features in made if features is not None]
    return next((features for features in told if features.axis is not None), told[0] if told else None)


def _written_by_product(node: gs.Node, rank: int) -> Features | None:
    left, right = (isinstance(x, gs.Constant) for x in node.inputs)
    return Features(rank - 1 if right else rank - 2) if left != right and rank > 1 else None


def _written_by_einsum(node: gs.Node) -> Features | None:
    """The output's axis that the weights alone have."""
    terms, _, result = node.attrs["equation"].replace(" ", "").partition("->")
    parts = terms.split(",")
    weights = [part for part, x in zip(parts, node.inputs, strict=True) if isinstance(x, gs.Constant)]
    others = "".join(part for part, x in zip(parts, node.inputs, strict=True) if not isinstance(x, gs.Constant))
    if "." in terms or not result or len(weights) != 1:
        return None
    own = [letter for letter in weights[0] if letter in result and letter not in others]
    return Features(result.index(own[0])) if len(own) == 1 else None


def _elementwise(node: gs.Node, x: gs.Tensor, y: gs.Tensor, found: Features) -> Features | None:
    """Arithmetic with broadcasting, and what keeps the rank."""
    shift = len(y.shape) - len(x.shape)
    return found if found.axis is None else Features(found.axis + shift) if shift >= 0 else None


def _transposed(node: gs.Node, x: gs.Tensor, y: gs.Tensor, found: Features) -> Features:
    return found if found.axis is None else Features(permutation(node).index(found.axis))


def _reshaped(node: gs.Node, x: gs.Tensor, y: gs.Tensor, found: Features) -> Features | None:
    """The axis of y that ends where the features ended: as many elements before it, or behind it."""
    if found.axis is None:
        return found if len(y.shape) == len(x.shape) else None
    size, before, behind = x.shape[found.axis], x.shape[: found.axis + 1], x.shape[found.axis + 1 :]
    if size == 1:
        return _single(y)
    for axis, part in enumerate(y.shape):
        ends = product(y.shape[: axis + 1]) == product(before) or product(y.shape[axis + 1 :]) == product(behind)
        if ends and part != 1 and _divides(part, size):
            return Features(axis)
    return None


def _single(y: gs.Tensor) -> Features:
    """One feature: the axis of size 1 that is no batch, the last of them; none where it was squeezed away."""
    single = [axis for axis, size in enumerate(y.shape) if size == 1 and axis]
    return Features(single[-1] if single else None)


def _divides(part: Dim, size: Dim) -> bool:
    return part == size or (isinstance(part, int) and isinstance(size, int) and part > 0 and size % part == 0)


def _gathered(node: gs.Node, x: gs.Tensor, y: gs.Tensor, found: Features) -> Features | None:
    """Gather puts the axes of its indices in the place of the one it picks from."""
    if found.axis is None:
        return None
    axis, more = node.attrs["axis"] % len(x.shape), len(y.shape) - len(x.shape)
    if found.axis == axis:
        return Features(axis) if more == 0 else None
    return Features(found.axis + (more if found.axis > axis else 0))


def _gathered_nd(node: gs.Node, x: gs.Tensor, y: gs.Tensor, found: Features) -> Features | None:
    indices = node.inputs[1].shape
    if found.axis is None or indices is None or not isinstance(indices[-1], int):
        return None
    picked = node.attrs["batch_dims"] + indices[-1]
    return Features(len(indices) - 1 + found.axis - picked) if found.axis >= picked else None


def _reduced(node: gs.Node, x: gs.Tensor, y: gs.Tensor, found: Features) -> Features | None:
    axes = axes_of(node, len(x.shape))
    if found.axis is None or not axes or found.axis in axes:
        return None
    kept = len(y.shape) == len(x.shape)
    return Features(found.axis if kept else found.axis - sum(axis < found.axis for axis in axes))


_FOLLOWED: dict[str, Callable[[gs.Node, gs.Tensor, gs.Tensor, Features], Features | None]] = {
    "Transpose": _transposed,
    **dict.fromkeys(_RESHAPING, _reshaped),
    "Gather": _gathered,
    "GatherND": _gathered_nd,
    **dict.fromkeys(
        (
            "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin",
            "ReduceProd", "ReduceSum", "ReduceSumSquare",
        ),
        _reduced,
    ),
}  # fmt: skip
