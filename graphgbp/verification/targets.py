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
    """The predicted class; a drawn mask, weights or cotangent; every position of a neuron. By public name."""
    rng = np.random.default_rng(1)
    z = subject.z
    axis = subject.manifest.score["class_axis"]
    positions = [size for index, size in enumerate(z.shape) if index not in (0, axis if axis is not None else 1)]
    made = {
        contract.TARGET: lambda: np.asarray([PREDICTED]),
        contract.TARGET_MASK: lambda: rng.random([1, *positions], np.float32),
        contract.TARGET_POSITION: lambda: np.full([1, len(positions)], PREDICTED),
        contract.TARGET_WEIGHTS: lambda: rng.standard_normal(z.shape).astype(np.float32),
        contract.TARGET_COTANGENT: lambda: rng.standard_normal(z.shape).astype(np.float32),
    }
    names = subject.manifest.names
    return {names[role]: make() for role, make in made.items() if role in names}


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
        mask_axis = 1 if axis is None else axis
    elif axis is None:
        return np.ones(z.shape)
    else:
        predicted = z.argmax(axis)
        wanted = predicted if target == PREDICTED else np.full(predicted.shape, target)
        w = np.moveaxis(np.eye(z.shape[axis])[wanted], -1, axis)
        is_predicted, mask_axis = np.expand_dims(wanted == predicted, axis), axis
    mask = targets.get(names.get(contract.TARGET_MASK, ""))
    if mask is not None:
        share = np.expand_dims(mask.astype(np.float64), mask_axis)
        w = w * np.where(share < 0, is_predicted, share)
    return w


def score_per_image(subject: "Subject", z: np.ndarray, w: np.ndarray) -> np.ndarray:
    """S_n, [N], or [1] where all images share it; class 0 of one probability p for two counts as 1 - p."""
    terms = z.astype(np.float64) * w
    if subject.is_probability and subject.manifest.score["two_classes_in_one"]:
        terms = terms + np.maximum(-w, 0)
    if not subject.manifest.score["per_image"]:
        return terms.sum(keepdims=True).reshape(1)
    return terms.reshape(len(terms), -1).sum(1)
