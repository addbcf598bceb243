"""How the score S is chosen at run time, and its cotangent, the seed.

S_n = z[n, t_n]. Where z has further positions, S sums over them, each at its own predicted class where the target is
-1; in a segmentation over the pixels of a mask, by default those predicted as the target; in a neuron's tensor over
the positions that are named. With weights or a cotangent w, S = sum z w.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import contract
from graphgbp.contract import PREDICTED
from graphgbp.emit import Emitter
from graphgbp.score import Score


@dataclass(frozen=True)
class Seed:
    """The score's cotangent, and what the file tells of the target: one class and one score per image."""

    cotangent: gs.Tensor
    target_class: gs.Tensor | None
    target_score: gs.Tensor


def input_roles(score: Score, kind: str) -> list[str]:
    """The inputs that a converted file takes beside the model's own."""
    if kind == "weights":
        return [contract.TARGET_WEIGHTS]
    if kind == "cotangent":
        return [contract.TARGET_COTANGENT]
    if score.has_pixels:
        return [contract.TARGET, contract.TARGET_MASK]
    if score.output is None and score.position_axes:
        return [contract.TARGET, contract.TARGET_POSITION]
    return [contract.TARGET]


def make_input(role: str, name: str, score: Score) -> gs.Variable:
    """The input of a role, with its type and shape."""
    positions = len(score.position_axes)
    dtype, shape = {
        contract.TARGET: (np.int64, ("targets",)),
        contract.TARGET_MASK: (np.float32, ("masks", *(f"mask_size_{axis}" for axis in range(positions)))),
        contract.TARGET_POSITION: (np.int64, ("positions", positions)),
        contract.TARGET_WEIGHTS: (np.float32, score.tensor.shape),
        contract.TARGET_COTANGENT: (np.float32, score.tensor.shape),
    }[role]
    return gs.Variable(name, np.dtype(dtype), shape)


def default_value(role: str, score: Score) -> np.ndarray:
    """What an optional input holds: the predicted class, the pixels predicted as it, every position."""
    positions = len(score.position_axes)
    shape = {
        contract.TARGET: [1],
        contract.TARGET_MASK: [1] * (positions + 1),
        contract.TARGET_POSITION: [1, positions],
    }
    return np.full(shape[role], PREDICTED, np.float32 if role == contract.TARGET_MASK else np.int64)


def seed(g: Emitter, score: Score, inputs: Mapping[str, gs.Variable]) -> Seed:
    """The seed from the inputs, by role, that say what is explained."""
    with g.scope("target"):
        for role in (contract.TARGET_WEIGHTS, contract.TARGET_COTANGENT):
            if role in inputs:
                return _weighted_seed(g, score, inputs[role])
        classes = _guarded_classes(g, score, inputs[contract.TARGET])
        if score.two_in_one:
            return _two_class_seed(g, score, classes, inputs.get(contract.TARGET_MASK))
        if score.class_axis is None:
            return _sum_seed(g, score, classes, inputs)
        return _class_seed(g, score, classes, inputs)


def _weighted_seed(g: Emitter, score: Score, weights: gs.Variable) -> Seed:
    """S = sum z w, with w of z's shape."""
    z = score.tensor
    cotangent = _in_shape_of_score(g, g.cast(weights, z.dtype), score)
    return Seed(cotangent, None, _per_image(g, score, g.mul(z, cotangent)))


def _in_shape_of_score(g: Emitter, x: gs.Tensor, score: Score) -> gs.Tensor:
    """x, through a Reshape that fails where it has another shape than the score."""
    z = score.tensor
    if all(isinstance(size, int) for size in z.shape):
        return x
    sizes = [g.as_int_vector(g.size(z, axis)) for axis in range(score.rank)]
    wanted = g.concat([_images(g, score), *sizes[1:]] if score.per_image else sizes, 0)
    shape = g.op("Shape", x)
    bad = g.reduce_sum(g.cast(g.op("Not", g.equal(shape, wanted)), np.int64), [0])
    return g.with_shape(g.op("Reshape", x, g.add(shape, bad), name=contract.GUARD_WEIGHTS), z)


def _guarded_classes(g: Emitter, score: Score, target: gs.Variable) -> gs.Tensor:
    """The target as [n, 1], through a Reshape that fails on every provider where it does not fit batch and classes.

    From one axis to one axis it would be an identity where it succeeds, and OpenVINO would take it out.
    """
    last = g.sub(_class_count(g, score), g.ints([1]))
    outside = g.op("Or", g.less(target, g.ints([PREDICTED])), g.greater(target, last))
    shape = g.op("Shape", g.unsqueeze(target, [1]))
    bad = g.add(g.reduce_sum(g.cast(outside, np.int64), [0]), _is_no_batch(g, score, shape))
    return g.op("Reshape", target, g.add(shape, bad), name=contract.GUARD_NODE)


def _is_no_batch(g: Emitter, score: Score, length: gs.Tensor) -> gs.Tensor:
    """int64: 0 where a length is that of the batch, or one for all; else 1."""
    fits = g.op("Or", g.equal(length, _images(g, score)), g.equal(length, g.ints([1])))
    return g.cast(g.op("Not", fits), np.int64)


def _class_count(g: Emitter, score: Score) -> gs.Tensor:
    if isinstance(score.classes, int):
        return g.ints([score.classes])
    assert score.class_axis is not None
    return g.as_int_vector(g.size(score.tensor, score.class_axis))


def _images(g: Emitter, score: Score) -> gs.Tensor:
    return g.as_int_vector(g.size(score.counted, 0)) if score.per_image else g.ints([1])


def _class_seed(g: Emitter, score: Score, classes: gs.Tensor, inputs: Mapping[str, gs.Variable]) -> Seed:
    z, axis = score.tensor, score.class_axis
    predicted = g.op("ArgMax", z, axis=axis, keepdims=1)
    wanted = g.where(_is_predicted(g, score, classes), predicted, _per_position(g, score, classes))
    chosen = g.equal(_class_numbers(g, score), wanted)
    if contract.TARGET_POSITION in inputs:
        chosen = g.op("And", chosen, _at_positions(g, score, inputs[contract.TARGET_POSITION]))
    if contract.TARGET_MASK in inputs:
        weight = _pixel_weights(g, score, inputs[contract.TARGET_MASK], g.equal(predicted, wanted))
        cotangent = g.where(chosen, weight, g.like(z, 0))
        kept = g.where(chosen, g.mul(z, weight), g.like(z, 0))
    else:
        cotangent = g.cast(chosen, z.dtype)
        kept = g.where(chosen, z, g.like(z, 0))
    return Seed(cotangent, _target_class(g, score, classes, wanted), _per_image(g, score, kept))


def _two_class_seed(g: Emitter, score: Score, classes: gs.Tensor, mask: gs.Variable | None) -> Seed:
    z, certain = score.tensor, int(score.is_probability)
    positive = g.greater(z, g.like(z, certain / 2))
    second = g.equal(_per_position(g, score, classes), g.ints([1]))
    one = g.op("Or", g.op("And", _is_predicted(g, score, classes), positive), second)
    cotangent = g.where(one, g.like(z, 1), g.like(z, -1))
    wanted = g.cast(one, np.int64)
    terms = g.where(one, z, g.sub(g.like(z, certain), z))
    if mask is not None:
        weight = _pixel_weights(g, score, mask, g.equal(g.cast(positive, np.int64), wanted))
        cotangent, terms = g.mul(cotangent, weight), g.mul(terms, weight)
    return Seed(cotangent, _target_class(g, score, classes, wanted), _per_image(g, score, terms))


def _sum_seed(g: Emitter, score: Score, classes: gs.Tensor, inputs: Mapping[str, gs.Variable]) -> Seed:
    z = score.tensor
    cotangent: gs.Tensor = g.like(z, 1)
    if contract.TARGET_POSITION in inputs:
        cotangent = g.expand_like(g.cast(_at_positions(g, score, inputs[contract.TARGET_POSITION]), z.dtype), z)
    only = _listed(g, classes) if score.position_axes else g.ints([0])
    return Seed(cotangent, g.op("Expand", only, _images(g, score)), _per_image(g, score, g.mul(z, cotangent)))


def _pixel_weights(g: Emitter, score: Score, mask: gs.Variable, is_predicted: gs.Tensor) -> gs.Tensor:
    """The mask at every pixel, in z's type; -1 stands for 1 where the pixel is predicted as the target, else for 0."""
    z = score.tensor
    weights = g.cast(g.unsqueeze(mask, [] if score.class_axis is None else [score.class_axis]), z.dtype)
    everywhere = g.where(g.less(weights, g.like(z, 0)), g.cast(is_predicted, z.dtype), weights)
    return _fitted(g, everywhere, is_predicted)


def _fitted(g: Emitter, x: gs.Tensor, positions: gs.Tensor) -> gs.Tensor:
    """x, through a Reshape that fails where it holds other positions than the score."""
    return g.with_shape(g.op("Reshape", x, g.op("Shape", positions), name=contract.GUARD_MASK), positions)


def _at_positions(g: Emitter, score: Score, position: gs.Variable) -> gs.Tensor:
    """bool, broadcasting against z: whether a position is among those named; -1 names all along its axis."""
    z, axes = score.tensor, score.position_axes
    sizes = g.join([g.size(z, axis) for axis in axes])
    outside = g.op("Or", g.less(position, g.ints([PREDICTED])), g.op("Not", g.less(position, sizes)))
    shape = g.op("Shape", position)
    rows = g.slice(shape, [0], [1], [0])
    bad = g.add(
        g.reduce_sum(g.reduce_sum(g.cast(outside, np.int64), [1], keepdims=False), [0]), _is_no_batch(g, score, rows)
    )
    kept = g.op("Reshape", position, g.add(shape, bad), name=contract.GUARD_POSITION)
    inside = None
    for column, axis in enumerate(axes):
        wanted = g.op("Reshape", g.slice(kept, [column], [column + 1], [1]), g.ints([-1] + [1] * (score.rank - 1)))
        here = g.op("Or", g.equal(_numbers(g, score, axis), wanted), g.less(wanted, g.ints([0])))
        inside = here if inside is None else g.op("And", inside, here)
    assert inside is not None
    return inside


def _per_position(g: Emitter, score: Score, classes: gs.Tensor) -> gs.Tensor:
    """Classes [n, 1] as [n, 1, ...] or [n], to be compared at every position."""
    return classes if score.rank == 2 else g.op("Reshape", classes, g.ints([-1] + [1] * (score.rank - 1)))


def _listed(g: Emitter, classes: gs.Tensor) -> gs.Tensor:
    """Classes [n, 1] as [n]."""
    return g.op("Reshape", classes, g.ints([-1]))


def _is_predicted(g: Emitter, score: Score, classes: gs.Tensor) -> gs.Tensor:
    return g.equal(_per_position(g, score, classes), g.ints([PREDICTED]))


def _class_numbers(g: Emitter, score: Score) -> gs.Tensor:
    """0 .. K-1 along the class axis."""
    assert score.class_axis is not None
    return _numbers(g, score, score.class_axis)


def _numbers(g: Emitter, score: Score, axis: int) -> gs.Tensor:
    """0, 1, ... along an axis of the score."""
    behind = [1] * (score.rank - axis - 1)
    size = score.tensor.shape[axis]
    if isinstance(size, int):
        return g.constant(np.arange(size, dtype=np.int64).reshape([-1, *behind]))
    count = g.squeeze(g.as_int_vector(g.size(score.tensor, axis)), [0])
    numbers = g.op("Range", g.constant(np.int64(0)), count, g.constant(np.int64(1)))
    return g.op("Reshape", numbers, g.ints([-1, *behind]))


def _target_class(g: Emitter, score: Score, classes: gs.Tensor, wanted: gs.Tensor) -> gs.Tensor:
    """int64 [N]: the class that was explained; where positions chose their own, the target as it came."""
    if not score.position_axes:
        return g.op("Reshape", wanted, g.ints([-1]))
    return g.op("Expand", _listed(g, classes), _images(g, score))


def _per_image(g: Emitter, score: Score, terms: gs.Tensor) -> gs.Tensor:
    """float32 [N]: the sum of an image's terms; [1] where all images share them."""
    if not score.per_image:
        total = g.reduce_sum(terms, range(score.rank), keepdims=False) if score.rank else terms
        return g.cast(g.reshape(total, [1]), np.float32)
    return g.cast(g.reduce_sum(terms, range(1, score.rank), keepdims=False), np.float32)
