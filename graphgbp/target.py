"""What is explained: the score S of one class per image, and its cotangent, the seed.

S_n = z[n, t_n] with z the scores before a final Softmax, LogSoftmax or Sigmoid. Where z has further positions, such as
pixels, S sums over them, each at its own predicted class where the target is -1. One score for two classes counts as
z for class 1 and as -z for class 0; where a probability is explained, as p and as 1 - p.
"""

from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.backward import is_float
from graphgbp.contract import GUARD_NODE, PREDICTED
from graphgbp.emit import Emitter
from graphgbp.errors import ModelFileError, RequestError, UnsupportedError
from graphgbp.nodes import label
from graphgbp.prepare import View
from graphgbp.shapes import Dim

_PASSED = {
    "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
_ACTIVATIONS = {"Softmax", "LogSoftmax", "Sigmoid"}
SCORES = ("auto", "pre_softmax", "probability")


@dataclass(frozen=True)
class Score:
    """The tensor that is explained. `class_axis` is None without classes; `two_in_one` marks one score for two.

    `is_probability`: it is what the final activation gives, and not what that takes.
    """

    tensor: gs.Tensor
    output: str
    activation: str | None
    class_axis: int | None
    two_in_one: bool
    reason: str
    is_probability: bool = False

    def require_shape(self) -> None:
        """Raise UnsupportedError where the rank is not known."""
        if self.tensor.shape is None:
            raise UnsupportedError(
                f"the rank of score tensor '{self.tensor.name}' is unknown, so its class axis is too; "
                "export the model with shapes"
            )

    @property
    def rank(self) -> int:
        return len(self.tensor.shape)

    @property
    def classes(self) -> Dim | None:
        """How many classes a target may name."""
        if self.tensor.shape is None:
            return None
        if self.two_in_one:
            return 2
        return 1 if self.class_axis is None else self.tensor.shape[self.class_axis]

    @property
    def one_position(self) -> bool:
        """Whether each image has exactly one score per class."""
        return all(size == 1 for axis, size in enumerate(self.tensor.shape) if axis not in (0, self.class_axis))

    def describe(self) -> dict[str, object]:
        classes = self.classes
        return {
            "tensor": self.tensor.name,
            "output": self.output,
            "activation": self.activation,
            "class_axis": self.class_axis,
            "classes": classes if isinstance(classes, int) else None,
            "two_classes_in_one": self.two_in_one,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Seed:
    """The score's cotangent, and what the file tells of the target: one class and one score per image."""

    cotangent: gs.Tensor
    target_class: gs.Tensor | None
    target_score: gs.Tensor


def find_score(view: View, kind: str = "auto", output: str | None = None) -> Score:
    """The score behind an output (by default the first float one).

    Raises ModelFileError where there is none, RequestError where there is none as asked.
    """
    if kind not in SCORES:
        raise RequestError(f"score='{kind}' is unknown; choose one of {', '.join(SCORES)}")
    final = _choose_output(view, output)
    activation = _final_activation(final)
    if activation is None:
        if kind == "probability":
            raise RequestError(
                f"score='probability' needs a model that ends in one, but output '{final.name}' has no Softmax, "
                "LogSoftmax or Sigmoid; leave score out"
            )
        return _score(final, final.name, None, None, f"output '{final.name}' has no final activation")
    after = kind == "probability"
    tensor = activation.outputs[0] if after else activation.inputs[0]
    axis = activation.attrs["axis"] if activation.op != "Sigmoid" else None
    side = "after" if after else "before"
    reason = f"{side} {activation.op} '{label(activation)}', which makes output '{final.name}'"
    return replace(_score(tensor, final.name, activation.op, axis, reason), is_probability=after)


def _choose_output(view: View, name: str | None) -> gs.Tensor:
    outputs = {tensor.name: tensor for tensor in view.graph.outputs if is_float(tensor)}
    if not outputs:
        raise ModelFileError("the model has no float output: there is no score to explain")
    if name is None:
        return next(iter(outputs.values()))
    if name not in outputs:
        raise RequestError(f"'{name}' is no float output of the model; it has {', '.join(outputs)}")
    return outputs[name]


def _final_activation(tensor: gs.Tensor) -> gs.Node | None:
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op in _ACTIVATIONS:
            return node
        if node.op not in _PASSED or node.outputs[0].name != tensor.name:
            return None
        tensor = node.inputs[0]
    return None


def _score(tensor: gs.Tensor, output: str, activation: str | None, axis: int | None, reason: str) -> Score:
    rank = len(tensor.shape or ())
    if rank == 0:
        return Score(tensor, output, activation, None, False, reason)
    if axis is None:
        axis = 1 if rank > 1 else None
    else:
        axis %= rank
    two_in_one = axis is None or (tensor.shape[axis] == 1 and activation not in ("Softmax", "LogSoftmax"))
    return Score(tensor, output, activation, axis, two_in_one, reason)


def seed(g: Emitter, score: Score, target: gs.Variable) -> Seed:
    """The seed for classes given at run time: `target` int64 [N] or [1], -1 for the predicted class."""
    with g.scope("target"):
        classes = _guarded(g, score, target)
        if score.two_in_one:
            return _two_class_seed(g, score, classes)
        if score.class_axis is None:
            return _sum_seed(g, score)
        return _class_seed(g, score, classes)


def weighted_seed(g: Emitter, score: Score, weights: gs.Variable) -> Seed:
    """The seed for S = sum_k z_k w_k with weights of the score's shape."""
    z = score.tensor
    with g.scope("target"):
        cotangent = g.cast(weights, z.dtype)
        return Seed(cotangent, None, _per_image(g, score, g.mul(z, cotangent)))


def _guarded(g: Emitter, score: Score, target: gs.Variable) -> gs.Tensor:
    """The target, through a Reshape that fails on every provider where it does not fit batch and classes."""
    images = _images(g, score)
    last = g.sub(_class_count(g, score), g.ints([1]))
    outside = g.op("Or", g.less(target, g.ints([PREDICTED])), g.greater(target, last))
    length = g.op("Shape", target)
    fits = g.op("Or", g.equal(length, images), g.equal(length, g.ints([1])))
    bad = g.add(
        g.reduce_sum(g.cast(outside, np.int64), [0]),
        g.cast(g.op("Not", fits), np.int64),
    )
    return g.op("Reshape", target, g.add(length, bad), name=GUARD_NODE)


def _class_count(g: Emitter, score: Score) -> gs.Tensor:
    if isinstance(score.classes, int):
        return g.ints([score.classes])
    assert score.class_axis is not None
    return g.as_int_vector(g.size(score.tensor, score.class_axis))


def _images(g: Emitter, score: Score) -> gs.Tensor:
    batched = score.rank > 0 and score.class_axis != 0
    return g.as_int_vector(g.size(score.tensor, 0)) if batched else g.ints([1])


def _class_seed(g: Emitter, score: Score, classes: gs.Tensor) -> Seed:
    z, axis = score.tensor, score.class_axis
    predicted = g.op("ArgMax", z, axis=axis, keepdims=1)
    wanted = g.where(_is_predicted(g, score, classes), predicted, _per_position(g, score, classes))
    chosen = g.equal(_class_numbers(g, score), wanted)
    kept = g.where(chosen, z, g.like(z, 0))
    return Seed(g.cast(chosen, z.dtype), _target_class(g, score, classes, wanted), _per_image(g, score, kept))


def _two_class_seed(g: Emitter, score: Score, classes: gs.Tensor) -> Seed:
    z, certain = score.tensor, int(score.is_probability)
    positive = g.greater(z, g.like(z, certain / 2))
    second = g.equal(_per_position(g, score, classes), g.ints([1]))
    one = g.op("Or", g.op("And", _is_predicted(g, score, classes), positive), second)
    cotangent = g.where(one, g.like(z, 1), g.like(z, -1))
    wanted = g.cast(one, np.int64)
    terms = g.where(one, z, g.sub(g.like(z, certain), z))
    return Seed(cotangent, _target_class(g, score, classes, wanted), _per_image(g, score, terms))


def _sum_seed(g: Emitter, score: Score) -> Seed:
    z = score.tensor
    return Seed(g.like(z, 1), g.ints([0]), g.cast(g.reshape(z, [1]), np.float32))


def _per_position(g: Emitter, score: Score, classes: gs.Tensor) -> gs.Tensor:
    """Classes [n] as [n, 1, ...], to be compared at every position."""
    return classes if score.rank == 1 else g.op("Reshape", classes, g.ints([-1] + [1] * (score.rank - 1)))


def _is_predicted(g: Emitter, score: Score, classes: gs.Tensor) -> gs.Tensor:
    return g.equal(_per_position(g, score, classes), g.ints([PREDICTED]))


def _class_numbers(g: Emitter, score: Score) -> gs.Tensor:
    """0 .. K-1 along the class axis."""
    assert score.class_axis is not None
    behind = [1] * (score.rank - score.class_axis - 1)
    if isinstance(score.classes, int):
        return g.constant(np.arange(score.classes, dtype=np.int64).reshape([-1, *behind]))
    count = g.squeeze(_class_count(g, score), [0])
    numbers = g.op("Range", g.constant(np.int64(0)), count, g.constant(np.int64(1)))
    return g.op("Reshape", numbers, g.ints([-1, *behind]))


def _target_class(g: Emitter, score: Score, classes: gs.Tensor, wanted: gs.Tensor) -> gs.Tensor:
    """int64 [N]: the class that was explained; where positions chose their own, the target as it came."""
    if score.one_position:
        return g.op("Reshape", wanted, g.ints([-1]))
    return g.op("Expand", classes, _images(g, score))


def _per_image(g: Emitter, score: Score, terms: gs.Tensor) -> gs.Tensor:
    """float32 [N]: the sum of an image's terms."""
    if score.class_axis == 0:
        return g.cast(g.reduce_sum(terms, [0]), np.float32)
    return g.cast(g.reduce_sum(terms, range(1, score.rank), keepdims=False), np.float32)
