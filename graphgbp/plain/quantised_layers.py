"""ONNX Runtime's own quantised operators: each dequantises, computes in real numbers and quantises again."""

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, attributes, plain
from graphgbp.plain.channels import channels_second
from graphgbp.plain.quantised import dequantized, quantized

_POOLING = ("auto_pad", "ceil_mode", "count_include_pad", "kernel_shape", "pads", "strides")


def _stored(g: Emitter, y: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None, like: gs.Tensor) -> gs.Tensor:
    """y quantised; without a zero point it is 0, of the type of the quantised input."""
    return quantized(g, y, scale, g.constant(np.zeros((), like.dtype)) if zero_point is None else zero_point)


def _pooled(g: Emitter, x: gs.Tensor, channels_last: bool, compute: Callable[[gs.Tensor], gs.Tensor]) -> gs.Tensor:
    if not channels_last:
        return compute(x)
    if x.shape is None:
        raise NotPlainError(f"the rank of its input '{x.name}' cannot be inferred")
    return channels_second(g, x, len(x.shape), compute)


@plain("QuantizeLinear", domain=MICROSOFT)
def quantize_linear(
    g: Emitter, node: gs.Node, x: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None
) -> gs.Tensor:
    """ONNX's own QuantizeLinear, for types that it had not at every opset"""
    _refuse_uncastable(g, zero_point)
    return quantized(g, x, scale, zero_point, axis=node.attrs.get("axis", 1))


def _refuse_uncastable(g: Emitter, q: gs.Tensor | None) -> None:
    if q is not None and g.opset < 21 and "int4" in np.dtype(q.dtype).name:
        raise NotPlainError("no Cast takes its 4 bits before opset 21; raise the model to opset 21 before quantisation")


@plain("DequantizeLinear", domain=MICROSOFT)
def dequantize_linear(
    g: Emitter, node: gs.Node, q: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None = None
) -> gs.Tensor:
    """ONNX's own DequantizeLinear, for types that it had not at every opset"""
    _refuse_uncastable(g, q)
    return g.op("DequantizeLinear", q, g.cast(scale, np.float32), zero_point, axis=node.attrs.get("axis", 1))


# -- elementwise --------------------------------------------------------------------------------------------------


@plain("QLinearAdd", domain=MICROSOFT, surrogate=True)
@plain("QLinearMul", domain=MICROSOFT, surrogate=True)
def qlinear_add(
    g: Emitter,
    node: gs.Node,
    a: gs.Tensor,
    a_scale: gs.Tensor,
    a_zero_point: gs.Tensor | None,
    b: gs.Tensor,
    b_scale: gs.Tensor,
    b_zero_point: gs.Tensor | None,
    scale: gs.Tensor,
    zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """Add, Mul"""
    real_a, real_b = dequantized(g, a, a_scale, a_zero_point), dequantized(g, b, b_scale, b_zero_point)
    y = g.add(real_a, real_b) if node.op == "QLinearAdd" else g.mul(real_a, real_b)
    return _stored(g, y, scale, zero_point, a)


@plain("QLinearSigmoid", domain=MICROSOFT, surrogate=True)
@plain("QLinearLeakyRelu", domain=MICROSOFT, surrogate=True)
def qlinear_activation(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    x_scale: gs.Tensor,
    x_zero_point: gs.Tensor | None,
    scale: gs.Tensor,
    zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """Sigmoid, LeakyRelu"""
    real = dequantized(g, x, x_scale, x_zero_point)
    if node.op == "QLinearSigmoid":
        return _stored(g, g.sigmoid(real), scale, zero_point, x)
    return _stored(g, g.op("LeakyRelu", real, alpha=node.attrs.get("alpha", 0.01)), scale, zero_point, x)


@plain("QLinearSoftmax", domain=MICROSOFT, surrogate=True)
def qlinear_softmax(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    x_scale: gs.Tensor,
    x_zero_point: gs.Tensor | None,
    scale: gs.Tensor,
    zero_point: gs.Tensor,
) -> gs.Tensor:
    """Softmax; before opset 13 over all axes from the one named"""
    real, axis = dequantized(g, x, x_scale, x_zero_point), node.attrs.get("axis", -1)
    if node.attrs["opset"] >= 13 or axis == -1:
        return quantized(g, g.op("Softmax", real, axis=axis), scale, zero_point)
    flat = g.op("Softmax", g.op("Flatten", real, axis=axis), axis=-1)
    return quantized(g, g.reshape_like(flat, real), scale, zero_point)


@plain("QLinearWhere", domain=MICROSOFT, surrogate=True)
def qlinear_where(
    g: Emitter,
    node: gs.Node,
    condition: gs.Tensor,
    x: gs.Tensor,
    x_scale: gs.Tensor,
    x_zero_point: gs.Tensor,
    y: gs.Tensor,
    y_scale: gs.Tensor,
    y_zero_point: gs.Tensor,
    scale: gs.Tensor,
    zero_point: gs.Tensor,
) -> gs.Tensor:
    """Where"""
    chosen = g.where(condition, dequantized(g, x, x_scale, x_zero_point), dequantized(g, y, y_scale, y_zero_point))
    return quantized(g, chosen, scale, zero_point)


@plain("QLinearConcat", domain=MICROSOFT, surrogate=True)
def qlinear_concat(
    g: Emitter, node: gs.Node, scale: gs.Tensor, zero_point: gs.Tensor, *parts: gs.Tensor | None
) -> gs.Tensor:
    """Concat; each part with its scale and its zero point"""
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    real = [dequantized(g, q, s, z) for q, s, z in triples if q is not None and s is not None]
    return quantized(g, g.op("Concat", *real, axis=node.attrs["axis"]), scale, zero_point)


# -- pooling ------------------------------------------------------------------------------------------------------


@plain("QLinearAveragePool", domain=MICROSOFT, surrogate=True)
@plain("QLinearGlobalAveragePool", domain=MICROSOFT, surrogate=True)
def qlinear_average_pool(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    x_scale: gs.Tensor,
    x_zero_point: gs.Tensor | None,
    scale: gs.Tensor,
    zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """AveragePool, GlobalAveragePool"""
    kind, kept = node.op.removeprefix("QLinear"), attributes(node, *_POOLING)
    real = dequantized(g, x, x_scale, x_zero_point)
    y = _pooled(g, real, bool(node.attrs.get("channels_last")), lambda x: g.op(kind, x, **kept))
    return _stored(g, y, scale, zero_point, x)


@plain("QLinearReduceMean", domain=MICROSOFT, surrogate=True)
def qlinear_reduce_mean(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    x_scale: gs.Tensor,
    x_zero_point: gs.Tensor | None,
    scale: gs.Tensor,
    zero_point: gs.Tensor | None = None,
) -> gs.Tensor:
    """ReduceMean"""
    if x.shape is None:
        raise NotPlainError(f"the rank of its input '{x.name}' cannot be inferred")
    axes = node.attrs.get("axes") or list(range(len(x.shape)))
    real = g.reduce_mean(dequantized(g, x, x_scale, x_zero_point), axes, bool(node.attrs.get("keepdims", 1)))
    return _stored(g, real, scale, zero_point, x)


@plain("NhwcMaxPool", domain=MICROSOFT)
def nhwc_max_pool(g: Emitter, node: gs.Node, x: gs.Tensor) -> gs.Tensor:
    """MaxPool between two Transposes"""
    kept = attributes(node, "auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
    return _pooled(g, x, True, lambda x: g.op("MaxPool", x, **kept))
