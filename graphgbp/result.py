"""What one call of `Explainer.explain` gives back: classes, scores, maps; its table and its pictures."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from graphgbp.contract import Manifest
from graphgbp.errors import RequestError

_PROBABILITIES = ("Softmax", "LogSoftmax", "Sigmoid")


class Ranked(NamedTuple):
    """One class of one image: its index, its value in the model's output, and whether that is a probability."""

    class_index: int
    value: float
    is_probability: bool


@dataclass(frozen=True, eq=False)
class Result:
    """The explanation of a batch of N images. Every map is also an attribute: `result.gradcam`.

    Attributes:
        images: the N images as the model took them.
        target_class: int64 [N], the class explained; -1 where it was no single one (weights, or a prediction of its
            own at every position).
        target_score: float32 [N], the score S that was differentiated.
        outputs: the model's own outputs by name.
        maps: float32 arrays by method. Of the CAMs (`gradcam`, `hirescam`, ...) each has one channel; the others have
            the images' shape, in units of score per unit of the image, of score for `input_x_gradient`, and times
            Grad-CAM's for `guided_gradcam`; `gradcam_features` and `gradcam_gradients` are the target layer's A and
            dS/dA.
        manifest: what the converted file says of itself.
    """

    images: np.ndarray
    target_class: np.ndarray
    target_score: np.ndarray
    outputs: Mapping[str, np.ndarray]
    maps: Mapping[str, np.ndarray]
    manifest: Manifest

    def __len__(self) -> int:
        return len(self.images)

    def __getattr__(self, name: str) -> np.ndarray:
        maps = self.__dict__.get("maps", {})
        if name in maps:
            return maps[name]
        raise AttributeError(f"the result has no '{name}'; its maps are {', '.join(maps) or 'none'}")

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.maps})

    def top(self, k: int = 5) -> list[list[Ranked]]:
        """The k highest classes of each image, highest first, by the model's own output.

        Values are probabilities where the model ends in a Softmax, Sigmoid or LogSoftmax (whose exponential is
        taken), else raw scores; one score z for two classes is listed as z and -z.
        Raises RequestError where the output holds no single value per image and class.
        """
        values, is_probability = self._class_values()
        order = np.argsort(-values, axis=1, kind="stable")[:, :k]
        return [
            [Ranked(int(index), float(row[index]), is_probability) for index in best]
            for row, best in zip(values, order, strict=True)
        ]

    def _class_values(self) -> tuple[np.ndarray, bool]:
        """[N, K] values of the output that the score was found from."""
        score = self.manifest.score
        activation = score["activation"]
        is_probability = activation in _PROBABILITIES
        values = np.asarray(self.outputs[score["output"]], np.float64)
        images, width = len(self.images), 1 if score["two_classes_in_one"] else score["classes"]
        if values.size != images * (width or max(values.shape[1:], default=1)):
            raise RequestError(
                f"output '{score['output']}' of shape {list(values.shape)} holds no single value per image and class, "
                "so there is no table of classes"
            )
        values = values.reshape(images, -1)
        if activation == "LogSoftmax":
            values = np.exp(values)
        if score["two_classes_in_one"]:
            values = np.concatenate([1 - values if is_probability else -values, values], axis=1)
        return values, is_probability

    def save(
        self,
        folder: str | os.PathLike[str],
        *,
        photos: Sequence[Any] | None = None,
        names: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        force: bool = False,
        style: str = "auto",
        channels: str = "RGB",
    ) -> Path:
        """Write a panel (`.png`) and the arrays (`.npz`) of every image, and an index of them, into `folder`.

        Args:
            folder: made where it is missing.
            photos: what to draw the maps over, one per image; by default the images themselves.
            names: of the files, one per image, without suffix; by default "image_0", "image_1", ...
            class_names: by class index.
            force: replace files of the same names.
            style: of the guided maps: "auto", "colour", "absolute", "positive", "negative" or "all".
            channels: the order of the model's colour channels, "RGB" or "BGR".

        Returns the path of the index. Raises OutputError where a file exists (unless `force`) or cannot be written.
        """
        from graphgbp import picture

        return picture.save_result(
            self,
            folder,
            photos=photos,
            names=names,
            class_names=class_names,
            force=force,
            style=style,
            channels=channels,
        )

    def show(self, *, class_names: Sequence[str] | None = None, style: str = "auto") -> None:
        """Show the panel of every image: in the notebook, or with the system's image viewer.

        Raises OutputError where there is no viewer.
        """
        from graphgbp import picture

        picture.show_result(self, class_names=class_names, style=style)
