"""Products and averages of quantised tensors: their integers are multiplied and summed, then scaled.

A sum of integers that is 0 stays 0, and the ReLU behind it shut. Summed in real numbers it would be rounding on either
side of the kink. float32 holds such sums without rounding to 2^24.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.plain.channels import convolution
from graphgbp.plain.quantised import along, centred, in_float32


class Quantised(NamedTuple):
    """A tensor of integers with its scale and zero point: one of each, or one for each index of an axis."""

    q: gs.Tensor
    scale: gs.Tensor
    zero_point: gs.Tensor | None = None
    axis: int = 0


def conv(
    g: Emitter, node: gs.Node, x: Quantised, w: Quantised, bias: gs.Tensor | None, channels_last: bool = False
) -> gs.Tensor:
    """Conv, real; the bias is in units of both scales."""
    b = None if bias is None else g.cast(bias, np.float32)
    sums = convolution(g, node, _centred(g, x), _centred(g, w), b, channels_last)
    by_channel = [-1] if channels_last else [-1, *[1] * (len(w.q.shape) - 2)]
    return _scaled(g, sums, g.reshape(g.mul(in_float32(g, x.scale), in_float32(g, w.scale)), by_channel))


def matmul(g: Emitter, a: Quantised, b: Quantised) -> gs.Tensor:
    """MatMul, real; a's scales are by row, b's by column."""
    a, b = a._replace(axis=-2), b._replace(axis=-1)
    units = [along(g, in_float32(g, x.scale), x.q, x.axis) for x in (a, b)]
    return _scaled(g, g.matmul(_centred(g, a), _centred(g, b)), g.mul(*units))


def gemm(g: Emitter, node: gs.Node, a: Quantised, b: Quantised, bias: gs.Tensor | None) -> gs.Tensor:
    """Gemm, real; b's scales are by column, the bias is in units of alpha and both scales."""
    turned = {name: node.attrs.get(name, 0) for name in ("transA", "transB")}
    b = b._replace(axis=0 if turned["transB"] else 1)
    c = None if bias is None else g.cast(bias, np.float32)
    sums = g.op("Gemm", _centred(g, a), _centred(g, b), c, **turned)
    unit = g.mul(in_float32(g, a.scale), in_float32(g, b.scale))
    return _scaled(g, sums, g.scale(unit, node.attrs.get("alpha", 1.0)))


def _centred(g: Emitter, x: Quantised) -> gs.Tensor:
    return centred(g, x.q, x.zero_point, x.axis)


def _scaled(g: Emitter, sums: gs.Tensor, unit: gs.Tensor) -> gs.Tensor:
    return g.div(sums, g.div(g.constant(np.float32(1)), unit))  # a Mul would be fused into the weights


# -- between DequantizeLinear and QuantizeLinear ------------------------------------------------------------------

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean")


def product(g: Emitter, node: gs.Node, dequantisers: Mapping[str, gs.Node]) -> gs.Tensor | None:
    """What a Conv, Gemm or MatMul of dequantised tensors gives; None of another node, and where a scale bars it.

    `dequantisers` are the nodes that made them, by what they make.
    """
    makers = [dequantisers.get(x.name) for x in node.inputs if not x.is_empty()]
    if node.op not in _PRODUCTS or node.domain not in (None, "", "ai.onnx"):
        return None
    read = [_quantised(maker) for maker in makers if maker is not None]
    if len(read) < len(makers) or not all(map(_is_plain, read)):
        return None
    a, b, *bias = read
    if not _fits(node, a, b) or (bias and not _counts_in_both(node, a, b, *bias)):
        return None
    c = bias[0].q if bias else None
    if node.op == "MatMul":
        return matmul(g, a, b)
    return conv(g, node, a, b, c) if node.op == "Conv" else gemm(g, node, a, b, c)


def average(g: Emitter, node: gs.Node, dequantisers: Mapping[str, gs.Node]) -> gs.Tensor | None:
    """What a pooling or a mean of a dequantised tensor gives, as `product`."""
    maker = dequantisers.get(node.inputs[0].name) if node.op in _AVERAGES else None
    x = None if maker is None else _quantised(maker)
    if x is None or not _is_plain(x) or x.scale.values.size > 1:
        return None
    sums = g.op(node.op, _centred(g, x), *node.inputs[1:], **node.attrs)
    return _scaled(g, sums, g.reshape(in_float32(g, x.scale), []))


def _quantised(maker: gs.Node) -> Quantised:
    q, scale, zero_point = (*maker.inputs, None)[:3]
    zero_point = None if zero_point is None or zero_point.is_empty() else zero_point
    return Quantised(q, scale, zero_point, -1 if maker.attrs.get("block_size") else maker.attrs.get("axis", 1))


def _is_plain(x: Quantised) -> bool:
    """Whether type, rank and scale are known, and the scale is one number or a row."""
    if not isinstance(x.scale, gs.Constant) or x.q.shape is None or x.q.dtype is None or isinstance(x.q.dtype, int):
        return False
    return x.scale.values.size == 1 or len(x.scale.shape) == 1


def _fits(node: gs.Node, a: Quantised, b: Quantised) -> bool:
    """Whether the scales do not vary along what is summed."""
    if a.scale.values.size > 1:
        return False
    summed_to = {"Conv": 0, "MatMul": -1, "Gemm": 0 if node.attrs.get("transB") else 1}[node.op]
    rank = len(b.q.shape)
    return b.scale.values.size == 1 or (rank > 1 and b.axis % rank == summed_to % rank)


def _counts_in_both(node: gs.Node, a: Quantised, b: Quantised, bias: Quantised) -> bool:
    """Whether a bias is in integers that add to the sums."""
    if bias.zero_point is not None and not (
        isinstance(bias.zero_point, gs.Constant) and not bias.zero_point.values.any()
    ):
        return False
    if node.attrs.get("alpha", 1.0) != 1 or node.attrs.get("beta", 1.0) != 1:
        return False
    unit = a.scale.values.astype(np.float32).reshape(-1) * b.scale.values.astype(np.float32).reshape(-1)
    return bool(np.allclose(bias.scale.values.astype(np.float32).reshape(-1), unit, rtol=1e-6, atol=0))
