"""How a file was deployed: by what, in which precision, how it is quantised, and what in it is fused."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphgbp.model_file import tensor_names
from graphgbp.plain.chains import AGAIN
from graphgbp.plain.units import copy_of
from graphgbp.stored import is_quantised
from graphgbp.view import View

_STATIC = ("QLinear", "QGemm", "QAttention")
_DYNAMIC = ("Dynamic", "ConvInteger", "MatMulInteger")
_WEIGHTS = ("DequantizeLinear", "MatMulNBits", "GatherBlockQuantized")


def origin(model: onnx.ModelProto) -> dict[str, Any]:
    """What wrote the file, and the opset of each domain."""
    return {
        "producer": {"name": model.producer_name, "version": model.producer_version},
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
    }


def deployed(model: onnx.ModelProto, view: View) -> dict[str, Any]:
    """What a model computes in: an Inspection's `precision`, `quantisation`, `fused` and `recomputed`."""
    return {
        "precision": _precision(model, view),
        "quantisation": _quantisation(model, view),
        "fused": _counted(op for op, _ in set(view.standing_for.values()) if op != "QuantizeLinear"),
        "recomputed": _recomputed(view),
    }


def _counted(words: Iterable[str]) -> dict[str, int]:
    """Most frequent first."""
    return dict(sorted(Counter(words).items(), key=lambda entry: (-entry[1], entry[0])))


def _made(model: onnx.ModelProto, view: View) -> list[np.dtype[Any]]:
    """The types of the tensors that the file's nodes make of its inputs, those in main graph alone."""
    there = tensor_names(model)
    tensors = {y.name: y for node in view.graph.nodes for y in node.outputs if isinstance(y, gs.Variable)}
    kinds = [view.stored.get(name, y.dtype) for name, y in tensors.items() if name in there]
    return [np.dtype(kind) for kind in kinds if kind is not None and not isinstance(kind, int)]


def _precision(model: onnx.ModelProto, view: View) -> dict[str, Any]:
    """float32, float16, bfloat16, another, or mixed; and how many tensors are made in each."""
    names = _counted(kind.name for kind in _made(model, view) if "float" in kind.name)
    return {"type": next(iter(names)) if len(names) == 1 else "mixed" if names else None, "tensors": names}


def _quantisation(model: onnx.ModelProto, view: View) -> dict[str, Any] | None:
    ops = [node.op_type for node in model.graph.node]
    quantised = _counted(op for op in ops if op == "QuantizeLinear" or op.startswith((*_STATIC, *_DYNAMIC, *_WEIGHTS)))
    if not quantised:
        return None
    kinds = {
        "QOperator": any(op.startswith(_STATIC) for op in ops),
        "dynamic": any(op.startswith(_DYNAMIC) for op in ops),
    }
    kinds["QDQ"] = not kinds["QOperator"] and "QuantizeLinear" in ops
    forms = [form for form in ("QDQ", "QOperator", "dynamic") if kinds[form]] or ["weights only"]
    made = {kind.name for kind in _made(model, view) if is_quantised(kind) and kind.itemsize <= 2}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    held = {kind for node in model.graph.node if node.op_type in quantised for kind in _weights(node, tensors)}
    activations = made & {kind.name for kind in view.stored.values()}
    return {"form": forms, "weights": sorted(held), "activations": sorted(activations), "operators": quantised}


def _weights(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> Iterator[str]:
    """The types of the quantised weights that a node reads; zero points and biases are none."""
    bits = next((attribute.i for attribute in node.attribute if attribute.name == "bits"), None)
    if bits:
        yield f"uint{bits}"
        return
    for tensor in (tensors[name] for name in node.input if name in tensors):
        kind = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        if len(tensor.dims) > 1 and is_quantised(kind) and kind.itemsize <= 2:
            yield kind.name


def _recomputed(view: View) -> dict[str, int]:
    """How many nodes a gradient that needs them computes again, by what they belong to."""
    formed = {y.name for node in view.graph.nodes if id(node) in view.standing_for for y in node.outputs}
    again = {*view.twins.values(), *map(copy_of, view.twins)}
    return _counted(_belongs_to(node, formed, again) for node in view.recomputed)


def _belongs_to(node: onnx.NodeProto, formed: Collection[str], again: Collection[str]) -> str:
    if not set(node.output).isdisjoint(formed):
        return "fused or quantised nodes"
    if any(name in again or name.startswith(f"{AGAIN}/") for name in node.output):
        return "integer units"
    return "functions and branches"
