"""Which nodes are rectifiers: Relu in any clothing.

    Relu                               max(x, 0)
    Clip(x, 0), Clip(x, 0, c)          ReLU and ReLU6
    Max(x, 0)
    Where(x > 0, x, 0), x * (x > 0)    and their mirror images
    LeakyRelu(alpha = 0), ThresholdedRelu(alpha = 0), PRelu(slope = 0)

A Clip(x + c/2, 0, c) that is scaled is the gate of a HardSigmoid or HardSwish and no rectifier; nor is a Max(x, 0) or
Clip(x, 0) that only a square root reads: it keeps rounding from making a variance negative.
Smooth and leaky activations are found too, whole or decomposed: guided backpropagation passes their true gradient
unless asked to mask them. Sigmoid and Tanh are gates and squashing functions, not of this kind.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.nodes import label


@dataclass(frozen=True)
class Rectifier:
    """A node that computes an activation of its input number `input`.

    `clothing` says how it is written; `vanishes` that its derivative is 0 wherever x <= 0, at ties too.
    """

    node: gs.Node
    clothing: str
    input: int = 0
    vanishes: bool = True

    @property
    def x(self) -> gs.Tensor:
        return self.node.inputs[self.input]

    def describe(self) -> dict[str, str]:
        return {"node": label(self.node), "tensor": self.node.outputs[0].name, "clothing": self.clothing}


Finder = Callable[[gs.Node], Rectifier | None]


def find_rectifiers(nodes: Iterable[gs.Node]) -> list[Rectifier]:
    """The rectifiers among nodes, in order."""
    return [found for node in nodes if (found := _recognise(node, _RECTIFIERS))]


def find_smooth(nodes: Iterable[gs.Node]) -> list[Rectifier]:
    """Smooth and leaky activations among nodes, in order: activations with no published guided rule."""
    return [found for node in nodes if not _recognise(node, _RECTIFIERS) and (found := _recognise(node, _SMOOTH))]


def _recognise(node: gs.Node, finders: dict[str, Finder]) -> Rectifier | None:
    finder = finders.get(node.op)
    return finder(node) if finder and node.domain in (None, "", "ai.onnx") and node.outputs else None


def _relu(node: gs.Node) -> Rectifier:
    return Rectifier(node, "Relu")


def _clip(node: gs.Node) -> Rectifier | None:
    low, high = (_scalar(node.inputs[index]) if index < len(node.inputs) else None for index in (1, 2))
    open_above = len(node.inputs) < 3 or node.inputs[2].is_empty()
    if low != 0 or (high is None and not open_above) or (high is not None and high <= 0):
        return None
    if high is None:
        return None if _guards_a_root(node) else Rectifier(node, "Clip(x, 0)")
    return None if _is_gate(node, high) else Rectifier(node, f"Clip(x, 0, {high:g})")


def _is_gate(clip: gs.Node, high: float) -> bool:
    """Whether a Clip(., 0, high) is the gate of a decomposed HardSigmoid: its input shifted by high / 2, and scaled."""
    shift = _producer(clip.inputs[0])
    if shift is None or shift.op != "Add" or not any(_near(_scalar(term), high / 2) for term in shift.inputs):
        return False
    shifted = [producer for term in shift.inputs if (producer := _producer(term))]
    scaled_before = any(
        node.op in ("Mul", "Div") and any(_scalar(t) is not None for t in node.inputs) for node in shifted
    )
    scaled_after = any(node.op in ("Mul", "Div") for node in clip.outputs[0].outputs)
    return scaled_before or scaled_after


def _max(node: gs.Node) -> Rectifier | None:
    if len(node.inputs) != 2:
        return None
    zeros = [index for index, tensor in enumerate(node.inputs) if _is_zero(tensor)]
    if len(zeros) != 1 or _guards_a_root(node):
        return None
    return Rectifier(node, "Max(x, 0)", 1 - zeros[0], vanishes=False)


def _guards_a_root(node: gs.Node) -> bool:
    """Whether the node is read by square roots alone, a constant added or not."""
    readers = [
        reader
        for first in node.outputs[0].outputs
        for reader in (first.outputs[0].outputs if first.op == "Add" and _adds_a_constant(first) else [first])
    ]
    return bool(readers) and all(reader.op == "Sqrt" for reader in readers)


def _adds_a_constant(node: gs.Node) -> bool:
    return any(_scalar(term) is not None for term in node.inputs)


def _where(node: gs.Node) -> Rectifier | None:
    """Where(x > 0, x, 0) or Where(x < 0, 0, x)."""
    test = _sign_test(node.inputs[0])
    if test is None:
        return None
    x, zero = (1, 2) if test.positive else (2, 1)
    if node.inputs[x].name != test.x.name or not _is_zero(node.inputs[zero]):
        return None
    return Rectifier(node, "Where(x > 0, x, 0)", x, vanishes=False)


def _times_sign(node: gs.Node) -> Rectifier | None:
    """x * (x > 0)"""
    for index, other in ((0, 1), (1, 0)):
        test = _sign_test(node.inputs[other])
        if test is not None and test.positive and test.x.name == node.inputs[index].name:
            return Rectifier(node, "x * (x > 0)", index, vanishes=False)
    return None


class _SignTest(NamedTuple):
    x: gs.Tensor
    positive: bool


def _sign_test(tensor: gs.Tensor) -> _SignTest | None:
    """What a condition asks of the sign of x: x > 0 or x < 0, strict or not, either way round, cast or not."""
    node = _producer(tensor)
    while node is not None and node.op == "Cast":
        node = _producer(node.inputs[0])
    if node is None or node.op not in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return None
    (a, b), greater = node.inputs, node.op.startswith("Greater")
    if _is_zero(b):
        return _SignTest(a, greater)
    return _SignTest(b, not greater) if _is_zero(a) else None


def _at_alpha_zero(node: gs.Node) -> Rectifier | None:
    return Rectifier(node, f"{node.op}(alpha=0)") if node.attrs.get("alpha") == 0 else None


def _prelu(node: gs.Node) -> Rectifier | None:
    return Rectifier(node, "PRelu(slope=0)") if _is_zero(node.inputs[1]) else None


def _smooth(node: gs.Node) -> Rectifier:
    return Rectifier(node, node.op, vanishes=False)


def _softplus(node: gs.Node) -> Rectifier | None:
    """Softplus, unless it is part of a Mish."""
    return None if {reader.op for reader in node.outputs[0].outputs} == {"Tanh"} else _smooth(node)


def _gated(node: gs.Node) -> Rectifier | None:
    """x * gate(x), as exporters decompose SiLU, HardSwish, Mish and GELU; a constant factor may stand anywhere."""
    for index, other in ((0, 1), (1, 0)):
        gate = _gate(node.inputs[other])
        if gate is not None and gate.x.name == _unscaled(node.inputs[index]).name:
            return Rectifier(node, f"x * {gate.name}(x)", index, vanishes=False)
    return None


class _Gate(NamedTuple):
    name: str
    x: gs.Tensor


def _gate(tensor: gs.Tensor) -> _Gate | None:
    """A factor between 0 and a constant that rises with x, and that x."""
    node = _producer(_unscaled(tensor))
    if node is None or node.domain not in (None, "", "ai.onnx"):
        return None
    if node.op in ("Sigmoid", "HardSigmoid"):
        return _Gate(node.op, _unscaled(node.inputs[0]))
    if node.op == "Clip" and _is_gate(node, _scalar(node.inputs[2]) or 0.0 if len(node.inputs) > 2 else 0.0):
        shift = node.inputs[0].inputs[0]
        return _Gate("HardSigmoid", _unscaled(next(term for term in shift.inputs if _scalar(term) is None)))
    if node.op == "Add" and any(_scalar(term) == 1 for term in node.inputs):
        inner = next((_producer(term) for term in node.inputs if _scalar(term) is None), None)
        return _Gate("(1 + Erf)", _unscaled(inner.inputs[0])) if inner is not None and inner.op == "Erf" else None
    if node.op == "Tanh" and (inner := _producer(node.inputs[0])) is not None and inner.op == "Softplus":
        return _Gate("Tanh(Softplus)", inner.inputs[0])
    return None


def _unscaled(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before it was multiplied or divided by a positive constant number."""
    node = _producer(tensor)
    if node is None or node.op not in ("Mul", "Div"):
        return tensor
    a, b = node.inputs
    if (_scalar(b) or 0) > 0:
        return _unscaled(a)
    return _unscaled(b) if node.op == "Mul" and (_scalar(a) or 0) > 0 else tensor


_RECTIFIERS: dict[str, Finder] = {
    "Relu": _relu,
    "Clip": _clip,
    "Max": _max,
    "Where": _where,
    "LeakyRelu": _at_alpha_zero,
    "ThresholdedRelu": _at_alpha_zero,
    "PRelu": _prelu,
    "Mul": _times_sign,
}
_SMOOTH: dict[str, Finder] = {
    **dict.fromkeys(
        (
            "LeakyRelu",
            "PRelu",
            "ThresholdedRelu",
            "Elu",
            "Selu",
            "Celu",
            "Gelu",
            "Swish",
            "Mish",
            "HardSwish",
        ),
        _smooth,
    ),
    "Softplus": _softplus,
    "Mul": _gated,
}


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None


def _scalar(tensor: gs.Tensor) -> float | None:
    """The one value of a constant, whatever its rank."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape)) != 1:
        return None
    return float(tensor.values.reshape(()))


def _is_zero(tensor: gs.Tensor) -> bool:
    """Whether every element is known to be 0, also where the shape is not known (zeros_like)."""
    if isinstance(tensor, gs.Constant):
        return not np.any(tensor.values)
    producer = _producer(tensor)
    if producer is not None and producer.op == "ConstantOfShape":
        value = producer.attrs.get("value")
        return value is None or not np.any(value.values if isinstance(value, gs.Constant) else value)
    return producer is not None and producer.op == "Expand" and _is_zero(producer.inputs[0])


def _near(value: float | None, wanted: float) -> bool:
    return value is not None and abs(value - wanted) <= 1e-3 * abs(wanted)
