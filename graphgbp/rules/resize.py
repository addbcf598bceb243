"""Resize: linear in x and separable, so dx = R^T dy along each axis in turn, R being the interpolation of that axis.

R is what the very same Resize makes of an identity matrix. Its coordinates, rounding, antialiasing and treatment of
the border are then the forward pass's own, on whatever runtime runs it.
"""

import math

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.registry import vjp

_SAME = ("mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a", "exclude_outside", "antialias")
_LARGEST_POOL = 5  # the rank up to which ONNX Runtime pools


def _refuse(node: gs.Node) -> str | None:
    x, y = node.inputs[0], node.outputs[0]
    if x.shape is None or y.shape is None:
        return f"the rank of its input '{x.name}' cannot be inferred"
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    if policy != "stretch" and len(_axes(node)) > 1:
        return f"keep_aspect_ratio_policy={policy} over several axes; export it with the sizes that come out"
    if node.attrs.get("antialias") and _crops(node):
        return "antialias together with tf_crop_and_resize: ONNX Runtime's kernels disagree beyond the border"
    if any(_is_rounded_apart(node, axis) for axis in _axes(node)):
        return "ONNX and ONNX Runtime round its scales to different sizes; export it with sizes instead of scales"
    return None


def _is_rounded_apart(node: gs.Node, axis: int) -> bool:
    """ONNX's inference multiplies scale and size in double precision, ONNX Runtime in single."""
    scales, before, after = _input(node, 2), node.inputs[0].shape[axis], node.outputs[0].shape[axis]
    if not isinstance(scales, gs.Constant) or not isinstance(before, int) or not isinstance(after, int):
        return False
    return int(np.float32(_scale(node, axis)) * np.float32(before)) != after


@vjp("Resize", versions=(13, 18, 19), refuse=_refuse)
def resize(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x interpolated along each axis; dx = dy times the transposed interpolation of each axis"""
    (x, *_) = node.inputs
    blocks = {axis: factor for axis in _axes(node) if (factor := _block(node, axis)) > 1}
    if blocks and _may_pool(blocks, len(x.shape)):
        dy = _summed_in_blocks(g, dy, [blocks.get(axis, 1) for axis in range(2, len(x.shape))])
    else:
        blocks = {}
    for axis in reversed(_axes(node)):
        if axis not in blocks and not _keeps(node, axis):
            dy = _contracted(g, dy, _transposed_interpolation(g, node, axis), axis)
    return [dy]


# -- what the node does to an axis -----------------------------------------------------------------------------------


def _axes(node: gs.Node) -> list[int]:
    """The axes that scales, sizes and roi speak of, in their order."""
    rank = len(node.inputs[0].shape)
    return [axis % rank for axis in node.attrs.get("axes") or range(rank)]


def _input(node: gs.Node, position: int) -> gs.Tensor | None:
    """An optional input; exporters also write an empty constant for one left out."""
    tensor = node.inputs[position] if position < len(node.inputs) else None
    return None if tensor is None or tensor.is_empty() or 0 in (tensor.shape or ()) else tensor


def _scale(node: gs.Node, axis: int) -> float | None:
    """The scale of an axis; None where it is known at run time only."""
    scales = _input(node, 2)
    if isinstance(scales, gs.Constant):
        return float(scales.values[_axes(node).index(axis)])
    before, after = node.inputs[0].shape[axis], node.outputs[0].shape[axis]
    if scales is not None:
        return None
    if isinstance(before, int) and isinstance(after, int):
        return after / before
    return 1.0 if before == after else None


def _keeps(node: gs.Node, axis: int) -> bool:
    """Whether an axis is left as it is."""
    return _scale(node, axis) == 1 and (not _crops(node) or _region(node, axis) == (0, 1))


def _crops(node: gs.Node) -> bool:
    return bool(node.attrs["coordinate_transformation_mode"] == "tf_crop_and_resize")


def _region(node: gs.Node, axis: int) -> tuple[float, float] | None:
    """Where the crop of an axis begins and ends, as parts of its size; None where it is known at run time only."""
    roi, position = _input(node, 1), _axes(node).index(axis)
    if not isinstance(roi, gs.Constant):
        return None
    return float(roi.values[position]), float(roi.values[position + len(_axes(node))])


# -- whole blocks of equal elements ----------------------------------------------------------------------------------


def _block(node: gs.Node, axis: int) -> int:
    """How often each element is repeated in place, where that is all that happens; else 1."""
    scale = _scale(node, axis)
    coordinates, rounding = node.attrs["coordinate_transformation_mode"], node.attrs["nearest_mode"]
    centred = coordinates in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel")
    repeats = (coordinates == "asymmetric" and rounding == "floor") or (centred and rounding.startswith("round"))
    if node.attrs["mode"] != "nearest" or not repeats or scale is None or scale != math.floor(scale):
        return 1
    return int(scale)


def _may_pool(axes: dict[int, int], rank: int) -> bool:
    return min(axes) >= 2 and rank <= _LARGEST_POOL


def _summed_in_blocks(g: Emitter, dy: gs.Tensor, blocks: list[int]) -> gs.Tensor:
    return g.scale(g.op("AveragePool", dy, kernel_shape=blocks, strides=blocks), math.prod(blocks))


# -- any interpolation -----------------------------------------------------------------------------------------------


def _transposed_interpolation(g: Emitter, node: gs.Node, axis: int) -> gs.Tensor:
    """R^T, [in, out]: the columns of an identity matrix, each a picture of its own, resized as the axis is.

    The pictures are 1 wide, and are made 2 wide where x changes: a runtime may copy where no size does.
    """
    x, y = node.inputs[0], node.outputs[0]
    size, width = g.as_int_vector(g.size(x, axis)), _width(g, node)
    scales, roi = _input(node, 2), _input(node, 1)
    position, count = _axes(node).index(axis), len(_axes(node))
    region, lengths = None, [None, g.join([size, 1, g.size(y, axis), width])]
    if roi is not None and _crops(node):
        begin, end = _entry(g, roi, position), _entry(g, roi, position + count)
        region = g.concat([g.like(roi, [0, 0]), begin, g.like(roi, [0, 1, 1]), end, g.like(roi, [1])], 0)
    if scales is not None:
        widening = g.like(scales, [width]) if isinstance(width, int) else g.cast(width, scales.dtype)
        lengths = [g.concat([g.like(scales, [1, 1]), _entry(g, scales, position), widening], 0)]
    attributes = {key: node.attrs.get(key) for key in _SAME}
    columns = g.unsqueeze(_identity(g, size, x.dtype), [1, 3])
    return g.squeeze(g.slice(g.op("Resize", columns, region, *lengths, **attributes), [0], [1], [3]), [1, 3])


def _width(g: Emitter, node: gs.Node) -> Size:
    """1 where no size of x changes although it may be interpolated, else 2."""
    x, y = node.inputs[0], node.outputs[0]
    sizes = list(zip(x.shape, y.shape, strict=True))
    if any(isinstance(before, int) and isinstance(after, int) and before != after for before, after in sizes):
        return 2
    if not any(_may_be_kept_in_size(node, axis) for axis in _axes(node)):
        return 2
    if x.shape == y.shape:
        return 1
    changes = g.cast(g.op("Not", g.equal(g.sizes(x), g.sizes(y))), np.float32)
    return g.add(g.cast(g.reduce_max(changes, [0]), np.int64), g.ints([1]))


def _may_be_kept_in_size(node: gs.Node, axis: int) -> bool:
    """Whether an axis that is interpolated may come out as long as it was."""
    if _crops(node) or _input(node, 2) is None:
        return _crops(node) and not _keeps(node, axis)
    scale = _scale(node, axis)
    return scale is None or 1 < scale < 2


def _entry(g: Emitter, vector: gs.Tensor, index: int) -> gs.Tensor:
    """One entry of a vector, shape [1]."""
    if isinstance(vector, gs.Constant):
        return g.constant(vector.values[index : index + 1])
    return g.slice(vector, [index], [index + 1], [0])


def _identity(g: Emitter, size: gs.Tensor, dtype: np.dtype) -> gs.Tensor:
    index = g.op("Range", g.constant(np.int64(0)), g.squeeze(size, [0]), g.constant(np.int64(1)))
    return g.cast(g.equal(g.unsqueeze(index, [1]), index), dtype)


def _contracted(g: Emitter, dy: gs.Tensor, matrix: gs.Tensor, axis: int) -> gs.Tensor:
    """dx[..., i, ...] = sum over o of matrix[i, o] dy[..., o, ...]"""
    rank = len(dy.shape)
    if axis == rank - 1:
        return g.matmul(dy, g.transpose(matrix, [1, 0])) if rank > 1 else g.matmul(matrix, dy)
    if axis == rank - 2:
        return g.matmul(matrix, dy)
    rest = [g.size(dy, index) for index in range(axis + 1, rank)]
    product = g.matmul(matrix, g.reshape(dy, [0] * (axis + 1) + [-1]))
    return g.reshape(product, [*[0] * (axis + 1), *rest])
