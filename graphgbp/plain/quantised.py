"""Quantised nodes as Dequantize -> the float node -> Quantize, and a ReLU that a quantiser swallowed as a ReLU.

A quantised tensor q stands for the real number (q - z) s; its cotangent is taken by q itself, as if q were real.
"""

from weakref import WeakKeyDictionary

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx.helper import tensor_dtype_to_np_dtype

from graphgbp.emit import Emitter
from graphgbp.forms import attributes, plain
from graphgbp.patterns import near, source
from graphgbp.plain.intervals import Intervals
from graphgbp.plain.signs import is_activated, is_models_own

QUANTISERS = (
    "QuantizeLinear", "QLinearConv", "QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearWhere",
    "QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearReduceMean", "QLinearLeakyRelu", "QGemm",
)  # fmt: skip
"""The nodes that may have swallowed a ReLU."""

_SWALLOWED_RELU6 = 1e-3  # how near to 6 a quantiser ends whose range was a ReLU6's
_INTERVALS: WeakKeyDictionary[Emitter, Intervals] = WeakKeyDictionary()


def dequantized(
    g: Emitter, q: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None, axis: int = 0
) -> gs.Tensor:
    """(q - z) s, float32, in plain nodes: no DequantizeLinear that the runtime would merge with the model's own."""
    real = g.cast(q, np.float32)
    if zero_point is not None and not (isinstance(zero_point, gs.Constant) and not np.any(zero_point.values)):
        real = g.sub(real, along(g, in_float32(g, zero_point), q, axis))
    return g.mul(real, along(g, in_float32(g, scale), q, axis))


def centred(g: Emitter, q: gs.Tensor, zero_point: gs.Tensor | None, axis: int = 0) -> gs.Tensor:
    """q - z, float32."""
    return dequantized(g, q, g.constant(np.float32(1)), zero_point, axis)


def in_float32(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """x cast; one number that is known stays known."""
    is_number = isinstance(x, gs.Constant) and x.values.size == 1
    return g.constant(x.values, np.float32) if is_number else g.cast(x, np.float32)


def along(g: Emitter, values: gs.Tensor, q: gs.Tensor, axis: int) -> gs.Tensor:
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
    rounded = g.op("Round", g.div(g.cast(x, np.float32), along(g, g.cast(scale, np.float32), x, axis)))
    shifted = g.add(rounded, along(g, g.cast(zero_point, np.float32), x, axis))
    clipped = g.op("Clip", shifted, g.constant(np.float32(kind.min)), g.constant(np.float32(kind.max)))
    return g.cast(clipped, zero_point.dtype)


def quantized(g: Emitter, y: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor, axis: int = 1) -> gs.Tensor:
    """y as the quantiser stores it, behind the ReLU that it swallowed, if it did."""
    return g.op(
        "QuantizeLinear", _behind_swallowed(g, y, scale, zero_point) or y, in_float32(g, scale), zero_point, axis=axis
    )


def _behind_swallowed(g: Emitter, x: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor) -> gs.Tensor | None:
    """Relu(x), or Clip(x, 0, 6) where the quantiser ends at 6; None where it swallowed neither.

    A quantiser whose zero point is the least of its type makes every x < 0 zero. That is a ReLU, unless x is never so
    far below 0 that it is not rounded to 0 anyway, comes from a smooth activation, or is the model's own input, whose
    pixels have their least value there.
    """
    scale = source(scale)
    if not (isinstance(zero_point, gs.Constant) and isinstance(scale, gs.Constant)):
        return None
    kind = zero_point.values.dtype
    if kind.kind not in "iu" or (zero_point.values != np.iinfo(kind).min).any():
        return None
    steps, intervals = scale.values.astype(np.float64), _INTERVALS.setdefault(g, Intervals())
    if intervals.of(x).low >= -steps.min() / 2 or is_activated(x) or is_models_own(x):
        return None
    ends = steps * (int(np.iinfo(kind).max) - int(np.iinfo(kind).min))
    if (abs(ends - 6) > 6 * _SWALLOWED_RELU6).any():
        return g.relu(x)
    return None if _is_gate(x, intervals) else g.op("Clip", x, g.like(x, 0), g.like(x, 6))


def _is_gate(x: gs.Tensor, intervals: Intervals) -> bool:
    """Whether x is y + 3: cut off at 0 and 6 that is the gate of a HardSwish, and the quantiser alone cuts it off."""
    node = x.inputs[0] if x.inputs else None
    terms = [intervals.of(term) for term in node.inputs] if node is not None and node.op == "Add" else []
    return any(near(term.low, 3) and near(term.high, 3) for term in terms)


@plain("QuantizeLinear", (13, 19, 21, 23, 24, 25))
def quantize_linear(
    g: Emitter, node: gs.Node, x: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None
) -> gs.Tensor | None:
    """A ReLU and the quantiser that swallowed it"""
    kept = attributes(node, "axis", "block_size", "saturate", "output_dtype", "precision")
    kind = tensor_dtype_to_np_dtype(kept.get("output_dtype") or TensorProto.UINT8)
    behind = _behind_swallowed(g, x, scale, g.constant(0, kind) if zero_point is None else zero_point)
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
