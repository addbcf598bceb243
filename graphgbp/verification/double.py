"""A model evaluated in double precision, by ONNX's own reference evaluator: no code of ONNX Runtime or of ours.

Central differences need it: in float32 a step small enough to cross no kink of a ReLU drowns in rounding.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphgbp.equivalence import Feeds, one_line
from graphgbp.verification.reference import OPERATORS
from graphgbp.weights import external_tensors

_NARROW = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_TYPES = {"to", "dtype"}
_VALUES = {"value_float", "value_floats"}
_MODES = {
    b"bilinear": b"linear",
    b"bicubic": b"cubic",
}  # GridSample's before opset 20, which the evaluator does not know


class DoubleError(Exception):
    """The reference evaluator cannot run the model; the text says why, on one line."""


class DoubleModel:
    """A model whose float tensors are double. Raises DoubleError where it cannot be evaluated.

    `operators` are further ones in place of the reference evaluator's.
    """

    def __init__(self, model: onnx.ModelProto, operators: Sequence[Any] = ()) -> None:
        if external_tensors(model):
            raise DoubleError("the weights are too large to be read in")
        try:
            self._evaluator = ReferenceEvaluator(in_double(model), new_ops=list[Any]([*OPERATORS, *operators]))
        except Exception as error:  # it raises whatever its operators raise
            raise DoubleError(one_line(error)[:300]) from None

    def run(self, names: Sequence[str], feeds: Feeds) -> list[np.ndarray]:
        """The named tensors. Float feeds count as double; those the model has no input for are left out."""
        taken = {name: feeds[name] for name in self._evaluator.input_names if name in feeds}
        wide = {name: x.astype(np.float64) if x.dtype.kind in "fV" else x for name, x in taken.items()}
        try:
            with np.errstate(all="ignore"):
                return [np.asarray(value) for value in self._evaluator.run(list(names), wide)]
        except Exception as error:
            raise DoubleError(one_line(error)[:300]) from None


def in_double(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose weights, constants, casts and declared types are double where they were narrower floats."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for graph in _graphs(copy.graph):
        for tensor in graph.initializer:
            _widen(tensor)
        for value in [*graph.input, *graph.output]:
            kind = value.type.tensor_type
            if kind.elem_type in _NARROW:
                kind.elem_type = TensorProto.DOUBLE
        _widen_nodes(graph.node)
    for function in copy.functions:
        _widen_nodes(function.node)
    return copy


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for attribute in (attribute for node in graph.node for attribute in node.attribute):
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            yield from _graphs(inner)


def _widen_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i in _NARROW:
                attribute.i = TensorProto.DOUBLE
            if attribute.HasField("t"):
                _widen(attribute.t)
            if node.op_type == "GridSample" and attribute.s in _MODES:
                attribute.s = _MODES[attribute.s]
            if node.op_type == "Constant" and attribute.name in _VALUES:
                value = np.asarray(helper.get_attribute_value(attribute), np.float64)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type in _NARROW:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
