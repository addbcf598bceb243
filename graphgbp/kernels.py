"""Which operators ONNX Runtime has a kernel for on the CPU and on CUDA, from the table of its own documentation."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import onnx
from onnx import TensorProto, defs, shape_inference

_CPU = "CPUExecutionProvider"
PROVIDERS = (_CPU, "CUDAExecutionProvider")


@cache
def _table() -> dict[str, Any]:
    return dict(json.loads(files("graphgbp").joinpath("ort_kernels.json").read_text("utf-8"))["providers"])


def missing_kernels(provider: str, model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Those of the nodes that a provider has no kernel for, at the model's opset and with its tensors' types."""
    types = tensor_types(model)
    opsets = {_plain(entry.domain): entry.version for entry in model.opset_import}
    return [node for node in nodes if not has_kernel(provider, node, opsets, types)]


def has_kernel(provider: str, node: onnx.NodeProto, opsets: Mapping[str, int], types: Mapping[str, int]) -> bool:
    """Whether a provider runs this node: an entry for its since_version that takes every input's type.

    The CPU provider runs a float16 node that it has no kernel for in float32.
    An input or output whose type is not known is not held against it. A Constant needs no kernel.
    """
    domain = _plain(node.domain)
    if not domain and node.op_type == "Constant":
        return True
    try:
        schema = defs.get_schema(node.op_type, opsets.get(domain, 0), domain)
    except defs.SchemaError:
        return False
    for entry in _table()[provider].get(domain, {}).get(node.op_type, []):
        first, last = entry["opset"]
        if first <= schema.since_version and (last is None or schema.since_version <= last):
            bound = list(_bindings(node, schema, types))
            if _takes(entry, bound) or (provider == _CPU and _takes(entry, _in_float32(bound))):
                return True
    return False


def _takes(entry: Mapping[str, Any], bound: Iterable[tuple[str, str]]) -> bool:
    return all(kind in entry["types"].get(parameter, [kind]) for parameter, kind in bound)


def _in_float32(bound: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(parameter, "float" if kind == "float16" else kind) for parameter, kind in bound]


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor of a model, by ONNX's inference."""
    graph = shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values if value.type.HasField("tensor_type")}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def type_name(elem_type: int) -> str:
    """An element type as the table spells it."""
    return TensorProto.DataType.Name(elem_type).lower()


def _bindings(node: onnx.NodeProto, schema: defs.OpSchema, types: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(type parameter, type name) for each input and output; the table names a parameter by letter or by argument."""
    for names, formals in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for index, name in enumerate(names):
            if types.get(name):
                formal = formals[min(index, len(formals) - 1)]
                kind = type_name(types[name])
                yield formal.type_str, kind
                yield formal.name, kind


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
