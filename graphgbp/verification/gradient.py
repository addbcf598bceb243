"""Is the plain gradient right? Held against central differences of the original model, in double precision.

The file itself is evaluated in double too, so what is compared is its mathematics: a wrong, missing or foreign part of
the gradient shows down to a thousandth. ONNX Runtime's float32 numbers are then held against those.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx

from graphgbp import contract
from graphgbp.equivalence import Feeds, RunError, Session, outputs_of
from graphgbp.errors import GraphgbpError
from graphgbp.jacobian import append_vjp
from graphgbp.model_file import read_manifest
from graphgbp.prepare import prepare
from graphgbp.source import Source
from graphgbp.verification.differences import (
    DOUBLE,
    FLOAT32,
    STRAIGHT_THROUGH,
    Difference,
    Precision,
    Score,
    differences,
    moves,
)
from graphgbp.verification.double import DoubleError, DoubleModel
from graphgbp.verification.masks import Mask, masked_maps
from graphgbp.verification.parts import norm, part_for
from graphgbp.verification.pins import REAL, Pins
from graphgbp.verification.report import PASS, Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject

FLOAT32_DISTANCE = 0.1  # relative L2: ReLUs near zero switch in float32, a few per cent in deep random networks
_AGREEMENT = 1e-3  # of the largest value: the reference evaluator computes what ONNX Runtime computes


class Evaluator(Protocol):
    """A model that can be run on named feeds, and leaves aside those it has no input for."""

    def run(self, names: Sequence[str], feeds: Feeds) -> list[np.ndarray]: ...


class _Runtime:
    """ONNX Runtime, where the reference evaluator cannot run a model."""

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None) -> None:
        self._session = Session(model, folder)
        kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        self._types = {name: onnx.helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items()}

    def run(self, names: Sequence[str], feeds: Feeds) -> list[np.ndarray]:
        typed = {name: x.astype(self._types[name]) for name, x in feeds.items() if name in self._types}
        found = self._session.outputs_of(typed)
        return [found[name] for name in names]


@dataclass(frozen=True)
class Claim:
    """A gradient that a file gives, of S = the sum of tensors of the original model times their weights.

    `moved` are tensors of `graph`, the original model, each with the tensor of `file` that carries dS/d it; `scored`
    the tensors that make S, each with its weights, or with the tensor of `file` that carries them. `feeds` are all
    inputs of both. `twins` are tensors of `graph` that `file` computes again, by the names of the copies.
    """

    words: str
    graph: onnx.ModelProto
    moved: Mapping[str, str]
    scored: Sequence[tuple[str, np.ndarray | str]]
    file: onnx.ModelProto
    feeds: Feeds
    twins: Mapping[str, str]


def check_gradients(subject: Subject) -> list[Check]:
    """The plain gradient by the inputs, and by each target layer whose gradient the file gives out."""
    checks = [held(subject, "gradient", _input_claim)]
    for qualifier, gradient in subject.roles(contract.GRADCAM_GRADIENTS):
        layer = next(x for x in subject.manifest.target_layers if qualifier in ("", x["name"]))["tensor"]
        name = "layer gradient" + (f" {qualifier}" if qualifier else "")
        checks.append(held(subject, name, partial(_layer_claim, layer=layer, gradient=gradient)))
    return checks


def check_masked_gradient(subject: Subject, policy: str, masks: Sequence[Mask]) -> Check:
    """A guided or deconvnet map between its masks, where it is the plain gradient of the pieces of the network."""
    return held(subject, f"{policy} gradient", partial(_masked_claim, policy=policy, masks=masks))


def held(subject: Subject, name: str, make: Callable[[Subject], Claim]) -> Check:
    """A claim held against central differences: in double precision, else in float32."""
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    try:
        pins = subject.pins
        claim = make(subject)
    except (GraphgbpError, RunError, DoubleError) as error:
        return unchecked(name, f"no gradient could be made to check: {error}")
    double = partial(DoubleModel, operators=REAL) if pins else DoubleModel
    try:
        return _held(name, claim, subject.point, pins, STRAIGHT_THROUGH if pins else DOUBLE, double)
    except DoubleError as error:
        reason = str(error)
    if pins:
        return unchecked(name, f"no difference of float32 goes straight through rounding, and {reason}")
    try:
        found = _held(name, claim, subject.point, pins, FLOAT32, partial(_Runtime, folder=subject.weights_folder))
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run the file: {error}")
    return Check(name, found.status, f"{found.detail} (no double precision: {reason})", found.figures)


# -- what is claimed -------------------------------------------------------------------------------------------------


def _input_claim(subject: Subject) -> Claim:
    """The gradient by the inputs: the file's own, or where it holds only other maps, one made afresh by the engine."""
    manifest, feeds = subject.manifest, {**subject.point, **subject.targets}
    if manifest.kind == "vjp":
        moved = {role.removesuffix("_grad"): x for role, x in manifest.names.items() if x not in subject.targets}
        scored = [(y, subject.targets[name]) for y, name in subject.seeded.items()]
        words = f"of {len(scored)} outputs by {len(moved)} inputs"
        return Claim(words, subject.graph, moved, scored, subject.file, feeds, subject.view.twins)
    z, inputs = manifest.score["tensor"], [entry["name"] for entry in manifest.inputs]
    if own := subject.gradients:
        held = contract.SALIENCY if contract.SALIENCY in manifest.methods else contract.INPUT_X_GRADIENT
        words = f"the file's {held.replace('_', ' ')}"
        return Claim(words, subject.graph, own, [(z, subject.w)], subject.file, feeds, subject.view.twins)
    return _claim_afresh(subject, z, inputs)


def _claim_afresh(subject: Subject, z: str, inputs: Sequence[str]) -> Claim:
    is_there = any(z in node.output for node in subject.whole_forward.graph.node)
    part = part_for(subject.whole_forward if is_there else subject.graph, [z])
    afresh = append_vjp(Source(part, subject.weights_folder, lambda: {"source": {}}), inputs, [z])
    made = read_manifest(afresh)
    assert made is not None
    words = "the engine's gradient for this model (the file holds none by the input)"
    moved = {x: made.names[f"{x}_grad"] for x in inputs}
    feeds = {**subject.point, **subject.targets, made.names[f"{z}_grad"]: subject.w}
    file, twins = subject.beside_graph(afresh), prepare(part, subject.weights_folder).twins
    return Claim(words, subject.graph, moved, [(z, subject.w)], file, feeds, twins)


def _layer_claim(subject: Subject, layer: str, gradient: str) -> Claim:
    """The gradient by a target layer, of the original model from that layer on."""
    z = subject.manifest.score["tensor"]
    feeds = {**subject.point, **subject.targets}
    words = f"'{gradient}' by '{layer}'"
    return Claim(words, subject.graph, {layer: gradient}, [(z, subject.w)], subject.file, feeds, subject.view.twins)


def _masked_claim(subject: Subject, policy: str, masks: Sequence[Mask]) -> Claim:
    """The network cut at its rectifiers: what reaches each y, and the inputs, of the masked cotangents of every x."""
    z = subject.manifest.score["tensor"]
    feeds = {**subject.point, **subject.targets}
    maps = masked_maps(subject, policy)
    moved = {**maps, **{mask.y: mask.arrived for mask in masks}}
    scored: list[tuple[str, np.ndarray | str]] = [(z, subject.w), *((mask.x, mask.passed_on) for mask in masks)]
    words = f"{len(maps)} {policy} map{'s' * (len(maps) > 1)}, cut at {len(masks)} rectifiers,"
    return Claim(words, subject.graph, moved, scored, subject.file, feeds, subject.view.twins)


# -- held against differences ------------------------------------------------------------------------------------------


def _held(
    name: str,
    claim: Claim,
    inputs: Feeds,
    pins: Pins,
    precision: Precision,
    evaluator: Callable[[onnx.ModelProto], Evaluator],
) -> Check:
    carried = [weight for _, weight in claim.scored if isinstance(weight, str)]
    wanted = list(dict.fromkeys([*claim.moved.values(), *carried]))
    file, pinned = pins.cut_off(claim.file, wanted, pins.displaced, claim.twins)
    values = dict(zip(wanted, evaluator(file).run(wanted, claim.feeds | pinned), strict=True))
    gradient = {tensor: values[name].astype(np.float64) for tensor, name in claim.moved.items()}
    terms = [(x, values[weight] if isinstance(weight, str) else weight) for x, weight in claim.scored]
    point = _point(claim, inputs, pins, evaluator)
    scored = list(dict.fromkeys(tensor for tensor, _ in terms))
    inside = [tensor for tensor in claim.moved if tensor not in inputs]
    original = evaluator(part_for(pins.straight_through if pins else claim.graph, scored, inside))
    if not precision.large and not pins:
        _require_agreement(claim, inputs, scored, original.run(scored, {**inputs, **point}))
    fixed = inputs | (pins.constants if pins else {})
    fault = _shape_fault(point, gradient)
    if fault:
        return failed(name, fault)

    def score(x: Feeds) -> float:
        z = dict(zip(scored, original.run(scored, {**fixed, **x}), strict=True))
        return sum(float(np.sum(weight * z[tensor])) for tensor, weight in terms)

    if not norm(gradient):
        return _judge_zero(name, claim.words, score, point, precision)
    check = _judge(name, claim.words, differences(score, point, gradient, precision), precision)
    if precision.large:
        return check
    feeds = claim.feeds
    if pins:
        file, pinned = pins.cut_off(claim.file, list(claim.moved.values()), pins.exact, claim.twins)
        feeds = feeds | pinned
        gradient = dict(zip(claim.moved, evaluator(file).run(list(claim.moved.values()), feeds), strict=True))
    return _with_float32(check, file, claim, gradient, feeds)


def _point(claim: Claim, inputs: Feeds, pins: Pins, evaluator: Callable[[onnx.ModelProto], Evaluator]) -> Feeds:
    """What is moved, where differences are taken."""
    known = inputs | pins.displaced
    point = {tensor: known[tensor].astype(np.float64) for tensor in claim.moved if tensor in known}
    inside = [tensor for tensor in claim.moved if tensor not in known]
    if not inside:
        return point
    found = evaluator(part_for(claim.graph, inside, pins.displaced.keys())).run(inside, known)
    return point | {tensor: x.astype(np.float64) for tensor, x in zip(inside, found, strict=True)}


def _require_agreement(claim: Claim, inputs: Feeds, names: Sequence[str], values: Sequence[np.ndarray]) -> None:
    """Raise DoubleError where the reference evaluator computes something else than ONNX Runtime."""
    outputs = outputs_of(part_for(claim.graph, names), inputs)
    for tensor, value in zip(names, values, strict=True):
        expected = outputs[tensor]
        off = np.abs(value - expected).max(initial=0) if value.shape == expected.shape else np.inf
        if not off <= _AGREEMENT * max(float(np.abs(expected).max(initial=0)), 1e-30):
            raise DoubleError(f"ONNX's reference evaluator gives other values of '{tensor}' than ONNX Runtime")


def _shape_fault(point: Feeds, gradient: Feeds) -> str | None:
    for tensor, x in point.items():
        if gradient[tensor].shape != x.shape:
            return f"the gradient by '{tensor}' has shape {list(gradient[tensor].shape)}, expected {list(x.shape)}"
        if not np.isfinite(gradient[tensor]).all():
            return f"the gradient by '{tensor}' is not finite on random input"
    return None


def _judge(name: str, words: str, found: Sequence[Difference], precision: Precision) -> Check:
    settled = [difference for difference in found if difference.settled]
    worst = max(settled, key=lambda difference: difference.error, default=None)
    figures: dict[str, Any] = {"tolerance": precision.tolerance, "directions": [d.to_dict() for d in found]}
    if worst is None:
        return unchecked(name, f"{words}: no step along any direction settles", **figures)
    figures["error"] = worst.error
    if worst.error > precision.tolerance:
        detail = (
            f"{words}: along {worst.direction} it claims a slope of {worst.claimed:.6g}, and central differences "
            f"{precision.words} give {worst.measured:.6g} (error {worst.error:.1e}, tolerance {precision.tolerance:g})"
        )
        return failed(name, detail, **figures)
    if len(settled) <= len(found) / 2 or not found[0].settled:
        return unchecked(
            name, f"{words}: {len(found) - len(settled)} of {len(found)} directions do not settle", **figures
        )
    return passed(
        name,
        f"{words} equals central differences {precision.words} along {len(settled)} directions: "
        f"error {worst.error:.1e}, tolerance {precision.tolerance:g}",
        **figures,
    )


def _judge_zero(name: str, words: str, score: Score, point: Feeds, precision: Precision) -> Check:
    """A gradient that is zero is wrong where the score moves, and not told from a missing one where it does not."""
    if precision.large or not moves(score, point, precision):
        return unchecked(name, f"{words}: it is zero on random input, so its size cannot be checked")
    return failed(name, f"{words} is zero, and central differences {precision.words} are not")


def _with_float32(check: Check, file: onnx.ModelProto, claim: Claim, gradient: Feeds, feeds: Feeds) -> Check:
    """The check, and how far ONNX Runtime's float32 gradient lies from the one in double."""
    try:
        found = _Runtime(file).run(list(claim.moved.values()), feeds)
    except RunError as error:
        return failed(check.name, f"ONNX Runtime does not run the file: {error}")
    off = {tensor: x - gradient[tensor] for tensor, x in zip(claim.moved, found, strict=True)}
    distance = norm(off) / norm(gradient)
    figures = {**check.figures, "float32_distance": distance}
    if check.status == PASS and not distance <= FLOAT32_DISTANCE:
        return failed(check.name, f"ONNX Runtime's float32 gradient lies {distance:.1e} from the double one", **figures)
    return Check(check.name, check.status, f"{check.detail}; in float32 {distance:.1e} from it", figures)
