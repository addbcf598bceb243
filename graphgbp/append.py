"""Appending what the Emitter made to the model: only nodes that an output needs, after everything that was there."""

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from graphgbp import model_file
from graphgbp.contract import RECOMPUTED
from graphgbp.emit import Emitter, elem_type
from graphgbp.errors import GraphgbpError
from graphgbp.model_file import tensor_names
from graphgbp.nodes import node_proto
from graphgbp.prepare import View, skeleton

_INITIALIZERS_NEED_NO_INPUT = 4  # the IR version from which an initializer need not be a graph input


def append_checked(
    model: onnx.ModelProto, view: View, g: Emitter, inputs: Sequence[gs.Variable], outputs: Sequence[gs.Variable]
) -> None:
    """`append`; where ONNX's checker had nothing against the model, it must have nothing now."""
    before = model_file.verdict(skeleton(model))
    append(model, view, g, inputs, outputs)
    after = model_file.verdict(skeleton(model))
    if before is None and after is not None:
        raise GraphgbpError(f"graphgbp made an invalid graph, please report it with the model: {after}")


def append(
    model: onnx.ModelProto, view: View, g: Emitter, inputs: Sequence[gs.Variable], outputs: Sequence[gs.Variable]
) -> None:
    """Add new inputs, outputs and the nodes the outputs need, emitted or recomputed, to `model`, in place."""
    there = tensor_names(model)
    recomputed = {id(node) for node in view.recomputed}
    nodes = _live([*view.recomputed, *g.nodes], outputs, there)
    read = {tensor.name: tensor for node in nodes for tensor in node.inputs}
    graph = model.graph
    for constant in read.values():
        if not isinstance(constant, gs.Constant) or constant.name in there:
            continue
        value = numpy_helper.from_array(constant.values, constant.name)
        if model.ir_version >= _INITIALIZERS_NEED_NO_INPUT:
            graph.initializer.append(value)
        else:
            graph.node.append(helper.make_node("Constant", [], [constant.name], constant.name, value=value))
    for node in nodes:
        proto = node_proto(node)
        proto.name = f"{RECOMPUTED}/{node.name}" if id(node) in recomputed else node.name
        graph.node.append(proto)
    graph.input.extend(_value_info(tensor) for tensor in inputs)
    graph.output.extend(_value_info(tensor) for tensor in outputs)


def _live(nodes: Sequence[gs.Node], outputs: Sequence[gs.Variable], there: set[str]) -> list[gs.Node]:
    """The nodes that make a tensor which the outputs need and the model does not make itself."""
    needed = {tensor.name for tensor in outputs}
    live = []
    for node in reversed(nodes):
        if any(output.name in needed for output in node.outputs):
            live.append(node)
            needed.update({tensor.name for tensor in node.inputs if tensor.name} - there)
    return live[::-1]


def _value_info(tensor: gs.Variable) -> onnx.ValueInfoProto:
    shape = (
        None
        if tensor.shape is None
        else [size if isinstance(size, int) or size.isidentifier() else None for size in tensor.shape]
    )
    return helper.make_tensor_value_info(tensor.name, elem_type(tensor.dtype), shape)
