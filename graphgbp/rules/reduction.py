"""Reductions over axes. The axes are an attribute or an input, by opset; they must be known before running."""

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.registry import vjp


def _refuse(node: gs.Node) -> str | None:
    if len(node.inputs) > 1 and not isinstance(node.inputs[1], gs.Constant) and not node.inputs[1].is_empty():
        return "its axes are known only at run time; make them constants"
    if node.inputs[0].shape is None:
        return f"the rank of its input '{node.inputs[0].name}' cannot be inferred"
    return None


@vjp("ReduceSum", versions=(13,), refuse=_refuse)
def reduce_sum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy, to every term"""
    return [g.expand_like(_keep_axes(g, node, dy), node.inputs[0])]


@vjp("ReduceMean", versions=(13, 18), refuse=_refuse)
def reduce_mean(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy / n, to each of the n terms"""
    (x, *_) = node.inputs
    share = _divided(g, _keep_axes(g, node, dy), [g.size(x, axis) for axis in _axes(node)])
    return [g.expand_like(share, x)]


@vjp("ReduceMax", versions=(13, 18, 20), refuse=_refuse)
@vjp("ReduceMin", versions=(13, 18, 20), refuse=_refuse)
def reduce_extremum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy to the extreme term; where several are, in equal parts"""
    (x, *_), (y,) = node.inputs, node.outputs
    hits = g.cast(g.equal(x, _keep_axes(g, node, y)), dy.dtype)
    share = g.div(_keep_axes(g, node, dy), g.reduce_sum(hits, _axes(node)))
    return [g.mul(hits, share)]


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
