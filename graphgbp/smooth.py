"""Smooth and leaky activations, whole or as exporters write them out.

    LeakyRelu, PRelu    Where(x > 0, x, a x), Max(x, a x), max(x, 0) + a min(x, 0)
    ThresholdedRelu     Where(x > c, x, 0)
    Elu, Selu, Celu     Where(x > 0, x, f(x)), max(x, 0) + f(min(x, 0))
    Softplus            Where(x > 20, x, Softplus(x)), max(x, 0) + log(1 + exp(-|x|))
    Gelu, Swish, HardSwish, Mish     x times a gate that rises with x

No guided rule was published for them: guided backpropagation passes their true gradient unless asked to mask them.
Sigmoid, HardSigmoid, Tanh and Softsign are gates and squashing functions, not of this kind.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import onnx_graphsurgeon as gs

from graphgbp import patterns
from graphgbp.nodes import label
from graphgbp.patterns import Clamp, is_standard, is_zero, number, producer, readers, same, source, unscaled


@dataclass(frozen=True)
class Activation:
    """A node that completes an activation of x, or that only looks like one.

    `clothing` says how it is written and `reason` why it counts as what it does; `parts` are nodes inside it that
    would be activations if they stood alone; `vanishes` says that its derivative is 0 wherever x <= 0, at ties too.
    """

    node: gs.Node
    x: gs.Tensor
    clothing: str
    reason: str
    parts: tuple[gs.Node, ...] = ()
    vanishes: bool = False

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
    """max(x, 0) plus something of min(x, 0)."""
    if (found := _choice(node) if node.op == "Add" else None) is not None:
        return found
    for positive, other in (node.inputs, node.inputs[::-1])[: 2 if node.op == "Add" else 1]:
        part = _part(producer(positive))
        if part is None or part.low != 0 or not _read_once(part):
            continue
        parts = tuple(term for term in (producer(positive),) if term)
        if (rest := _negative_part(other)) is not None and same(rest.x, part.x):
            clothing, reason = "max(x, 0) + f(min(x, 0))", "leaky or smooth: another function of x where it is negative"
            return Activation(node, part.x, clothing, reason, (*parts, *rest.parts))
        log = producer(other)
        if node.op == "Add" and log is not None and log.op == "Log" and patterns.depends_only_on(other, part.x):
            clothing, reason = "max(x, 0) + log(1 + exp(-|x|))", "Softplus, written so that it does not overflow"
            return Activation(node, part.x, clothing, reason, parts)
    return None


class _Inside(NamedTuple):
    """What a tensor is of x, and the nodes in it that would be activations if they stood alone."""

    x: gs.Tensor
    parts: tuple[gs.Node, ...]


def _part(node: gs.Node | None) -> Clamp | None:
    """max(x, 0) or min(x, 0), in any clothing of one node."""
    if node is None:
        return None
    if node.op == "Relu":
        return Clamp(node.inputs[0], 0.0, None, node.outputs[0])
    found = patterns.clamp(node)
    return found if found is not None and {found.low, found.high} == {0.0, None} else None


def _read_once(part: Clamp) -> bool:
    return sum(1 for _ in readers(part.result)) == 1


def _negative_part(tensor: gs.Tensor, limit: int = 6) -> _Inside | None:
    """x where the tensor is made of min(x, 0), or of max(-x, 0), and constants."""
    for _ in range(limit):
        node = producer(tensor)
        part = _part(node)
        if part is not None and _read_once(part):
            assert node is not None
            negated = producer(part.x)
            if part.high == 0:
                return _Inside(source(part.x), (node,))
            return _Inside(source(negated.inputs[0]), (node,)) if negated is not None and negated.op == "Neg" else None
        terms = [] if node is None else [term for term in node.inputs if not isinstance(source(term), gs.Constant)]
        if node is None or node.op not in ("Mul", "Div", "Add", "Sub", "Neg", "Exp") or len(terms) != 1:
            return None
        (tensor,) = terms
    return None


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
    """x where the node bounds the gate of a HardSigmoid, min(max(x + c / 2, 0), c), scaled before or after."""
    found = patterns.clamp(node)
    if found is None or found.low != 0 or found.high is None or found.high <= 0:
        return None
    shift = producer(found.x)
    if (
        shift is None
        or shift.op != "Add"
        or not any(patterns.near(number(term), found.high / 2) for term in shift.inputs)
    ):
        return None
    x = next((term for term in shift.inputs if number(term) is None), None)
    if x is None:
        return None
    scaled_after = any(reader.op in ("Mul", "Div") for reader in readers(found.result))
    return unscaled(x) if scaled_after or unscaled(x).name != source(x).name else None


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
    **dict.fromkeys(("Elu", "Selu", "Celu", "Gelu", "Swish", "Mish", "HardSwish", "Softplus"), _operator),
    "LeakyRelu": _leaky,
    "ThresholdedRelu": _leaky,
    "PRelu": _prelu,
    "Max": _max,
    "Where": _choice,
    "Add": _sum,
    "Sub": _sum,
    "Mul": _gated,
}
