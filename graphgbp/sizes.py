"""Sizes that a network computes while it runs, followed as symbols.

Exporters spell a dynamic Reshape, Expand or Resize by arithmetic on Shape: take the batch, multiply it, put it beside
known numbers. Followed element by element, that arithmetic tells the shape: a batch stays the batch through all of it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import symbols
from graphgbp.shapes import is_static

_LIMIT = 64  # a tensor with more elements holds no sizes

_EXACT = 2**24  # a whole number below this is exact in float32
_TYPES = [np.dtype(kind) for kind in (np.int32, np.int64, np.bool_, np.float32, np.float64)]

Values = Sequence[np.ndarray]


class Sizes:
    """What the small integer tensors of a graph hold: arrays of ints, symbols, and None where nothing is known."""

    def __init__(self) -> None:
        self._values: dict[str, np.ndarray] = {}

    def of(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The elements of a tensor of sizes; None where it is none, or nothing is known of it."""
        if not isinstance(tensor, gs.Constant):
            return self._values.get(tensor.name)
        if not _holds_sizes(tensor) or not _are_whole(tensor.values):
            return None
        return tensor.values.astype(np.int64).astype(object)

    def known(self, tensor: gs.Tensor) -> np.ndarray | None:
        """The value of a tensor of sizes that are all known."""
        value = self._values.get(tensor.name)
        if value is None or not is_static(tuple(value.flat)) or np.issubdtype(tensor.dtype, np.floating):
            return None
        return value.astype(tensor.dtype)

    def follow(self, node: gs.Node) -> None:
        """Work out what a node makes of sizes."""
        rule = _RULES.get(node.op) if node.domain in (None, "", "ai.onnx") and len(node.outputs) == 1 else None
        if rule is None or not _holds_sizes(node.outputs[0]):
            return
        given = [self.of(x) for x in node.inputs] if node.op not in ("Shape", "Size") else [_shape(node.inputs[0])]
        known = [value for value in given if value is not None]
        if len(known) == len(given):
            found = rule(node, known)
            if found is not None and any(size is not None for size in found.flat):
                self._values[node.outputs[0].name] = found.reshape(node.outputs[0].shape)


def _holds_sizes(tensor: gs.Tensor) -> bool:
    """Whether a tensor is small; one of real numbers may hold sizes on their way to other sizes."""
    return tensor.dtype in _TYPES and is_static(tensor.shape) and int(np.prod(tensor.shape)) <= _LIMIT


def _are_whole(values: np.ndarray) -> bool:
    """Whether numbers are whole and exact; integers of any size are, the end of a Slice among them."""
    if not np.issubdtype(values.dtype, np.floating):
        return True
    return bool((np.abs(values) < _EXACT).all() and (np.rint(values) == values).all())


def _shape(tensor: gs.Tensor) -> np.ndarray | None:
    return None if tensor.shape is None else np.array([*tensor.shape], object)


def _part_of_shape(node: gs.Node, values: Values) -> np.ndarray:
    return values[0][node.attrs.get("start", 0) : node.attrs.get("end")]


def _gather(node: gs.Node, values: Values) -> np.ndarray | None:
    data, indices = values
    if data.ndim != 1 or not all(isinstance(index, int) and -data.size <= index < data.size for index in indices.flat):
        return None
    return data[indices.astype(np.int64).reshape(-1)]


def _slice(node: gs.Node, values: Values) -> np.ndarray | None:
    data, *bounds = values
    known = [bound[0] for bound in bounds if bound.size == 1 and isinstance(bound[0], int)]
    if data.ndim != 1 or len(known) < len(bounds):
        return None
    return data[known[0] : known[1] : known[3] if len(known) > 3 else 1]


def _divided(node: gs.Node, values: Values) -> np.ndarray:
    """Whole numbers round down, real ones must divide."""
    whole = np.issubdtype(node.outputs[0].dtype, np.integer)
    return _by_element(symbols.over if whole else symbols.quotient)(node, values)


def _concat(node: gs.Node, values: Values) -> np.ndarray:
    return np.concatenate(values, node.attrs["axis"])


def _product(node: gs.Node, values: Values) -> np.ndarray:
    return np.array(symbols.product(list(values[0].flat)), object)


def _filled(node: gs.Node, values: Values) -> np.ndarray:
    value = node.attrs.get("value")
    number = 0.0 if value is None else float(np.asarray(value.values).reshape(-1)[0])
    return np.full(node.outputs[0].shape, int(number) if number.is_integer() else None, object)


def _by_element(function: Callable[..., symbols.Open]) -> Callable[[gs.Node, Values], np.ndarray]:
    every = np.frompyfunc(function, function.__code__.co_argcount, 1)
    return lambda node, values: np.array(every(*values), object)


def _same(node: gs.Node, values: Values) -> np.ndarray:
    return values[0]


_RULES: dict[str, Callable[[gs.Node, Values], Any]] = {
    "Shape": _part_of_shape,
    "Size": _product,
    "Gather": _gather,
    "Slice": _slice,
    "Concat": _concat,
    "ConstantOfShape": _filled,
    **dict.fromkeys(("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Floor", "Ceil", "Round"), _same),
    "Add": _by_element(symbols.plus),
    "Sub": _by_element(symbols.minus),
    "Mul": _by_element(symbols.times),
    "Div": _divided,
    "Equal": _by_element(symbols.equal),
    "Where": _by_element(symbols.chosen),
}
