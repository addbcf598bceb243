"""Quantisers. Rounding has derivative zero, so the gradient goes straight through it (Bengio et al. 2013, arXiv
1308.3432), and is zero where the value saturates.

The cotangent of a quantised tensor q is dS/dq of q taken as a real number.
"""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.emit import Emitter
from graphgbp.registry import nondifferentiable, vjp

_VERSIONS = (13, 19, 21, 23, 24, 25)


def _quantised_type(node: gs.Node) -> np.dtype[Any]:
    """The type that a QuantizeLinear gives: its zero point's, else the attribute's, else uint8."""
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        return np.dtype(node.inputs[2].dtype)
    named = node.attrs.get("output_dtype") or onnx.TensorProto.UINT8
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(named))


def _uncovered(node: gs.Node) -> str | None:
    if node.attrs.get("block_size"):
        return "its scales are by block, and no rule gives that gradient; quantise by tensor or by axis"
    if node.op == "QuantizeLinear" and "float" in _quantised_type(node).name:
        return "it quantises to a float of 8 bits or less, whose surrogate nobody wrote; quantise to integers"
    if node.inputs[0].shape is None and not _is_one_number(node.inputs[1]):
        return f"the rank of its input '{node.inputs[0].name}' cannot be inferred"
    return None


def _is_one_number(scale: gs.Tensor) -> bool:
    return scale.shape is not None and tuple(scale.shape) in ((), (1,))


def _along(g: Emitter, node: gs.Node, values: gs.Tensor) -> gs.Tensor:
    """Scales or zero points, float32, broadcast against the node's first input."""
    values = g.cast(values, np.float32)
    if _is_one_number(values):
        return g.reshape(values, [])
    sizes = [1] * len(node.inputs[0].shape)
    sizes[node.attrs["axis"]] = -1
    return g.reshape(values, sizes)


@vjp("QuantizeLinear", versions=_VERSIONS, refuse=_uncovered, surrogate=True)
def quantize_linear(g: Emitter, node: gs.Node, dq: gs.Tensor) -> list[gs.Tensor]:
    """q = clip(round(x / s) + z): dx = dq / s where round(x / s) + z fits into q's type, else 0"""
    x, scale = node.inputs[0], _along(g, node, node.inputs[1])
    rounded = g.op("Round", g.div(g.cast(x, np.float32), scale))
    if len(node.inputs) > 2 and not node.inputs[2].is_empty():
        rounded = g.add(rounded, _along(g, node, node.inputs[2]))
    kind = _quantised_type(node)
    limits = np.iinfo(kind) if kind.kind in "iu" else ml_dtypes.iinfo(kind)
    fits = g.op(
        "And",
        g.op("GreaterOrEqual", rounded, g.like(rounded, int(limits.min))),
        g.op("LessOrEqual", rounded, g.like(rounded, int(limits.max))),
    )
    return [g.cast(masks.keep(g, g.div(dq, scale), fits), x.dtype)]


@vjp("DequantizeLinear", versions=_VERSIONS, refuse=_uncovered)
def dequantize_linear(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = (q - z) s: dq = dy s"""
    return [g.mul(g.cast(dy, np.float32), _along(g, node, node.inputs[1]))]


# Its first output is seen as a QuantizeLinear's; the scale and the zero point that it finds count as given.
nondifferentiable("DynamicQuantizeLinear", (11,))
