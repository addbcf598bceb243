"""Pooling: the largest element, the mean or the p-norm of each window, or of the whole image."""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import blocked
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, Repeated, vjp
from graphgbp.rules.windows import Window, begin_and_end, lowest_same_padding, transpose, windows
from graphgbp.shapes import is_static, window_count

# -- max -------------------------------------------------------------------------------------------------------------


def _refuse(node: gs.Node) -> str | None:
    kernel = node.attrs["kernel_shape"]
    if not node.attrs["auto_pad"].startswith("SAME"):
        return None
    if any(window.dilation > 1 for window in windows(node, kernel)):
        return f"auto_pad={node.attrs['auto_pad']} with dilations: ONNX Runtime pads as if there were none"
    if lowest_same_padding(node, kernel) < 0:
        return f"auto_pad={node.attrs['auto_pad']} with a kernel smaller than the stride: ONNX Runtime misplaces it"
    return None


def _refuse_before_22(node: gs.Node) -> str | None:
    """Also a window in the end padding: ONNX counts it until opset 22 and ONNX Runtime does not, so shapes conflict."""
    axes = windows(node, node.attrs["kernel_shape"])
    if any(w.ceil and w.size is not None and w.pads is not None and _counts_differ(w) for w in axes):
        return (
            "its last window would begin in the end padding (ceil_mode), where ONNX before opset 22 and ONNX Runtime "
            "count differently; export at opset 22 or newer, or with an open image size"
        )
    return _refuse(node)


def _counts_differ(window: Window) -> bool:
    assert window.size is not None and window.pads is not None
    rounded_up = -(-(window.size + sum(window.pads) - window.span) // window.stride) + 1
    return rounded_up != window_count(window.size, window.span, window.stride, window.pads, ceil=True)


@vjp("MaxPool", versions=(12,), refuse=_refuse_before_22)
@vjp("MaxPool", versions=(22,), refuse=_refuse)
def max_pool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy to the first largest element of each window: MaxPool's Indices count through the whole of x."""
    (x,) = node.inputs
    geometry = ("kernel_shape", "strides", "pads", "dilations", "ceil_mode", "auto_pad")
    y, indices = g.ops("MaxPool", x, outputs=2, **{key: node.attrs.get(key) for key in geometry})
    if _may_be_empty(windows(node, node.attrs["kernel_shape"])):
        dy = g.where(g.greater(y, g.like(y, np.finfo(y.dtype).min)), dy, g.like(dy, 0))
    zeros = g.op("Expand", g.like(dy, 0), g.reshape(g.count(x), [1]))
    dx = g.op("ScatterElements", zeros, g.reshape(indices, [-1]), g.reshape(dy, [-1]), axis=0, reduction="add")
    return [blocked.enter(g, g.reshape_like(dx, x), x)]


@vjp("MaxUnpool", versions=(11, 22))
def max_unpool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y is 0 but at the given places, which count through the whole of y: dy from there"""
    x, places = node.inputs[:2]
    return [g.with_shape(g.op("Gather", g.reshape(dy, [-1]), places), x)]


def _may_be_empty(axes: Sequence[Window]) -> bool:
    """Whether a window may read nothing, as a dilated one that straddles a tiny image does.

    Its maximum is the lowest number there is, and its index points at some other element.
    """
    return any(window.dilation > 1 and window.pads != (0, 0) for window in axes)


@vjp("GlobalMaxPool", versions=(1, 22))
def global_max_pool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy to the first largest element of each channel"""
    (x,) = node.inputs
    flat = g.reshape(x, [0, 0, -1])
    first = g.op("ArgMax", flat, axis=2, keepdims=1)
    return [g.reshape_like(g.scatter_add(flat, first, g.reshape(dy, [0, 0, 1]), axis=2), x)]


# -- average ---------------------------------------------------------------------------------------------------------


@vjp("AveragePool", versions=(11, 19), refuse=_refuse_before_22)
@vjp("AveragePool", versions=(22,), refuse=_refuse)
def average_pool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = (sum over the window) / divisor; dx = each window's dy / divisor, added up over the windows that hold x"""
    (x,) = node.inputs
    axes = windows(node, node.attrs["kernel_shape"])
    correction = _taps_over_divisor(g, node, axes)
    if correction is not None:
        dy = g.mul(dy, correction)
    if all(_is_its_own_transpose(window) for window in axes):
        margins = [window.kernel - 1 - window.pads[0] for window in axes if window.pads]
        kernel = [window.kernel for window in axes]
        return [g.op("AveragePool", dy, kernel_shape=kernel, pads=margins * 2, count_include_pad=1)]
    return [_spread(g, dy, axes, x, 1 / prod(window.kernel for window in axes))]


def _is_its_own_transpose(window: Window) -> bool:
    """Whether the transpose is AveragePool too, with complementary pads that are symmetric.

    (Asymmetric ones come out wrong on CUDA in many versions of ONNX Runtime.)
    """
    return window.stride == window.dilation == 1 and window.pads is not None and window.pads[0] == window.pads[1]


def _spread(g: Emitter, dy: gs.Tensor, axes: Sequence[Window], x: gs.Tensor, weight: float) -> gs.Tensor:
    """The transpose of a sum over every tap of the window times a weight, channel by channel."""
    taps = g.constant(np.full([1, 1, *(window.kernel for window in axes)], weight, dy.dtype))
    channels = g.size(x, 1)
    if isinstance(channels, int):
        kernel = g.op("Expand", taps, g.ints([channels, *taps.shape[1:]]))
        return blocked.enter(g, transpose(g, dy, kernel, axes, x, group=channels), x)
    images = g.reshape(dy, [-1, 1, *(g.size(dy, axis + 2) for axis in range(len(axes)))])
    return g.reshape_like(transpose(g, images, taps, axes, x), x)


def _taps_over_divisor(g: Emitter, node: gs.Node, axes: Sequence[Window]) -> gs.Tensor | None:
    """(taps in a window) / (what the runtime divides its sum by), [1, 1, o...]; None where it is 1 everywhere.

    The divisor counts the taps on x, with count_include_pad also those on padding. In ceil_mode a window may overhang
    the padding too: versions of ONNX Runtime differ there, so the divisor is read off an image of ones.
    """
    overhangs = any(window.ceil and window.stride > 1 and _overhang(window) != 0 for window in axes)
    if node.attrs["count_include_pad"] and not overhangs:
        return None
    if not overhangs and all(window.pads == (0, 0) for window in axes):
        return None
    (x,) = node.inputs
    (y,) = node.outputs
    correction = g.like(x, 1)
    for axis, window in enumerate(axes):
        taps = g.cast(_taps_on_image(g, x, y, axis + 2, window), x.dtype)
        share = g.div(g.like(x, window.kernel), taps)
        correction = g.mul(correction, g.reshape(share, [-1] + [1] * (len(axes) - 1 - axis)))
    if not node.attrs["count_include_pad"]:
        return correction
    one = g.op("Expand", g.like(x, 1), g.join([1, 1, *(g.size(x, axis + 2) for axis in range(len(axes)))]))
    measured = g.op("AveragePool", one, **node.attrs)
    return g.mul(correction, _in_true_sizes(g, measured, y))


def _in_true_sizes(g: Emitter, pooled: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """Spelled out for ceil_mode, because ONNX's inference before opset 22 may round the sizes up too far."""
    if y.shape is None or not is_static(y.shape[2:]):
        return pooled
    return g.op("Reshape", pooled, g.ints([0, 0, *y.shape[2:]]))


def _overhang(window: Window) -> int | None:
    """How far the last window reaches beyond the padding; None where unknown."""
    return None if window.slack is None or window.pads is None else max(0, window.slack - window.pads[1])


def _taps_on_image(g: Emitter, x: gs.Tensor, y: gs.Tensor, axis: int, window: Window) -> gs.Tensor:
    """int64 [o]: for each window, how many of its taps fall on x; 1 where none does."""
    begin, _ = begin_and_end(g, x, axis, window)
    count = g.squeeze(g.as_int_vector(g.size(y, axis)), [0])
    index = g.op("Range", g.constant(np.int64(0)), count, g.constant(np.int64(1)))
    first = g.sub(g.mul(index, g.ints([window.stride])), g.as_int_vector(begin))
    before = _ceil_divide(g, g.maximum(g.neg(first), g.ints([0])), window.dilation)
    until = _ceil_divide(g, g.sub(g.as_int_vector(g.size(x, axis)), first), window.dilation)
    return g.maximum(g.sub(g.minimum(until, g.ints([window.kernel])), before), g.ints([1]))


def _ceil_divide(g: Emitter, a: gs.Tensor, divisor: int) -> gs.Tensor:
    return a if divisor == 1 else g.div(g.add(a, g.ints([divisor - 1])), g.ints([divisor]))


@vjp("GlobalAveragePool", versions=(1, 22))
def global_average_pool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dx = dy / (number of positions), everywhere"""
    (x,) = node.inputs
    sizes = None if x.shape is None else x.shape[2:]
    if sizes is not None and all(isinstance(size, int) for size in sizes):
        return [Repeated(blocked.scale(g, dy, 1 / prod(sizes)))]
    positions = g.cast(g.div(g.count(x), g.count(dy)), dy.dtype)
    return [Repeated(g.div(dy, positions))]


# -- p-norm ----------------------------------------------------------------------------------------------------------


@vjp("LpPool", versions=(11, 18, 22), refuse=_refuse)
def lp_pool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = (sum |x|^p)^(1/p) over the window; dx = sign(x) |x|^(p-1) times dy y^(1-p), added up over the windows"""
    (x,), (y,), p = node.inputs, node.outputs, node.attrs["p"]
    y = _in_true_sizes(g, y, y) if node.attrs.get("ceil_mode") else y
    share = dy if p == 1 else g.div(dy, g.pow(_nonzero(g, y), p - 1))
    total = _spread(g, share, windows(node, node.attrs["kernel_shape"]), x, 1)
    return [g.mul(_signed_power(g, x, p - 1), total)]


@vjp("GlobalLpPool", versions=(2, 22))
def global_lp_pool(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = (sum |x|^p)^(1/p); dx = dy sign(x) (|x| / y)^(p-1)"""
    (x,), (y,), p = node.inputs, node.outputs, node.attrs["p"]
    if p == 1:
        return [g.mul(dy, g.op("Sign", x))]
    return [g.mul(dy, _signed_power(g, g.div(x, _nonzero(g, y)), p - 1))]


def _signed_power(g: Emitter, x: gs.Tensor, exponent: int) -> gs.Tensor:
    """sign(x) |x|^exponent"""
    if exponent == 0:
        return g.op("Sign", x)
    if exponent == 1:
        return x
    return g.mul(x, g.pow(g.op("Abs", x), exponent - 1))


def _nonzero(g: Emitter, y: gs.Tensor) -> gs.Tensor:
    """y, and 1 where the norm is 0: there x is 0 too, and its cotangent, as torch has it."""
    return g.where(g.greater(y, g.like(y, 0)), y, g.like(y, 1))
