"""Do the outputs hold? Those of the original model, and the score, run by ONNX Runtime."""

from typing import Any

import numpy as np

from graphgbp import contract
from graphgbp.equivalence import Feeds, RunError, difference
from graphgbp.errors import GraphgbpError
from graphgbp.verification.double import DoubleError
from graphgbp.verification.parts import part_for
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject
from graphgbp.verification.targets import score_per_image, weights

FORWARD_TOLERANCE = 1e-6  # of the largest value: less than a step of what was quantised
RAISED_TOLERANCE = 1e-5  # the same, where ONNX's converter has written the forward graph anew
SCORE_TOLERANCE = 1e-5
HALF_STEP = 2.0**-10  # of the largest score: where one of half precision is rounded and what reads it is not
_SAME = 1e-4  # of the largest value: functions may be computed in another order


def check_forward(subject: Subject) -> Check:
    """On random input the file gives the outputs of its source."""
    name = "forward"
    if subject.original is None:
        return unchecked(name, "there is no source to compare with")
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    feeds = subject.point
    try:
        is_raised = subject.manifest.opset is not None and not subject.quantised
        tolerance = RAISED_TOLERANCE if is_raised else FORWARD_TOLERANCE
        before, after = subject.run_both(feeds)
    except GraphgbpError as error:
        return unchecked(name, f"the forward graph cannot be read: {error}")
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run source and file on the same input: {error}")
    equal = True
    for output, expected in before.items():
        if output not in after:
            return failed(name, f"output '{output}' of the source is not in the file")
        what = difference(expected, after[output], tolerance)
        if what:
            return failed(name, f"output '{output}' {what}")
        equal = equal and difference(expected, after[output], 0) is None
    how = "bit for bit" if equal else f"within {tolerance:g} of the largest value"
    if subject.quantised:
        how += ", as ONNX Runtime optimises it by default"
        how += "" if equal else " (it fuses nodes between floats, where the file reads them, in another way)"
    shapes = {name: list(x.shape) for name, x in feeds.items()}
    return passed(name, f"{len(before)} outputs equal {how}, on random input {shapes}", bit_equal=equal)


def check_plain_nodes(subject: Subject) -> Check | None:
    """What is seen through computes what it stands for; None where there is nothing to see through."""
    name = "plain nodes"
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    try:
        if subject.expanded is None and not subject.pins:
            return None
        if subject.pins:
            return _check_pinned(name, subject)
        found = subject.run(subject.graph, subject.point)
    except (RunError, DoubleError) as error:
        return unchecked(name, f"the plain nodes cannot be evaluated: {error}")
    for output, expected in zip(found, subject.run_of_forward[1] or [], strict=True):
        if what := difference(expected, found[output], _SAME):
            return failed(name, f"functions or fused nodes are read wrongly: output '{output}' {what}")
    return passed(
        name, f"functions and fused nodes as plain ones give the outputs within {_SAME:g} of the largest value"
    )


def _check_pinned(name: str, subject: Subject) -> Check:
    pins = subject.pins
    if pins.fault:
        return failed(name, f"fused or quantised nodes are read wrongly: {pins.fault}")
    figures: dict[str, Any] = {"tensors": len(pins.exact)}
    detail = f"{len(pins.exact)} tensors of few bits are what the plain nodes make of those before them, within a step"
    if subject.quantised:
        figures["equal_share"] = pins.equal_share
        detail += f"; {pins.equal_share:.3%} of the quantised values are equal"
    return passed(name, detail, **figures)


def check_score(subject: Subject) -> Check | None:
    """target_score and target_class are those of the original's scores, for the predicted class and for the last."""
    name = "score"
    if not subject.manifest.score:
        return None
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    target = subject.public(contract.TARGET)
    requests = [subject.targets]
    if target is not None:
        requests.append({**subject.targets, target: np.asarray([subject.classes - 1])})
    roles = (contract.TARGET_SCORE, contract.TARGET_CLASS)
    wanted = [public for role in roles if (public := subject.public(role))]
    tensor = subject.manifest.score["tensor"]
    part = part_for(subject.whole, [*wanted, tensor] if subject.halves and subject.expanded is None else wanted)
    worst = 0.0
    for targets in requests:
        try:
            found = subject.run(part, {**subject.point, **targets})
        except RunError as error:
            return failed(name, f"ONNX Runtime does not run the file: {error}")
        z = found.get(tensor, subject.z)  # of half precision its rounding depends on what else is read
        if not _distance(subject.z, z) <= HALF_STEP:
            return failed(name, f"'{tensor}' is not that of the original model")
        w = weights(subject, z, targets)
        expected = score_per_image(subject, z, w)
        scores = found[subject.manifest.names[contract.TARGET_SCORE]]
        if scores.shape != expected.shape:
            return failed(name, f"target_score has shape {list(scores.shape)}, expected {list(expected.shape)}")
        terms = float(np.abs(z.astype(np.float64) * w).sum()) or 1.0
        worst = max(worst, float(np.abs(scores - expected).max()) / terms)
        said = subject.public(contract.TARGET_CLASS)
        if said and not _is_class(subject, found[said], z, targets):
            return failed(name, f"target_class is {found[said].tolist()} where the scores say otherwise")
    if not worst <= (HALF_STEP if subject.halves else SCORE_TOLERANCE):
        return failed(name, f"target_score is off by {worst:.1e} of the scores that make it", error=worst)
    return passed(name, f"target_score is that of '{subject.manifest.score['tensor']}' within {worst:.1e}", error=worst)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    wide = a.astype(np.float64)
    return float(np.abs(wide - b.astype(np.float64)).max(initial=0) / (np.abs(wide).max(initial=0) or 1.0))


def _is_class(subject: Subject, found: np.ndarray, z: np.ndarray, targets: Feeds) -> bool:
    score, asked = subject.manifest.score, int(targets[subject.manifest.names[contract.TARGET]][0])
    axis = score["class_axis"]
    one_position = all(size == 1 for index, size in enumerate(z.shape) if index not in (0, axis))
    if asked != contract.PREDICTED or not one_position:
        return bool((found == asked).all())
    if score["two_classes_in_one"]:
        return bool((found == (z.reshape(-1) > (0.5 if subject.is_probability else 0))).all())
    return bool((found == (0 if axis is None else z.argmax(axis).reshape(-1))).all())
