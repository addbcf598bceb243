"""What the runtime fuses at load, which a gradient must therefore not read: it reads copies instead.

A *unit* of a quantised model is Dequantize -> a node -> Quantize. ONNX Runtime runs it as one integer node, but only
where nothing else reads the tensors inside. Copies of them are made of the unit's quantised inputs again.

Activations in int8 it fuses on x86 only where each quantised tensor has a single reader, because it turns them into
uint8 first. There everything behind the first such quantiser is computed again, in float32, rounded and clipped as the
quantisers do.
"""

from collections import defaultdict
from collections.abc import Container, Iterator
from typing import NamedTuple

import onnx

from graphgbp.contract import RECOMPUTED

_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh")


class Copies(NamedTuple):
    """Copies of nodes, by the tensor that each stands for, and int8 tensors to be quantised again in plain nodes."""

    nodes: dict[str, onnx.NodeProto]
    quantised: set[str]


def copies(model: onnx.ModelProto) -> Copies:
    """What the gradient must read copies of; the copy of a tensor is named `copy_of(tensor)`."""
    units = _Units(model)
    signed = units.signed()
    behind = list(units.behind(signed))
    inside = [member for node in model.graph.node if _is(node, "QuantizeLinear") for member in units.members(node)]
    nodes: dict[str, onnx.NodeProto] = {}
    for node in [*inside, *behind]:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = copy_of(node.name or node.output[0])
        copy.output[:] = [name and copy_of(name) for name in node.output]
        nodes.update((name, copy) for name in node.output if name)
    return Copies(nodes, signed)


def _is(node: onnx.NodeProto, op: str) -> bool:
    return node.op_type == op and node.domain in ("", "ai.onnx")


def copy_of(name: str) -> str:
    return f"{RECOMPUTED}/{name}"


class _Units:
    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self._makers = {name: node for node in graph.node for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._readers[name].append(node)
        self._given = {output.name for output in graph.output}
        self._nodes = graph.node
        self._int8 = {x.name for x in graph.initializer if x.data_type == onnx.TensorProto.INT8}
        constants = (node for node in graph.node if _is(node, "Constant"))
        self._int8 |= {
            node.output[0]
            for node in constants
            for attribute in node.attribute
            if attribute.t.data_type == onnx.TensorProto.INT8
        }

    def signed(self) -> set[str]:
        """The activations that are quantised to int8."""
        return {
            node.output[0]
            for node in self._nodes
            if _is(node, "QuantizeLinear") and len(node.input) > 2 and node.input[2] in self._int8
        }

    def behind(self, signed: Container[str]) -> Iterator[onnx.NodeProto]:
        """The nodes that depend on quantised activations, but for the quantisers and what makes the model's outputs."""
        reached: set[str] = set()
        for node in self._nodes:
            quantises = node.output[0] in signed
            if quantises or not reached.isdisjoint(node.input):
                reached.update(filter(None, node.output))
                if not quantises and self._given.isdisjoint(node.output) and not _has_graph(node):
                    yield node

    def members(self, quantiser: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The node that a quantiser reads, and the one before it where that is an activation."""
        node = self._only_read_by("QuantizeLinear", quantiser.input[0])
        if node is None:
            return
        if node.op_type in _ACTIVATIONS:
            before = self._only_read_by(node.op_type, node.input[0])
            if before is not None and self._dequantises(before):
                yield before
                yield node
                return
        if self._dequantises(node):
            yield node

    def _only_read_by(self, op: str, name: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, where nodes of that operator are all that reads any of its outputs."""
        node = self._makers.get(name)
        if node is None or _has_graph(node):
            return None
        closed = all(
            not name or (name not in self._given and all(r.op_type == op for r in self._readers[name]))
            for name in node.output
        )
        return node if closed and not name.startswith(RECOMPUTED) else None

    def _dequantises(self, node: onnx.NodeProto) -> bool:
        makers = (self._makers.get(name) for name in node.input)
        return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)


def _has_graph(node: onnx.NodeProto) -> bool:
    return any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute)
