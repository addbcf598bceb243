"""Appending what the Emitter made to the model: only nodes that an output needs, after everything that was there."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from graphgbp import model_file
from graphgbp.contract import SCOPE
from graphgbp.emit import Emitter, elem_type
from graphgbp.errors import GraphgbpError
from graphgbp.inference import skeleton
from graphgbp.model_file import tensor_names
from graphgbp.nodes import input_names, node_proto
from graphgbp.shapes import is_static
from graphgbp.view import View

_READ_SHAPES = ("Shape", "Size")
_HAVE_FLOAT16 = ("Cast", *_READ_SHAPES)
_TAKE_SIZES = ("Expand", "Reshape", "Resize", "Slice", "ConvTranspose")
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
    nodes = [*view.recomputed, *_emitted(view, g.nodes)]
    nodes = _live(list(_beside_the_forward_pass(view, nodes)), outputs, there)
    read = {x.name: x for node in g.nodes for x in node.inputs if isinstance(x, gs.Constant) and x.name not in there}
    constants = view.constants | {name: x.values for name, x in read.items()}
    graph = model.graph
    for name in dict.fromkeys(name for node in nodes for name in node.input if name in constants):
        value = numpy_helper.from_array(constants[name], name)
        if model.ir_version >= _INITIALIZERS_NEED_NO_INPUT:
            graph.initializer.append(value)
        else:
            graph.node.append(helper.make_node("Constant", [], [name], name, value=value))
    graph.node.extend(nodes)
    graph.value_info.extend(
        _sizes_to_declare(
            graph, g, outputs, there - view.stored.keys(), {name for node in nodes for name in node.output}
        )
    )
    graph.input.extend(_value_info(tensor) for tensor in inputs)
    graph.output.extend(_value_info(tensor) for tensor in outputs)


def _emitted(view: View, nodes: Sequence[gs.Node]) -> Iterator[onnx.NodeProto]:
    """Emitted nodes, and before them the Casts by which they read what the view shows as float32."""
    cast: set[str] = set()
    for node in nodes:
        proto = node_proto(node)
        for index, name in enumerate(proto.input):
            proto.input[index] = view.twins.get(name, name)
            if name not in view.stored or node.op in _READ_SHAPES:
                continue
            shown = f"{SCOPE}/float32/{name}"
            if name not in cast:
                cast.add(name)
                yield helper.make_node("Cast", [proto.input[index]], [shown], shown, to=onnx.TensorProto.FLOAT)
            proto.input[index] = shown
        yield proto


def _beside_the_forward_pass(view: View, nodes: Sequence[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes that read what the model computes in float16 through a Sum of that one tensor.

    ONNX Runtime's CPU provider runs in float32 what it has no float16 kernel for, and does not round between two such
    nodes. A node between them that has one runs in float32 too, unless a reader of it has one as well: Cast and Shape
    do, and would round the forward pass where nothing did. Sum has none.
    """
    halves, read = _computed_in_float16(view), set()
    for node in nodes:
        if node.op_type in _HAVE_FLOAT16 and node.input[0] in halves:
            name = node.input[0]
            node.input[0] = f"{SCOPE}/float16/{name}"
            if name not in read:
                read.add(name)
                yield helper.make_node("Sum", [name], [node.input[0]], node.input[0])
        yield node


def _computed_in_float16(view: View) -> set[str]:
    """The float16 tensors that nodes make of the inputs; what depends on weights alone is folded at load."""
    made: set[str] = set()
    moving = {x.name for x in view.graph.inputs}
    for node in view.graph.nodes:
        if not moving.isdisjoint(input_names(node)):
            made.update(y.name for y in node.outputs)
            moving.update(y.name for y in node.outputs)
    return {name for name in made if view.stored.get(name) == np.float16}


def _sizes_to_declare(
    graph: onnx.GraphProto, g: Emitter, outputs: Sequence[gs.Variable], there: set[str], live: set[str]
) -> list[onnx.ValueInfoProto]:
    """The open sizes of images that the runtime cannot find by itself, so that it sees which tensors have equal sizes.

    It follows the size of the batch until a shape is computed, and no other open size: then what we read is declared
    too, behind what we make.
    """
    told = {value.name for value in (*graph.input, *graph.output, *graph.value_info, *outputs)}
    ours: dict[str, gs.Tensor] = {}
    read: dict[str, gs.Tensor] = {}
    for node in g.nodes:
        made = {y.name: y for y in node.outputs if y.name in live}
        if made and (node.op in _TAKE_SIZES or any(_is_open_image(y, 2) for y in made.values())):
            ours |= made
            read |= {x.name: x for x in node.inputs if x.name in there and _is_open_image(x, 2)}
    return [
        helper.make_tensor_value_info(name, elem_type(tensor.dtype), list(tensor.shape))
        for name, tensor in (ours | read).items()
        if name not in told and _is_open_image(tensor, 0)
    ]


def _is_open_image(tensor: gs.Tensor, first: int) -> bool:
    """Whether the tensor is a float32 [N, C, H, W] of which a size is open, from axis `first` on."""
    if tensor.dtype != np.float32 or tensor.shape is None or len(tensor.shape) != 4:
        return False
    return not is_static(tensor.shape[first:])


def _live(nodes: Sequence[onnx.NodeProto], outputs: Sequence[gs.Variable], there: set[str]) -> list[onnx.NodeProto]:
    """The nodes that make a tensor which the outputs need and the model does not make itself."""
    needed = {tensor.name for tensor in outputs}
    live = []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            live.append(node)
            needed.update({name for name in node.input if name} - there)
    return live[::-1]


def _value_info(tensor: gs.Variable) -> onnx.ValueInfoProto:
    shape = (
        None
        if tensor.shape is None
        else [size if isinstance(size, int) or size.isidentifier() else None for size in tensor.shape]
    )
    return helper.make_tensor_value_info(tensor.name, elem_type(tensor.dtype), shape)
