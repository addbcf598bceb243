"""ONNX Runtime's own products of a real matrix with weights of a few bits: only constants are quantised."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain


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


@plain("GatherBlockQuantized", domain=MICROSOFT)
def gather_block_quantized(g: Emitter, node: gs.Node, *inputs: gs.Tensor | None) -> gs.Tensor:
    """Refused"""
    raise NotPlainError(
        "it looks rows up in a table of few bits, as networks for text do; explain from the tensor that it gives, or "
        "quantise without the operator Gather"
    )
