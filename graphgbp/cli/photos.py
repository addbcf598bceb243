"""The photos of a command line: folders opened, each with a name of its own."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

from graphgbp.errors import ImageError
from graphgbp.photo import SUFFIXES, require_photo


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
