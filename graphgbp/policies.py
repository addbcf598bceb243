"""Policies: what a backward pass does at rectifiers. Each lays itself over the rule table; no rule knows of it.

gradient    dx = dy f'(x)                          the derivative
guided      dx = dy f'(x) 1(x > 0) 1(dy > 0)       Springenberg et al. 2014, arXiv 1412.6806
deconvnet   dx = dy 1(dy > 0)                      Zeiler & Fergus 2014, arXiv 1311.2901
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.backward import RuleFor
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, Entry, Repeated, Rule
from graphgbp.smooth import Activation


def guided(rule_for: RuleFor, rectifiers: Sequence[Activation]) -> RuleFor:
    """The rule table with guided backpropagation at the rectifiers."""
    return _overlay(rule_for, rectifiers, _guided)


def deconvnet(rule_for: RuleFor, rectifiers: Sequence[Activation]) -> RuleFor:
    """The rule table with the deconvnet's rule at the rectifiers."""
    return _overlay(rule_for, rectifiers, _deconvnet)


def _overlay(rule_for: RuleFor, rectifiers: Sequence[Activation], policy: Callable[..., Rule]) -> RuleFor:
    found = {rectifier.node.outputs[0].name: partial(policy, rectifier=rectifier) for rectifier in rectifiers}
    for rectifier in rectifiers:
        for node, index in rectifier.route[1:]:
            found[node.outputs[0].name] = partial(_hands_on, index=index)

    def overlaid(node: gs.Node) -> Entry | None:
        rule = rule_for(node)
        change = found.get(node.outputs[0].name) if node.outputs else None
        return change(rule) if change and isinstance(rule, Rule) else rule

    return overlaid


def _guided(rule: Rule, rectifier: Activation) -> Rule:
    if rectifier.route:
        x, (_, index) = rectifier.x, rectifier.route[0]
        return _hands_on(rule, index, lambda g, dy: masks.where_positive(g, g.relu(dy), x))

    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor | None]:
        answers = [_made(answer) for answer in rule.vjp(g, node, g.relu(dy))]
        if rectifier.vanishes:
            return answers
        return [answer and masks.where_positive(g, answer, rectifier.x) for answer in answers]

    return replace(rule, vjp=vjp)


def _deconvnet(rule: Rule, rectifier: Activation) -> Rule:
    if rectifier.route:
        return _hands_on(rule, rectifier.route[0][1], lambda g, dy: g.relu(dy))

    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
        positions = range(len(node.inputs)) if rule.wrt is None else rule.wrt
        x = rectifier.x.name
        return [g.relu(dy) if node.inputs[index].name == x else lambda: g.zeros_like(dy) for index in positions]

    return replace(rule, vjp=vjp)


def _hands_on(rule: Rule, index: int, change: Callable[[Emitter, gs.Tensor], gs.Tensor] = lambda g, dy: dy) -> Rule:
    """A node of a ReLU that is written out: its cotangent goes to one input, on the way to x, and to no other."""

    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
        positions = range(len(node.inputs)) if rule.wrt is None else rule.wrt
        return [change(g, dy) if position == index else lambda: g.zeros_like(dy) for position in positions]

    return replace(rule, vjp=vjp)


def _made(answer: Cotangent) -> gs.Tensor | None:
    made = answer() if callable(answer) else answer
    assert not isinstance(made, Repeated), "the rule of an activation gives cotangents in the shape of x"
    return made
