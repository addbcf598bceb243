"""Which nodes are rectifiers: Relu in any clothing.

    Relu                               max(x, 0)
    Clip(x, 0), Clip(x, 0, c)          ReLU and ReLU6
    Max(x, 0)
    Where(x > 0, x, 0)                 and its mirror images
    LeakyRelu(alpha = 0), ThresholdedRelu(alpha = 0), PRelu(slope = 0)

A Clip(x + c/2, 0, c) that is scaled is the gate of a HardSigmoid or HardSwish and no rectifier.
Smooth and leaky activations are found too: guided backpropagation passes their true gradient unless asked to mask them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.prepare import label


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
        return Rectifier(node, "Clip(x, 0)")
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
    return Rectifier(node, "Max(x, 0)", 1 - zeros[0], vanishes=False) if len(zeros) == 1 else None


def _where(node: gs.Node) -> Rectifier | None:
    """Where(x > 0, x, 0) or Where(x < 0, 0, x), the comparison strict or not and either way round."""
    condition = _producer(node.inputs[0])
    if condition is None or condition.op not in _MIRRORED:
        return None
    op, (a, b) = condition.op, condition.inputs
    if _is_zero(a):
        op, a, b = _MIRRORED[op], b, a
    x, zero = (1, 2) if op.startswith("Greater") else (2, 1)
    if not (_is_zero(b) and node.inputs[x].name == a.name and _is_zero(node.inputs[zero])):
        return None
    return Rectifier(node, "Where(x > 0, x, 0)", x, vanishes=False)


_MIRRORED = {
    "Greater": "Less",
    "GreaterOrEqual": "LessOrEqual",
    "Less": "Greater",
    "LessOrEqual": "GreaterOrEqual",
}


def _at_alpha_zero(node: gs.Node) -> Rectifier | None:
    return Rectifier(node, f"{node.op}(alpha=0)") if node.attrs.get("alpha") == 0 else None


def _prelu(node: gs.Node) -> Rectifier | None:
    return Rectifier(node, "PRelu(slope=0)") if _is_zero(node.inputs[1]) else None


def _smooth(node: gs.Node) -> Rectifier:
    return Rectifier(node, node.op, vanishes=False)


def _gated(node: gs.Node) -> Rectifier | None:
    """x * sigmoid(x), x * hardsigmoid(x), x * tanh(softplus(x)): exporters decompose SiLU, HardSwish and Mish so."""
    for index, other in ((0, 1), (1, 0)):
        gate, x = _producer(node.inputs[other]), node.inputs[index]
        if gate is None:
            continue
        inner = _producer(gate.inputs[0])
        if gate.op in ("Sigmoid", "HardSigmoid") and gate.inputs[0].name == x.name:
            return Rectifier(node, f"x * {gate.op}(x)", index, vanishes=False)
        if gate.op == "Tanh" and inner is not None and inner.op == "Softplus" and inner.inputs[0].name == x.name:
            return Rectifier(node, "x * Tanh(Softplus(x))", index, vanishes=False)
    return None


_RECTIFIERS: dict[str, Finder] = {
    "Relu": _relu,
    "Clip": _clip,
    "Max": _max,
    "Where": _where,
    "LeakyRelu": _at_alpha_zero,
    "ThresholdedRelu": _at_alpha_zero,
    "PRelu": _prelu,
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
            "Softplus",
        ),
        _smooth,
    ),
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
