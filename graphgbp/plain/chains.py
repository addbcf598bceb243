"""Nodes that make again what a gradient must not read from the model: dequantised tensors, sums, int8 activations."""

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.contract import RECOMPUTED
from graphgbp.emit import Emitter
from graphgbp.plain.quantised import dequantized, quantized_in_plain_nodes
from graphgbp.plain.sums import average, product
from graphgbp.plain.units import Copies

AGAIN = f"{RECOMPUTED}/again"
"""The scope of what they make."""


class Chains:
    """Follows the nodes of a model in order. `nodes` are those that it makes, `twins` the names of what they make by
    those of the tensors that it is to be read for.

    `there` are the tensors of the model, `copies` those inside what the runtime fuses. Its nodes are no part of the
    view, so no node there may read what they make: they have an Emitter of their own.
    """

    def __init__(self, graph: gs.Graph, opset: int, there: Collection[str], copies: Copies) -> None:
        self.nodes: list[gs.Node] = []
        self.twins: dict[str, str] = {}
        self._g, self._there = Emitter(graph, opset, AGAIN), there
        self._copied, self._signed = copies.nodes, copies.quantised
        self._dequantisers: dict[str, gs.Node] = {}

    def follow(self, node: gs.Node, y: gs.Tensor | None) -> None:
        """Make again what a node makes, if it is one of those; `y` is its first output, maybe a constant."""
        if y is None or y.is_empty() or y.dtype is None or isinstance(y.dtype, int):
            return
        start = len(self._g.nodes)
        with self._g.scope(y.name):
            twin = self._again(node, y)
            if twin is not None:
                self.twins[y.name] = self._g.cast(twin, y.dtype).name
        self.nodes += self._g.nodes[start:]

    def _again(self, node: gs.Node, y: gs.Tensor) -> gs.Tensor | None:
        g, axis = self._g, node.attrs.get("axis", 1)
        if node.op == "DequantizeLinear" and y.name in self._there:
            self._dequantisers[y.name] = node
            q, scale, zero_point = (*node.inputs, None)[:3]
            if q.dtype is None or isinstance(q.dtype, int):
                return None
            if block := node.attrs.get("block_size"):
                scale, zero_point = (
                    None if x is None else _repeated(g, x, q, axis, block) for x in (scale, zero_point)
                )
            return dequantized(g, q, scale, zero_point, axis)
        if node.op == "QuantizeLinear" and y.name in self._signed:
            x, scale, zero_point = node.inputs
            return quantized_in_plain_nodes(g, x, scale, zero_point, axis)
        if y.name not in self._copied:
            return None
        made = product(g, node, self._dequantisers)
        if made is not None or self._signed:  # what is quantised again rounds halves as the nodes written do
            return made
        return average(g, node, self._dequantisers)


def _repeated(g: Emitter, x: gs.Tensor, q: gs.Tensor, axis: int, block: int) -> gs.Tensor:
    """What each block along an axis of q has, for each element; float32."""
    rank = len(x.shape)
    axis %= rank
    sizes = [1] * (rank + 1)
    sizes[axis + 1] = block
    blocks = g.op("Expand", g.unsqueeze(g.cast(x, np.float32), [axis + 1]), g.ints(sizes))
    flat = g.reshape(blocks, [*x.shape[:axis], -1, *x.shape[axis + 1 :]])
    return flat if flat.shape == q.shape else g.slice(flat, [0], [q.shape[axis]], [axis])
