"""Activations: functions of one tensor, element by element, that networks put behind their layers."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.emit import Emitter
from graphgbp.registry import vjp


@vjp("Relu", versions=(14,))
def relu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy 1(y > 0): the mask is read from y, so that the runtime may still fuse x away."""
    return [masks.where_positive(g, dy, node.outputs[0])]


@vjp("Sigmoid", versions=(13,))
def sigmoid(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy y (1 - y)"""
    (y,) = node.outputs
    return [g.mul(dy, g.mul(y, g.sub(g.like(y, 1), y)))]


@vjp("Tanh", versions=(13,))
def tanh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy (1 - y^2)"""
    (y,) = node.outputs
    return [g.mul(dy, g.sub(g.like(y, 1), g.mul(y, y)))]


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


@vjp("HardSigmoid", versions=(6, 22))
def hard_sigmoid(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = clip(alpha x + beta, 0, 1); dx = alpha dy strictly inside"""
    (y,) = node.outputs
    return [_inside_unit(g, g.scale(dy, node.attrs["alpha"]), y)]


@vjp("HardSwish", versions=(14, 22))
def hard_swish(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x h, h = clip(x/6 + 1/2, 0, 1); dx = dy (h + x h')"""
    (x,) = node.inputs
    h = g.op("HardSigmoid", x, alpha=1 / 6, beta=0.5)
    return [g.add(g.mul(dy, h), _inside_unit(g, g.scale(g.mul(dy, x), 1 / 6), h))]


def _inside_unit(g: Emitter, dy: gs.Tensor, y: gs.Tensor) -> gs.Tensor:
    """dy where 0 < y < 1, for y in [0, 1]."""
    if y.dtype == np.float32:
        return masks.where_below(g, masks.where_positive(g, dy, y), y, 1.0)
    return masks.keep(g, dy, g.op("And", g.greater(y, g.like(y, 0)), g.less(y, g.like(y, 1))))
