"""Activations written out as x times a gate of x, differentiated as one: fewer passes over large tensors.

SiLU        y = x s, s = sigmoid(x)       dx = dy (s + y (1 - s))
HardSwish   y = x h, h = HardSigmoid(x)   dx = dy (h + x h')

The rules of the two nodes would give dy s + (dy x) s (1 - s), two passes more, and the same to rounding. The whole goes
to x from the product; nothing goes to the gate, unless the gate's own cotangent is wanted.
"""

from collections.abc import Collection, Iterator

import onnx_graphsurgeon as gs

from graphgbp.backward import RuleFor
from graphgbp.emit import Emitter
from graphgbp.patterns import is_standard
from graphgbp.registry import Cotangent, Rule
from graphgbp.rules import activation
from graphgbp.view import View

_SLOPES = {
    "Sigmoid": lambda g, x, gate, y: activation.silu_slope(g, gate, y),
    "HardSigmoid": lambda g, x, gate, y: activation.hard_swish_slope(g, gate, x, gate.inputs[0].attrs["alpha"]),
}


def as_one(view: View, rule_for: RuleFor, wanted: Collection[str]) -> RuleFor:
    """The rule table with one rule for each activation that is written out, its gate being none of the `wanted`."""
    found = {node.outputs[0].name: _rule(index) for node, index in _gated(view, wanted)}
    return lambda node: (found.get(node.outputs[0].name) if node.outputs else None) or rule_for(node)


def _gated(view: View, wanted: Collection[str]) -> Iterator[tuple[gs.Node, int]]:
    """Each product of x with its own gate, and which of its inputs is x."""
    for node in view.graph.nodes:
        if node.op == "Mul" and is_standard(node):
            for index, gate in enumerate(reversed(node.inputs)):
                maker = gate.inputs[0] if gate.inputs else None
                if maker is None or maker.op not in _SLOPES or not is_standard(maker) or gate.name in wanted:
                    continue
                if maker.inputs[0].name == node.inputs[index].name:
                    yield node, index


def _rule(index: int) -> Rule:
    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
        x, gate = node.inputs[index], node.inputs[1 - index]
        slope = _SLOPES[gate.inputs[0].op](g, x, gate, node.outputs[0])
        to_x: list[Cotangent] = [lambda: g.mul(dy, slope), None]
        return to_x[:: 1 - 2 * index]

    return Rule(vjp, wrt=(0, 1))
