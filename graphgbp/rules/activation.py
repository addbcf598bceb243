"""Activations: functions of one tensor, element by element, that networks put behind their layers."""

from math import pi, sqrt

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import blocked, masks
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp


@vjp("Relu", versions=(14,))
def relu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy 1(y > 0): the mask is read from y, so that the runtime may still fuse x away."""
    return [masks.where_positive(g, dy, node.outputs[0])]


@vjp("Sigmoid", versions=(13,))
def sigmoid(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy y (1 - y)"""
    (y,) = node.outputs
    return [g.mul(dy, g.mul(y, blocked.one_minus(g, y)))]


@vjp("Tanh", versions=(13,))
def tanh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy (1 - y^2)"""
    (y,) = node.outputs
    return [g.mul(dy, blocked.one_minus(g, g.mul(y, y)))]


@vjp("Softplus", versions=(1, 22))
def softplus(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = log(1 + exp(x)); dx = dy sigmoid(x)"""
    (x,) = node.inputs
    return [g.mul(dy, g.sigmoid(x))]


@vjp("Elu", versions=(6, 22))
def elu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = alpha (exp(x) - 1) where x <= 0; dx = dy where x > 0, else dy (y + alpha)"""
    (x,), (y,) = node.inputs, node.outputs
    slope = g.add(y, g.like(y, node.attrs["alpha"]))
    return [g.where(g.greater(x, g.like(x, 0)), dy, g.mul(dy, slope))]


@vjp("Selu", versions=(6, 22))
def selu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = gamma x where x > 0, else gamma alpha (exp(x) - 1); dx = dy gamma where x > 0, else dy (y + gamma alpha)"""
    (x,), (y,) = node.inputs, node.outputs
    alpha, gamma = node.attrs["alpha"], node.attrs["gamma"]
    slope = g.add(y, g.like(y, gamma * alpha))
    return [g.where(g.greater(x, g.like(x, 0)), g.scale(dy, gamma), g.mul(dy, slope))]


@vjp("Celu", versions=(12,))
def celu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = alpha (exp(x / alpha) - 1) where x <= 0; dx = dy where x > 0, else dy (y / alpha + 1)"""
    (x,), (y,) = node.inputs, node.outputs
    slope = g.add(g.scale(y, 1 / node.attrs["alpha"]), g.like(y, 1))
    return [g.where(g.greater(x, g.like(x, 0)), dy, g.mul(dy, slope))]


@vjp("Clip", versions=(13,))
def clip(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy inside the bounds; at a bound dy, but 0 where the lower bound is 0: that is ReLU or ReLU6."""
    x, low, high = (*node.inputs, gs.Variable.empty(), gs.Variable.empty())[:3]
    if isinstance(low, gs.Constant) and not low.values.any():
        return [_relu6(g, dy, node.outputs[0], high)]
    if not low.is_empty():
        dy = masks.keep(g, dy, g.op("GreaterOrEqual", x, low))
    if not high.is_empty():
        dy = masks.keep(g, dy, g.op("LessOrEqual", x, high))
    return [dy]


def _relu6(g: Emitter, dy: gs.Tensor, y: gs.Tensor, high: gs.Tensor) -> gs.Tensor:
    dy = masks.where_positive(g, dy, y)
    if high.is_empty():
        return dy
    if isinstance(high, gs.Constant) and high.values.reshape(()) > 0:
        return masks.where_below(g, dy, y, float(high.values.reshape(())))
    return masks.keep(g, dy, g.less(y, high))


@vjp("LeakyRelu", versions=(16,))
def leaky_relu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy where x > 0, else alpha dy"""
    (x,) = node.inputs
    return [g.where(g.greater(x, g.like(x, 0)), dy, g.scale(dy, node.attrs["alpha"]))]


@vjp("PRelu", versions=(16,), wrt=(0, 1), broadcast=True)
def prelu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dx = dy where x > 0, else slope dy; dslope = x dy where x <= 0"""
    x, slope = node.inputs
    positive = g.greater(x, g.like(x, 0))
    return [
        lambda: g.with_shape(g.where(positive, dy, g.mul(dy, slope)), x),
        lambda: g.where(positive, g.like(dy, 0), g.mul(dy, x)),
    ]


@vjp("ThresholdedRelu", versions=(10, 22))
def thresholded_relu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy where x > alpha"""
    (x,) = node.inputs
    return [masks.keep(g, dy, g.greater(x, g.like(x, node.attrs["alpha"])))]


@vjp("Shrink", versions=(9,))
def shrink(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy where x < -lambd or x > lambd"""
    (x,) = node.inputs
    bound = node.attrs["lambd"]
    return [masks.keep(g, dy, g.op("Or", g.less(x, g.like(x, -bound)), g.greater(x, g.like(x, bound))))]


@vjp("HardSigmoid", versions=(6, 22))
def hard_sigmoid(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = clip(alpha x + beta, 0, 1); dx = alpha dy strictly inside"""
    (y,) = node.outputs
    return [_inside_unit(g, g.scale(dy, node.attrs["alpha"]), y)]


@vjp("HardSwish", versions=(14, 22))
def hard_swish(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x h, h = clip(x/6 + 1/2, 0, 1); dx = dy (h + x h')"""
    (x,) = node.inputs
    return [g.mul(dy, hard_swish_slope(g, g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5), x, 1 / 6))]


def hard_swish_slope(g: Emitter, h: gs.Tensor, x: gs.Tensor, alpha: float) -> gs.Tensor:
    """(x h)' = h + x h', for the gate h = clip(alpha x + beta, 0, 1)"""
    return g.add(h, _inside_unit(g, blocked.scale(g, x, alpha), h))


def _inside_unit(g: Emitter, dy: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """dy where 0 < y < 1, for y in [0, 1]."""
    if y.dtype == np.float32:
        return masks.where_below(g, masks.where_positive(g, dy, y), y, 1.0)
    return masks.keep(g, dy, g.op("And", g.greater(y, g.like(y, 0)), g.less(y, g.like(y, 1))))


# -- smooth -------------------------------------------------------------------------------------------------------


@vjp("Softsign", versions=(1, 22))
def softsign(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x / (1 + |x|); dx = dy / (1 + |x|)^2"""
    (x,) = node.inputs
    return [g.div(dy, g.pow(g.add(g.op("Abs", x), g.like(x, 1)), 2))]


@vjp("Swish", versions=(24,))
def swish(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x s, s = sigmoid(alpha x); dx = dy (s + alpha y (1 - s))"""
    (x,), (y,) = node.inputs, node.outputs
    alpha = node.attrs["alpha"]
    s = g.sigmoid(g.scale(x, alpha))
    return [g.mul(dy, silu_slope(g, s, g.scale(y, alpha)))]


def silu_slope(g: Emitter, s: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """(x s)' = s + y (1 - s), for the gate s = sigmoid(x) and y = x s"""
    return g.add(s, g.mul(y, blocked.one_minus(g, s)))


@vjp("Mish", versions=(18, 22))
def mish(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x t, t = tanh(softplus(x)); dx = dy (t + x (1 - t^2) sigmoid(x))"""
    (x,) = node.inputs
    t = g.op("Tanh", g.op("Softplus", x))
    bend = g.mul(g.sub(g.like(x, 1), g.mul(t, t)), g.sigmoid(x))
    return [g.mul(dy, g.add(t, g.mul(x, bend)))]


@vjp("Gelu", versions=(20,))
def gelu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x P(x), P the normal distribution or tanh's approximation of it; dx = dy (P + x P')"""
    (x,) = node.inputs
    p, slope = _normal_by_tanh(g, x) if node.attrs["approximate"] == "tanh" else _normal_by_erf(g, x)
    return [g.mul(dy, g.add(p, slope))]


def _normal_by_erf(g: Emitter, x: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """P = (1 + erf(t)) / 2 and x P' = t / exp(t^2) / sqrt(pi), with t = x / sqrt(2)"""
    t = g.scale(x, sqrt(1 / 2))
    return _half_of_one_more(g, g.op("Erf", t)), g.scale(g.div(t, g.op("Exp", g.mul(t, t))), 1 / sqrt(pi))


def _normal_by_tanh(g: Emitter, x: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """P = (1 + t) / 2 with t = tanh(a (x + b x^3)), and x P' = x (1 - t^2) a (1 + 3 b x^2) / 2

    Beyond 10 both are constant to the last bit of a double, and powers of x are kept from overflowing.
    """
    a, b = sqrt(2 / pi), 0.044715
    x = g.maximum(g.minimum(x, g.like(x, 10)), g.like(x, -10))
    square = g.mul(x, x)
    t = g.op("Tanh", g.mul(x, g.add(g.scale(square, a * b), g.like(x, a))))
    steepness = g.add(g.scale(square, 3 * a * b / 2), g.like(x, a / 2))
    slope = g.mul(g.mul(x, g.sub(g.like(x, 1), g.mul(t, t))), steepness)
    return _half_of_one_more(g, t), slope


def _half_of_one_more(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """(1 + x) / 2 for x between -1 and 1: in float32 by HardSigmoid, in one pass."""
    if x.dtype == np.float32:
        return g.op("HardSigmoid", x, alpha=0.5, beta=0.5)
    return g.scale(g.add(x, g.like(x, 1)), 1 / 2)
