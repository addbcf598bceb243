"""Elementwise arithmetic. Several tensors broadcast against each other: the engine sums over the broadcast axes."""

import math
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp

_REAL = ("float16", "bfloat16", "float32", "float64")


@vjp("Add", versions=(14,), wrt=(0, 1), broadcast=True)
def add(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d(a + b) = da + db"""
    return [dy, dy]


@vjp("Sub", versions=(14,), wrt=(0, 1), broadcast=True)
def sub(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """d(a - b) = da - db"""
    return [dy, lambda: g.neg(dy)]


@vjp("Mul", versions=(14,), wrt=(0, 1), broadcast=True)
def mul(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """d(a b) = b da + a db"""
    a, b = node.inputs
    return [lambda: g.mul(dy, b), lambda: g.mul(dy, a)]


@vjp("Div", versions=(14,), wrt=(0, 1), broadcast=True)
def div(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """d(a / b) = da / b - (a / b) db / b"""
    _, b = node.inputs
    (y,) = node.outputs
    return [lambda: g.div(dy, b), lambda: g.neg(g.div(g.mul(dy, y), b))]


@vjp("Pow", versions=(15,), wrt=(0, 1), broadcast=True)
def pow_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """d(a^b) = b a^(b-1) da + a^b log(a) db; the first is 0 where b = 0, the second where a = 0 and b >= 0"""
    a, b = node.inputs
    (y,) = node.outputs

    def to_base() -> gs.Tensor:
        return g.mul(dy, g.mul(g.cast(b, dy.dtype), _power(g, a, _one_less(g, b))))

    def to_exponent() -> gs.Tensor:
        settled = g.op("And", g.equal(a, g.like(a, 0)), g.op("GreaterOrEqual", b, g.like(b, 0)))
        slope = g.mul(y, g.op("Log", a))
        return g.cast(g.mul(dy, g.where(settled, g.like(y, 0), slope)), b.dtype)

    return [to_base, to_exponent]


def _power(g: Emitter, base: gs.Tensor, exponent: gs.Tensor) -> gs.Tensor:
    known_one = isinstance(exponent, gs.Constant) and (exponent.values == 1).all()
    return base if known_one else g.op("Pow", base, exponent)


def _one_less(g: Emitter, exponent: gs.Tensor) -> gs.Tensor:
    """exponent - 1, but 0 where the exponent is 0: its product with the exponent stays 0 at every base."""
    if isinstance(exponent, gs.Constant):
        return g.constant(np.where(exponent.values == 0, 0, exponent.values - 1), exponent.dtype)
    zero = g.like(exponent, 0)
    return g.where(g.equal(exponent, zero), zero, g.sub(exponent, g.like(exponent, 1)))


@vjp("Sum", versions=(13,), wrt=None, broadcast=True)
def sum_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d(a + b + ...) = da + db + ..."""
    return [dy] * len(node.inputs)


@vjp("Mean", versions=(13,), wrt=None, broadcast=True)
def mean(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy / n, to each of the n terms"""
    return [g.scale(dy, 1 / len(node.inputs))] * len(node.inputs)


def _takes_divisors_sign(node: gs.Node) -> str | None:
    return None if node.attrs["fmod"] else "ONNX gives real numbers no remainder without fmod=1; set it"


@vjp("Mod", versions=(13,), wrt=(0, 1), broadcast=True, refuse=_takes_divisors_sign)
def mod(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y = a - n b with n = trunc(a / b) = (a - y) / b; da = dy, db = -n dy"""
    (a, b), (y,) = node.inputs, node.outputs
    return [dy, lambda: g.mul(dy, g.op("Round", g.div(g.sub(y, a), b)))]


@vjp("Max", versions=(13,), wrt=None, broadcast=True)
def max_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dy to the largest; where several are, in equal parts"""
    return _extremum(g, node, dy)


@vjp("Min", versions=(13,), wrt=None, broadcast=True)
def min_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dy to the smallest; where several are, in equal parts"""
    return _extremum(g, node, dy)


def _extremum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    (y,) = node.outputs
    hits = [g.cast(g.equal(x, y), dy.dtype) for x in node.inputs]
    share = g.div(dy, g.sum(hits))
    return [partial(g.mul, share, hit) for hit in hits]


@vjp("Where", versions=(16,), wrt=(1, 2), broadcast=True)
def where(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dy to the branch that was taken"""
    condition = node.inputs[0]
    zero = g.like(dy, 0)
    return [lambda: g.where(condition, dy, zero), lambda: g.where(condition, zero, dy)]


@vjp("Neg", versions=(13,))
def neg(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d(-x) = -dx"""
    return [g.neg(dy)]


@vjp("Abs", versions=(13,))
def abs_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d|x| = sign(x) dx, and 0 at 0"""
    (x,) = node.inputs
    return [g.mul(dy, g.op("Sign", x))]


@vjp("Sqrt", versions=(13,))
def sqrt(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = sqrt(x); dx = dy / (2 y)"""
    (y,) = node.outputs
    return [g.div(dy, g.scale(y, 2))]


@vjp("Exp", versions=(13,))
def exp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = exp(x); dx = dy y"""
    (y,) = node.outputs
    return [g.mul(dy, y)]


@vjp("Log", versions=(13,))
def log(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d(log x) = dx / x"""
    (x,) = node.inputs
    return [g.div(dy, x)]


@vjp("Reciprocal", versions=(13,))
def reciprocal(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = 1 / x; dx = -dy y^2"""
    (y,) = node.outputs
    return [g.neg(g.mul(dy, g.mul(y, y)))]


@vjp("Erf", versions=(13,))
def erf(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d erf(x) = 2 / sqrt(pi) dx / exp(x^2); a factor of dy is applied with that number, in one pass"""
    (x,) = node.inputs
    dy, factor = g.unscaled(dy)
    return [g.scale(g.div(dy, g.op("Exp", g.mul(x, x))), factor * 2 / math.sqrt(math.pi))]


@vjp("Identity", versions=(16, 19, 21, 23, 24, 25))
def identity(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy"""
    return [dy]


def _rounds_to_few_bits(node: gs.Node) -> str | None:
    (x,), (y,) = node.inputs, node.outputs
    if x.dtype is None or y.dtype is None:
        return "its element types cannot be inferred"
    few = next((name for name in (np.dtype(x.dtype).name, np.dtype(y.dtype).name) if name not in _REAL), None)
    return f"it casts to or from {few}, a quantisation whose derivative is zero" if few else None


@vjp("Cast", versions=(13, 19, 21, 23, 24, 25), refuse=_rounds_to_few_bits)
def cast(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy, in x's type; a Cast to integers is on no float path"""
    (x,) = node.inputs
    return [g.cast(dy, x.dtype)]


def _trains(node: gs.Node) -> str | None:
    mode = node.inputs[2] if len(node.inputs) > 2 and not node.inputs[2].is_empty() else None
    if mode is None or (isinstance(mode, gs.Constant) and not mode.values.any()):
        return None
    known = "is true" if isinstance(mode, gs.Constant) else "is known only at run time"
    return f"its training_mode {known}, and it would draw another mask each time; export the model for inference"


@vjp("Dropout", versions=(13, 22), refuse=_trains)
def dropout(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy: at inference it is the identity, whatever its ratio"""
    return [dy]
