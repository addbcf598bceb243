"""Reading what a few nodes compute together: known numbers, tests of a sign, choices, bounds.

Nodes that hand a number on as it is (Identity, a Cast between real types) are looked through everywhere: exporters put
them around every activation.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

_UNIFORM_LIMIT = 4096  # a constant larger than this is a weight
_SAME_ELEMENTS = ("Identity", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Transpose")
_FAR = 1e30  # a bound beyond which no activation gets: the largest float32 or float16 spelled out as "none"


class Test(NamedTuple):
    """x > bound where `above`, else x < bound; strict or not."""

    x: gs.Tensor
    bound: float
    above: bool


class Choice(NamedTuple):
    """One tensor where x is above a bound, another where it is below."""

    x: gs.Tensor
    bound: float
    above: gs.Tensor
    below: gs.Tensor


class Clamp(NamedTuple):
    """min(max(x, low), high), by one node or by a Max and a Min; a bound that is None is open."""

    x: gs.Tensor
    low: float | None
    high: float | None
    result: gs.Tensor


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The standard node that computes a tensor."""
    tensor = source(tensor)
    node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
    return node if node is not None and is_standard(node) else None


def source(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor whose numbers these are."""
    while isinstance(tensor, gs.Variable) and tensor.inputs and _hands_on(tensor.inputs[0]):
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that compute with a tensor."""
    for node in tensor.outputs:
        if _hands_on(node):
            yield from readers(node.outputs[0])
        else:
            yield node


def _hands_on(node: gs.Node) -> bool:
    if not is_standard(node) or node.op not in ("Identity", "Cast") or not node.outputs:
        return False
    return node.op == "Identity" or (_is_real(node.inputs[0]) and _is_real(node.outputs[0]))


def _is_real(tensor: gs.Tensor) -> bool:
    return tensor.dtype is not None and np.dtype(tensor.dtype).name in ("float16", "bfloat16", "float32", "float64")


def is_standard(node: gs.Node) -> bool:
    return node.domain in (None, "", "ai.onnx")


def same(a: gs.Tensor, b: gs.Tensor) -> bool:
    return source(a).name == source(b).name


# -- known numbers ------------------------------------------------------------------------------------------------


def number(tensor: gs.Tensor) -> float | None:
    """The one value of a constant, whatever its shape."""
    tensor = source(tensor)
    if not isinstance(tensor, gs.Constant) or not 0 < int(np.prod(tensor.shape)) <= _UNIFORM_LIMIT:
        return None
    values = tensor.values.reshape(-1)
    return float(values[0]) if (values == values[0]).all() else None


def is_zero(tensor: gs.Tensor) -> bool:
    """Whether every element is known to be 0, also where the shape is not known (zeros_like)."""
    while not isinstance(tensor, gs.Constant):
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_standard(node):
            return False
        if node.op == "ConstantOfShape":
            value = node.attrs.get("value")
            return value is None or not np.any(value.values if isinstance(value, gs.Constant) else value)
        if node.op not in _SAME_ELEMENTS:
            return False
        tensor = node.inputs[0]
    return tensor.values.size > 0 and not np.any(tensor.values)


def known(tensor: gs.Tensor) -> float | None:
    """As `number`, and 0 where that is known without the shape."""
    return 0.0 if is_zero(tensor) else number(tensor)


def near(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= 1e-3 * abs(wanted)


def unscaled(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before it was multiplied or divided by a positive constant number."""
    while (node := producer(tensor)) is not None and node.op in ("Mul", "Div"):
        a, b = node.inputs
        if (number(b) or 0) > 0:
            tensor = a
        elif node.op == "Mul" and (number(a) or 0) > 0:
            tensor = b
        else:
            break
    return source(tensor)


# -- tests, choices, bounds ---------------------------------------------------------------------------------------


def test_of(tensor: gs.Tensor) -> Test | None:
    """What a condition, or its Cast to numbers, asks of x."""
    negated = False
    while (node := producer(tensor)) is not None and node.op in ("Cast", "Not"):
        negated ^= node.op == "Not"
        tensor = node.inputs[0]
    if node is None or node.op not in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return None
    (a, b), greater = node.inputs, node.op.startswith("Greater")
    if (bound := known(b)) is not None:
        return Test(a, bound, greater != negated)
    return Test(b, bound, greater == negated) if (bound := known(a)) is not None else None


def choice(node: gs.Node) -> Choice | None:
    """Where(x > bound, a, b), its mirror images, and the sum a (x > bound) + b (x <= bound)."""
    if node.op == "Where":
        test = test_of(node.inputs[0])
        return None if test is None else _choice(test, node.inputs[1], node.inputs[2])
    if node.op != "Add":
        return None
    terms = [_counted(producer(term)) for term in node.inputs]
    if any(term is None for term in terms):
        return None
    (one, a), (other, b) = terms  # type: ignore[misc]
    if not same(one.x, other.x) or one.bound != other.bound or one.above == other.above:
        return None
    return _choice(one, a, b)


def _choice(test: Test, taken: gs.Tensor, otherwise: gs.Tensor) -> Choice:
    return Choice(test.x, test.bound, *((taken, otherwise) if test.above else (otherwise, taken)))


def _counted(node: gs.Node | None) -> tuple[Test, gs.Tensor] | None:
    """A product of a truth value and a tensor."""
    if node is None or node.op != "Mul":
        return None
    for index in (0, 1):
        if (test := test_of(node.inputs[index])) is not None:
            return test, node.inputs[1 - index]
    return None


def clamp(node: gs.Node) -> Clamp | None:
    """The bounds that a Clip sets, or a Max or Min by a constant together with the Min or Max next to it."""
    if node.op == "Clip":
        low, high = (_bound(node, index) for index in (1, 2))
        unknown = any(bound is not None and math.isnan(bound) for bound in (low, high))
        return None if unknown else Clamp(node.inputs[0], low, high, node.outputs[0])
    if (found := _one_bound(node)) is None:
        return None
    outside = list(readers(node.outputs[0]))
    for other, inside in ((producer(found.x), True), (outside[0] if len(outside) == 1 else None, False)):
        if other is None or {node.op, other.op} != {"Max", "Min"} or (second := _one_bound(other)) is None:
            continue
        low, high = (found.low, second.high) if node.op == "Max" else (second.low, found.high)
        return Clamp(second.x, low, high, found.result) if inside else Clamp(found.x, low, high, second.result)
    return found


def _bound(node: gs.Node, index: int) -> float | None:
    """A bound of a Clip: a number, None where it is open, NaN where it is not known."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    value = known(node.inputs[index])
    if value is None:
        return math.nan
    return value if abs(value) < _FAR else None


def _one_bound(node: gs.Node) -> Clamp | None:
    if node.op not in ("Max", "Min") or len(node.inputs) != 2:
        return None
    for index in (0, 1):
        if (bound := known(node.inputs[index])) is not None:
            low, high = (bound, None) if node.op == "Max" else (None, bound)
            return Clamp(node.inputs[1 - index], low, high, node.outputs[0])
    return None


def depends_only_on(tensor: gs.Tensor, x: gs.Tensor, limit: int = 16) -> bool:
    """Whether a tensor is made of x and constants alone, by at most `limit` nodes."""
    waiting, seen = [tensor], set()
    while waiting:
        found = source(waiting.pop())
        if found.is_empty() or isinstance(found, gs.Constant) or same(found, x) or is_zero(found) or found.name in seen:
            continue
        seen.add(found.name)
        node = producer(found)
        if node is None or len(seen) > limit:
            return False
        waiting.extend(node.inputs)
    return True
