"""Which operators ONNX Runtime has a kernel for, from the table of its own documentation."""

import json
from collections.abc import Iterator
from importlib.resources import files

import onnx
from onnx import TensorProto, defs

TABLE = json.loads(files("graphgbp").joinpath("ort_kernels.json").read_text())["providers"]


def type_name(elem_type: int) -> str:
    return {TensorProto.FLOAT: "float", TensorProto.DOUBLE: "double"}.get(
        elem_type, TensorProto.DataType.Name(elem_type).lower()
    )


def has_kernel(provider: str, node: onnx.NodeProto, opset: int, types: dict[str, int]) -> bool:
    """Whether a provider runs this node: an entry for its since_version that takes every input's type."""
    schema = defs.get_schema(node.op_type, opset, node.domain)
    for entry in TABLE[provider].get(node.domain, {}).get(node.op_type, []):
        first, last = entry["opset"]
        if first <= schema.since_version and (last is None or schema.since_version <= last):
            bound = dict(_bindings(node, schema, types))
            if all(kind in entry["types"].get(parameter, [kind]) for parameter, kind in bound.items()):
                return True
    return False


def _bindings(node: onnx.NodeProto, schema: defs.OpSchema, types: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(type parameter, type name) for each input and output; the table names a parameter by letter or by argument."""
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            if name:
                formal = formals[min(index, len(formals) - 1)]
                kind = type_name(types[name])
                yield formal.type_str, kind
                yield formal.name, kind


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor of a model, by ONNX's inference."""
    inferred = onnx.shape_inference.infer_shapes(model)
    graph = inferred.graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info, *graph.output]}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def missing_kernels(provider: str, model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> set[tuple[str, int, str]]:
    """(operator, opset, first input's type) of each node the provider has no kernel for."""
    types = tensor_types(model)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return {
        (node.op_type, opset, type_name(types[node.input[0]]) if node.input else "")
        for node in nodes
        if not has_kernel(provider, node, opset, types)
    }
