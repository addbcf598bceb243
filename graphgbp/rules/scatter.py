"""Scattering: updates written, or reduced, into a copy of the data at indices.

y = data, with the updates u at their indices. ScatterElements and ScatterND differ in what an index means and in
nothing else, so each formula below stands for both; gather takes the entries back that an index means.
"""

from collections.abc import Callable

import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp


class _Places:
    """Where a node scatters to."""

    def __init__(self, g: Emitter, node: gs.Node) -> None:
        self._g = g
        self._indices = node.inputs[1]
        self._ops = ("ScatterND", "GatherND") if node.op == "ScatterND" else ("ScatterElements", "GatherElements")
        self._axis = {} if node.op == "ScatterND" else {"axis": node.attrs["axis"]}

    def scatter(self, data: gs.Tensor, updates: gs.Tensor, reduction: str = "none") -> gs.Tensor:
        """In data's shape"""
        made = self._g.op(self._ops[0], data, self._indices, updates, reduction=reduction, **self._axis)
        return self._g.with_shape(made, data)

    def gather(self, y: gs.Tensor) -> gs.Tensor:
        """In the updates' shape"""
        return self._g.op(self._ops[1], y, self._indices, **self._axis)


@vjp("ScatterElements", versions=(16, 18), wrt=(0, 2))
@vjp("ScatterND", versions=(16, 18), wrt=(0, 2))
def scatter(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """by the reduction; where it is none, indices that repeat have no meaning in ONNX"""
    return list(_REDUCTIONS[node.attrs["reduction"]](g, node, dy, _Places(g, node)))


def _written(g: Emitter, node: gs.Node, dy: gs.Tensor, at: _Places) -> tuple[Cotangent, Cotangent]:
    """y = u at the indices; ddata = dy elsewhere, du = dy there"""
    updates = node.inputs[2]
    return lambda: at.scatter(dy, g.zeros_like(updates)), lambda: at.gather(dy)


def _added(g: Emitter, node: gs.Node, dy: gs.Tensor, at: _Places) -> tuple[Cotangent, Cotangent]:
    """y = data + u; ddata = dy, du = dy at the indices"""
    return dy, lambda: at.gather(dy)


def _multiplied(g: Emitter, node: gs.Node, dy: gs.Tensor, at: _Places) -> tuple[Cotangent, Cotangent]:
    """y = data prod(u); ddata = dy prod(u), du = dy data times the product of the other updates

    That is the product of all but zeros, over u, where no other update is 0.
    """
    data, _, updates = node.inputs

    def to_data() -> gs.Tensor:
        return g.mul(dy, at.scatter(g.expand_like(g.like(data, 1), data), updates, "mul"))

    def to_updates() -> gs.Tensor:
        is_zero = g.equal(updates, g.like(updates, 0))
        factors, zeros = g.where(is_zero, g.like(updates, 1), updates), g.cast(is_zero, updates.dtype)
        other_zeros = g.sub(at.gather(at.scatter(g.zeros_like(data), zeros, "add")), zeros)
        product = at.gather(at.scatter(g.mul(dy, data), factors, "mul"))
        return masks.keep(g, g.div(product, factors), g.equal(other_zeros, g.like(zeros, 0)))

    return to_data, to_updates


def _extreme(g: Emitter, node: gs.Node, dy: gs.Tensor, at: _Places) -> tuple[Cotangent, Cotangent]:
    """dy to the largest (smallest) of data and updates; where several are, in equal parts"""
    (data, _, updates), (y,) = node.inputs, node.outputs
    kept = g.cast(g.equal(data, y), dy.dtype)
    hits = g.cast(g.equal(updates, at.gather(y)), dy.dtype)
    share = g.div(dy, at.scatter(kept, hits, "add"))
    return lambda: g.mul(share, kept), lambda: g.mul(at.gather(share), hits)


_Formula = Callable[[Emitter, gs.Node, gs.Tensor, _Places], tuple[Cotangent, Cotangent]]
_REDUCTIONS: dict[str, _Formula] = {
    "none": _written,
    "add": _added,
    "mul": _multiplied,
    "max": _extreme,
    "min": _extreme,
}
