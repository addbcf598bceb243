"""Several nodes differentiated as one: the same derivative, in fewer passes over large tensors.

SiLU        y = x s, s = sigmoid(x)       dx = dy (s + y (1 - s))
HardSwish   y = x h, h = HardSigmoid(x)   dx = dy (h + x h')

The rules of the two nodes would give dy s + (dy x) s (1 - s), two passes more, and the same to rounding. The whole goes
to x from the product; nothing goes to the gate.

Concat      y = [a, b, c], z = [a, b]     [dz, dc] = dy

DenseNet joins all earlier features again before each layer. The rule of Concat would cut each cotangent into all of
them, a number of pieces quadratic in the layers; here it is cut in two, and z hands on to a and b what arrives for them
together with its own.

A gate or a z whose own cotangent is wanted stays out of it: the gate would get nothing, z what went past it.
"""

from collections.abc import Collection, Iterator

import onnx_graphsurgeon as gs

from graphgbp.backward import RuleFor
from graphgbp.emit import Emitter
from graphgbp.patterns import is_standard
from graphgbp.registry import Cotangent, Rule
from graphgbp.rules import activation, movement
from graphgbp.view import View

_SLOPES = {
    "Sigmoid": lambda g, x, gate, y: activation.silu_slope(g, gate, y),
    "HardSigmoid": lambda g, x, gate, y: activation.hard_swish_slope(g, gate, x, gate.inputs[0].attrs["alpha"]),
}


def lowered(view: View, rule_for: RuleFor, wanted: Collection[str]) -> RuleFor:
    """The rule table with these rules laid over it, for a backward pass to the tensors `wanted`."""
    found = {node.outputs[0].name: _product(index) for node, index in _gated(view, wanted)}
    found |= {node.outputs[0].name: _joined(whole, node.inputs[count:]) for node, whole, count in _nested(view, wanted)}
    return lambda node: (found.get(node.outputs[0].name) if node.outputs else None) or rule_for(node)


def _gated(view: View, wanted: Collection[str]) -> Iterator[tuple[gs.Node, int]]:
    """Each product of x with its own gate, and which of its inputs is x."""
    for node in view.graph.nodes:
        if node.op == "Mul" and is_standard(node) and node.outputs:
            for index, gate in enumerate(reversed(node.inputs)):
                maker = gate.inputs[0] if gate.inputs else None
                if maker is None or maker.op not in _SLOPES or not is_standard(maker) or gate.name in wanted:
                    continue
                if maker.inputs[0].name == node.inputs[index].name:
                    yield node, index


def _product(index: int) -> Rule:
    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
        x, gate = node.inputs[index], node.inputs[1 - index]
        slope = _SLOPES[gate.inputs[0].op](g, x, gate, node.outputs[0])
        to_x: list[Cotangent] = [lambda: g.mul(dy, slope), None]
        return to_x[:: 1 - 2 * index]

    return Rule(vjp, wrt=(0, 1))


def _nested(view: View, wanted: Collection[str]) -> Iterator[tuple[gs.Node, gs.Tensor, int]]:
    """Each Concat whose first inputs an earlier one has joined: the output of the longest such, and their number.

    The inputs read so far are a state, numbered as they are met: the time is linear in the inputs of all Concats.
    """
    states: dict[tuple[int, str], int] = {}
    wholes: dict[int, gs.Tensor] = {}
    for node in view.graph.nodes:
        if node.op != "Concat" or not is_standard(node) or not node.outputs:
            continue
        y, state = node.outputs[0], states.setdefault((_axis(node), ""), len(states))
        longest: tuple[gs.Tensor, int] | None = None
        for count, x in enumerate(node.inputs, start=1):
            state = states.setdefault((state, x.name), len(states))
            if count > 1 and state in wholes:
                longest = wholes[state], count
        if longest is not None:
            yield node, *longest
        if y.name not in wanted:
            wholes.setdefault(state, y)


def _axis(node: gs.Node) -> int:
    shape = node.outputs[0].shape
    return int(node.attrs["axis"] if shape is None else node.attrs["axis"] % len(shape))


def _joined(whole: gs.Tensor, others: list[gs.Tensor]) -> Rule:
    parts = (whole, *others)

    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
        return movement.pieces(g, dy, parts, node.attrs["axis"])

    return Rule(vjp, wrt=None, to=parts)
