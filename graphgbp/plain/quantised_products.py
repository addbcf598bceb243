"""ONNX Runtime's own products of quantised matrices, and of a real matrix with weights of a few bits."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain
from graphgbp.plain.quantised import dequantized, quantized


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
    alpha, by_column = node.attrs.get("alpha", 1.0), 0 if node.attrs.get("transB") else 1
    y = g.op(
        "Gemm",
        dequantized(g, a, a_scale, a_zero_point),
        dequantized(g, b, b_scale, b_zero_point, axis=by_column),
        alpha=alpha,
        transA=node.attrs.get("transA", 0),
        transB=node.attrs.get("transB", 0),
    )
    if c is not None:
        unit = g.scale(g.mul(g.cast(a_scale, np.float32), g.cast(b_scale, np.float32)), alpha)
        y = g.add(y, g.mul(g.cast(c, np.float32), unit))
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
    y = g.matmul(dequantized(g, a, a_scale, a_zero_point, axis=-2), dequantized(g, b, b_scale, b_zero_point, axis=-1))
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


@plain("MatMulNBits", domain=MICROSOFT)
def matmul_nbits(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    b: gs.Tensor,
    scales: gs.Tensor,
    zero_points: gs.Tensor | None = None,
    g_idx: gs.Tensor | None = None,
    bias: gs.Tensor | None = None,
) -> gs.Tensor:
    """A W' + bias; W [N, K] is stored in blocks along K, each with its scale and its zero point"""
    rows, columns, size = (node.attrs[name] for name in ("N", "K", "block_size"))
    bits = node.attrs.get("bits", 4)
    if bits not in (2, 4, 8):
        raise NotPlainError(f"its weights have {bits} bits, which straddle bytes; quantise to 2, 4 or 8 bits")
    if g_idx is not None:
        raise NotPlainError("its weights are in an order of their own (g_idx); quantise without act_order")
    if node.attrs.get("weight_prepacked"):
        raise NotPlainError("its weights are packed for one GPU; save the model without prepacking")
    blocks = -(-columns // size)
    real = g.reshape(_unpacked(g, b, bits), [rows, blocks, size])
    real = g.mul(g.sub(real, _zero_points(g, zero_points, bits, rows, blocks)), g.reshape(scales, [rows, blocks, 1]))
    weight = g.reshape(real, [rows, blocks * size])
    if columns != blocks * size:
        weight = g.slice(weight, [0], [columns], [1])
    y = g.matmul(a, g.transpose(weight, [1, 0]))
    return y if bias is None else g.add(y, bias)


def _zero_points(g: Emitter, stored: gs.Tensor | None, bits: int, rows: int, blocks: int) -> gs.Tensor:
    """float32 [rows, blocks, 1] or scalar: packed like the weights, or real numbers already."""
    if stored is None:
        return g.constant(np.float32(2 ** (bits - 1)))
    if stored.dtype == np.float32:
        return g.reshape(stored, [rows, blocks, 1])
    numbers = g.reshape(_unpacked(g, stored, bits), [rows, -1])
    return g.unsqueeze(g.slice(numbers, [0], [blocks], [1]), [2])


def _unpacked(g: Emitter, packed: gs.Tensor, bits: int) -> gs.Tensor:
    """The numbers in each byte, the lowest bits first, along a new last axis; float32."""
    rest, parts = g.cast(packed, np.float32), []
    for _ in range(8 // bits - 1):
        higher = g.op("Floor", g.scale(rest, 2.0**-bits))
        parts.append(g.sub(rest, g.scale(higher, 2.0**bits)))
        rest = higher
    return g.concat([g.unsqueeze(part, [len(packed.shape)]) for part in [*parts, rest]], len(packed.shape))


@plain("DynamicQuantizeLSTM", domain=MICROSOFT)
def dynamic_quantize_lstm(g: Emitter, node: gs.Node, *inputs: gs.Tensor | None) -> gs.Tensor:
    """Refused"""
    raise NotPlainError("it repeats a step for each element of a sequence, and no rule goes back through that")
