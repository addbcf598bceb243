"""The kinds of GELU among ONNX Runtime's own operators."""

import math

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain
from graphgbp.plain.fused import silu

_GELU_SINCE = 20  # the opset from which ONNX has the operator


def gelu_of(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """x Phi(x), Phi the normal distribution"""
    if g.opset >= _GELU_SINCE:
        return g.op("Gelu", x)
    gate = g.add(g.op("Erf", g.scale(x, math.sqrt(0.5))), g.like(x, 1))
    return g.mul(g.scale(x, 0.5), gate)


def fast_gelu_of(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2"""
    if g.opset >= _GELU_SINCE:
        return g.op("Gelu", x, approximate="tanh")
    inner = g.scale(g.add(x, g.scale(g.mul(g.mul(x, x), x), 0.044715)), math.sqrt(2 / math.pi))
    return g.mul(g.scale(x, 0.5), g.add(g.op("Tanh", inner), g.like(x, 1)))


@plain("Gelu", domain=MICROSOFT)
def gelu(g: Emitter, node: gs.Node, x: gs.Tensor) -> gs.Tensor:
    """GELU by the error function"""
    return gelu_of(g, x)


@plain("BiasGelu", domain=MICROSOFT)
def bias_gelu(g: Emitter, node: gs.Node, x: gs.Tensor, bias: gs.Tensor) -> gs.Tensor:
    """GELU of x + bias"""
    return gelu_of(g, g.add(x, bias))


@plain("FastGelu", domain=MICROSOFT)
def fast_gelu(g: Emitter, node: gs.Node, x: gs.Tensor, bias: gs.Tensor | None = None) -> gs.Tensor:
    """GELU of x + bias by a hyperbolic tangent"""
    return fast_gelu_of(g, x if bias is None else g.add(x, bias))


@plain("QuickGelu", domain=MICROSOFT)
def quick_gelu(g: Emitter, node: gs.Node, x: gs.Tensor) -> gs.Tensor:
    """x sigmoid(alpha x); SiLU where alpha is 1"""
    return silu(g, x, node.attrs.get("alpha", 1.702))


@plain("BiasSplitGelu", domain=MICROSOFT)
def bias_split_gelu(g: Emitter, node: gs.Node, x: gs.Tensor, bias: gs.Tensor) -> gs.Tensor:
    """The first half of x + bias times GELU of the second, halves of the last axis"""
    size = x.shape[-1] if x.shape else None
    if not isinstance(size, int):
        raise NotPlainError("the size of its input's last axis is not known before running")
    linear, gate = g.ops("Split", g.add(x, bias), g.ints([size // 2, size - size // 2]), outputs=2, axis=-1)
    return g.mul(linear, gelu_of(g, gate))
