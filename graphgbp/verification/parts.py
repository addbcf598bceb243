"""Parts of a model, as models: what makes some of its tensors, and the whole of it as plain nodes."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from graphgbp.contract import RECOMPUTED
from graphgbp.equivalence import Feeds, RunError
from graphgbp.nodes import node_proto
from graphgbp.view import View

_REPLACEABLE = 4  # the IR version from which an initializer need not be an input, and one that is can be replaced


def expanded(view: View, model: onnx.ModelProto) -> onnx.ModelProto:
    """A model of the nodes of a raw reading view: no functions, no known branches, no fused nodes."""
    flat = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    nodes = [node for node in view.graph.nodes if any(isinstance(y, gs.Variable) for y in node.outputs)]
    if any(isinstance(value, gs.Graph) for node in nodes for value in node.attrs.values()):
        raise RunError("a branch or a loop that is chosen at run time stands beside functions or fused nodes")
    constants = {x.name: x for node in nodes for x in node.inputs if isinstance(x, gs.Constant)}
    flat.graph.name = model.graph.name or "graph"
    flat.graph.node.extend(node_proto(node) for node in nodes)
    for node in flat.graph.node:  # its first output is made by the node that it is seen as
        node.output[0] = node.output[0] or f"{RECOMPUTED}/{node.name}/first output"
    flat.graph.initializer.extend(numpy_helper.from_array(x.values, name) for name, x in constants.items())
    flat.graph.input.extend(value for value in model.graph.input if value.name not in constants)
    flat.graph.output.extend(model.graph.output)
    return flat


def part_for(
    model: onnx.ModelProto, names: Sequence[str], cut: Collection[str] | Mapping[str, int] = ()
) -> onnx.ModelProto:
    """The part of a model that makes the named tensors, as its outputs, of its inputs and of the tensors in `cut`.

    Those that are cut are float32, or of the ONNX type that a mapping gives.
    """
    graph, kinds = model.graph, cut if isinstance(cut, Mapping) else dict.fromkeys(cut, onnx.TensorProto.FLOAT)
    read, nodes = set(names), []
    for node in reversed(graph.node):
        if not (read - kinds.keys()).isdisjoint(node.output):
            nodes.append(_without_outputs(node, kinds))
            read.update(_read_by(node))
    needed = read - kinds.keys()
    fixed = {tensor.name for tensor in graph.initializer} if model.ir_version < _REPLACEABLE else set()
    part = onnx.ModelProto(functions=model.functions, opset_import=model.opset_import)
    part.ir_version = max(model.ir_version, _REPLACEABLE)
    part.graph.name = graph.name or "part"
    part.graph.node.extend(reversed(nodes))
    part.graph.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    part.graph.sparse_initializer.extend(x for x in graph.sparse_initializer if x.values.name in needed)
    part.graph.input.extend(value for value in graph.input if value.name in needed - fixed)
    part.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items() if name in read
    )
    known = {value.name: value for value in graph.output}
    part.graph.output.extend(known.get(name, onnx.ValueInfoProto(name=name)) for name in dict.fromkeys(names))
    return part


def _without_outputs(node: onnx.NodeProto, names: Collection[str]) -> onnx.NodeProto:
    if set(names).isdisjoint(node.output):
        return node
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.output[:] = ["" if name in names else name for name in node.output]
    return copy


def _read_by(node: onnx.NodeProto) -> set[str]:
    """What a node reads, also from inside its subgraphs."""
    names = set(node.input)
    for attribute in node.attribute:
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            names.update(output.name for output in inner.output)
            names.update(name for child in inner.node for name in _read_by(child))
    return names - {""}


def norm(arrays: Feeds) -> float:
    """The Euclidean length of several arrays as one."""
    return float(np.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in arrays.values())))
