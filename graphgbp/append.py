"""Appending what the Emitter made to the model: only nodes that an output needs, after everything that was there."""

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from graphgbp.emit import Emitter, elem_type

_INITIALIZERS_NEED_NO_INPUT = 4  # the IR version from which an initializer need not be a graph input


def append(model: onnx.ModelProto, g: Emitter, inputs: Sequence[gs.Variable], outputs: Sequence[gs.Variable]) -> None:
    """Add new inputs, outputs and the emitted nodes the outputs need to `model`, in place."""
    nodes = _live(g.nodes, outputs)
    read = {tensor.name for node in nodes for tensor in node.inputs}
    constants = [constant for constant in g.constants.values() if constant.name in read]
    graph = model.graph
    for constant in constants:
        value = numpy_helper.from_array(constant.values, constant.name)
        if model.ir_version >= _INITIALIZERS_NEED_NO_INPUT:
            graph.initializer.append(value)
        else:
            graph.node.append(helper.make_node("Constant", [], [constant.name], constant.name, value=value))
    graph.node.extend(_to_proto(node) for node in nodes)
    graph.input.extend(_value_info(tensor) for tensor in inputs)
    graph.output.extend(_value_info(tensor) for tensor in outputs)


def _live(nodes: Sequence[gs.Node], outputs: Sequence[gs.Variable]) -> list[gs.Node]:
    needed = {tensor.name for tensor in outputs}
    live = []
    for node in reversed(nodes):
        if any(output.name in needed for output in node.outputs):
            live.append(node)
            needed.update(tensor.name for tensor in node.inputs)
    return live[::-1]


def _to_proto(node: gs.Node) -> onnx.NodeProto:
    inputs = [tensor.name for tensor in node.inputs]
    outputs = [tensor.name for tensor in node.outputs]
    return helper.make_node(node.op, inputs, outputs, node.name, **node.attrs)


def _value_info(tensor: gs.Variable) -> onnx.ValueInfoProto:
    shape = (
        None
        if tensor.shape is None
        else [size if isinstance(size, int) or size.isidentifier() else None for size in tensor.shape]
    )
    return helper.make_tensor_value_info(tensor.name, elem_type(tensor.dtype), shape)
