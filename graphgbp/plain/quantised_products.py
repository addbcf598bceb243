"""Convolutions and products of quantised matrices, ONNX's and ONNX Runtime's own."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain
from graphgbp.plain import sums
from graphgbp.plain.channels import convolution
from graphgbp.plain.quantised import centred, quantized
from graphgbp.plain.sums import Quantised


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
    left, right = Quantised(x, x_scale, x_zero_point), Quantised(w, w_scale, w_zero_point)
    y = sums.conv(g, node, left, right, bias, bool(node.attrs.get("channels_last")))
    return quantized(g, y, y_scale, y_zero_point)


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
    y = sums.matmul(g, Quantised(a, a_scale, a_zero_point), Quantised(b, b_scale, b_zero_point))
    return quantized(g, y, y_scale, y_zero_point)


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
    y = convolution(g, node, centred(g, x, x_zero_point), centred(g, w, w_zero_point), None)
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
    return g.cast(g.matmul(centred(g, a, a_zero_point, -2), centred(g, b, b_zero_point, -1)), np.int32)


@plain("QGemm", domain=MICROSOFT, surrogate=True)
def qgemm(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    a_scale: gs.Tensor,
    a_zero_point: gs.Tensor,
    b: gs.Tensor,
    b_scale: gs.Tensor,
    b_zero_point: gs.Tensor,
    c: gs.Tensor | None = None,
    y_scale: gs.Tensor | None = None,
    y_zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """Gemm; c is in units of alpha a_scale b_scale, and without y_scale the result is not quantised"""
    y = sums.gemm(g, node, Quantised(a, a_scale, a_zero_point), Quantised(b, b_scale, b_zero_point), c)
    if y_scale is None:
        return y
    zero_point = g.constant(np.zeros((), a.dtype)) if y_zero_point is None else y_zero_point
    return quantized(g, y, y_scale, zero_point)


@plain("MatMulIntegerToFloat", domain=MICROSOFT, surrogate=True)
def matmul_integer_to_float(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    b: gs.Tensor,
    a_scale: gs.Tensor,
    b_scale: gs.Tensor,
    a_zero_point: gs.Tensor | None = None,
    b_zero_point: gs.Tensor | None = None,
    bias: gs.Tensor | None = None,
) -> gs.Tensor:
    """MatMul plus bias, of dequantised matrices; b's scales are by column"""
    y = sums.matmul(g, Quantised(a, a_scale, a_zero_point), Quantised(b, b_scale, b_zero_point))
    return y if bias is None else g.add(y, bias)


@plain("DynamicQuantizeMatMul", domain=MICROSOFT, surrogate=True)
def dynamic_quantize_matmul(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    b: gs.Tensor,
    b_scale: gs.Tensor,
    b_zero_point: gs.Tensor | None = None,
    bias: gs.Tensor | None = None,
) -> gs.Tensor:
    """MatMulIntegerToFloat of a behind a quantiser that finds its own scale"""
    q, scale, zero_point = g.ops("DynamicQuantizeLinear", a, outputs=3)
    return matmul_integer_to_float(g, node, q, b, scale, b_scale, zero_point, b_zero_point, bias)


@plain("DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic_quantize_lstm(g: Emitter, node: gs.Node, *inputs: gs.Tensor | None) -> gs.Tensor:
    """Refused"""
    raise NotPlainError("it repeats a step for each element of a sequence, and no rule goes back through that")
