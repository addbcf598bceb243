"""Do the outputs hold? Those of the original model, and the score, run by ONNX Runtime."""

import numpy as np

from graphgbp import contract
from graphgbp.equivalence import Feeds, RunError, difference
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject, part_for
from graphgbp.verification.targets import score_per_image, weights

FORWARD_TOLERANCE = 1e-6  # of the largest value
RAISED_TOLERANCE = 1e-5  # the same, where ONNX's converter has written the forward graph anew
SCORE_TOLERANCE = 1e-5


def check_forward(subject: Subject) -> Check:
    """On random input the file gives the outputs of its source."""
    name = "forward"
    if subject.original is None:
        return unchecked(name, "there is no source to compare with")
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    feeds = subject.point
    tolerance = RAISED_TOLERANCE if subject.manifest.opset else FORWARD_TOLERANCE
    try:
        before = subject.run_original(feeds)
        after = subject.run(subject.whole, {**feeds, **subject.targets})
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
    shapes = {name: list(x.shape) for name, x in feeds.items()}
    return passed(name, f"{len(before)} outputs equal {how} on random input {shapes}", bit_equal=equal)


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
    part = part_for(subject.whole, [public for role in roles if (public := subject.public(role))])
    worst = 0.0
    for targets in requests:
        z, w = subject.z, weights(subject, subject.z, targets)
        expected = score_per_image(subject, z, w)
        try:
            found = subject.run(part, {**subject.point, **targets})
        except RunError as error:
            return failed(name, f"ONNX Runtime does not run the file: {error}")
        scores = found[subject.manifest.names[contract.TARGET_SCORE]]
        if scores.shape != expected.shape:
            return failed(name, f"target_score has shape {list(scores.shape)}, expected {list(expected.shape)}")
        terms = float(np.abs(z.astype(np.float64) * w).sum()) or 1.0
        worst = max(worst, float(np.abs(scores - expected).max()) / terms)
        said = subject.public(contract.TARGET_CLASS)
        if said and not _is_class(subject, found[said], z, targets):
            return failed(name, f"target_class is {found[said].tolist()} where the scores say otherwise")
    if not worst <= SCORE_TOLERANCE:
        return failed(name, f"target_score is off by {worst:.1e} of the scores that make it", error=worst)
    return passed(name, f"target_score is that of '{subject.manifest.score['tensor']}' within {worst:.1e}", error=worst)


def _is_class(subject: Subject, found: np.ndarray, z: np.ndarray, targets: Feeds) -> bool:
    score, asked = subject.manifest.score, int(targets[subject.manifest.names[contract.TARGET]][0])
    axis = score["class_axis"]
    one_position = all(size == 1 for index, size in enumerate(z.shape) if index not in (0, axis))
    if asked != contract.PREDICTED or not one_position:
        return bool((found == asked).all())
    if score["two_classes_in_one"]:
        return bool((found == (z.reshape(-1) > (0.5 if subject.is_probability else 0))).all())
    return bool((found == (0 if axis is None else z.argmax(axis).reshape(-1))).all())
