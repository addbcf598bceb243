"""What is said of each image of a result: the class explained, its score, the classes ranked highest."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from graphgbp import contract, panel
from graphgbp.contract import Manifest
from graphgbp.errors import RequestError

TOP = 5


class Explained(Protocol):
    """What is needed of a `Result`, whose docstring says what each is."""

    @property
    def images(self) -> np.ndarray: ...
    @property
    def target_class(self) -> np.ndarray: ...
    @property
    def target_score(self) -> np.ndarray: ...
    @property
    def outputs(self) -> Mapping[str, np.ndarray]: ...
    @property
    def maps(self) -> Mapping[str, np.ndarray]: ...
    @property
    def manifest(self) -> Manifest: ...
    def top(self, k: int = 5) -> list[list[Any]]: ...


@dataclass(frozen=True)
class Fact:
    """What was explained in one image: its class (None: no single one), its score S, the classes ranked highest."""

    class_index: int | None
    class_name: str | None
    score: float
    probability: float | None
    top: list[dict[str, Any]]

    @property
    def title(self) -> str:
        if self.class_index is None:
            return "no single class"
        return self.class_name or f"class {self.class_index}"

    @property
    def subtitle(self) -> str:
        number = [f"class {self.class_index}"] if self.class_name else []
        value = (
            f"score {panel.number(self.score, 4)}"
            if self.probability is None
            else f"probability {self.probability:.3f}"
        )
        return " · ".join([*number, value])

    def to_dict(self) -> dict[str, Any]:
        return {
            "class": self.class_index,
            "class_name": self.class_name,
            "score": self.score,
            "probability": self.probability,
            "top": self.top,
        }


def facts(result: Explained, class_names: Sequence[str] | None = None) -> list[Fact]:
    """What was explained in each image, and its five highest classes; none where the model's output ranks none."""
    head = result.manifest.score
    classless = head["class_axis"] is None and not head["two_classes_in_one"]
    return [
        _fact(None if classless or index == contract.PREDICTED else int(index), float(score), ranked, class_names)
        for index, score, ranked in zip(result.target_class, result.target_score, _ranked(result), strict=True)
    ]


def _ranked(result: Explained) -> list[list[Any]]:
    """The highest classes of every image, highest first; all of them where the explained one is not among the first."""
    try:
        best = result.top(TOP)
    except RequestError:  # a score at every position, such as a segmentation's
        return [[] for _ in result.images]
    listed = [
        index == contract.PREDICTED or index in {entry.class_index for entry in row}
        for index, row in zip(result.target_class.tolist(), best, strict=True)
    ]
    return best if all(listed) else result.top(sys.maxsize)


def _fact(index: int | None, score: float, ranked: Sequence[Any], class_names: Sequence[str] | None) -> Fact:
    def name(index: int | None) -> str | None:
        return class_names[index] if class_names and index is not None and index < len(class_names) else None

    own = [entry.value for entry in ranked if entry.class_index == index and entry.is_probability]
    top = [
        {
            "class": entry.class_index,
            "class_name": name(entry.class_index),
            "probability" if entry.is_probability else "score": entry.value,
        }
        for entry in ranked[:TOP]
    ]
    return Fact(index, name(index), score, own[0] if own else None, top)
