"""From a photo to the array a model was trained on: the recipe, its file, its presets.

A recipe is a JSON file, by habit `<model>.recipe.json` beside `<model>.onnx`:

    {
      "channels": "RGB",              or "BGR", "L" (grey)
      "resize": 256,                  the short side in pixels; [height, width]; null for none
      "filter": "bicubic",            nearest, box, bilinear, hamming, bicubic, lanczos
      "crop": 224,                    the square in the middle; [height, width]; null for none
      "scale": 1.0,                   value = (pixel * scale - mean) / std, pixel from 0 to 255,
      "mean": [127, 127, 127],        mean and std one per channel, in the order of `channels`
      "std": [128, 128, 128],
      "class_names": "classes.txt"    one name per line; relative to the recipe; may be left out
    }

Whether channels come first or last is read off the model.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image

from graphgbp.ahead import ahead
from graphgbp.contract import dtype_of
from graphgbp.errors import ImageError, RequestError
from graphgbp.photo import PhotoLike, read_photo

CHANNELS = ("RGB", "BGR", "L")
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
PRESETS = ("imagenet", "unit", "symmetric", "caffe", "pixels")
OPEN_SIZE = 224
"""The side of the photo for a preset where the model leaves the size open."""
_WHOLE = 1e-3  # how far from a whole number an integer's value may be

Layout = Literal["NCHW", "NHWC"]
Size = int | tuple[int, int] | None


@dataclass(frozen=True)
class ImageInput:
    """The model's image input: sizes in pixels, channels (None: left open), layout."""

    name: str
    height: int | None
    width: int | None
    channels: int | None
    layout: Layout
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, image_input: Mapping[str, Any]) -> "ImageInput":
        """From `Explainer.input`."""
        return cls.from_shape(*(image_input[key] for key in ("name", "shape", "dtype", "layout")))

    @classmethod
    def from_shape(
        cls, name: str, shape: Sequence[int | str | None], dtype: Any = np.float32, layout: str | None = None
    ) -> "ImageInput":
        """Read off a shape; where the layout is not known, channels are the axis of size 1, 3 or 4.

        Raises ImageError where the shape is no image's, or either axis could be the channels.
        """
        sizes = [size if isinstance(size, int) and size > 0 else None for size in shape]
        shown = f"input '{name}' of shape [{', '.join(str(size or '?') for size in shape)}]"
        if len(sizes) != 4:
            raise ImageError(f"{shown} takes no batch of images (4 axes); call Explainer from Python with arrays")
        layout = layout or _layout(sizes, shown)
        height, width = sizes[2:] if layout == "NCHW" else sizes[1:3]
        channels = sizes[1] if layout == "NCHW" else sizes[3]
        return cls(name, height, width, channels, cast(Layout, layout), dtype_of(dtype))


def _layout(sizes: Sequence[int | None], shown: str) -> Layout:
    first, last = sizes[1] in (1, 3, 4), sizes[3] in (1, 3, 4)
    if first != last:
        return "NCHW" if first else "NHWC"
    which = "both the second and the last axis" if first else "neither the second nor the last axis"
    raise ImageError(
        f"{shown}: {which} could be channels (1, 3 or 4); fix the sizes in the model's input shape, "
        "or call Explainer from Python with arrays"
    )


@dataclass(frozen=True)
class Recipe:
    """How a photo becomes an input; the fields are those of the file, described at the top of this module."""

    channels: str = "RGB"
    resize: Size = None
    filter: str = "bicubic"
    crop: Size = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    class_names: Path | None = None

    def __post_init__(self) -> None:
        """Raises RequestError on a value no recipe may have."""
        _require(self.channels in CHANNELS, f"channels is {self.channels!r}; use {_either(CHANNELS)}")
        _require(self.filter in FILTERS, f"filter is {self.filter!r}; use {_either(FILTERS)}")
        for key in ("resize", "crop"):
            _require(_is_size(getattr(self, key)), f"{key} must be a number of pixels, [height, width] or null")
        _require(_is_number(self.scale) and self.scale != 0, "scale must be a number other than 0")
        for key in ("mean", "std"):
            values = getattr(self, key)
            _require(
                len(values) == len(self.channels) and all(map(_is_number, values)),
                f"{key} must hold {len(self.channels)} number(s), one per channel of {self.channels}",
            )
        _require(all(self.std), "std holds a 0, and values are divided by it")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Recipe":
        """Read a recipe file. Raises RequestError, naming the file, where it is none."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise RequestError(f"cannot read the recipe '{path}': {error.strerror or error}") from None
        except ValueError as error:
            raise RequestError(f"the recipe '{path}' is not JSON: {error}") from None
        try:
            return cls._from_json(data, path.parent)
        except RequestError as error:
            raise RequestError(f"the recipe '{path}': {error}") from None

    @classmethod
    def _from_json(cls, data: Any, folder: Path) -> "Recipe":
        _require(isinstance(data, dict), "it must be a JSON object")
        known = [field.name for field in fields(cls)]
        unknown = [key for key in data if key not in known]
        _require(not unknown, f"unknown {_either(unknown, 'and')}; the keys are {_either(known, 'and')}")
        missing = [key for key in ("channels", "mean", "std") if key not in data]
        _require(not missing, f"{_either(missing, 'and')} missing")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        for key in ("mean", "std"):
            _require(isinstance(values[key], tuple), f"{key} must be a list of numbers")
        if values.get("class_names") is not None:
            _require(isinstance(values["class_names"], str), "class_names must be the name of a file")
            values["class_names"] = folder / str(values["class_names"])
        return cls(**values)

    def prepare(self, photo: PhotoLike, spec: ImageInput) -> tuple[np.ndarray, np.ndarray]:
        """The model's input, [C, H, W] or [H, W, C] in its dtype, and the photo as the model sees it.

        The second array is uint8 [H, W, 3], RGB, resized and cropped.

        Raises ImageError where the photo cannot be read, or its channels or size do not fit the model.
        """
        if spec.channels not in (None, len(self.channels)):
            raise ImageError(
                f"the model's input '{spec.name}' has {spec.channels} channel(s), but the preprocessing "
                f"makes {len(self.channels)} ({self.channels}); give a recipe with {spec.channels}"
            )
        name = "the image" if isinstance(photo, Image.Image) else f"'{os.fspath(photo)}'"
        image = self._cropped(self._resized(read_photo(photo, "L" if self.channels == "L" else "RGB")), name)
        self._require_size(image, spec, name)
        pixels = np.atleast_3d(np.asarray(image))
        ordered = pixels[..., ::-1] if self.channels == "BGR" else pixels
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        values = (ordered * np.float32(self.scale) - mean) / std
        array = values.transpose(2, 0, 1) if spec.layout == "NCHW" else values
        return np.ascontiguousarray(_typed(array, spec)), np.asarray(image.convert("RGB"))

    def batch(self, photos: Sequence[PhotoLike], image_input: Mapping[str, Any]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Photos as one batch for the model, [N, C, H, W] or [N, H, W, C], and each as the model sees it.

        `image_input` is `Explainer.input`. Raises ImageError as `prepare` does, or where the model leaves its size open
        and the photos come out in different sizes.
        """
        spec = ImageInput.of(image_input)
        prepared = [self.prepare(photo, spec) for photo in photos]
        sizes = {array.shape for array, _ in prepared}
        if len(sizes) != 1:
            raise ImageError(
                f"{len(photos)} photos of {len(sizes)} sizes make no batch; a recipe with a crop gives one size"
            )
        return _taken(prepared)

    def batches(
        self, photos: Iterable[PhotoLike], image_input: Mapping[str, Any], batch_size: int = 8
    ) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
        """Photos without end, as `batch` gives them, `batch_size` at once; the next are read in background threads.

        In order; a batch is smaller at the end, and where the next photo comes out in another size. No more photos are
        held than the caller's batch and two further ones. Raises ImageError as `prepare` does, in the photo's turn.
        """
        _require(batch_size >= 1, f"batch_size={batch_size} is no number of photos; give 1 or more")
        spec = ImageInput.of(image_input)
        waiting: list[tuple[np.ndarray, np.ndarray]] = []
        for image, seen in ahead(lambda photo: self.prepare(photo, spec), photos, limit=batch_size):
            if waiting and waiting[0][0].shape != image.shape:
                yield _taken(waiting)
            waiting.append((image, seen))
            if len(waiting) == batch_size:
                yield _taken(waiting)
        if waiting:
            yield _taken(waiting)

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.resize is None:
            return image
        if isinstance(self.resize, int):
            short = min(image.size)
            width, height = (side * self.resize // short for side in image.size)
        else:
            height, width = self.resize
        return image.resize((width, height), Image.Resampling[self.filter.upper()])

    def _cropped(self, image: Image.Image, name: str) -> Image.Image:
        if self.crop is None:
            return image
        height, width = (self.crop, self.crop) if isinstance(self.crop, int) else self.crop
        if height > image.height or width > image.width:
            raise ImageError(
                f"a crop of {height} x {width} (height x width) does not fit into {name}, {image.height} x "
                f"{image.width} after its resize; resize to more, or crop less"
            )
        left, top = (round((whole - part) / 2) for whole, part in ((image.width, width), (image.height, height)))
        return image.crop((left, top, left + width, top + height))

    @staticmethod
    def _require_size(image: Image.Image, spec: ImageInput, name: str) -> None:
        if spec.height not in (None, image.height) or spec.width not in (None, image.width):
            wanted = " x ".join("any" if size is None else str(size) for size in (spec.height, spec.width))
            raise ImageError(
                f"the model's input '{spec.name}' is {wanted} (height x width), but the recipe makes {name} "
                f"{image.height} x {image.width}; change its resize and crop"
            )

    def read_class_names(self) -> list[str] | None:
        """The class names the recipe points to; None where it names no file."""
        return None if self.class_names is None else read_class_names(self.class_names)


def _taken(prepared: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """What was prepared as one batch; the list is empty then."""
    batch = np.stack([image for image, _ in prepared]), [seen for _, seen in prepared]
    prepared.clear()
    return batch


def _typed(array: np.ndarray, spec: ImageInput) -> np.ndarray:
    """In the input's type; ImageError where that holds integers and the values are none that fit."""
    if spec.dtype.kind in "iu":
        limits = np.iinfo(spec.dtype)
        if array.min() < limits.min or array.max() > limits.max or np.abs(array - np.rint(array)).max() > _WHOLE:
            raise ImageError(
                f"the model's input '{spec.name}' takes {spec.dtype}, and the preprocessing makes values from "
                f"{array.min():g} to {array.max():g}; where the model takes pixels as they are: --preprocess pixels"
            )
        array = np.rint(array)
    return array.astype(spec.dtype)


def preset(name: str, spec: ImageInput) -> Recipe:
    """A common recipe, at the model's size: the short side resized and the middle cut out.

    `imagenet`: torchvision's, short side 256 for 224. `unit`: values in [0, 1]. `symmetric`: [-1, 1].
    `caffe`: BGR minus ImageNet's mean colour. `pixels`: values from 0 to 255, as they are. A model that is not square
    gets the whole photo, made to fit; one that leaves its size open gets 224 x 224.

    Raises RequestError on an unknown name.
    """
    height, width = (spec.height or spec.width or OPEN_SIZE), (spec.width or spec.height or OPEN_SIZE)
    recipe = _colours(name, "L" if spec.channels == 1 else "RGB")
    if height != width:
        return replace(recipe, resize=(height, width), crop=None)
    return replace(recipe, resize=round(height * 256 / 224) if name == "imagenet" else height, crop=height)


def _colours(name: str, channels: str) -> Recipe:
    count = len(channels)
    if name == "imagenet":
        return Recipe(filter="bilinear", scale=1 / 255, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    if name == "unit":
        return Recipe(channels, scale=1 / 255, mean=(0.0,) * count, std=(1.0,) * count)
    if name == "symmetric":
        return Recipe(channels, scale=1 / 127.5, mean=(1.0,) * count, std=(1.0,) * count)
    if name == "pixels":
        return Recipe(channels, mean=(0.0,) * count, std=(1.0,) * count)
    if name == "caffe":
        return Recipe("BGR", mean=(103.939, 116.779, 123.68))
    raise RequestError(f"no preset '{name}'; use {_either(PRESETS)}, or the name of a recipe file")


def usual_preset(spec: ImageInput) -> tuple[str, bool]:
    """What is taken where nothing says how photos become the input, and whether that is a guess."""
    return ("pixels", False) if spec.dtype.kind in "iu" else ("unit", True)


def recipe_beside(model: str | os.PathLike[str]) -> Path | None:
    """`<stem>.recipe.json` beside `<stem>.onnx` or `<stem>.explained.onnx`; None where there is none."""
    path = Path(model)
    candidates = [path.with_name(f"{stem}.recipe.json") for stem in (path.stem, path.stem.removesuffix(".explained"))]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def read_class_names(path: str | os.PathLike[str]) -> list[str]:
    """Class names from a text file: one per line, in the order of the classes.

    Raises RequestError where the file cannot be read or a line is empty.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the class names '{path}': {getattr(error, 'strerror', error)}") from None
    empty = [number for number, name in enumerate(names, start=1) if not name]
    if empty or not names:
        where = f"line {empty[0]} is empty" if empty else "it is empty"
        raise RequestError(f"the class names '{path}': {where}; give one name per line")
    return names


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, tuple) and len(value) == 2 else (value,)
    return value is None or all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)


def _either(words: Sequence[str], conjunction: str = "or") -> str:
    quoted = [f"'{word}'" for word in words]
    return f" {conjunction} ".join(filter(None, [", ".join(quoted[:-1]), *quoted[-1:]]))
