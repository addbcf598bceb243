"""Indexing: elements chosen by index, and the tensors that indices make."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.places import add_at, places


@vjp("Gather", versions=(13,))
def gather(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy added where each element was taken; for a single known index that is dy between zeros"""
    x, indices = node.inputs
    axis = node.attrs["axis"]
    if isinstance(indices, gs.Constant) and indices.values.ndim == 0 and x.shape is not None:
        return [_between_zeros(g, dy, x, int(indices.values), axis % len(x.shape))]
    return [add_at(g, dy, g.op("Gather", places(g, x), indices, axis=axis), x)]


def _between_zeros(g: Emitter, dy: gs.Tensor, x: gs.Tensor, index: int, axis: int) -> gs.Tensor:
    size = g.as_int_vector(g.size(x, axis))
    begins: list[Size] = [0] * len(x.shape)
    ends = list(begins)
    if index < 0:
        begins[axis], ends[axis] = g.add(size, g.ints([index])), -index - 1
    else:
        begins[axis], ends[axis] = index, g.sub(size, g.ints([index + 1]))
    return g.pad(g.unsqueeze(dy, [axis]), [*begins, *ends])


@vjp("GatherElements", versions=(13,))
def gather_elements(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy added where each element was taken"""
    x, indices = node.inputs
    return [g.scatter_add(x, indices, dy, node.attrs["axis"])]


@vjp("GatherND", versions=(13,))
def gather_nd(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy added where each slice was taken; ScatterND knows no batch axes"""
    x, indices = node.inputs
    batch_dims = node.attrs["batch_dims"]
    if batch_dims:
        return [add_at(g, dy, g.op("GatherND", places(g, x), indices, batch_dims=batch_dims), x)]
    return [g.op("ScatterND", g.zeros_like(x), indices, dy, reduction="add")]


@vjp("Compress", versions=(11,))
def compress(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy added where each slice was taken"""
    x, condition = node.inputs
    return [add_at(g, dy, g.op("Compress", places(g, x), condition, axis=node.attrs.get("axis")), x)]


@vjp("TopK", versions=(11, 24))
def top_k(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy to the values that were chosen"""
    x, (_, indices) = node.inputs[0], node.outputs
    return [g.scatter_add(x, indices, dy, node.attrs["axis"])]


@vjp("Range", versions=(11,), wrt=(0, 1, 2))
def range_(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y_i = start + i delta; dstart = sum(dy), ddelta = sum(i dy); the limit only sets how many there are"""
    limit = node.inputs[1]

    def to_delta() -> gs.Tensor:
        steps = g.op("Range", g.constant(np.int64(0)), g.count(dy), g.constant(np.int64(1)))
        return g.reduce_sum(g.mul(dy, g.cast(steps, dy.dtype)), [0], keepdims=False)

    return [lambda: g.reduce_sum(dy, [0], keepdims=False), lambda: g.zeros_like(limit), to_delta]


@vjp("OneHot", versions=(11,), wrt=(2,))
def one_hot(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """values = [off, on]; doff and don are the sums of dy where it is off and on"""
    indices, depth, _ = node.inputs
    hot = g.op("OneHot", indices, depth, g.like(dy, [0, 1]), axis=node.attrs["axis"])
    on = g.reshape(g.op("ReduceSum", g.mul(dy, hot)), [1])
    total = g.reshape(g.op("ReduceSum", dy), [1])
    return [g.concat([g.sub(total, on), on], 0)]
