"""What a user gives, images and labels, checked and made into what a converted file is fed."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from graphgbp.contract import PREDICTED, dtype_of
from graphgbp.errors import GraphgbpError, ImageError, TargetError

Shape = Sequence[int | str | None]


def read_inputs(
    images: Any, explained: Sequence[Mapping[str, Any]], inputs: Mapping[str, "ModelInput"]
) -> dict[str, np.ndarray]:
    """The model's inputs by name, from one array where it has one, else from a mapping of all.

    `explained` are the manifest's descriptions of the explained inputs, `inputs` all the model has. Raises ImageError
    where an input is missing or unknown, or does not fit.
    """
    if not isinstance(images, Mapping):
        if len(inputs) > 1:
            raise ImageError(f"the model takes {len(inputs)} inputs; give a mapping with {', '.join(inputs)}")
        images = {name: images for name in inputs}
    missing = [name for name in inputs if name not in images]
    unknown = [name for name in images if name not in inputs]
    if missing or unknown:
        wrong = f"'{missing[0]}' is missing" if missing else f"there is no input '{unknown[0]}'"
        raise ImageError(f"{wrong}: the model takes {', '.join(inputs)}")
    known = {entry["name"]: entry for entry in explained}
    return {
        name: read_images(images[name], known[name]) if name in known else _read_other(images[name], declared)
        for name, declared in inputs.items()
    }


class ModelInput(Protocol):
    """What is needed of a `runtime.Input`."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> Shape: ...
    @property
    def dtype(self) -> np.dtype | None: ...


def _read_other(value: Any, declared: ModelInput) -> np.ndarray:
    """An input that is fed and not explained, in its type where that loses nothing."""
    array = np.asarray(value)
    if declared.dtype is None or array.dtype == declared.dtype:
        return array
    if not np.can_cast(array.dtype, declared.dtype, "same_kind"):
        raise ImageError(f"input '{declared.name}' takes {declared.dtype}, and it is given {array.dtype}")
    return array.astype(declared.dtype)


def read_images(images: Any, expected: Mapping[str, Any]) -> np.ndarray:
    """A batch in the type of the model's input; `expected` is the manifest's description of that input.

    Raises ImageError where type, rank, a size, or a value (NaN, infinity) does not fit.
    """
    array = _as_array(images, "images", ImageError)
    array = _typed(array, dtype_of(expected["dtype"]), expected["name"])
    shape = expected["shape"]
    if array.ndim == len(shape) - 1 > 0:
        array = array[np.newaxis]
    _check_shape(array.shape, shape, expected)
    if _is_real(array.dtype) and not np.isfinite(array).all():
        raise ImageError("the images hold NaN or infinity; look at how they were preprocessed")
    return array


def _as_array(value: Any, what: str, error: type[GraphgbpError]) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as reason:
        words = " ".join(str(reason).split())
        raise error(f"{what} cannot be made into one numpy array: {words}") from reason
    if array.dtype.kind not in "biu" and not _is_real(array.dtype):
        raise error(f"{what} must be an array of numbers, and {type(value).__name__} gives {array.dtype}")
    return array


def _typed(array: np.ndarray, wanted: np.dtype, name: str) -> np.ndarray:
    """The array in the wanted type: floats are cast to floats, nothing else is cast."""
    if array.dtype == wanted:
        return array
    if _is_real(array.dtype) and _is_real(wanted):
        with np.errstate(over="ignore"):  # an overflow becomes infinity, which is refused
            return array.astype(wanted)
    if _is_real(wanted):
        raise ImageError(
            f"the images are {array.dtype} and input '{name}' takes {wanted}: preprocess them as the model was "
            "trained, for many models (pixels / 255 - mean) / std"
        )
    raise ImageError(f"the images are {array.dtype} and input '{name}' takes {wanted}; convert them yourself")


def _is_real(dtype: np.dtype) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def _check_shape(given: tuple[int, ...], shape: Shape, expected: Mapping[str, Any]) -> None:
    wanted = f"input '{expected['name']}' takes {_spell(shape)}"
    if expected["layout"]:
        wanted += f" ({expected['layout']})"
    if len(given) != len(shape):
        raise ImageError(f"the images have shape {_spell(given)}, and {wanted}")
    if 0 in given:
        raise ImageError(f"the images are empty: shape {_spell(given)}, and {wanted}")
    wrong = [axis for axis in range(1, len(shape)) if isinstance(shape[axis], int) and given[axis] != shape[axis]]
    if wrong:
        axes = ", ".join(map(str, wrong))
        raise ImageError(
            f"the images have shape {_spell(given)}, and {wanted}; look at axis {axes}"
            f"{_layout_advice(given, shape, expected['layout'])}"
        )


def _layout_advice(given: tuple[int, ...], shape: Shape, layout: str | None) -> str:
    """What to type where the channels stand at the other end."""
    if layout not in ("NCHW", "NHWC"):
        return ""
    here, there = layout.index("C"), "NHWC".index("C") if layout == "NCHW" else 1
    if given[here] == shape[here] or given[there] != shape[here]:
        return ""
    other = "NHWC" if layout == "NCHW" else "NCHW"
    return f"; they look like {other}: np.moveaxis(images, {there}, {here}) makes them {layout}"


def _spell(shape: Shape) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def read_targets(targets: Any, images: int, score: Mapping[str, Any]) -> np.ndarray:
    """What is to be explained of each image: int64 classes [N], or float32 weights [N, K] or of the score's shape.

    `targets` is None (the predicted class of each image), one class, classes [N] or [1], one-hot [N, K], or real
    weights; -1 is the predicted class. `score` is the manifest's description of the score.

    Raises TargetError where classes are out of range or labels do not fit the batch.
    """
    if targets is None:
        return np.full(images, PREDICTED, np.int64)
    labels = _as_array(targets, "labels", TargetError)
    if labels.size == 0:
        raise TargetError(f"the labels are empty; {_valid(images, score)}")
    if labels.ndim < 2:
        return _read_classes(labels.reshape(-1), images, score)
    return _read_weights(labels, images, score)


def _read_classes(labels: np.ndarray, images: int, score: Mapping[str, Any]) -> np.ndarray:
    if labels.size not in (1, images):
        raise TargetError(f"{labels.size} labels for {images} image{'s' * (images > 1)}; {_valid(images, score)}")
    if _is_real(labels.dtype) and not (np.isfinite(labels) & (labels == np.floor(labels))).all():
        raise TargetError("labels of shape [N] are classes and must be whole numbers; real weights have shape [N, K]")
    last = score["classes"] and score["classes"] - 1
    for label in labels.tolist():
        if label < PREDICTED or (last is not None and label > last):
            raise TargetError(f"class {int(label)} is out of range; {_valid(images, score)}")
    return np.broadcast_to(labels.astype(np.int64), images).copy()


def _read_weights(labels: np.ndarray, images: int, score: Mapping[str, Any]) -> np.ndarray:
    if labels.shape[0] not in (1, images):
        raise TargetError(f"labels for {labels.shape[0]} images, and there are {images}; {_valid(images, score)}")
    classes = score["classes"]
    if labels.ndim == 2 and (labels.shape[1] == 1 or classes not in (None, labels.shape[1])):
        raise TargetError(f"labels of shape {_spell(labels.shape)} do not fit; {_valid(images, score)}")
    labels = np.broadcast_to(labels, (images, *labels.shape[1:]))
    if labels.ndim == 2 and ((labels == 0) | (labels == 1)).all() and (labels.sum(1) == 1).all():
        return labels.argmax(1)
    return _finite(labels, "weights")


def _valid(images: int, score: Mapping[str, Any]) -> str:
    classes = score["classes"]
    last, width = ("K-1", "K") if classes is None else (classes - 1, classes)
    return (
        f"give one class from 0 to {last} (-1: the predicted one), as many as images ({images}), "
        f"or one-hot or real weights [{images}, {width}]"
    )


def read_cotangent(cotangent: Any, images: int, score: Mapping[str, Any]) -> np.ndarray:
    """A cotangent of the explained output's shape, float32. Raises TargetError where it is none."""
    if cotangent is None:
        raise TargetError(f"the model takes a cotangent in the shape of '{score['tensor']}' {_spell(score['shape'])}")
    array = _finite(_as_array(cotangent, "the cotangent", TargetError), "cotangent")
    shape = [images, *score["shape"][1:]] if score["per_image"] else score["shape"]
    if array.ndim != len(shape) or not _sizes_fit(array.shape, shape):
        raise TargetError(
            f"the cotangent has shape {_spell(array.shape)} and must have that of '{score['tensor']}' {_spell(shape)}"
        )
    return array


def read_mask(mask: Any, images: int, score: Mapping[str, Any]) -> np.ndarray:
    """How much each pixel counts: float32 [N, ...] with a size, or 1, per axis of positions.

    None, and -1 anywhere, stand for the pixels predicted as the target. Raises TargetError where it does not fit.
    """
    sizes = _position_sizes(score)
    array = np.full([1] * (len(sizes) + 1), PREDICTED) if mask is None else _as_array(mask, "the mask", TargetError)
    array = _finite(array, "mask")
    if array.ndim == len(sizes):
        array = array[np.newaxis]
    allowed = [None if given == 1 else size for given, size in zip(array.shape[1:], sizes, strict=False)]
    if array.ndim != len(sizes) + 1 or len(array) not in (1, images) or not _sizes_fit(array.shape[1:], allowed):
        raise TargetError(
            f"the mask has shape {_spell(array.shape)}; give {_spell([images, *sizes])}, or 1 for any size"
        )
    if ((array < 0) & (array != PREDICTED)).any():
        raise TargetError(
            "the mask holds a negative weight; give 0 or more, or -1 for the pixels predicted as the target"
        )
    return np.broadcast_to(array, (images, *array.shape[1:]))


def read_position(position: Any, images: int, score: Mapping[str, Any]) -> np.ndarray:
    """Where the neuron is: int64 [N, R], an index or -1 (all) per axis of positions. Raises TargetError otherwise."""
    sizes = _position_sizes(score)
    array = np.asarray([PREDICTED] * len(sizes)) if position is None else _as_array(position, "position", TargetError)
    array = array.reshape(1, -1) if array.ndim < 2 else array
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != len(sizes) or len(array) not in (1, images):
        raise TargetError(
            f"the position has shape {_spell(array.shape)}; give whole numbers {_spell([images, len(sizes)])}"
        )
    for column, size in enumerate(sizes):
        if (array[:, column] < PREDICTED).any() or (isinstance(size, int) and (array[:, column] >= size).any()):
            raise TargetError(f"the position is out of range: the positions of '{score['tensor']}' are {_spell(sizes)}")
    return np.broadcast_to(array.astype(np.int64), (images, len(sizes)))


def _position_sizes(score: Mapping[str, Any]) -> list[int | str]:
    return [size for axis, size in enumerate(score["shape"]) if axis not in (0, score["class_axis"])]


def _sizes_fit(given: Sequence[int], wanted: Shape) -> bool:
    return all(not isinstance(b, int) or a == b for a, b in zip(given, wanted, strict=True))


def _finite(array: np.ndarray, what: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise TargetError(f"the {what} holds NaN or infinity")
    return values


def one_hot(classes: np.ndarray, score: Mapping[str, Any]) -> np.ndarray:
    """Weights [N, K] that explain one class per image, for a file that takes weights alone."""
    if score["classes"] is None or (classes == PREDICTED).any():
        raise TargetError(
            "the model was converted with target='weights', so it does not choose the predicted class; "
            "give one class per image, or weights [N, K], or convert its source with target='required'"
        )
    return np.eye(score["classes"], dtype=np.float32)[classes]


def fit_weights(weights: np.ndarray, score: Mapping[str, Any], shape: Shape) -> np.ndarray:
    """Weights [N, K] or of the score's shape, in the score's shape as the file declares it.

    One score z for two classes stands for [-z, z]; weights [N, K] hold at every further position of the score.
    Raises TargetError where they do not fit.
    """
    given = weights.shape
    if weights.ndim == 2:
        if score["two_classes_in_one"]:
            weights = weights[:, 1:] - weights[:, :1]
        weights = _at_every_position(weights, score["class_axis"], shape)
    fits = weights.ndim == len(shape) and all(
        size == wanted or not isinstance(wanted, int) for size, wanted in zip(weights.shape[1:], shape[1:], strict=True)
    )
    if not fits:
        raise TargetError(f"weights of shape {_spell(given)} do not fit scores of shape {_spell(shape)}")
    return np.ascontiguousarray(weights)


def _at_every_position(weights: np.ndarray, class_axis: int | None, shape: Shape) -> np.ndarray:
    if class_axis == 0 and len(shape) == 1:  # the model takes one image
        return weights[0]
    if len(shape) == 2:
        return weights
    if class_axis is None:
        return weights.reshape(len(weights), *[1] * (len(shape) - 1))
    sizes = [1] * len(shape)
    sizes[0], sizes[class_axis] = weights.shape
    positions = [sizes[axis] if axis in (0, class_axis) else size for axis, size in enumerate(shape)]
    known = [size for size in positions if isinstance(size, int)]
    if len(known) < len(shape):
        raise TargetError(
            f"the scores have open sizes {_spell(shape)}, so weights {_spell(weights.shape)} do not say at which "
            "positions; give weights of the score's own shape"
        )
    return np.broadcast_to(weights.reshape(sizes), known)
