"""Faults to put into graphgbp on purpose: a test suite that does not notice one has a hole.

Every cotangent of every rule, 5 % too large; every mask, policy, head and target with its one essential step left out.
Each fault has a *site*, the code it changes: only tests that pass there can notice.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

import graphgbp.rules
from graphgbp import (
    backward,
    cams,
    contract,
    heads,
    layers,
    maps,
    masks,
    policies,
    rectifiers,
    registry,
    score,
    smooth,
    target,
)
from graphgbp.emit import Emitter
from graphgbp.errors import RequestError
from graphgbp.registry import Key, Rule

FACTOR = 1.05
ZERO = {("Range", 1)}  # cotangents that are zero by definition: there 0.05 is added
VARIADIC = range(3)  # of rules that answer for every input, these stand for all

Wrap = Callable[[Any], Any]


@dataclass(frozen=True)
class Fault:
    """A replacement for `owner.attribute`; `site` names what is replaced, `family` the rule's file, if it is a rule."""

    name: str
    site: str
    wrap: Wrap
    owner: Any
    attribute: Any
    family: str | None = None

    def inject(self) -> None:
        if isinstance(self.owner, dict):
            self.owner[self.attribute] = self.wrap(self.owner[self.attribute])
        else:
            setattr(self.owner, self.attribute, self.wrap(getattr(self.owner, self.attribute)))


def all_faults() -> dict[str, Fault]:
    found = [*rule_faults(), *_STEPS]
    assert len({fault.name for fault in found}) == len(found)
    return {fault.name: fault for fault in found}


# -- rules -----------------------------------------------------------------------------------------------------------


def rule_faults() -> Iterator[Fault]:
    """For each version of each operator that has a rule, and each input: its cotangent times 1.05."""
    for key, rule in sorted(registry.table().items()):
        if isinstance(rule, Rule):
            domain, op, version = key
            site = f"{domain}{'.' if domain else ''}{op}-{version}"
            family = rule.vjp.__module__.removeprefix(f"{graphgbp.rules.__name__}.")
            for answer, position in enumerate(rule.wrt or VARIADIC):
                wrap = _spoil(key, answer, position)
                yield Fault(f"{site}:{position} times {FACTOR}", site, wrap, registry._TABLE, key, family)


def _spoil(key: Key, answer: int, position: int) -> Wrap:
    """A rule whose answer for one input is wrong."""

    def spoil(g: Emitter, dx: Any) -> Any:
        return g.add(dx, g.like(dx, FACTOR - 1)) if (key[1], position) in ZERO else g.scale(dx, FACTOR)

    def wrap(rule: Rule) -> Rule:
        def vjp(g: Emitter, node: Any, *dy: Any) -> list[Any]:
            answers = list(rule.vjp(g, node, *dy))
            if answer < len(answers):
                right = answers[answer]
                answers[answer] = lambda: spoil(g, right() if callable(right) else right)
            return answers

        return replace(rule, vjp=vjp)

    return wrap


# -- everything else: one essential step left out --------------------------------------------------------------------


@contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    original = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, original)


def _while(owner: Any, attribute: str, value: Any) -> Wrap:
    """The function as it was, but with something else replaced while it runs."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(*arguments: Any, **options: Any) -> Any:
            with _replaced(owner, attribute, value):
                return original(*arguments, **options)

        return faulty

    return wrap


def _unchanged(g: Emitter, x: Any) -> Any:
    return x


def _unrectified(original: Callable[..., Rule]) -> Callable[..., Rule]:
    """A policy that does not stop negative cotangents."""

    def faulty(*arguments: Any) -> Rule:
        rule = original(*arguments)
        return replace(rule, vjp=_while(Emitter, "relu", _unchanged)(rule.vjp))

    return faulty


def _everything_vanishes(original: Callable[..., Rule]) -> Callable[..., Rule]:
    return lambda rule, rectifier: original(rule, replace(rectifier, vanishes=True))


def _mask_at_zero(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda g, dy, x: masks.keep(g, dy, g.op("GreaterOrEqual", x, g.like(x, 0)))


def _mask_at_bound(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda g, dy, x, bound: masks.keep(g, dy, g.op("LessOrEqual", x, g.like(x, bound)))


def _pass(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda g, dy, *_: dy


def _scaled(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda g, *arguments: g.scale(original(g, *arguments), FACTOR)


def _scaled_seed(original: Callable[..., target.Seed]) -> Callable[..., target.Seed]:
    def faulty(g: Emitter, *arguments: Any) -> target.Seed:
        seed = original(g, *arguments)
        return replace(seed, cotangent=g.scale(seed.cotangent, FACTOR))

    return faulty


def _scaled_score(original: Callable[..., target.Seed]) -> Callable[..., target.Seed]:
    def faulty(g: Emitter, *arguments: Any) -> target.Seed:
        seed = original(g, *arguments)
        return replace(seed, target_score=g.scale(seed.target_score, FACTOR))

    return faulty


def _positive_seed(original: Callable[..., target.Seed]) -> Callable[..., target.Seed]:
    def faulty(g: Emitter, *arguments: Any) -> target.Seed:
        seed = original(g, *arguments)
        return replace(seed, cotangent=g.mul(seed.cotangent, seed.cotangent))

    return faulty


def _probability(original: Callable[..., score.Score]) -> Callable[..., score.Score]:
    def faulty(view: Any, reached: Any, axes: Any, kind: str = "auto", *rest: Any) -> score.Score:
        try:
            return original(view, reached, axes, "probability" if kind == "auto" else kind, *rest)
        except RequestError:
            return original(view, reached, axes, kind, *rest)

    return faulty


def _cam_alone(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Guided Grad-CAM that is guided backpropagation alone."""

    def faulty(g: Emitter, plan: Any, made: Mapping[str, Any]) -> dict[str, Any]:
        cams = original(g, plan, made)
        if contract.GUIDED_GRADCAM in cams:
            cams[contract.GUIDED_GRADCAM] = g.cast(made[contract.GUIDED_BACKPROP], np.float32)
        return cams

    return faulty


def _by_signed_cam(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Guided Grad-CAM times the map that is shown, rectified or not."""

    def faulty(g: Emitter, plan: Any, made: Mapping[str, Any]) -> dict[str, Any]:
        cams = original(g, plan, made)
        if contract.GUIDED_GRADCAM in cams:
            guided = g.cast(made[contract.GUIDED_BACKPROP], np.float32)
            cams[contract.GUIDED_GRADCAM] = g.mul(guided, cams[contract.GRADCAM])
        return cams

    return faulty


def _gradient_alone(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Input x Gradient without the input."""

    def faulty(*arguments: Any) -> dict[str, Any]:
        made = original(*arguments)
        products = [role for role in made if contract.method_of(role) == contract.INPUT_X_GRADIENT]
        return {**made, **{x: made[x.replace(contract.INPUT_X_GRADIENT, contract.SALIENCY)] for x in products}}

    return faulty


def _unguarded(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda g, above, below, rounding: g.div(above, below)


def _other_mode(mode: str, key: str, value: str) -> Wrap:
    modes = {**heads.INTERPOLATE_MODES, mode: {**heads.INTERPOLATE_MODES[mode], key: value}}
    return _while(heads, "INTERPOLATE_MODES", modes)


def _first_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    """As many tokens as there are positions, from the front."""

    def faulty(g: Any, layout: Any, sizes: Any, x: Any) -> Any:
        if layout.others is None:
            return x
        kept = original(g, layout, sizes, x)
        return g.slice(x, [0], [g.size(kept, layout.others)], [layout.others])

    return faulty


def _one_earlier(original: Callable[..., Any]) -> Callable[..., Any]:
    def faulty(search: Any, request: str) -> Any:
        chosen, found = original(search, request), search.candidates
        index = next((i for i, layer in enumerate(found) if layer.tensor.name == chosen.tensor.name), 0)
        return found[index - 1] if request == "auto" and index else chosen

    return faulty


def _everywhere(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda g, *_: g.constant(np.asarray(True))


def _never(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *_: None


def _fault(name: str, owner: Any, attribute: Any, wrap: Wrap) -> Fault:
    home = name.partition(":")[0] if isinstance(owner, dict) else owner.__name__
    return Fault(name, f"{home}.{attribute}", wrap, owner, attribute)


_STEPS = [
    _fault("guided: negative cotangents pass", policies, "_guided", _unrectified),
    _fault("guided: cotangents pass where x <= 0", policies, "_guided", _everything_vanishes),
    _fault("guided: the plain gradient", policies, "_guided", lambda _: lambda rule, rectifier: rule),
    _fault("deconvnet: negative cotangents pass", policies, "_deconvnet", _unrectified),
    _fault("deconvnet: the guided rule", policies, "_deconvnet", lambda _: policies._guided),
    _fault("mask x > 0: everything passes", masks, "where_positive", _pass),
    _fault("mask x > 0: zero passes", masks, "where_positive", _mask_at_zero),
    _fault("mask x < bound: everything passes", masks, "where_below", _pass),
    _fault("mask x < bound: the bound passes", masks, "where_below", _mask_at_bound),
    _fault("mask by condition: everything passes", masks, "keep", _pass),
    _fault("accumulate: the first cotangent only", Emitter, "sum", lambda _: lambda g, terms: terms[0]),
    _fault("unbroadcast times 1.05", backward, "unbroadcast", _scaled),
    _fault("unbroadcast at run time times 1.05", backward, "_unbroadcast_at_run_time", _scaled),
    _fault("Grad-CAM: alpha a sum, no mean", heads, "cam", _while(Emitter, "reduce_mean", Emitter.reduce_sum)),
    _fault("Grad-CAM: mean over channels, no sum", heads, "cam", _while(Emitter, "reduce_sum", Emitter.reduce_mean)),
    _fault("Grad-CAM: no ReLU", maps, "_cams", _while(Emitter, "relu", _unchanged)),
    _fault("Guided Grad-CAM: not times Grad-CAM", maps, "_cams", _cam_alone),
    _fault("Guided Grad-CAM: times the signed map", maps, "_cams", _by_signed_cam),
    *(_fault(f"CAM weights: {method} times 1.05", cams.WEIGHTS, method, _scaled) for method in cams.WEIGHTS),
    _fault("CAM weights: LayerCAM of both signs", cams.WEIGHTS, contract.LAYERCAM, lambda _: cams._gradient),
    _fault(
        "CAM weights: Grad-CAM++ of both signs",
        cams.WEIGHTS,
        contract.GRADCAM_PLUSPLUS,
        _while(Emitter, "relu", _unchanged),
    ),
    _fault("CAM weights: divided by what may be 0", cams, "_ratio", _unguarded),
    _fault("Input x Gradient: the gradient alone", maps, "_gradients", _gradient_alone),
    *(
        _fault(f"resize: {mode} {key}={value}", heads, "resize_to", _other_mode(mode, key, value))
        for mode, key, value in (
            ("bilinear", "mode", "cubic"),
            ("bilinear", "coordinate_transformation_mode", "asymmetric"),
            ("bilinear", "coordinate_transformation_mode", "align_corners"),
            ("nearest", "coordinate_transformation_mode", "half_pixel"),
            ("nearest", "nearest_mode", "ceil"),
        )
    ),
    _fault("auto layer: one earlier", layers.LayerSearch, "choose", _one_earlier),
    _fault("auto layer: positions always reach", layers.LayerSearch, "_positions_reach", lambda _: lambda *_: True),
    _fault("auto layer: the maps of the classes", layers, "one_to_one", lambda _: lambda *_: {}),
    _fault("Grad-CAM of tokens: those in front not left out", heads, "_at_positions", _first_tokens),
    _fault("score: behind the Softmax", score, "find_score", _probability),
    *(
        _fault(f"seed: {attribute} times 1.05", owner, attribute, _scaled_seed)
        for owner, attribute in (
            (target, "_class_seed"),
            (target, "_two_class_seed"),
            (target, "_sum_seed"),
            (target, "_weighted_seed"),
        )
    ),
    *(
        _fault(f"target_score: {attribute} times 1.05", owner, attribute, _scaled_score)
        for owner, attribute in (
            (target, "_class_seed"),
            (target, "_two_class_seed"),
            (target, "_sum_seed"),
            (target, "_weighted_seed"),
        )
    ),
    _fault("seed: the mask times 1.05", target, "_pixel_weights", _scaled),
    _fault("seed: every position of a neuron", target, "_at_positions", _everywhere),
    _fault("Grad-CAM of several layers: not normalised", heads, "_normalised", lambda _: lambda g, cam: cam),
    _fault("seed: class 0 of two has S = z", target, "_two_class_seed", _positive_seed),
    _fault("rectifiers: the gate of a HardSigmoid is one", rectifiers, "hard_gate", lambda _: _never),
    *(_fault(f"rectifiers: {op} is none", rectifiers._FINDERS, op, _never) for op in sorted(rectifiers._FINDERS)),
    *(_fault(f"smooth activations: {op} is none", smooth._FINDERS, op, _never) for op in sorted(smooth._FINDERS)),
]
