"""Movement: operators that give elements another place or shape and change no value."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.places import add_at, places
from graphgbp.rules.refusals import unknown_rank

_SHAPE_VERSIONS = (13, 21, 23, 24, 25)


# -- the same elements in another shape --------------------------------------------------------------------------


@vjp("Reshape", versions=(14, 19, 21, 23, 24, 25))
@vjp("Flatten", versions=_SHAPE_VERSIONS)
def reshape(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy in x's shape"""
    return [g.reshape_like(dy, node.inputs[0])]


@vjp("Squeeze", versions=_SHAPE_VERSIONS)
def squeeze(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy with the axes of size 1 put back"""
    axes = _known_axes(node)
    return [g.reshape_like(dy, node.inputs[0]) if axes is None else g.unsqueeze(dy, axes)]


@vjp("Unsqueeze", versions=_SHAPE_VERSIONS)
def unsqueeze(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy without the new axes"""
    axes = _known_axes(node)
    return [g.squeeze(dy, axes) if axes else g.reshape_like(dy, node.inputs[0])]


def _known_axes(node: gs.Node) -> list[int] | None:
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    return axes.values.tolist() if isinstance(axes, gs.Constant) else None


@vjp("Transpose", versions=_SHAPE_VERSIONS)
def transpose(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy by the inverse permutation; reversing the axes is its own inverse"""
    perm = node.attrs.get("perm")
    return [g.op("Transpose", dy) if perm is None else g.transpose(dy, np.argsort(perm).tolist())]


@vjp("Expand", versions=(13,), broadcast=True)
def expand(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy, summed over the copies"""
    return [dy]


# -- parts and wholes ---------------------------------------------------------------------------------------------


@vjp("Concat", versions=(13,), wrt=None)
def concat(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """to each part its own piece of dy"""
    return pieces(g, dy, node.inputs, node.attrs["axis"])


def pieces(g: Emitter, dy: gs.Tensor, parts: Sequence[gs.Tensor], axis: int) -> list[Cotangent]:
    """dy, the cotangent of the joined parts, cut at their seams"""
    if len(parts) == 1:
        return [dy]
    sizes = g.join([g.size(part, axis) for part in parts])
    return list(g.ops("Split", dy, sizes, outputs=len(parts), axis=axis))


def _skips_outputs(node: gs.Node) -> str | None:
    return None if all(y.name for y in node.outputs) else "it leaves one of its outputs without a name"


@vjp("Split", versions=(13, 18), outputs=None, refuse=_skips_outputs)
def split(g: Emitter, node: gs.Node, *dy: gs.Tensor) -> list[gs.Tensor]:
    """the pieces joined"""
    return [g.concat(dy, node.attrs["axis"])]


@vjp("Slice", versions=(13,), refuse=unknown_rank(0))
def slice_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy between zeros; a step leaves zeros inside too, and a negative step is undone by reversing dy"""
    x, *arguments = node.inputs
    if not all(isinstance(argument, gs.Constant) or argument.is_empty() for argument in arguments):
        return [add_at(g, dy, g.op("Slice", places(g, x), *arguments), x)]
    rank = len(x.shape)
    starts, axes, steps = _arguments(arguments, rank)
    begins: list[Size] = [0] * rank
    ends: list[Size] = [0] * rank
    dx = g.flip(dy, [axis for axis, step in zip(axes, steps, strict=True) if step < 0])
    for axis, start, step in zip(axes, starts, steps, strict=True):
        size, count = (g.as_int_vector(g.size(tensor, axis)) for tensor in (x, dy))
        dx = _spread(g, dx, axis, abs(step))
        begins[axis] = first = _first(g, start, step, size, count)
        ends[axis] = g.sub(g.sub(size, first), g.mul(count, g.ints([abs(step)])))
    return [g.pad(dx, [*begins, *ends])]


def _arguments(tensors: list[gs.Tensor], rank: int) -> tuple[list[int], list[int], list[int]]:
    """Known starts, axes and steps, with those that are left out filled in."""
    starts: list[int] = tensors[0].values.tolist()
    given = [tensor.values.tolist() if isinstance(tensor, gs.Constant) else None for tensor in tensors[2:]]
    axes, steps = (*given, None, None)[:2]
    axes = range(len(starts)) if axes is None else axes
    return starts, [axis % rank for axis in axes], [1] * len(starts) if steps is None else steps


def _first(g: Emitter, start: int, step: int, size: gs.Tensor, count: gs.Tensor) -> gs.Tensor:
    """int64 [1]: the lowest index that Slice takes; anything in [0, size] where it takes none."""
    if start == 0 and step > 0:
        return g.ints([0])
    last = size if step > 0 else g.sub(size, g.ints([1]))
    begin = g.minimum(g.ints([start]), last) if start >= 0 else g.maximum(g.add(size, g.ints([start])), g.ints([0]))
    if step > 0:
        return begin
    lowest = g.add(begin, g.mul(g.sub(count, g.ints([1])), g.ints([step])))
    return g.minimum(g.maximum(lowest, g.ints([0])), size)


def _spread(g: Emitter, x: gs.Tensor, axis: int, step: int) -> gs.Tensor:
    """x with step - 1 zeros behind each entry along the axis."""
    if step == 1:
        return x
    rank = len(x.shape)
    ends = [0] * (rank + 1)
    ends[axis + 1] = step - 1
    padded = g.pad(g.unsqueeze(x, [axis + 1]), [0] * (rank + 1) + ends)
    sizes = [g.size(x, other) for other in range(rank)]
    sizes[axis] = g.mul(g.as_int_vector(sizes[axis]), g.ints([step]))
    return g.reshape(padded, sizes)


@vjp("Pad", versions=(13, 18, 19, 21, 23, 24, 25))
def pad(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy padded by the opposite amount; where the border repeats elements, its share goes back to them"""
    x, pads, *_ = node.inputs
    axes = node.inputs[3] if len(node.inputs) > 3 else None
    mode = node.attrs["mode"]
    if mode == "constant":
        opposite = g.ints(-pads.values) if isinstance(pads, gs.Constant) else g.neg(pads)
        return [g.op("Pad", dy, opposite, g.like(dy, 0), axes)]
    numbers = g.cast(places(g, x), np.float64)  # Pad has no integer kernel on CUDA; a double holds any place exactly
    return [add_at(g, dy, g.cast(g.op("Pad", numbers, pads, None, axes, mode=mode), np.int64), x)]


@vjp("CenterCropPad", versions=(18,))
def center_crop_pad(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy cropped where x was padded and padded where x was cropped: the same operator, to x's own sizes"""
    x, axes = node.inputs[0], node.attrs.get("axes")
    sizes = g.op("Shape", x) if axes is None else g.sizes(x, axes)
    return [g.op("CenterCropPad", dy, sizes, axes=axes)]
