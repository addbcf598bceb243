"""Where no ReLU stands before a quantiser, although what it reads may be negative."""

import onnx_graphsurgeon as gs

from graphgbp.plain.intervals import KEPT

_MOVES = KEPT | {"AveragePool", "DequantizeLinear", "Pad", "QuantizeLinear", "Resize"}
_ARITHMETIC = {"Add", "Div", "Mul", "Sub"}
_ACTIVATIONS = {
    "Celu", "Elu", "Gelu", "HardSwish", "LeakyRelu", "Mish", "PRelu", "Selu", "Softsign", "Swish", "Tanh",
}  # fmt: skip
_ELEMENTWISE = _ARITHMETIC | _ACTIVATIONS | {
    "Cast", "Clip", "DequantizeLinear", "Erf", "Exp", "HardSigmoid", "Identity", "Pow", "QuantizeLinear", "Relu",
    "Sigmoid", "Softplus",
}  # fmt: skip


def _varied(node: gs.Node) -> list[gs.Tensor]:
    return [x for x in node.inputs if not x.is_empty() and not isinstance(x, gs.Constant)]


def _before(x: gs.Tensor) -> gs.Tensor | None:
    """The tensor that x is, moved, pooled, requantised, shifted or scaled by constants."""
    node = x.inputs[0] if x.inputs else None
    if node is None or node.op not in _MOVES | _ARITHMETIC:
        return None
    read = node.inputs[:1] if node.op in _MOVES else _varied(node)
    return read[0] if len(read) == 1 else None


def is_models_own(tensor: gs.Tensor) -> bool:
    """Whether a tensor is an input of the model or several, at most moved, pooled, shifted or scaled by constants."""
    waiting, seen = [tensor], set()
    while waiting:
        x = waiting.pop()
        if id(x) in seen or isinstance(x, gs.Constant) or not x.inputs:
            continue
        seen.add(id(x))
        before = _before(x)
        if before is None and x.inputs[0].op != "Concat":
            return False
        waiting += x.inputs[0].inputs if before is None else [before]
    return True


def is_activated(tensor: gs.Tensor) -> bool:
    """Whether a tensor comes from a smooth or leaky activation, whole or written out as x times a gate of x.

    Networks have no ReLU behind one. Where the quantiser has the least zero point, its dip was not met in calibration.
    """
    while (before := _before(tensor)) is not None:
        tensor = before
    node = tensor.inputs[0] if tensor.inputs else None
    return node is not None and (node.op in _ACTIVATIONS or (node.op == "Mul" and _is_of_one(tensor)))


def _is_of_one(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a function of one other, element by element."""
    waiting, seen, roots = [tensor], set(), 0
    while waiting and roots < 2:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if x.inputs and x.inputs[0].op in _ELEMENTWISE:
            waiting += _varied(x.inputs[0])
        else:
            roots += 1
    return roots == 1
