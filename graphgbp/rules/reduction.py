"""Reductions over axes, and the running sum. A reduction's axes, an attribute or an input by opset, must be known."""

import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.emit import Emitter, Size
from graphgbp.registry import Repeated, vjp


def _refuse(node: gs.Node) -> str | None:
    if len(node.inputs) > 1 and not isinstance(node.inputs[1], gs.Constant) and not node.inputs[1].is_empty():
        return "its axes are known only at run time; make them constants"
    if node.inputs[0].shape is None:
        return f"the rank of its input '{node.inputs[0].name}' cannot be inferred"
    return None


@vjp("ReduceSum", versions=(13,), refuse=_refuse)
def reduce_sum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy, to every term"""
    return [Repeated(_keep_axes(g, node, dy))]


@vjp("ReduceMean", versions=(13, 18), refuse=_refuse)
def reduce_mean(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy / n, to each of the n terms"""
    (x, *_) = node.inputs
    share = _divided(g, _keep_axes(g, node, dy), [g.size(x, axis) for axis in _axes(node)])
    return [Repeated(share)]


@vjp("ReduceMax", versions=(13, 18, 20), refuse=_refuse)
@vjp("ReduceMin", versions=(13, 18, 20), refuse=_refuse)
def reduce_extremum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy to the extreme term; where several are, in equal parts"""
    (x, *_), (y,) = node.inputs, node.outputs
    hits = g.cast(g.equal(x, _keep_axes(g, node, y)), dy.dtype)
    share = g.div(_keep_axes(g, node, dy), g.reduce_sum(hits, _axes(node)))
    return [g.mul(hits, share)]


@vjp("ReduceL1", versions=(13, 18), refuse=_refuse)
def reduce_l1(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = sum |x|; dx = dy sign(x)"""
    return [g.mul(g.op("Sign", node.inputs[0]), _keep_axes(g, node, dy))]


@vjp("ReduceL2", versions=(13, 18), refuse=_refuse)
def reduce_l2(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = sqrt(sum x^2); dx = dy x / y, and 0 where y = 0"""
    (x, *_), (y,) = node.inputs, node.outputs
    zero = g.like(y, 0)
    share = g.where(g.equal(y, zero), zero, g.div(dy, y))
    return [g.mul(x, _keep_axes(g, node, share))]


@vjp("ReduceSumSquare", versions=(13, 18), refuse=_refuse)
def reduce_sum_square(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = sum x^2; dx = 2 dy x"""
    return [g.mul(node.inputs[0], g.scale(_keep_axes(g, node, dy), 2))]


@vjp("ReduceLogSum", versions=(13, 18), refuse=_refuse)
def reduce_log_sum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = log(sum x); dx = dy / sum x"""
    (x, *_) = node.inputs
    share = g.div(_keep_axes(g, node, dy), g.reduce_sum(x, _axes(node)))
    return [g.expand_like(share, x)]


@vjp("ReduceLogSumExp", versions=(13, 18), refuse=_refuse)
def reduce_log_sum_exp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = log(sum exp(x)); dx = dy exp(x - y)"""
    (x, *_), (y,) = node.inputs, node.outputs
    return [g.mul(g.op("Exp", g.sub(x, _keep_axes(g, node, y))), _keep_axes(g, node, dy))]


@vjp("ReduceProd", versions=(13, 18), refuse=_refuse)
def reduce_prod(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy times the product of the other factors: that of all but zeros, over x, where no other factor is 0"""
    (x, *_) = node.inputs
    axes = _axes(node)
    is_zero = g.equal(x, g.like(x, 0))
    factors, zeros = g.where(is_zero, g.like(x, 1), x), g.cast(is_zero, x.dtype)
    other_zeros = g.sub(g.reduce_sum(zeros, axes), zeros)
    others = g.div(g.reduce_prod(factors, axes), factors)
    alone = g.equal(other_zeros, g.like(zeros, 0))
    return [g.mul(_keep_axes(g, node, dy), masks.keep(g, others, alone))]


@vjp("CumSum", versions=(14,))
def cum_sum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """x_j is in every y_i from j on: dx is the running sum of dy from the other end"""
    exclusive, reverse = node.attrs["exclusive"], node.attrs["reverse"]
    return [g.op("CumSum", dy, node.inputs[1], exclusive=exclusive, reverse=1 - reverse)]


def _axes(node: gs.Node) -> list[int]:
    """The axes that are summed over, none of them negative."""
    rank = len(node.inputs[0].shape)
    given = node.attrs.get("axes")
    if len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        given = node.inputs[1].values.tolist()
    if given:
        return sorted(axis % rank for axis in given)
    return [] if node.attrs.get("noop_with_empty_axes") else list(range(rank))


def _keep_axes(g: Emitter, node: gs.Node, y: gs.Tensor) -> gs.Tensor:
    """A tensor of the node's result's shape, with size 1 along each reduced axis."""
    return y if node.attrs["keepdims"] else g.unsqueeze(y, _axes(node))


def _divided(g: Emitter, x: gs.Tensor, sizes: list[Size]) -> gs.Tensor:
    """x over the product of the sizes."""
    if not sizes:
        return x
    count = g.ints([1])
    for size in sizes:
        count = g.mul(count, g.as_int_vector(size))
    if isinstance(count, gs.Constant):
        return g.scale(x, 1 / max(int(count.values[0]), 1))
    return g.div(x, g.cast(count, x.dtype))
