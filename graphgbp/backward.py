"""Reverse-mode differentiation of a reading view: from cotangents of some tensors to cotangents of others.

Three ideas carry it. A node is *active* when it lies on a float path from a wanted tensor to a seeded one; only active
nodes are visited, and one whose operator has no rule stops everything before a node is made. Active nodes are visited
in reverse, so when a node's turn comes every cotangent of its outputs has arrived: they *accumulate* by a sum. A rule
answers in the shape of its output; where inputs broadcast, the engine *unbroadcasts* by summing over the copies.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import blocked
from graphgbp.emit import Emitter
from graphgbp.errors import UnsupportedOperatorError
from graphgbp.nodes import input_names, label
from graphgbp.registry import NONDIFFERENTIABLE, Arrived, Entry, Repeated, Rule, Unsupported, since_version
from graphgbp.view import View

RuleFor = Callable[[gs.Node], Entry | None]
Cotangents = dict[str, gs.Tensor]


@dataclass(frozen=True)
class Gap:
    """An active node that cannot be differentiated, and why."""

    node: gs.Node
    reason: str


def backward(
    g: Emitter,
    view: View,
    seeds: Mapping[str, gs.Tensor],
    wanted: Sequence[str],
    rule_for: RuleFor,
    scope: str,
) -> Cotangents:
    """The cotangent of each wanted tensor, given those of the seeded ones; a wanted tensor with no path is left out.

    Raises UnsupportedOperatorError, listing every gap, before any node is made.
    """
    nodes = active_nodes(view, wanted, seeds, rule_for)
    refuse_gaps(gaps(view, nodes, wanted, seeds, rule_for), view)
    varied = varied_tensors(view, wanted, rule_for)
    arrived: dict[str, list[Arrived]] = {name: [seed] for name, seed in seeds.items()}
    with g.scope(scope):
        for node in reversed(nodes):
            rule = rule_for(node)
            assert isinstance(rule, Rule)
            with g.scope(label(node)):
                for x, dx in _propagate(g, node, rule, arrived, varied):
                    arrived.setdefault(x.name, []).append(dx)
        return {name: _accumulated(g, arrived[name], view.tensors[name]) for name in wanted if name in arrived}


def _propagate(
    g: Emitter, node: gs.Node, rule: Rule, arrived: Mapping[str, list[Arrived]], varied: set[str]
) -> Iterable[tuple[gs.Tensor, Arrived]]:
    """(tensor, its cotangent) for each varied tensor that a node's rule answers for."""
    outputs = node.outputs[: rule.outputs]
    if not any(y.name in arrived for y in outputs):
        return
    dy = [_accumulated(g, arrived[y.name], y) if y.name in arrived else g.zeros_like(y) for y in outputs]
    receivers, answers = rule.receivers(node), list(rule.vjp(g, node, *dy))
    assert len(answers) == len(receivers), f"the rule of {node.op} answers for {len(answers)} of {len(receivers)}"
    for x, answer in zip(receivers, answers, strict=True):
        if x is None or x.name not in varied:
            continue
        dx = answer() if callable(answer) else answer
        if isinstance(dx, Repeated):
            yield x, dx
        elif dx is not None:
            yield x, unbroadcast(g, dx, x) if rule.broadcast else g.with_shape(dx, x)


def _accumulated(g: Emitter, arrived: Sequence[Arrived], x: gs.Tensor) -> gs.Tensor:
    """The sum of the cotangents of x. What is repeated is spelled out only where nothing else arrived."""
    terms = [term for term in arrived if not isinstance(term, Repeated)]
    repeated = [term.tensor for term in arrived if isinstance(term, Repeated)]
    if not repeated:
        return g.sum(terms)
    if terms:
        return g.with_shape(g.add(g.sum(terms), g.sum(repeated)), x)
    return blocked.enter(g, g.expand_like(g.sum(repeated), x), x)


def unbroadcast(g: Emitter, dy: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """dy summed over the axes along which x was repeated, in x's shape."""
    if x.shape is None or dy.shape is None or _may_repeat(x.shape, dy.shape):
        return _unbroadcast_at_run_time(g, dy, x)
    lead = len(dy.shape) - len(x.shape)
    padded = (1,) * lead + tuple(x.shape)
    axes = [
        axis for axis, (a, b) in enumerate(zip(padded, dy.shape, strict=True)) if axis < lead or (a == 1 and b != 1)
    ]
    summed = g.reduce_sum(dy, axes)
    return g.with_shape(g.squeeze(summed, range(lead)) if lead else summed, x)


def _may_repeat(shape: Sequence[int | str], result: Sequence[int | str]) -> bool:
    """Whether an open size may turn out to be 1 where the result's is not."""
    tail = result[len(result) - len(shape) :]
    return any(isinstance(a, str) and a != b for a, b in zip(shape, tail, strict=True))


def _unbroadcast_at_run_time(g: Emitter, dy: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    shape = g.op("Shape", x)
    lead = g.sub(g.op("Size", g.op("Shape", dy)), g.op("Size", shape))
    ones = g.op("Expand", g.ints([1]), g.reshape(lead, [1]))
    axes = g.reshape(g.op("NonZero", g.equal(g.concat([ones, shape], 0), g.ints([1]))), [-1])
    return g.with_shape(g.op("Reshape", g.reduce_sum(dy, axes), shape), x)


def varied_tensors(view: View, wanted: Iterable[str], rule_for: RuleFor) -> set[str]:
    """Float tensors whose value moves with a wanted one, and what an operator without a rule may make of it."""
    varied = set(wanted)
    for node in view.graph.nodes:
        rule = rule_for(node)
        if not varied.isdisjoint(input_names(node)) and rule is not NONDIFFERENTIABLE:
            moves = is_float if isinstance(rule, Rule) else _may_stand_for_floats
            varied.update(output.name for output in node.outputs if output.name and moves(output))
    return varied


def active_nodes(view: View, wanted: Iterable[str], targets: Iterable[str], rule_for: RuleFor) -> list[gs.Node]:
    """The nodes on a float path from a wanted tensor to a target, in topological order."""
    wanted = set(wanted)
    varied = varied_tensors(view, wanted, rule_for)
    needed, active = set(targets), []
    for node in reversed(view.graph.nodes):
        rule, names = rule_for(node), input_names(node)
        if rule is NONDIFFERENTIABLE or varied.isdisjoint(names):
            continue
        if any(output.name in needed and output.name in varied for output in node.outputs if output.name):
            active.append(node)
            if isinstance(rule, Rule) and rule.to is not None:
                names = {x.name for x in rule.to}
            needed.update(names & varied)
    return active[::-1]


def gaps(
    view: View, nodes: Iterable[gs.Node], wanted: Iterable[str], targets: Iterable[str], rule_for: RuleFor
) -> list[Gap]:
    """Every active node that no rule covers, or not in this use."""
    varied = varied_tensors(view, wanted, rule_for)
    needed = {name for node in nodes for name in input_names(node)}.union(targets)
    return [Gap(node, reason) for node in nodes if (reason := _gap(node, rule_for(node), varied, needed))]


def _gap(node: gs.Node, rule: Entry | None, varied: set[str], needed: set[str]) -> str | None:
    if isinstance(rule, Unsupported):
        return rule.reason(node)
    if not isinstance(rule, Rule):
        return "it has no derivative rule"
    if rule.wrt is not None:
        for index, x in enumerate(node.inputs):
            if index not in rule.wrt and x.name in varied and is_float(x):
                return f"no rule gives the gradient to its input {index} ('{x.name}')"
    for y in node.outputs[rule.outputs :] if rule.outputs is not None else []:
        if y.name in varied and y.name in needed:
            return f"no rule takes the gradient of its output '{y.name}'"
    return rule.refuse(node) if rule.refuse else None


def refuse_gaps(found: Sequence[Gap], view: View) -> None:
    """Raise UnsupportedOperatorError naming every gap, or do nothing where there is none."""
    if not found:
        return
    lines = [
        f"  {gap.node.op} ({gap.node.domain or 'ai.onnx'} {view.opsets.get(gap.node.domain or '', '?')}"
        f"{_since(gap.node, view)}) node '{label(gap.node)}': {gap.reason}"
        for gap in found
    ]
    raise UnsupportedOperatorError(
        f"{len(found)} node{'s' * (len(found) > 1)} between the input and the target cannot be differentiated:\n"
        + "\n".join(lines)
        + "\nReplace them before export, or explain from a tensor behind them"
    )


def _since(node: gs.Node, view: View) -> str:
    version = since_version(node, view.opsets)
    return "" if version is None else f", since {version}"


def _may_stand_for_floats(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds real numbers or, in few bits, quantised ones; int64 is for indices and sizes."""
    if is_float(tensor) or isinstance(tensor.dtype, int):
        return is_float(tensor)
    return np.dtype(tensor.dtype).kind in "iuV" and tensor.dtype != np.int64


def is_float(tensor: gs.Tensor) -> bool:
    """Whether the tensor holds real numbers; one of unknown type may, a sequence or map does not."""
    if tensor.dtype is None:
        return True
    if isinstance(tensor.dtype, int):  # an ONNX type that numpy has not
        return False
    return np.issubdtype(tensor.dtype, np.floating) or np.dtype(tensor.dtype).name.startswith(("bfloat", "float"))
