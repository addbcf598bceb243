"""The type of every tensor of a model: of the whole graph by ONNX's inference, and finer ones node by node."""

from math import prod

import onnx
import onnx_graphsurgeon as gs
from onnx import helper, shape_inference

from graphgbp.emit import type_of
from graphgbp.errors import ModelFileError
from graphgbp.folding import FOLD_LIMIT, has_graph, is_small
from graphgbp.nodes import label, node_proto
from graphgbp.shapes import TensorType, from_proto, infer_node
from graphgbp.sizes import Sizes


def skeleton(model: onnx.ModelProto, limit: int = FOLD_LIMIT) -> onnx.ModelProto:
    """The model with every large or sparse weight replaced by an input of its type: small, and of the same shapes."""
    small = onnx.ModelProto(ir_version=max(model.ir_version, 4), producer_name=model.producer_name)
    small.opset_import.extend(model.opset_import)
    small.functions.extend(model.functions)
    graph = small.graph
    graph.name = model.graph.name or "graph"
    large = large_weights(model, limit)
    graph.node.extend(node for node in model.graph.node if large.keys().isdisjoint(node.output))
    graph.output.extend(model.graph.output)
    sparse = {scattered.values.name: scattered for scattered in model.graph.sparse_initializer}
    initializers = {tensor.name for tensor in model.graph.initializer} | sparse.keys()
    graph.input.extend(value for value in model.graph.input if value.name not in initializers)
    for name, tensor in large.items():
        graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    for name, scattered in sparse.items():
        graph.input.append(helper.make_tensor_value_info(name, scattered.values.data_type, scattered.dims))
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name not in large)
    return small


def large_weights(model: onnx.ModelProto, limit: int = FOLD_LIMIT) -> dict[str, onnx.TensorProto]:
    """The weights of more than `limit` elements in the main graph, initializers and Constant nodes, by name."""
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            named.update((node.output[0], entry.t) for entry in node.attribute if entry.name == "value")
    return {name: tensor for name, tensor in named.items() if prod(tensor.dims) > limit}


def type_outputs(node: gs.Node, opsets: dict[str, int], known: dict[str, TensorType], sizes: Sizes) -> None:
    outputs = [tensor for tensor in node.outputs if tensor.name and isinstance(tensor, gs.Variable)]
    types = _node_types(node, opsets, known, sizes) if outputs else {}
    for tensor in outputs:
        kind = types.get(tensor.name) or known.get(tensor.name)
        if kind is not None:
            tensor.dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if kind is not None and kind.shape is not None:
            tensor.shape = tuple(kind.shape)
        elif tensor.shape is not None:
            tensor.shape = sizes_as_declared(tensor)


def sizes_as_declared(tensor: gs.Tensor) -> tuple[int | str, ...]:
    return tuple(
        size if (isinstance(size, str) and size) or (isinstance(size, int) and size >= 0) else f"{tensor.name}:{axis}"
        for axis, size in enumerate(tensor.shape)
    )


def whole_graph_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    bare = skeleton(model)
    for output in bare.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(bare, data_prop=True)
    except shape_inference.InferenceError as error:
        raise ModelFileError(
            f"ONNX finds the model's shapes inconsistent: {error}; repair the file or its export"
        ) from None
    graph = inferred.graph
    return {
        value.name: _with_symbols(value.name, from_proto(value.type))
        for value in [*graph.value_info, *graph.output]
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type
    }


def _with_symbols(name: str, kind: TensorType) -> TensorType:
    if kind.shape is None:
        return kind
    return TensorType(
        kind.elem_type,
        tuple(size if size != "" else f"{name}:{axis}" for axis, size in enumerate(kind.shape)),
    )


def _node_types(
    node: gs.Node, opsets: dict[str, int], known: dict[str, TensorType], sizes: Sizes
) -> dict[str, TensorType]:
    """Types by inference of the node alone, whose symbols are finer than the whole graph's."""
    domain = node.domain or ""
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if has_graph(node) or domain not in opsets or any(tensor.dtype is None for tensor in inputs):
        return {}
    types = {tensor.name: type_of(tensor) for tensor in inputs}
    values = {tensor.name: tensor.values for tensor in inputs if is_small(tensor)}
    try:
        held = {tensor.name: value for tensor in inputs if (value := sizes.of(tensor)) is not None}
        return infer_node(node_proto(node), opsets[domain], types, values, known, held)
    except (onnx.defs.SchemaError, onnx.checker.ValidationError):  # not for this opset, or not as ONNX would have it
        return {}
    except shape_inference.InferenceError as error:
        raise ModelFileError(
            f"node '{label(node)}' ({node.op}) does not fit its inputs: {str(error).strip()}; "
            "repair the file or its export"
        ) from None
