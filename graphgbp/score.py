"""What is explained: the tensor z of scores, found from a model's outputs.

From an output the search goes back over post-processing (ArgMax, TopK, ZipMap, NonMaxSuppression) to the scores it
reads, then over Identity, Cast, Reshape and the like to a final Softmax, LogSoftmax or Sigmoid, whose input z is. Of a
quantised z it takes what the quantiser rounds. One score for two classes counts as z for class 1 and as -z for class 0;
where a probability is explained, as p and 1 - p.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphgbp.backward import is_float
from graphgbp.errors import ModelFileError, RequestError, UnsupportedError
from graphgbp.features import find_features
from graphgbp.nodes import label
from graphgbp.shapes import Dim
from graphgbp.stored import before_quantiser
from graphgbp.view import View

SCORES = ("auto", "pre_softmax", "probability")
_PASSED = {
    "Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Dropout",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
_ACTIVATIONS = {"Softmax", "LogSoftmax", "Sigmoid"}
# the input from which each takes the scores
_POST_PROCESSING = {"ArgMax": 0, "TopK": 0, "ZipMap": 0, "ArrayFeatureExtractor": 1, "NonMaxSuppression": 1}
_CLASSES_AND_MATRIX = 2
_PICTURE_RANK = 4


@dataclass(frozen=True)
class Score:
    """The tensor that is explained. `class_axis` is None without classes; `two_in_one` marks one score for two.

    `is_probability`: it is what the final activation gives, and not what that takes. `output` is the model's output
    it was found from, None for a neuron inside the model. `per_image`: its first axis runs over the images, which are
    as many as along the first axis of `counted`: an input, because a declared output shape can be wrong.
    """

    tensor: gs.Tensor
    output: str | None
    activation: str | None
    class_axis: int | None
    two_in_one: bool
    reason: str
    is_probability: bool = False
    per_image: bool = True
    counted: gs.Tensor | None = None

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
    def position_axes(self) -> list[int]:
        """The axes beside batch and classes, where they are not all known to be 1: pixels, tokens, boxes."""
        if self.tensor.shape is None:
            return []
        axes = [axis for axis in range(1, self.rank) if axis != self.class_axis]
        return axes if any(self.tensor.shape[axis] != 1 for axis in axes) else []

    @property
    def has_pixels(self) -> bool:
        """Whether it is a segmentation: a score per class at every pixel or voxel of an image."""
        return self.output is not None and len(self.position_axes) >= _PICTURE_RANK - 2

    def describe(self) -> dict[str, object]:
        classes = self.classes
        return {
            "tensor": self.tensor.name,
            "output": self.output,
            "activation": self.activation,
            "shape": list(self.tensor.shape or ()),
            "class_axis": self.class_axis,
            "classes": classes if isinstance(classes, int) else None,
            "two_classes_in_one": self.two_in_one,
            "per_image": self.per_image,
            "reason": self.reason,
        }


def find_score(
    view: View,
    reached: Collection[str],
    axes: Mapping[str, int],
    kind: str = "auto",
    output: str | None = None,
    class_axis: int | None = None,
) -> Score:
    """The score behind an output.

    `reached` are the tensors that depend on the explained inputs, `axes` the channel axes that are known. By default
    the output is the first [N, K] behind a Softmax or LogSoftmax, else the first [N, K], else the first behind a
    Softmax, LogSoftmax or Sigmoid, else the first; a detector's boxes are passed over. Raises ModelFileError where
    there is none, RequestError where there is none as asked.
    """
    if kind not in SCORES:
        raise RequestError(f"score='{kind}' is unknown; choose one of {', '.join(SCORES)}")
    chosen, choice = _choose_output(view, reached, output)
    scores = _before_post_processing(chosen)
    behind = "" if scores is chosen else f"'{scores.name}', behind the post-processing that makes "
    activation = _final_activation(scores)
    if activation is None:
        if kind == "probability":
            raise RequestError(
                f"score='probability' needs a model that ends in one, but output '{chosen.name}' has no Softmax, "
                "LogSoftmax or Sigmoid; leave score out"
            )
        reason = f"{behind}output '{chosen.name}'{choice}, has no final activation"
        found = _unquantised(view, Score(scores, chosen.name, None, None, False, reason))
        return _with_class_axis(view, found, axes, class_axis)
    after = kind == "probability"
    tensor = activation.outputs[0] if after else activation.inputs[0]
    side = "after" if after else "before"
    reason = f"{side} {activation.op} '{label(activation)}', which makes {behind}output '{chosen.name}'{choice}"
    axis = activation.attrs["axis"] if activation.op != "Sigmoid" else None
    found = _unquantised(view, Score(tensor, chosen.name, activation.op, axis, False, reason, after))
    return _with_class_axis(view, found, axes, class_axis)


def _unquantised(view: View, score: Score) -> Score:
    """The score before its own quantiser, which cuts off the highest: there its gradient would be zero."""
    tensor = before_quantiser(score.tensor, view.stored)
    if tensor is score.tensor:
        return score
    return replace(score, tensor=tensor, reason=f"{score.reason}; before its quantiser")


def whole_output(view: View, reached: Collection[str], output: str | None = None) -> Score:
    """An output as it is, to be seeded with a cotangent of its own shape."""
    chosen, choice = _choose_output(view, reached, output)
    if not is_float(chosen):
        raise RequestError(f"output '{chosen.name}' holds no real numbers, so it has no cotangent; name another output")
    per_image = bool(chosen.shape) and chosen.shape[0] in _batches(view)
    reason = f"output '{chosen.name}'{choice}, as it is"
    return Score(chosen, chosen.name, None, None, False, reason, False, per_image, _counted(view, chosen))


def neuron(view: View, tensor: gs.Tensor, axes: Mapping[str, int], class_axis: int | None = None) -> Score:
    """A tensor inside the model: its channels stand for classes, its positions can be chosen."""
    if not is_float(tensor) or not tensor.inputs:
        raise RequestError(f"'{tensor.name}' is no float tensor that the model computes; name another target_tensor")
    if not tensor.shape:
        raise RequestError(f"'{tensor.name}' has no axes of known number, so no neuron of it can be named")
    score = Score(tensor, None, None, None, False, "the neurons asked for")
    axis, reason = _class_axis(view, score, axes, class_axis)
    return replace(score, class_axis=axis, reason=score.reason + reason, counted=_counted(view, tensor))


def _choose_output(view: View, reached: Collection[str], name: str | None) -> tuple[gs.Tensor, str]:
    """An output whose scores depend on the explained inputs, and the words for why this one."""
    outputs = {tensor.name: tensor for tensor in view.graph.outputs if is_float(_before_post_processing(tensor))}
    if not outputs:
        raise ModelFileError("the model has no float output: there is no score to explain")
    if name is not None:
        if name not in outputs:
            raise RequestError(f"'{name}' is no float output of the model; it has {', '.join(outputs)}")
        return outputs[name], ""
    found = [tensor for tensor in outputs.values() if _before_post_processing(tensor).name in reached]
    if len(outputs) == 1 or not found:
        return next(iter(outputs.values())), ""
    scores = [tensor for tensor in found if not _are_boxes(tensor, found)]
    for fits, why in _PREFERENCES:
        for tensor in scores:
            if fits(tensor):
                return tensor, f" ({why} of {len(outputs)} outputs)"
    return scores[
        0
    ], f" (the first{' that are no boxes' if scores[0] is not found[0] else ''} of {len(outputs)} outputs)"


def _are_boxes(tensor: gs.Tensor, outputs: Sequence[gs.Tensor]) -> bool:
    """Whether it is [..., T, 4] beside another output with T rows: a detector's boxes beside its scores."""
    shape = list(tensor.shape or ())
    if len(shape) < 2 or shape[-1] != 4:
        return False
    others = [list(y.shape) for y in outputs if y.shape is not None and len(y.shape) == len(shape)]
    return any(other[-1] != 4 and other[-2] == shape[-2] for other in others)


def _before_post_processing(tensor: gs.Tensor) -> gs.Tensor:
    """The scores that ArgMax and its like read to make a tensor, else the tensor itself."""
    found = tensor
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op in _POST_PROCESSING:
            tensor = found = node.inputs[_POST_PROCESSING[node.op]]
        elif node.op in _PASSED:
            tensor = node.inputs[0]
        else:
            break
    return found


def _ends_in_activation(tensor: gs.Tensor) -> bool:
    return _final_activation(_before_post_processing(tensor)) is not None


def _is_matrix(tensor: gs.Tensor) -> bool:
    shape = _before_post_processing(tensor).shape
    return shape is not None and len(shape) == _CLASSES_AND_MATRIX


def _ends_in_softmax(tensor: gs.Tensor) -> bool:
    activation = _final_activation(_before_post_processing(tensor))
    return activation is not None and activation.op != "Sigmoid" and _is_matrix(tensor)


_PREFERENCES = (
    (_ends_in_softmax, "the first [N, K] behind a Softmax"),
    (_is_matrix, "the first of shape [N, K]"),
    (_ends_in_activation, "the first that ends in a class activation"),
)


def _final_activation(tensor: gs.Tensor) -> gs.Node | None:
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op in _ACTIVATIONS:
            return node
        if node.op not in _PASSED or node.outputs[0].name != tensor.name:
            return None
        tensor = node.inputs[0]
    return None


def _with_class_axis(view: View, score: Score, axes: Mapping[str, int], asked: int | None) -> Score:
    """The score with its class axis: as asked, else the activation's, else that of the features, else axis 1."""
    shape = score.tensor.shape or ()
    if not shape:
        return replace(score, class_axis=None, per_image=False)
    axis, reason = _class_axis(view, score, axes, asked)
    single = axis is None or (shape[axis] == 1 and score.activation not in ("Softmax", "LogSoftmax"))
    return replace(
        score,
        class_axis=None if single and axis == 0 else axis,
        two_in_one=single,
        per_image=single or axis != 0,
        reason=score.reason + reason,
        counted=_counted(view, score.tensor),
    )


def _class_axis(view: View, score: Score, axes: Mapping[str, int], asked: int | None) -> tuple[int | None, str]:
    """The axis, None where each position has one score alone, and words where they are called for."""
    shape = score.tensor.shape
    rank = len(shape)
    if asked is not None:
        if not -rank <= asked < rank:
            raise RequestError(f"class_axis={asked} is none of '{score.tensor.name}' {list(shape)}; it has {rank} axes")
        return asked % rank, ""
    if score.class_axis is not None:
        return score.class_axis % rank, ""
    if rank == 1:
        return (0 if _is_one_image(view, shape[0]) else None), ""
    if rank == _CLASSES_AND_MATRIX:
        return 1, ""
    features = find_features(view, score.tensor)
    if features is not None:
        return features.axis, "" if features.axis is not None else "; one score for two classes at each position"
    if score.tensor.name in axes:
        return axes[score.tensor.name], ""
    return 1, "; nothing tells its class axis, so axis 1 is taken: name another with class_axis"


def _is_one_image(view: View, size: Dim) -> bool:
    """Whether scores [K] are the classes of one image and not one score for each of N images."""
    return isinstance(size, int) and size > 1 and size not in _batches(view)


def _counted(view: View, tensor: gs.Tensor) -> gs.Tensor:
    """An input with as many images as the tensor; the tensor itself where none is known to have."""
    same = (x for x in view.graph.inputs if x.shape and tensor.shape and x.shape[0] == tensor.shape[0])
    return next(same, tensor)


def _batches(view: View) -> set[Dim]:
    return {x.shape[0] for x in view.graph.inputs if is_float(x) and x.shape}
