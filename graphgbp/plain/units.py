"""Units of quantised models: Dequantize -> a node -> Quantize, which ONNX Runtime runs as one integer node.

It does so only where nothing else reads the tensors inside. A gradient that reads them therefore reads copies, made
of the unit's quantised inputs again, and the deployed integer forward pass stays what it is.
"""

from collections import defaultdict
from collections.abc import Iterator

import onnx

from graphgbp.contract import RECOMPUTED

_ACTIVATIONS = ("Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh")


def copies(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Copies of the float nodes inside units, by the tensor that each stands for; each makes `copy_of(tensor)`."""
    units = _Units(model)
    found: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            for member in units.members(node):
                copy = onnx.NodeProto()
                copy.CopyFrom(member)
                copy.name = copy_of(member.name or member.output[0])
                copy.output[:] = [name and copy_of(name) for name in member.output]
                found.update((name, copy) for name in member.output if name)
    return found


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
        if node is None or any(a.HasField("g") or a.graphs for a in node.attribute):
            return None
        closed = all(
            not name or (name not in self._given and all(r.op_type == op for r in self._readers[name]))
            for name in node.output
        )
        return node if closed and not name.startswith(RECOMPUTED) else None

    def _dequantises(self, node: onnx.NodeProto) -> bool:
        makers = (self._makers.get(name) for name in node.input)
        return any(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers)
