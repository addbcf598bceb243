"""Smooth and leaky activations, whole or as exporters write them out.

    LeakyRelu, PRelu    Where(x > 0, x, a x), Max(x, a x), max(x, 0) + a min(x, 0), a x + b max(x, 0)
    ThresholdedRelu     Where(x > c, x, 0)
    Elu, Selu, Celu     Where(x > 0, x, f(x)), max(x, 0) + f(min(x, 0)), max(x, 0) + min(f(x), 0)
    Softplus            Where(x > 20, x, Softplus(x)), max(x, 0) + log(1 + exp(-|x|))
    Shrink              max(x - c, 0) - max(-x - c, 0), Where(x > c, x - c, 0) + Where(x < -c, x + c, 0)
    Squareplus          x + sqrt(x^2 + b)
    Gelu, Swish, HardSwish, Mish     x times a gate that rises with x

A sum of two functions of x is one of these where either has a max(x, 0) or min(x, 0) inside, or where by its values it
bends from one slope into a larger one or is 0 around 0 alone; a multiple of max(x, 0) is not (graphgbp.rectifiers). No
guided rule was published for them: guided backpropagation passes their true gradient unless asked to mask them.

Sigmoid, HardSigmoid, Tanh and Softsign are gates and squashing functions: they always have their true gradient and are
not counted. Of a HardSigmoid that is written out the Clip is a look-alike.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_graphsurgeon as gs

from graphgbp import patterns
from graphgbp.curves import curves, is_joined
from graphgbp.nodes import label
from graphgbp.patterns import is_standard, is_zero, number, producer, readers, same, source, unscaled

_QUANTISERS = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class Activation:
    """A node that completes an activation of x, or that only looks like one.

    `clothing` says how it is written and `reason` why it counts as what it does; `parts` are nodes inside it that
    would be activations if they stood alone; `vanishes` says that its derivative is 0 wherever x <= 0, at ties too;
    `route` leads back to x through a ReLU of several nodes, as (node, index of its input).
    """

    node: gs.Node
    x: gs.Tensor
    clothing: str
    reason: str
    parts: tuple[gs.Node, ...] = ()
    vanishes: bool = False
    route: tuple[tuple[gs.Node, int], ...] = ()

    def describe(self) -> dict[str, str]:
        name = self.node.outputs[0].name
        return {"node": label(self.node), "tensor": name, "clothing": self.clothing, "reason": self.reason}


Finder = Callable[[gs.Node], Activation | None]


def find_smooth(nodes: Iterable[gs.Node]) -> list[Activation]:
    """Smooth and leaky activations among nodes, in order: activations with no published guided rule."""
    found = [activation for node in nodes if (activation := _recognise(node))]
    inside = {id(part) for activation in found for part in activation.parts}
    return [activation for activation in found if id(activation.node) not in inside]


def _recognise(node: gs.Node) -> Activation | None:
    finder = _FINDERS.get(node.op)
    return finder(node) if finder and is_standard(node) and node.outputs else None


def _operator(node: gs.Node) -> Activation:
    return Activation(node, node.inputs[0], node.op, "no guided rule was published for it")


def _leaky(node: gs.Node) -> Activation | None:
    return None if node.attrs.get("alpha") == 0 else _operator(node)


def _prelu(node: gs.Node) -> Activation | None:
    return None if is_zero(node.inputs[1]) else _operator(node)


def _max(node: gs.Node) -> Activation | None:
    """Max(x, a x)"""
    if len(node.inputs) != 2:
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        if unscaled(other).name == source(x).name != source(other).name:
            return Activation(node, x, "Max(x, a x)", "leaky: a slope on either side of 0")
    return None


def _choice(node: gs.Node) -> Activation | None:
    """x above a bound, something else of x below."""
    found = patterns.choice(node)
    if found is None or found.bound < 0 or not same(unscaled(found.above), unscaled(found.x)):
        return None
    x, written = unscaled(found.x), "Where(x > 0, x, {})"
    if found.bound > 0 and is_zero(found.below):
        clothing, reason, parts = f"Where(x > {found.bound:g}, x, 0)", "a threshold above 0: ThresholdedRelu", ()
    elif (softplus := _softplus(found.below)) is not None and same(softplus.x, x):
        clothing, reason = f"Where(x > {found.bound:g}, x, Softplus(x))", "Softplus, computed as x where that is exact"
        parts = softplus.parts
    elif found.bound > 0 or patterns.known(found.below) is not None or not patterns.depends_only_on(found.below, x):
        return None
    elif same(unscaled(found.below), x):
        clothing, reason, parts = written.format("a x"), "leaky: a slope on either side of 0", ()
    else:
        clothing, reason, parts = written.format("f(x)"), "smooth: another function of x where it is negative", ()
    products = tuple(term for tensor in node.inputs if node.op == "Add" and (term := producer(tensor)))
    return Activation(node, x, clothing, reason, (*parts, *products))


def _sum(node: gs.Node) -> Activation | None:
    """f(x) + g(x), where that is leaky or smooth and no ReLU."""
    if (found := _choice(node) if node.op == "Add" else None) is not None:
        return found
    curve = next(curves(node), None) if is_joined(node) else None
    if curve is None or not curve.encloses(curve.bounds) or curve.slope_of_relu() is not None:
        return None
    if curve.is_softplus():
        clothing, reason = "max(x, 0) + log(1 + exp(-|x|))", "Softplus, written so that it does not overflow"
    elif curve.bounds:
        clothing, reason = _written(node), "leaky or smooth: max(x, 0) is only a part of it"
    elif curve.bends():
        clothing, reason = _written(node), "leaky or smooth: it bends from one slope into a larger one"
    elif curve.shrinks():
        clothing, reason = _written(node), "leaky or smooth: it is 0 around x = 0 alone"
    else:
        return None
    return Activation(node, curve.x, clothing, reason, curve.inner)


def _written(node: gs.Node) -> str:
    return f"f(x) {'+' if node.op == 'Add' else '-'} g(x)"


def _negated(node: gs.Node) -> Activation | None:
    """-min(-x, -a x)"""
    curve = next((curve for curve in curves(node) if curve.slope_of_relu() is None and curve.bends()), None)
    if curve is None or not any(inner.op == "Min" for inner in curve.inner):
        return None
    return Activation(node, curve.x, "-min(-x, -a x)", "leaky: a slope on either side of 0", curve.inner)


class _Inside(NamedTuple):
    """What a tensor is of x, and the nodes in it that would be activations if they stood alone."""

    x: gs.Tensor
    parts: tuple[gs.Node, ...]


# -- x times a gate -----------------------------------------------------------------------------------------------


def _gated(node: gs.Node) -> Activation | None:
    """A constant factor may stand anywhere."""
    for index in (0, 1):
        x, gate = node.inputs[index], _gate(node.inputs[1 - index])
        if gate is not None and same(gate.x, unscaled(x)):
            clothing, reason = f"x * {gate.name}(x)", f"{_SMOOTH_NAMES[gate.name]}, written as x times its gate"
            return Activation(node, x, clothing, reason, gate.parts)
    return None


class _Gate(NamedTuple):
    name: str
    x: gs.Tensor
    parts: tuple[gs.Node, ...] = ()


_SMOOTH_NAMES = {
    "Sigmoid": "SiLU or Swish",
    "HardSigmoid": "HardSwish",
    "(1 + Erf)": "GELU",
    "(1 + Tanh)": "GELU by its tanh form",
    "Tanh(Softplus)": "Mish",
}


def _gate(tensor: gs.Tensor) -> _Gate | None:
    """A factor between 0 and a constant that rises with x, and that x."""
    node = producer(unscaled(tensor))
    if node is None:
        return None
    if node.op in ("Sigmoid", "HardSigmoid"):
        return _Gate(node.op, unscaled(node.inputs[0]))
    if node.op in ("Clip", "Max", "Min") and (x := hard_gate(node)) is not None:
        return _Gate("HardSigmoid", x)
    if node.op == "Add" and any(number(term) == 1 for term in node.inputs):
        inner = next((producer(term) for term in node.inputs if number(term) is None), None)
        if inner is not None and inner.op == "Erf":
            return _Gate("(1 + Erf)", unscaled(inner.inputs[0]))
        x = None if inner is None or inner.op != "Tanh" else _cubic(unscaled(inner.inputs[0]))
        return None if x is None else _Gate("(1 + Tanh)", x)
    if node.op == "Tanh" and (softplus := _softplus(node.inputs[0])) is not None:
        return _Gate("Tanh(Softplus)", softplus.x, softplus.parts)
    return None


def hard_gate(node: gs.Node) -> gs.Tensor | None:
    """x where the node bounds the gate of a HardSigmoid, min(max(a x + b, 0), c).

    That is told by its range, scaled to end at 1 before or after, and by numbers a and b that are the same for all
    channels; or by b = c / 2, however it is scaled. Vectors a and b are those of a normalization before a ReLU6.
    """
    found = patterns.clamp(node)
    if found is None or found.low != 0 or found.high is None or found.high <= 0:
        return None
    shift = _producer_before_quantisers(found.x)
    if shift is None or shift.op not in ("Add", "Sub"):
        return None
    x, beta = shift.inputs if number(shift.inputs[1]) is not None else shift.inputs[::-1]
    b = number(beta)
    if b is None or number(x) is not None or (shift.op == "Sub" and x is shift.inputs[1]):
        return None
    after, before = list(_readers_behind_quantisers(found.result)), unscaled(x).name != source(x).name
    if shift.op == "Add" and patterns.near(b, found.high / 2):
        return unscaled(x) if before or any(reader.op in ("Mul", "Div") for reader in after) else None
    to_one = found.high == 1 and before and _is_scaled_by_scalar(x)
    return unscaled(x) if _is_scalar(beta) and (to_one or _to_one(after, found.high)) else None


def _producer_before_quantisers(tensor: gs.Tensor) -> gs.Node | None:
    node = producer(tensor)
    while node is not None and node.op in _QUANTISERS:
        node = producer(node.inputs[0])
    return node


def _readers_behind_quantisers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    for node in readers(tensor):
        if node.op in _QUANTISERS:
            yield from _readers_behind_quantisers(node.outputs[0])
        else:
            yield node


def _is_scalar(tensor: gs.Tensor) -> bool:
    tensor = source(tensor)
    return isinstance(tensor, gs.Constant) and tensor.values.size == 1 and tensor.values.ndim < 2


def _is_scaled_by_scalar(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return node is not None and any(map(_is_scalar, node.inputs))


def _to_one(after: list[gs.Node], high: float) -> bool:
    """Whether all that read a range from 0 to `high` scale it to end at 1."""
    return bool(after) and all(
        (node.op == "Div" and patterns.near(number(node.inputs[1]), high))
        or (node.op == "Mul" and any(patterns.near(number(term), 1 / high) for term in node.inputs))
        for node in after
    )


def _cubic(tensor: gs.Tensor) -> gs.Tensor | None:
    """x where the tensor is x + b x^3, as a sum or as x (1 + b x^2)."""
    node = producer(tensor)
    if node is None or node.op not in ("Add", "Mul"):
        return None
    for x, other in (node.inputs, node.inputs[::-1]):
        power, rest = (3, unscaled(other)) if node.op == "Add" else (2, _less_one(other))
        if rest is not None and sorted(_factors(rest)) == [source(unscaled(x)).name] * power:
            return unscaled(x)
    return None


def _less_one(tensor: gs.Tensor) -> gs.Tensor | None:
    """The tensor to which 1 is added."""
    node = producer(tensor)
    if node is None or node.op != "Add" or not any(number(term) == 1 for term in node.inputs):
        return None
    return next((unscaled(term) for term in node.inputs if number(term) is None), None)


def _factors(tensor: gs.Tensor) -> Iterator[str]:
    """The names of what is multiplied, constants left out."""
    node = producer(tensor := unscaled(tensor))
    if node is not None and node.op == "Mul":
        for term in node.inputs:
            yield from _factors(term)
    elif node is not None and node.op == "Pow" and number(node.inputs[1]) in (2, 3):
        yield from [unscaled(node.inputs[0]).name] * int(number(node.inputs[1]) or 0)
    else:
        yield tensor.name


def _softplus(tensor: gs.Tensor) -> _Inside | None:
    """x where the tensor is Softplus(x), in any clothing, scaled or not."""
    node = producer(unscaled(tensor))
    if node is None:
        return None
    if node.op == "Softplus":
        return _Inside(unscaled(node.inputs[0]), (node,))
    if node.op == "Add":
        found = _sum(node)
        return _Inside(unscaled(found.x), (node, *found.parts)) if found and "log" in found.clothing else None
    if node.op != "Where":
        return None
    if (found := _choice(node)) is not None:
        return _Inside(unscaled(found.x), (node, *found.parts)) if "Softplus" in found.clothing else None
    inner = _softplus(node.inputs[2])  # what jax writes: x where that is not a number
    return inner if inner is not None and patterns.depends_only_on(node.inputs[1], inner.x) else None


_FINDERS: dict[str, Finder] = {
    **dict.fromkeys(("Elu", "Selu", "Celu", "Gelu", "Swish", "Mish", "HardSwish", "Softplus", "Shrink"), _operator),
    "LeakyRelu": _leaky,
    "ThresholdedRelu": _leaky,
    "PRelu": _prelu,
    "Max": _max,
    "Where": _choice,
    "Add": _sum,
    "Sub": _sum,
    "Neg": _negated,
    "Mul": _gated,
}
