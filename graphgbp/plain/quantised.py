"""Quantised nodes as Dequantize -> the float node -> Quantize, and a ReLU that a quantiser swallowed as a ReLU.

A quantised tensor q stands for the real number (q - z) s; its cotangent is taken by q itself, as if q were real.
"""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, attributes, plain
from graphgbp.plain.signs import is_models_own, may_be_followed_by_relu, may_be_negative

QUANTISERS = (
    "QuantizeLinear", "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearLeakyRelu", "QGemm",
)  # fmt: skip
"""The nodes that may have swallowed a ReLU."""

_SWALLOWED_RELU6 = 1e-3  # how near to 6 a quantiser ends whose range was a ReLU6's
_CONVOLUTION = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def dequantized(
    g: Emitter, q: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None, axis: int = 0
) -> gs.Tensor:
    """(q - z) s, float32, in plain nodes: no DequantizeLinear that the runtime would merge with the model's own."""
    real = g.cast(q, np.float32)
    if zero_point is not None and not (isinstance(zero_point, gs.Constant) and not np.any(zero_point.values)):
        real = g.sub(real, _along(g, in_float32(g, zero_point), q, axis))
    return g.mul(real, _along(g, in_float32(g, scale), q, axis))


def in_float32(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """x cast; one number that is known stays known."""
    is_number = isinstance(x, gs.Constant) and x.values.size == 1
    return g.constant(x.values, np.float32) if is_number else g.cast(x, np.float32)


def _along(g: Emitter, values: gs.Tensor, q: gs.Tensor, axis: int) -> gs.Tensor:
    """One number for the whole tensor, or one for each index of an axis, broadcast against q."""
    if values.shape is not None and (len(values.shape) == 0 or tuple(values.shape) == (1,)):
        return g.reshape(values, [])
    if values.shape is None or q.shape is None or len(values.shape) == len(q.shape):
        return values
    sizes = [1] * len(q.shape)
    sizes[axis] = -1
    return g.reshape(values, sizes)


def quantized_in_plain_nodes(g: Emitter, x: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor, axis: int) -> gs.Tensor:
    """clip(round(x / s) + z), in the zero point's type."""
    kind = np.iinfo(zero_point.dtype)
    rounded = g.op("Round", g.div(g.cast(x, np.float32), _along(g, g.cast(scale, np.float32), x, axis)))
    shifted = g.add(rounded, _along(g, g.cast(zero_point, np.float32), x, axis))
    clipped = g.op("Clip", shifted, g.constant(np.float32(kind.min)), g.constant(np.float32(kind.max)))
    return g.cast(clipped, zero_point.dtype)


def quantized(g: Emitter, y: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor, axis: int = 1) -> gs.Tensor:
    """y as the quantiser stores it, behind the ReLU that it swallowed, if it did."""
    return g.op(
        "QuantizeLinear", _behind_swallowed(g, y, scale, zero_point) or y, in_float32(g, scale), zero_point, axis=axis
    )


def _behind_swallowed(g: Emitter, x: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None) -> gs.Tensor | None:
    """Relu(x), or Clip(x, 0, 6) where the quantiser ends at 6; None where it swallowed neither.

    A quantiser whose zero point is the least of its type makes every x < 0 zero. That is a ReLU, unless x is never
    negative, comes from where no ReLU follows, or is the model's own input, whose pixels have their least value there.
    """
    if not (isinstance(zero_point, gs.Constant) and isinstance(scale, gs.Constant)) or zero_point.values.size != 1:
        return None
    kind = zero_point.values.dtype
    if kind.kind not in "iu" or int(zero_point.values.reshape(())) != np.iinfo(kind).min:
        return None
    if not may_be_negative(x) or not may_be_followed_by_relu(x) or is_models_own(x):
        return None
    end = float(scale.values.reshape(())) * (int(np.iinfo(kind).max) - int(np.iinfo(kind).min))
    if abs(end - 6) > 6 * _SWALLOWED_RELU6:
        return g.relu(x)
    return g.op("Clip", x, g.like(x, 0), g.like(x, 6))


@plain("QuantizeLinear", (13, 19, 21, 23, 24, 25))
def quantize_linear(
    g: Emitter, node: gs.Node, x: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None
) -> gs.Tensor | None:
    """A ReLU and the quantiser that swallowed it"""
    behind = _behind_swallowed(g, x, scale, zero_point)
    kept = attributes(node, "axis", "block_size", "saturate", "output_dtype", "precision")
    return None if behind is None else g.op("QuantizeLinear", behind, in_float32(g, scale), zero_point, **kept)


@plain("DynamicQuantizeLinear", (11,), keeps=True, surrogate=True)
def dynamic_quantize_linear(g: Emitter, node: gs.Node, x: gs.Tensor) -> gs.Tensor | None:
    """A quantiser with the scale and the zero point that the node finds in x"""
    q, scale, zero_point = node.outputs
    if not q.outputs and not any(q is output for output in g.graph.outputs):
        return None
    scale.dtype, zero_point.dtype = np.dtype(np.float32), np.dtype(np.uint8)
    scale.shape = zero_point.shape = ()
    return g.op("QuantizeLinear", x, scale, zero_point)


# -- convolution and products -------------------------------------------------------------------------------------


@plain("QLinearConv", (10,), surrogate=True)
@plain("QLinearConv", domain=MICROSOFT, surrogate=True)
def qlinear_conv(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    x_scale: gs.Tensor,
    x_zero_point: gs.Tensor,
    w: gs.Tensor,
    w_scale: gs.Tensor,
    w_zero_point: gs.Tensor,
    y_scale: gs.Tensor,
    y_zero_point: gs.Tensor,
    bias: gs.Tensor | None = None,
) -> gs.Tensor:
    """Conv; the bias is in units of x_scale w_scale"""
    channels_last, unit = bool(node.attrs.get("channels_last")), g.mul(in_float32(g, x_scale), in_float32(g, w_scale))
    b = None if bias is None else g.cast(bias, np.float32)
    # of integers: a sum that is 0 stays 0, and the ReLU behind it shut
    sums = convolution(g, node, _centred(g, x, x_zero_point), _centred(g, w, w_zero_point), b, channels_last)
    by_channel = [-1] if channels_last else [-1, *[1] * (len(w.shape) - 2)]
    per_unit = g.div(g.constant(np.float32(1)), g.reshape(unit, by_channel))  # a Mul would be fused into the weights
    return quantized(g, g.div(sums, per_unit), y_scale, y_zero_point)


def convolution(
    g: Emitter, node: gs.Node, x: gs.Tensor, w: gs.Tensor, b: gs.Tensor | None, channels_last: bool = False
) -> gs.Tensor:
    """Conv with the node's attributes, between two Transposes where the channels come last."""
    kept = attributes(node, *_CONVOLUTION)
    if not channels_last:
        return g.op("Conv", x, w, b, **kept)
    return channels_second(g, x, len(w.shape), lambda x: g.op("Conv", x, w, b, **kept))


def channels_second(g: Emitter, x: gs.Tensor, rank: int, compute: Callable[[gs.Tensor], gs.Tensor]) -> gs.Tensor:
    """What `compute` gives of x, both with their channels last."""
    y = compute(g.transpose(x, [0, rank - 1, *range(1, rank - 1)]))
    return g.transpose(y, [0, *range(2, rank), 1])


@plain("QLinearMatMul", (10, 21), surrogate=True)
def qlinear_matmul(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    a_scale: gs.Tensor,
    a_zero_point: gs.Tensor,
    b: gs.Tensor,
    b_scale: gs.Tensor,
    b_zero_point: gs.Tensor,
    y_scale: gs.Tensor,
    y_zero_point: gs.Tensor,
) -> gs.Tensor:
    """MatMul; a's scales are by row, b's by column"""
    product = g.matmul(
        dequantized(g, a, a_scale, a_zero_point, axis=-2), dequantized(g, b, b_scale, b_zero_point, axis=-1)
    )
    return quantized(g, product, y_scale, y_zero_point)


@plain("ConvInteger", (10,), surrogate=True)
def conv_integer(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    w: gs.Tensor,
    x_zero_point: gs.Tensor | None = None,
    w_zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """Conv of x - z_x and w - z_w, in integers"""
    y = convolution(g, node, _centred(g, x, x_zero_point), _centred(g, w, w_zero_point), None)
    return g.cast(y, np.int32)


@plain("MatMulInteger", (10,), surrogate=True)
def matmul_integer(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    b: gs.Tensor,
    a_zero_point: gs.Tensor | None = None,
    b_zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """MatMul of a - z_a and b - z_b, in integers"""
    return g.cast(g.matmul(_centred(g, a, a_zero_point, -2), _centred(g, b, b_zero_point, -1)), np.int32)


def _centred(g: Emitter, q: gs.Tensor, zero_point: gs.Tensor | None, axis: int = 0) -> gs.Tensor:
    return dequantized(g, q, g.constant(np.float32(1)), zero_point, axis)
