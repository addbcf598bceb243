"""Curves: what a few elementwise nodes compute together of one tensor, read from its values.

There is no end of ways to write one function, so it is not the nodes that are compared but what they give at points.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.patterns import clamp, is_zero, known, producer, readers, source

_LIMIT = 16  # nodes in a curve, at most
_TOLERANCE = 1e-5
_NEAR = np.array([-8.0, -3.0, -1.0, -0.3, -0.01, -0.0001, 0.0001, 0.01, 0.3, 1.0, 3.0, 8.0])
_FAR = np.array([-40.0, -20.0, 20.0, 40.0])  # where exp does not overflow yet


def _clipped(node: gs.Node, x: Any, *_: Any) -> Any:
    bounds = clamp(node)
    if bounds is None:
        raise _Unknown
    low, high = (-np.inf if bounds.low is None else bounds.low), (np.inf if bounds.high is None else bounds.high)
    return np.minimum(np.maximum(x, low), high)


_BY_VALUE: dict[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Max": lambda *values: np.max(np.broadcast_arrays(*values), axis=0),
    "Min": lambda *values: np.min(np.broadcast_arrays(*values), axis=0),
    "Sum": lambda *values: sum(values),
    "Neg": np.negative,
    "Abs": np.abs,
    "Sign": np.sign,
    "Exp": np.exp,
    "Log": np.log,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Relu": lambda x: np.maximum(x, 0),
    "Tanh": np.tanh,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Softplus": lambda x: np.logaddexp(x, 0),
    "Where": np.where,
    "Greater": np.greater,
    "GreaterOrEqual": np.greater_equal,
    "Less": np.less,
    "LessOrEqual": np.less_equal,
    "Not": np.logical_not,
    "IsNaN": np.isnan,
    "Cast": lambda x: np.asarray(x, np.float64),
}
_ELEMENTWISE = {*_BY_VALUE, "Clip", "Erf", "Elu", "Celu", "Selu", "LeakyRelu", "HardSigmoid", "HardSwish"}
_CONDITIONS = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "IsNaN", "Cast", "Sign"}


class _Unknown(Exception):
    """The values are not known: a constant that is not one number, an operator that is only known by name."""


class Curve(NamedTuple):
    """A node that gives a function of x alone, elementwise, and the nodes between them."""

    node: gs.Node
    x: gs.Tensor
    inner: tuple[gs.Node, ...]

    @property
    def bounds(self) -> list[gs.Node]:
        """Its parts that are max(x, 0) or min(x, 0), of any x."""
        return [node for node in self.inner if node.op == "Relu" or _at_zero(node)]

    def encloses(self, nodes: Iterable[gs.Node]) -> bool:
        """Whether nothing else reads what the nodes give."""
        inside = {id(self.node), *map(id, self.inner)}
        return all(id(reader) in inside for node in nodes for reader in readers(node.outputs[0]))

    def slope_of_relu(self) -> float | None:
        """a > 0 where the curve is a max(x, 0)."""
        values = self._at(_NEAR)
        if values is None or not (slope := values[-1] / _NEAR[-1]) > 0:
            return None
        return float(slope) if _equal(values, slope * np.maximum(_NEAR, 0)) else None

    def is_softplus(self) -> bool:
        values = self._at(_NEAR)
        return values is not None and _equal(values, np.logaddexp(_NEAR, 0))

    def bends(self) -> bool:
        """Whether it is a straight line at either far end, rises at the right, and less or not at all at the left."""
        values = self._at(_FAR)
        if values is None:
            return False
        left, right = ((values[high] - values[low]) / (_FAR[high] - _FAR[low]) for low, high in ((0, 1), (2, 3)))
        return bool(
            right > 0 and -0.02 * right < left < 0.98 * right and abs(values[3] / _FAR[3] - right) < 0.1 * right
        )

    def shrinks(self) -> bool:
        """Whether it is 0 around x = 0 and rises at either side, as much at the left as at the right."""
        around, far = self._at(_NEAR[np.abs(_NEAR) < 0.1]), self._at(_FAR)
        return around is not None and far is not None and not around.any() and bool(far[3] > 0 and far[0] == -far[3])

    def route(self) -> tuple[tuple[gs.Node, int], ...]:
        """The shortest way from the node back to x, as (node, index of its input)."""
        waiting: list[tuple[gs.Node, tuple[tuple[gs.Node, int], ...]]] = [(self.node, ())]
        for node, way in waiting:
            for index, tensor in enumerate(node.inputs):
                if source(tensor) is source(self.x):
                    return (*way, (node, index))
                maker = producer(tensor)
                if maker is not None and maker.op not in _CONDITIONS and any(maker is inner for inner in self.inner):
                    waiting.append((maker, (*way, (node, index))))
        return ()

    def _at(self, points: np.ndarray) -> np.ndarray | None:
        """Its values; None where they are not known or not finite."""
        try:
            with np.errstate(all="ignore"):
                values = np.asarray(_value(source(self.node.outputs[0]), {source(self.x).name: points}), np.float64)
        except _Unknown:
            return None
        return values if values.shape == points.shape and np.isfinite(values).all() else None


def is_joined(node: gs.Node) -> bool:
    """Whether a node brings two tensors together that are not constants."""
    return sum(known(tensor) is None and not isinstance(source(tensor), gs.Constant) for tensor in node.inputs) > 1


def curves(node: gs.Node) -> Iterator[Curve]:
    """The curves that end at a node, that of the nearest x first.

    All ways back lead through x, so none is found behind the first tensor at which a way ends.
    """
    waiting = [node]
    seen: set[str] = set()
    for reader in waiting:
        for tensor in map(source, reader.inputs):
            if _is_constant(tensor) or tensor.name in seen or len(seen) > _LIMIT:
                continue
            seen.add(tensor.name)
            inner = _between(node, tensor)
            if inner is not None:
                yield Curve(node, tensor, tuple(inner))
            maker = producer(tensor)
            if maker is None or maker.op not in _ELEMENTWISE:
                return
            waiting.append(maker)


def _is_constant(tensor: gs.Tensor) -> bool:
    return tensor.is_empty() or isinstance(tensor, gs.Constant) or is_zero(tensor)


def _between(node: gs.Node, x: gs.Tensor) -> list[gs.Node] | None:
    """The nodes that make the node's inputs of x and constants; None where more than x goes into them."""
    waiting: list[gs.Node] = [node]
    found: dict[str, gs.Node] = {}
    for reader in waiting:
        for tensor in map(source, reader.inputs):
            if tensor is x or _is_constant(tensor) or tensor.name in found:
                continue
            maker = producer(tensor)
            if maker is None or maker.op not in _ELEMENTWISE or len(found) >= _LIMIT:
                return None
            found[tensor.name] = maker
            waiting.append(maker)
    return list(found.values())


def _at_zero(node: gs.Node) -> bool:
    found = clamp(node)
    return found is not None and 0 in (found.low, found.high)


def _rounds(node: gs.Node) -> bool:
    dtype = node.outputs[0].dtype
    return node.op == "Cast" and (dtype is None or np.issubdtype(dtype, np.integer))


def _value(tensor: gs.Tensor, values: dict[str, Any]) -> Any:
    tensor = source(tensor)
    if tensor.name in values:
        return values[tensor.name]
    if _is_constant(tensor):
        if (constant := known(tensor)) is None:
            raise _Unknown
        return constant
    node = producer(tensor)
    if node is None or node.op not in {*_BY_VALUE, "Clip"} or _rounds(node):
        raise _Unknown
    operands = [_value(each, values) for each in node.inputs if not each.is_empty()]
    values[tensor.name] = _clipped(node, *operands) if node.op == "Clip" else _BY_VALUE[node.op](*operands)
    return values[tensor.name]


def _equal(values: np.ndarray, wanted: np.ndarray) -> bool:
    return np.allclose(values, wanted, rtol=1e-4, atol=_TOLERANCE)
