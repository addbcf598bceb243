"""The photos of a command line: folders opened, each with a name of its own, read in batches of one shape."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphgbp.errors import ImageError
from graphgbp.photo import SUFFIXES, require_photo

if TYPE_CHECKING:
    from graphgbp.recipe import ImageInput, Recipe


@dataclass(frozen=True)
class Batch:
    """Photos that share a shape: their names and files, the model's input [N, ...], and what the model sees."""

    names: list[str]
    files: list[str]
    images: np.ndarray
    photos: list[np.ndarray]


def find_photos(arguments: Sequence[str]) -> list[Path]:
    """The photos named, and those in the folders named, each once.

    Raises ImageError for what is not there, is no image, or a folder without any.
    """
    found: list[Path] = []
    for path in map(Path, arguments):
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
            if not inside:
                raise ImageError(f"no photo in the folder '{path}' ({', '.join(sorted(SUFFIXES))})")
            found += inside
        else:
            found.append(path)
    found = list(dict.fromkeys(found))
    for path in found:
        require_photo(path)
    return found


def unique_names(photos: Sequence[Path]) -> list[str]:
    """The photos' names without suffix, numbered where two would be equal."""
    names: list[str] = []
    taken: set[str] = set()
    for photo in photos:
        candidates = (photo.stem if n == 1 else f"{photo.stem}-{n}" for n in count(1))
        name = next(name for name in candidates if name.casefold() not in taken)
        taken.add(name.casefold())
        names.append(name)
    return names


def batches(
    photos: Sequence[Path], names: Sequence[str], recipe: "Recipe", spec: "ImageInput", size: int
) -> Iterator[Batch]:
    """The photos prepared, in order, at most `size` at once. Raises what `Recipe.prepare` raises."""
    waiting: list[tuple[str, str, np.ndarray, np.ndarray]] = []
    for photo, name in zip(photos, names, strict=True):
        image, seen = recipe.prepare(photo, spec)
        if waiting and (len(waiting) == size or waiting[0][2].shape != image.shape):
            yield _batch(waiting)
            waiting = []
        waiting.append((name, str(photo), image, seen))
    if waiting:
        yield _batch(waiting)


def _batch(waiting: Sequence[tuple[str, str, np.ndarray, np.ndarray]]) -> Batch:
    names, files, images, photos = zip(*waiting, strict=True)
    return Batch(list(names), list(files), np.stack(images), list(photos))
