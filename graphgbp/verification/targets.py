"""What is explained, worked out again in numpy: the target that is fed, the score S and its weights w, S = sum z w.

It shares no code with the graph that computes the same in the file.
"""

from typing import TYPE_CHECKING

import numpy as np

from graphgbp import contract
from graphgbp.contract import PREDICTED
from graphgbp.equivalence import Feeds

if TYPE_CHECKING:
    from graphgbp.verification.subject import Subject


def default_targets(subject: "Subject") -> Feeds:
    """The predicted class; a drawn mask (-1 in places), weights or cotangent; one row of positions. By public name."""
    rng = np.random.default_rng(1)
    z = subject.z
    axis = subject.manifest.score["class_axis"]
    positions = [size for index, size in enumerate(z.shape) if index not in (0, axis)]
    made = {
        contract.TARGET: lambda: np.asarray([PREDICTED]),
        contract.TARGET_MASK: lambda: _some_predicted(rng, [1, *positions]),
        contract.TARGET_POSITION: lambda: np.asarray([[positions[0] // 2, *[PREDICTED] * (len(positions) - 1)]]),
        contract.TARGET_WEIGHTS: lambda: rng.standard_normal(z.shape).astype(np.float32),
        contract.TARGET_COTANGENT: lambda: rng.standard_normal(z.shape).astype(np.float32),
    }
    names = subject.manifest.names
    return {names[role]: make() for role, make in made.items() if role in names}


def _some_predicted(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """A mask that leaves half of the positions to the prediction."""
    return np.where(rng.random(shape) < 0.5, PREDICTED, rng.random(shape)).astype(np.float32)


def weights(subject: "Subject", z: np.ndarray, targets: Feeds) -> np.ndarray:
    """dS/dz, in z's shape, for one class for all images."""
    names, score = subject.manifest.names, subject.manifest.score
    for role in (contract.TARGET_WEIGHTS, contract.TARGET_COTANGENT):
        if role in names:
            return targets[names[role]].reshape(z.shape)
    target, axis = int(targets[names[contract.TARGET]][0]), score["class_axis"]
    if score["two_classes_in_one"]:
        positive = z > (0.5 if subject.is_probability else 0)
        wanted = positive if target == PREDICTED else np.full(z.shape, bool(target))
        w, is_predicted = np.where(wanted, 1.0, -1.0), wanted == positive
    elif axis is None:
        w, is_predicted = np.ones(z.shape), np.ones(z.shape, bool)
    else:
        predicted = z.argmax(axis)
        wanted = predicted if target == PREDICTED else np.full(predicted.shape, target)
        w = np.moveaxis(np.eye(z.shape[axis])[wanted], -1, axis)
        is_predicted = np.expand_dims(wanted == predicted, axis)
    mask = targets.get(names.get(contract.TARGET_MASK, ""))
    if mask is not None:
        share = mask.astype(np.float64) if axis is None else np.expand_dims(mask.astype(np.float64), axis)
        w = w * np.where(share < 0, is_predicted, share)
    position = targets.get(names.get(contract.TARGET_POSITION, ""))
    return w if position is None else w * _at(position[0], z.shape, axis)


def _at(position: np.ndarray, shape: tuple[int, ...], class_axis: int | None) -> np.ndarray:
    """1 at the position that is named, else 0; -1 names all along its axis."""
    inside = np.ones(shape)
    axes = [index for index in range(1, len(shape)) if index != class_axis]
    for axis, wanted in zip(axes, position.tolist(), strict=True):
        if wanted != PREDICTED:
            here = np.arange(shape[axis]) == wanted
            inside = inside * here.reshape([-1, *[1] * (len(shape) - axis - 1)])
    return inside


def score_per_image(subject: "Subject", z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """S_n, [N], or [1] where all images share it; class 0 of one probability p for two counts as 1 - p."""
    terms = z.astype(np.float64) * w
    if subject.is_probability and subject.manifest.score["two_classes_in_one"]:
        terms = terms + np.maximum(-w, 0)
    if not subject.manifest.score["per_image"]:
        return terms.sum(keepdims=True).reshape(1)
    return terms.reshape(len(terms), -1).sum(1)
