"""What a file stores in few bits and the reading view shows as float32: half precision, quantised numbers, pixels.

Rules compute in the types that the view shows. A tensor shown as float32 is read through a Cast, so cotangents and
masks are float32 throughout and have its range, whatever the deployed forward pass computes in.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphgbp.contract import SCOPE
from graphgbp.forms import is_half

Stored = dict[str, np.dtype[Any]]

_SMALL = 1024  # a smaller constant is written as float32, a larger one is cast
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")
_ZERO_POINT = 2  # their input that tells the type


def show_as_float32(graph: gs.Graph, opsets: Mapping[str, int], formed: Collection[str]) -> Stored:
    """Let the tensors that stand for real numbers be float32 in a view; gives the types they are stored in, by name.

    Those are the quantised ones, pixels, and those of half precision. `formed` names the outputs of nodes that were
    seen as plain ones: an integer among them is a quantised number.
    """
    shown: dict[int, gs.Tensor] = {id(x): x for x in _pixels(graph.inputs)}
    for node in graph.nodes:
        quantised = _quantised(node, opsets, formed, shown)
        half = [x for x in [*node.inputs, *node.outputs] if is_half(x)]
        shown.update((id(x), x) for x in [*quantised, *half])
    shown.update((id(x), x) for x in [*graph.inputs, *graph.outputs] if is_half(x))
    twins = {key: _in_float32(x) for key, x in shown.items() if isinstance(x, gs.Constant)}
    for node in graph.nodes if twins else []:
        for index, x in enumerate(node.inputs):
            if id(x) in twins and not (node.op in _QUANTISERS and index == _ZERO_POINT):
                node.inputs[index] = twins[id(x)]
    stored: Stored = {}
    for x in shown.values():
        twin = twins.get(id(x), x)
        if isinstance(twin, gs.Variable):
            stored[twin.name] = np.dtype(x.dtype)
            twin.dtype = np.dtype(np.float32)
    return stored


def _pixels(inputs: Collection[gs.Tensor]) -> list[gs.Tensor]:
    """Inputs of 8-bit integers with channels and positions, where the model has no others of real numbers."""
    if any(
        x.dtype is None or is_half(x) or np.dtype(x.dtype).kind == "f" for x in inputs if not isinstance(x.dtype, int)
    ):
        return []
    eight_bits = (np.dtype(np.uint8), np.dtype(np.int8))
    return [
        x for x in inputs if not isinstance(x.dtype, int) and np.dtype(x.dtype) in eight_bits and len(x.shape or ()) > 2
    ]


def _in_float32(constant: gs.Constant) -> gs.Tensor:
    if int(np.prod(constant.shape)) > _SMALL:
        return gs.Variable(constant.name, constant.dtype, constant.shape)
    return gs.Constant(f"{SCOPE}/float32/{constant.name}", constant.values.astype(np.float32))


def _quantised(
    node: gs.Node, opsets: Mapping[str, int], formed: Collection[str], shown: Mapping[int, gs.Tensor]
) -> Iterator[gs.Tensor]:
    """The quantised tensors that a node makes, and what it reads together with quantised ones."""
    yield from (y for y in node.outputs if _is_integer(y) and (node.op == "QuantizeLinear" or y.name in formed))
    if node.op in _QUANTISERS or not any(_is_integer(x) and id(x) in shown for x in node.inputs):
        return
    if node.op == "Cast":
        yield from (y for y in node.outputs if _is_integer(y))
        return
    try:
        schema = onnx.defs.get_schema(node.op, opsets[""], node.domain or "")
    except onnx.defs.SchemaError:
        return
    kinds = {kind for x, kind in _kinds(node.inputs, schema.inputs) if id(x) in shown and _is_integer(x)}
    for tensors, formals in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        yield from (x for x, kind in _kinds(tensors, formals) if kind in kinds and _is_integer(x))


def _kinds(tensors: Iterable[gs.Tensor], formals: Any) -> Iterator[tuple[gs.Tensor, str]]:
    """Each tensor with the type parameter that ONNX binds it to."""
    for index, tensor in enumerate(tensors):
        if not tensor.is_empty() and formals:
            yield tensor, formals[min(index, len(formals) - 1)].type_str


def _is_integer(x: gs.Tensor) -> bool:
    return not (x.is_empty() or x.dtype is None or isinstance(x.dtype, int)) and is_quantised(np.dtype(x.dtype))


def is_quantised(kind: np.dtype[Any]) -> bool:
    """Whether a stored type is one of quantised numbers, not of half precision."""
    return kind.kind in "iu" or kind.name in ("int4", "uint4", "int2", "uint2")


def counts_steps(x: gs.Tensor, stored: Stored) -> bool:
    """Whether a tensor holds the integers of a quantised one, and not what they stand for."""
    while x.name not in stored or stored[x.name].kind not in "iu":
        if not x.inputs or x.inputs[0].op not in ("Cast", "Sub"):
            return False
        x = x.inputs[0].inputs[0]
    return True


def real_of(x: gs.Tensor, stored: Stored) -> gs.Tensor | None:
    """What the integers of a tensor stand for, as a node behind it makes it; None where none does."""
    waiting = [x]
    while waiting:
        for node in waiting.pop(0).outputs:
            if node.op == "DequantizeLinear" or (node.op == "Mul" and counts_steps(node.inputs[0], stored)):
                return node.outputs[0]
            if node.op in ("Cast", "Sub"):
                waiting.append(node.outputs[0])
    return None


def before_quantiser(x: gs.Tensor, stored: Stored) -> gs.Tensor:
    """What a quantiser rounds to make what x stands for; x itself where it is no dequantised tensor."""
    found = x
    while found.inputs and found.inputs[0].op in ("DequantizeLinear", "Mul", "Sub", "Cast"):
        found = found.inputs[0].inputs[0]
        if found.name in stored and stored[found.name].kind in "iu":
            quantiser = found.inputs[0] if found.inputs else None
            return quantiser.inputs[0] if quantiser is not None and quantiser.op == "QuantizeLinear" else x
    return x
