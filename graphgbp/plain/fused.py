"""Layers that ONNX Runtime fused with their activation, bias, residual, scale or transposition."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, attributes, plain
from graphgbp.plain.channels import convolution

# -- activations ---------------------------------------------------------------------------------------------------

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "HardSwish": (),
    "Silu": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
    "Elu": ("alpha",),
    "Celu": ("alpha",),
    "Selu": ("alpha", "gamma"),
    "Softplus": (),
    "Softsign": (),
    "ThresholdedRelu": ("alpha",),
    "ScaledTanh": ("alpha", "beta"),
    "ParametricSoftplus": ("alpha", "beta"),
}
"""The activations that a fused node may name, and what they take, in the order of `activation_params`."""


def activation(g: Emitter, x: gs.Tensor, name: str | None, given: Mapping[str, Any]) -> gs.Tensor:
    """The activation that a fused node names, with the parameters it gives."""
    if not name:
        return x
    if name not in _PARAMETERS:
        raise NotPlainError(f"its activation '{name}' is not known; save the model again without that fusion")
    written = _WRITTEN.get(name)
    return written(g, x, **given) if written else g.op(name, x, **given)


def clip(g: Emitter, x: gs.Tensor, min: float, max: float) -> gs.Tensor:
    """min(max(x, low), high); the largest float32 stands for no bound"""
    bounds = [None if abs(b) >= np.finfo(np.float32).max else g.like(x, b) for b in (min, max)]
    return g.op("Clip", x, *bounds)


def silu(g: Emitter, x: gs.Tensor, alpha: float = 1.0) -> gs.Tensor:
    """x sigmoid(alpha x)"""
    return g.mul(x, g.sigmoid(g.scale(x, alpha)))


_WRITTEN: dict[str, Callable[..., gs.Tensor]] = {
    "Clip": clip,
    "Silu": silu,
    "ScaledTanh": lambda g, x, alpha, beta: g.scale(g.op("Tanh", g.scale(x, beta)), alpha),
    "ParametricSoftplus": lambda g, x, alpha, beta: g.scale(g.op("Softplus", g.scale(x, beta)), alpha),
}


def _in_order(node: gs.Node) -> dict[str, Any]:
    """The parameters of a fused convolution's activation."""
    names, values = _PARAMETERS.get(node.attrs.get("activation") or "", ()), node.attrs.get("activation_params") or []
    if len(values) < len(names):
        raise NotPlainError(f"it gives {len(values)} of its activation's parameters ({', '.join(names)})")
    return dict(zip(names, values, strict=False))


def _by_name(node: gs.Node) -> dict[str, Any]:
    """The parameters of a fused product's activation."""
    names = _PARAMETERS.get(node.attrs.get("activation") or "", ())
    found = attributes(node, *(f"activation_{name}" for name in names))
    return {name.removeprefix("activation_"): value for name, value in found.items()}


# -- convolutions --------------------------------------------------------------------------------------------------


def _fused_conv(g: Emitter, node: gs.Node, y: gs.Tensor, z: gs.Tensor | None) -> gs.Tensor:
    y = y if z is None else g.add(y, z)
    return activation(g, y, node.attrs.get("activation"), _in_order(node))


@plain("FusedConv", domain=MICROSOFT)
def fused_conv(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    w: gs.Tensor,
    b: gs.Tensor | None = None,
    z: gs.Tensor | None = None,
) -> gs.Tensor:
    """activation(Conv(x, w, b) + z)"""
    return _fused_conv(g, node, convolution(g, node, x, w, b), z)


@plain("NhwcFusedConv", domain=MICROSOFT)
def nhwc_fused_conv(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    w: gs.Tensor,
    b: gs.Tensor | None = None,
    z: gs.Tensor | None = None,
) -> gs.Tensor:
    """activation(Conv(x, w, b) + z), the channels of x, y and z last, w as in Conv"""
    return _fused_conv(g, node, convolution(g, node, x, w, b, channels_last=True), z)


@plain("NhwcConv", domain=MICROSOFT)
def nhwc_conv(g: Emitter, node: gs.Node, x: gs.Tensor, w: gs.Tensor, b: gs.Tensor | None = None) -> gs.Tensor:
    """Conv(x, w, b), the channels of x, y and w last"""
    if w.shape is None:
        raise NotPlainError(f"the rank of its kernel '{w.name}' cannot be inferred")
    rank = len(w.shape)
    return convolution(g, node, x, g.transpose(w, [0, rank - 1, *range(1, rank - 1)]), b, channels_last=True)


@plain("ConvTransposeWithDynamicPads", domain=MICROSOFT)
def conv_transpose_with_dynamic_pads(
    g: Emitter, node: gs.Node, x: gs.Tensor, w: gs.Tensor, pads: gs.Tensor | None = None, b: gs.Tensor | None = None
) -> gs.Tensor:
    """ConvTranspose, where its pads are known before running"""
    if pads is not None and not isinstance(pads, gs.Constant):
        raise NotPlainError("its pads are known only at run time; export the model with fixed pads")
    kept = attributes(node, "auto_pad", "dilations", "group", "kernel_shape", "output_padding", "strides")
    known = None if pads is None else [int(pad) for pad in pads.values]
    return g.op("ConvTranspose", x, w, b, pads=known, **kept)


# -- products ------------------------------------------------------------------------------------------------------


@plain("FusedGemm", domain=MICROSOFT)
def fused_gemm(g: Emitter, node: gs.Node, a: gs.Tensor, b: gs.Tensor, c: gs.Tensor | None = None) -> gs.Tensor:
    """activation(alpha a b + beta c), each of a and b transposed where its attribute says so"""
    kept = attributes(node, "alpha", "beta", "transA", "transB")
    return activation(g, g.op("Gemm", a, b, c, **kept), node.attrs.get("activation"), _by_name(node))


@plain("FusedMatMul", domain=MICROSOFT)
@plain("TransposeMatMul", domain=MICROSOFT)
def fused_matmul(g: Emitter, node: gs.Node, a: gs.Tensor, b: gs.Tensor) -> gs.Tensor:
    """alpha a b, each of a and b transposed as its attributes say"""
    factors = [_turned(g, node, x, side) for x, side in ((a, "A"), (b, "B"))]
    return g.scale(g.matmul(*factors), node.attrs.get("alpha", 1.0))


@plain("FusedMatMulActivation", domain=MICROSOFT)
def fused_matmul_activation(g: Emitter, node: gs.Node, a: gs.Tensor, b: gs.Tensor) -> gs.Tensor:
    """activation(alpha a b)"""
    return activation(g, fused_matmul(g, node, a, b), node.attrs.get("activation"), _by_name(node))


def _turned(g: Emitter, node: gs.Node, x: gs.Tensor, side: str) -> gs.Tensor:
    """A factor with its first axis moved behind the batch's others, then its last two exchanged, where asked."""
    first, last = (bool(node.attrs.get(f"{name}{side}")) for name in ("transBatch", "trans"))
    if not (first or last):
        return x
    if x.shape is None:
        raise NotPlainError(f"it transposes '{x.name}', whose rank cannot be inferred")
    order: Sequence[int] = range(len(x.shape))
    if len(order) < 2:
        return x
    order = [*order[1:-1], order[0], order[-1]] if first else list(order)
    return g.transpose(x, [*order[:-2], order[-1], order[-2]] if last else order)


# -- biases --------------------------------------------------------------------------------------------------------


@plain("BiasAdd", domain=MICROSOFT)
def bias_add(g: Emitter, node: gs.Node, x: gs.Tensor, bias: gs.Tensor, skip: gs.Tensor) -> gs.Tensor:
    """x + bias + skip"""
    return g.add(g.add(x, bias), skip)


@plain("BiasSoftmax", domain=MICROSOFT)
def bias_softmax(g: Emitter, node: gs.Node, x: gs.Tensor, bias: gs.Tensor) -> gs.Tensor:
    """softmax(x + bias) over the elements of all axes from `axis` on"""
    y = g.add(x, bias)
    if y.shape is None:
        raise NotPlainError("the rank of its input cannot be inferred")
    rank, axis = len(y.shape), node.attrs.get("axis", 1) % len(y.shape)
    if axis == rank - 1:
        return g.op("Softmax", y, axis=-1)
    flat = g.op("Softmax", g.reshape(y, [*[0] * axis, -1]), axis=-1)
    return g.reshape_like(flat, y)


@plain("BiasDropout", domain=MICROSOFT)
def bias_dropout(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    bias: gs.Tensor,
    residual: gs.Tensor | None = None,
    ratio: gs.Tensor | None = None,
    training: gs.Tensor | None = None,
) -> gs.Tensor:
    """x + bias + residual: Dropout outside of training"""
    if training is not None and not (isinstance(training, gs.Constant) and not training.values.any()):
        raise NotPlainError("it may drop values at random (training_mode); export the model for inference")
    y = g.add(x, bias)
    return y if residual is None else g.add(y, residual)
