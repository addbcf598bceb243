"""Trigonometric and hyperbolic functions and their inverses.

Where a derivative needs a hyperbolic function, it is spelled by exp and tanh, which have a CUDA kernel.
"""

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import vjp


@vjp("Sin", versions=(7, 22))
def sin(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d sin(x) = cos(x) dx"""
    (x,) = node.inputs
    return [g.mul(dy, g.op("Cos", x))]


@vjp("Cos", versions=(7, 22))
def cos(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d cos(x) = -sin(x) dx"""
    (x,) = node.inputs
    return [g.neg(g.mul(dy, g.op("Sin", x)))]


@vjp("Tan", versions=(7, 22))
def tan(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = tan(x); dx = dy (1 + y^2)"""
    (y,) = node.outputs
    return [g.mul(dy, g.add(g.mul(y, y), g.like(y, 1)))]


@vjp("Asin", versions=(7, 22))
def asin(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d asin(x) = dx / sqrt((1 - x) (1 + x))"""
    (x,) = node.inputs
    return [g.div(dy, g.sqrt(_one_less_square(g, x)))]


@vjp("Acos", versions=(7, 22))
def acos(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d acos(x) = -dx / sqrt((1 - x) (1 + x))"""
    (x,) = node.inputs
    return [g.neg(g.div(dy, g.sqrt(_one_less_square(g, x))))]


@vjp("Atan", versions=(7, 22))
def atan(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d atan(x) = dx / (1 + x^2)"""
    (x,) = node.inputs
    return [g.div(dy, g.add(g.mul(x, x), g.like(x, 1)))]


@vjp("Sinh", versions=(9, 22))
def sinh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = sinh(x); dx = dy cosh(x), and cosh(x) = |y| + exp(-|x|)"""
    (x,), (y,) = node.inputs, node.outputs
    return [g.mul(dy, g.add(g.op("Abs", y), g.op("Exp", g.neg(g.op("Abs", x)))))]


@vjp("Cosh", versions=(9, 22))
def cosh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = cosh(x); dx = dy sinh(x), and sinh(x) = y tanh(x)"""
    (x,), (y,) = node.inputs, node.outputs
    return [g.mul(dy, g.mul(y, g.op("Tanh", x)))]


@vjp("Asinh", versions=(9, 22))
def asinh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d asinh(x) = dx / sqrt(x^2 + 1)"""
    (x,) = node.inputs
    return [g.div(dy, g.sqrt(g.add(g.mul(x, x), g.like(x, 1))))]


@vjp("Acosh", versions=(9, 22))
def acosh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d acosh(x) = dx / sqrt((x - 1) (x + 1))"""
    (x,) = node.inputs
    one = g.like(x, 1)
    return [g.div(dy, g.sqrt(g.mul(g.sub(x, one), g.add(x, one))))]


@vjp("Atanh", versions=(9, 22))
def atanh(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d atanh(x) = dx / ((1 - x) (1 + x))"""
    (x,) = node.inputs
    return [g.div(dy, _one_less_square(g, x))]


def _one_less_square(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """1 - x^2, to the last digits also where x is near 1"""
    one = g.like(x, 1)
    return g.mul(g.sub(one, x), g.add(one, x))
