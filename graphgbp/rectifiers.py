"""Which nodes are rectifiers: Relu in any clothing, and what only looks like it.

    Relu                               max(x, 0)
    Clip(x, 0), Clip(x, 0, c)          ReLU and ReLU6
    Max(x, 0)                          and with it min(max(x, 0), c)
    Where(x > 0, x, 0), x * (x > 0)    and their mirror images
    LeakyRelu(alpha = 0), ThresholdedRelu(alpha = 0), PRelu(slope = 0)
    (x + |x|) / 2, x - min(x, 0), -min(-x, 0), x * (sign(x) + 1) / 2, ... by their values (graphgbp.curves)

A Clip(a x + b, 0, c) with a and b the same for all channels is the gate of a HardSigmoid or HardSwish and no rectifier
where its range is scaled to end at 1, or b = c/2 and it is scaled at all. Nor is a Max(x, 0) or
Clip(x, 0) that only a square root reads: it keeps rounding from making a variance negative. Nor is one inside a smooth
or leaky activation that is written out (graphgbp.smooth).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import onnx_graphsurgeon as gs

from graphgbp.curves import Curve, curves, is_joined
from graphgbp.nodes import label
from graphgbp.patterns import choice, clamp, is_standard, is_zero, number, readers, same, test_of
from graphgbp.smooth import Activation, find_smooth, hard_gate


class Activations(NamedTuple):
    """The rectifiers, the smooth and leaky activations, and what only looks like a rectifier; each in order."""

    rectifiers: list[Activation]
    smooth: list[Activation]
    look_alikes: list[Activation]


class _Verdict(NamedTuple):
    masked: bool
    activation: Activation


Finder = Callable[[gs.Node], _Verdict | None]


def find_activations(nodes: Iterable[gs.Node]) -> Activations:
    """Tell the nodes that the guided rule masks from those that only look like it."""
    nodes = list(nodes)
    found = Activations([], find_smooth(nodes), [])
    complete = {id(activation.node) for activation in found.smooth}
    verdicts = [verdict for node in nodes if id(node) not in complete and (verdict := _judge(node))]
    rectifiers = [activation for masked, activation in verdicts if masked]
    whole = {id(part): activation for activation in [*rectifiers, *found.smooth] for part in activation.parts}
    for masked, activation in verdicts:
        node = activation.node
        if id(node) in whole:
            outer = whole[id(node)]
            masked, activation = False, replace(activation, reason=f"part of {outer.clothing} at '{label(outer.node)}'")
        (found.rectifiers if masked else found.look_alikes).append(activation)
    return found


def _judge(node: gs.Node) -> _Verdict | None:
    finder = _FINDERS.get(node.op)
    return finder(node) if finder and is_standard(node) and node.outputs else None


def _yes(node: gs.Node, clothing: str, reason: str, index: int = 0, vanishes: bool = True) -> _Verdict:
    return _Verdict(True, Activation(node, node.inputs[index], clothing, reason, vanishes=vanishes))


def _no(node: gs.Node, clothing: str, reason: str) -> _Verdict:
    return _Verdict(False, Activation(node, node.inputs[0], clothing, reason))


def _relu(node: gs.Node) -> _Verdict:
    return _yes(node, "Relu", "ONNX's ReLU")


def _clip(node: gs.Node) -> _Verdict:
    found = clamp(node)
    if found is None:
        return _no(node, "Clip", "its bounds are known only at run time")
    bounds = [f"{bound:g}" for bound in (found.low, found.high) if bound is not None]
    clothing = f"Clip({', '.join(['x', *bounds])})"
    if found.low is None:
        return _no(node, f"Clip(x, , {found.high:g})" if found.high is not None else "Clip(x)", "it has no lower bound")
    if (obstacle := _no_rectifier(node, found.low, found.high)) is not None:
        return _no(node, clothing, obstacle)
    return _yes(node, clothing, "lower bound 0" + (f", upper bound {found.high:g}" if found.high is not None else ""))


def _max(node: gs.Node) -> _Verdict | None:
    found = clamp(node)
    if found is None and any(is_zero(term) for term in node.inputs) and is_joined(node):
        return _no(node, "Max(x, y, ..., 0)", "the largest of several tensors: no function of one x")
    if found is None or found.low is None:
        return _written_out(node)
    if (obstacle := _no_rectifier(node, found.low, found.high)) is not None:
        return _no(node, f"Max(x, {found.low:g})", obstacle)
    index = next(index for index in (0, 1) if not is_zero(node.inputs[index]))
    bounded = f", no more than {found.high:g} by the Min next to it" if found.high is not None else ""
    return _yes(node, "Max(x, 0)", f"the larger of x and 0{bounded}", index, vanishes=False)


def _no_rectifier(node: gs.Node, low: float, high: float | None) -> str | None:
    """Why bounds do not make a rectifier."""
    if low != 0:
        return f"its lower bound is {low:g}, not 0"
    if high is not None and high <= 0:
        return f"its upper bound is {high:g}, not above 0"
    if high is not None and hard_gate(node) is not None:
        return f"x + {high / 2:g} between 0 and {high:g}, scaled: the gate of a HardSigmoid or HardSwish"
    if high is None and _guards_a_root(node):
        return "only a square root reads it: it keeps rounding from making a variance negative"
    return None


def _guards_a_root(node: gs.Node) -> bool:
    """Whether the node is read by square roots alone, a constant added or not."""
    found = [
        reader
        for first in readers(node.outputs[0])
        for reader in (readers(first.outputs[0]) if first.op == "Add" and _adds_a_constant(first) else [first])
    ]
    return bool(found) and all(reader.op == "Sqrt" for reader in found)


def _adds_a_constant(node: gs.Node) -> bool:
    return any(number(term) is not None for term in node.inputs)


def _where(node: gs.Node) -> _Verdict | None:
    """Where(x > 0, x, 0) or Where(x < 0, 0, x)."""
    found = choice(node)
    if found is None or not (same(found.above, found.x) or same(found.below, found.x)):
        return None
    if not same(found.above, found.x):
        return _no(node, f"Where(x < {found.bound:g}, x, ...)", f"it keeps x below {found.bound:g}")
    if found.bound != 0:
        return _no(node, f"Where(x > {found.bound:g}, x, ...)", f"its threshold is {found.bound:g}, not 0")
    if not is_zero(found.below):
        return _no(node, "Where(x > 0, x, ...)", "what it gives below 0 is not 0")
    index = next(index for index in (1, 2) if node.inputs[index] is found.above)
    return _yes(node, "Where(x > 0, x, 0)", "x where it is positive, else 0", index, vanishes=False)


def _times_sign(node: gs.Node) -> _Verdict | None:
    """x * (x > 0)"""
    for index, other in ((0, 1), (1, 0)):
        test = test_of(node.inputs[other])
        if test is None or not same(test.x, node.inputs[index]):
            continue
        if test.bound != 0 or not test.above:
            sign = ">" if test.above else "<"
            return _no(node, f"x * (x {sign} {test.bound:g})", f"it keeps x where x {sign} {test.bound:g}")
        return _yes(node, "x * (x > 0)", "x where it is positive, else 0", index, vanishes=False)
    return _written_out(node)


def _at_alpha_zero(node: gs.Node) -> _Verdict | None:
    return _yes(node, f"{node.op}(alpha=0)", "its alpha is 0") if node.attrs.get("alpha") == 0 else None


def _prelu(node: gs.Node) -> _Verdict | None:
    return _yes(node, "PRelu(slope=0)", "its slope is 0") if is_zero(node.inputs[1]) else None


def _written_out(node: gs.Node) -> _Verdict | None:
    """A ReLU by its values, of the nearest x; no ReLU that is one already and then scaled or negated."""
    joined = is_joined(node)
    for curve in islice(curves(node), 1 if joined else None):
        slope, route = curve.slope_of_relu(), curve.route()
        if slope is None or not curve.inner or not (joined or _has_no_rectifier(curve)):
            continue
        if abs(slope - 1) > 1e-4:
            return _Verdict(
                False, Activation(node, curve.x, f"{slope:g} max(x, 0)", "a ReLU by its values, but scaled")
            )
        written = f"a ReLU by its values, written with {len(curve.inner) + 1} nodes"
        if not route or not curve.encloses([*curve.bounds, *(step for step, _ in route[1:])]):
            return _Verdict(
                False, Activation(node, curve.x, "max(x, 0), written out", f"{written}, some read elsewhere")
            )
        activation = Activation(node, curve.x, "max(x, 0), written out", written, curve.inner, route=route)
        return _Verdict(True, activation)
    return None


def _has_no_rectifier(curve: Curve) -> bool:
    return not any((verdict := _judge(inner)) and verdict.masked for inner in curve.inner)


_FINDERS: dict[str, Finder] = {
    "Relu": _relu,
    "Clip": _clip,
    "Max": _max,
    "Where": _where,
    "LeakyRelu": _at_alpha_zero,
    "ThresholdedRelu": _at_alpha_zero,
    "PRelu": _prelu,
    "Mul": _times_sign,
    **dict.fromkeys(("Add", "Sub", "Div", "Neg"), _written_out),
}
