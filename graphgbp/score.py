"""What is explained: the tensor z of scores, found from a model's outputs.

From an output the search goes back over post-processing (ArgMax, TopK, ZipMap, NonMaxSuppression) to the scores it
reads, then over Identity, Cast, Reshape and the like to a final Softmax, LogSoftmax or Sigmoid, whose input z is. One
score for two classes counts as z for class 1 and as -z for class 0; where a probability is explained, as p and 1 - p.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from graphgbp.backward import is_float
from graphgbp.errors import ModelFileError, RequestError, UnsupportedError
from graphgbp.nodes import label
from graphgbp.prepare import View
from graphgbp.shapes import Dim

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
    it was found from, None for a neuron inside the model. `per_image`: its first axis runs over the images.
    """

    tensor: gs.Tensor
    output: str | None
    activation: str | None
    class_axis: int | None
    two_in_one: bool
    reason: str
    is_probability: bool = False
    per_image: bool = True

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
    view: View, reached: Collection[str], axes: Mapping[str, int], kind: str = "auto", output: str | None = None
) -> Score:
    """The score behind an output.

    `reached` are the tensors that depend on the explained inputs, `axes` the channel axes that are known. By default
    the output is the first that ends in a Softmax, LogSoftmax or Sigmoid, else the first of shape [N, K], else the
    first; a detector's boxes are passed over. Raises ModelFileError where there is none, RequestError where there is
    none as asked.
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
        return _score(view, scores, axes, Score(scores, chosen.name, None, None, False, reason))
    after = kind == "probability"
    tensor = activation.outputs[0] if after else activation.inputs[0]
    side = "after" if after else "before"
    reason = f"{side} {activation.op} '{label(activation)}', which makes {behind}output '{chosen.name}'{choice}"
    axis = activation.attrs["axis"] if activation.op != "Sigmoid" else None
    return _score(view, tensor, axes, Score(tensor, chosen.name, activation.op, axis, False, reason, after))


def whole_output(view: View, reached: Collection[str], output: str | None = None) -> Score:
    """An output as it is, to be seeded with a cotangent of its own shape."""
    chosen, choice = _choose_output(view, reached, output)
    if not is_float(chosen):
        raise RequestError(f"output '{chosen.name}' holds no real numbers, so it has no cotangent; name another output")
    per_image = bool(chosen.shape) and chosen.shape[0] in _batches(view)
    return Score(chosen, chosen.name, None, None, False, f"output '{chosen.name}'{choice}, as it is", False, per_image)


def neuron(tensor: gs.Tensor, axes: Mapping[str, int]) -> Score:
    """A tensor inside the model: its channels stand for classes, its positions can be chosen."""
    if not is_float(tensor) or not tensor.inputs:
        raise RequestError(f"'{tensor.name}' is no float tensor that the model computes; name another target_tensor")
    if not tensor.shape:
        raise RequestError(f"'{tensor.name}' has no axes of known number, so no neuron of it can be named")
    rank = len(tensor.shape)
    axis = axes.get(tensor.name, _feature_axis(tensor)) if rank > 1 else None
    return Score(tensor, None, None, axis, False, "the neurons asked for")


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


_PREFERENCES = (
    (_ends_in_activation, "the first that ends in a class activation"),
    (_is_matrix, "the first of shape [N, K]"),
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


def _score(view: View, tensor: gs.Tensor, axes: Mapping[str, int], score: Score) -> Score:
    """The score with its class axis settled: the activation's, else the one the network's layout tells, else axis 1."""
    shape = tensor.shape or ()
    if not shape:
        return replace(score, class_axis=None, per_image=False)
    axis = score.class_axis
    if axis is not None:
        axis %= len(shape)
    elif len(shape) == 1:
        axis = 0 if _is_one_image(view, shape[0]) else None
    else:
        axis = axes.get(tensor.name, _feature_axis(tensor)) if len(shape) > _CLASSES_AND_MATRIX else 1
    single = axis is None or (shape[axis] == 1 and score.activation not in ("Softmax", "LogSoftmax"))
    return replace(
        score, class_axis=None if single and axis == 0 else axis, two_in_one=single, per_image=single or axis != 0
    )


def _is_one_image(view: View, size: Dim) -> bool:
    """Whether scores [K] are the classes of one image and not one score for each of N images."""
    return isinstance(size, int) and size > 1 and size not in _batches(view)


def _batches(view: View) -> set[Dim]:
    return {x.shape[0] for x in view.graph.inputs if is_float(x) and x.shape}


def _feature_axis(tensor: gs.Tensor) -> int:
    """Where a dense layer writes its features: the last axis behind a MatMul with weights; else axis 1."""
    while isinstance(tensor, gs.Variable) and tensor.inputs:
        node = tensor.inputs[0]
        if node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant):
            return len(tensor.shape) - 1
        varied = [x for x in node.inputs if isinstance(x, gs.Variable)]
        if node.op not in ("Add", "Sub", "Mul", "Div", *_PASSED_IN_PLACE) or len(varied) != 1:
            break
        tensor = varied[0]
    return 1


_PASSED_IN_PLACE = ("Identity", "Cast", "Dropout")
