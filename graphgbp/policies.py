"""Policies: what a backward pass does at rectifiers. Each lays itself over the rule table; no rule knows of it.

gradient    dx = dy f'(x)                          the derivative
guided      dx = dy f'(x) 1(x > 0) 1(dy > 0)       Springenberg et al. 2014, arXiv 1412.6806
deconvnet   dx = dy 1(dy > 0)                      Zeiler & Fergus 2014, arXiv 1311.2901
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.backward import RuleFor
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, Entry, Rule
from graphgbp.smooth import Activation


def guided(rule_for: RuleFor, rectifiers: Iterable[Activation]) -> RuleFor:
    """The rule table with guided backpropagation at the rectifiers."""
    return _overlay(rule_for, rectifiers, _guided)


def deconvnet(rule_for: RuleFor, rectifiers: Iterable[Activation]) -> RuleFor:
    """The rule table with the deconvnet's rule at the rectifiers."""
    return _overlay(rule_for, rectifiers, _deconvnet)


def _overlay(
    rule_for: RuleFor, rectifiers: Iterable[Activation], policy: Callable[[Rule, Activation], Rule]
) -> RuleFor:
    found = {rectifier.node.outputs[0].name: rectifier for rectifier in rectifiers}

    def overlaid(node: gs.Node) -> Entry | None:
        rule = rule_for(node)
        rectifier = found.get(node.outputs[0].name) if node.outputs else None
        return policy(rule, rectifier) if rectifier and isinstance(rule, Rule) else rule

    return overlaid


def _guided(rule: Rule, rectifier: Activation) -> Rule:
    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
        answers = [_made(answer) for answer in rule.vjp(g, node, g.relu(dy))]
        if rectifier.vanishes:
            return answers
        return [masks.where_positive(g, answer, rectifier.x) for answer in answers]

    return replace(rule, vjp=vjp)


def _deconvnet(rule: Rule, rectifier: Activation) -> Rule:
    def vjp(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
        positions = range(len(node.inputs)) if rule.wrt is None else rule.wrt
        x = rectifier.x.name
        return [g.relu(dy) if node.inputs[index].name == x else lambda: g.zeros_like(dy) for index in positions]

    return replace(rule, vjp=vjp)


def _made(answer: Cotangent) -> gs.Tensor:
    return answer() if callable(answer) else answer
