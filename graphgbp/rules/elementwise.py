"""Elementwise arithmetic of several tensors, with broadcasting. The engine sums over the broadcast axes."""

from functools import partial

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp


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


@vjp("Sum", versions=(13,), wrt=None, broadcast=True)
def sum_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """d(a + b + ...) = da + db + ..."""
    return [dy] * len(node.inputs)


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


@vjp("Where", versions=(9, 16), wrt=(1, 2), broadcast=True)
def where(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dy to the branch that was taken"""
    condition = node.inputs[0]
    zero = g.like(dy, 0)
    return [lambda: g.where(condition, dy, zero), lambda: g.where(condition, zero, dy)]
