"""A result on disk and on the screen: a panel and the arrays of every image, and one index of them all."""

import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from textwrap import indent
from typing import Any, cast

import numpy as np

from graphgbp import contract, panel
from graphgbp._version import __version__
from graphgbp.contract import Manifest
from graphgbp.errors import ImageError, OutputError, RequestError
from graphgbp.facts import Explained, Fact, facts
from graphgbp.files import make_folder, refuse_existing, write_pieces, write_whole

INDEX = "index.json"


def save_result(
    result: Explained,
    folder: str | os.PathLike[str],
    *,
    photos: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
    force: bool = False,
    style: str = "auto",
    channels: str = "RGB",
) -> Path:
    """Write `<name>.png`, `<name>.npz` and the index of every image, as `Album` does, and return the index's path.

    Names are "image_0", "image_1", ... by default. Raises what `Album` and `Album.add` raise.
    """
    names = names or _numbered(len(result.images))
    album = Album(folder, names, class_names=class_names, style=style, channels=channels, force=force)
    album.add(result, names, photos)
    return album.finish()


def show_result(result: Explained, *, class_names: Sequence[str] | None = None, style: str = "auto") -> None:
    """Show every panel: in the notebook, or else with the system's image viewer.

    Raises OutputError where there is no viewer.
    """
    from PIL import Image

    for n, (name, fact) in enumerate(zip(_numbered(len(result.images)), facts(result, class_names), strict=True)):
        tiles = _tiles(result, n, None, style, "RGB")
        if not tiles:
            raise RequestError("the maps are no images, so there is nothing to show; save writes them as arrays")
        content = panel.png(panel.draw(tiles, fact.title, f"{fact.subtitle} · {name}"))
        picture = Image.open(io.BytesIO(content))
        if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
            sys.modules["IPython"].display.display(picture)
        else:
            _open_viewer(picture)


def _open_viewer(picture: Any) -> None:
    from PIL import ImageShow

    if not ImageShow.show(picture, title="graphgbp"):
        raise OutputError("no image viewer is found to show the maps; save them with result.save(folder)")


def _numbered(count: int) -> list[str]:
    return [f"image_{n:0{len(str(count - 1))}d}" for n in range(count)]


class Album:
    """A folder that fills with explained images, in one go or batch by batch.

    Each image gets `<name>.png`, its panel, and `<name>.npz`, its arrays: every map by method, `target_class`,
    `target_score`, and each output of the model as `outputs/<output>`. `finish` writes index.json. Maps that are no
    images (four axes, a known layout) get arrays and no panel.

    Args:
        folder: made where it is missing.
        names: of all images that will come, without suffix.
        class_names: by class index.
        style: of the guided maps: "auto", "colour", "absolute", "positive", "negative" or "all".
        channels: the order of the model's colour channels, "RGB" or "BGR".
        force: replace files of the same names.
        panels, arrays: whether they are written.

    Raises OutputError where a file exists (unless `force`) or the folder cannot be made; RequestError for a name
    that is no file name or comes twice, or an unknown style.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        names: Sequence[str],
        *,
        class_names: Sequence[str] | None = None,
        style: str = "auto",
        channels: str = "RGB",
        force: bool = False,
        panels: bool = True,
        arrays: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self._panels, self._arrays = panels, arrays
        self._class_names, self._style, self._channels = class_names, style, channels
        self._manifest: Manifest | None = None
        self._entries: dict[str, str] = {}  # JSON: a tenth of the room that objects take
        panel.require_style(style)
        require_place(folder, names, force)
        self._order = {name: n for n, name in enumerate(names)}

    def add(
        self,
        result: Explained,
        names: Sequence[str],
        photos: Sequence[Any] | None = None,
        sources: Sequence[str] | None = None,
    ) -> list[dict[str, Any]]:
        """Write the panels and arrays of one batch, and say of each image what the index will.

        Takes and raises what `pages` and `write` do.
        """
        return [self.write(page) for page in self.pages(result, names, photos, sources)]

    def pages(
        self,
        result: Explained,
        names: Sequence[str],
        photos: Sequence[Any] | None = None,
        sources: Sequence[str] | None = None,
    ) -> list["Page"]:
        """One batch, image by image, to be written.

        `photos` are uint8 [H, W, 3], RGB, as the model saw them; without, the input itself is drawn, stretched to
        the full range. `sources` are the files they came from.

        Raises RequestError for a name that this album was not made for, or where there is not one of each.
        """
        unknown = [name for name in names if name not in self._order]
        if unknown:
            raise RequestError(f"'{unknown[0]}' is not among the names this album was made for")
        _require_one_each(len(result.images), names=names, photos=photos, sources=sources)
        self._manifest = result.manifest
        return [
            Page(
                result,
                n,
                names[n],
                fact,
                None if photos is None else photos[n],
                None if sources is None else str(sources[n]),
            )
            for n, fact in enumerate(facts(result, self._class_names))
        ]

    def write(self, page: "Page") -> dict[str, Any]:
        """Write the panel and the arrays of one image, and say of it what the index will. Safe in several threads.

        Raises OutputError where a file cannot be written, ImageError where the photo does not fit its maps.
        """
        make_folder(self.folder)
        name, fact, source = page.name, page.fact, page.source
        entry = {"name": name, "file": source, **fact.to_dict(), "panel": None, "arrays": None, "scales": {}}
        if self._panels:
            tiles = _tiles(page.result, page.n, page.photo, self._style, self._channels)
            if tiles:
                entry["panel"] = f"{name}.png"
                subtitle = f"{fact.subtitle} · {Path(source).name if source else name}"
                write_whole(self.folder / f"{name}.png", panel.png(panel.draw(tiles, fact.title, subtitle)))
            entry["scales"] = {tile.method: tile.scale for tile in tiles if tile.method}
        if self._arrays:
            entry["arrays"] = f"{name}.npz"
            write_whole(self.folder / f"{name}.npz", _arrays(page.result, page.n))
        entry = _plain(entry)
        self._entries[name] = _json(entry)
        return entry

    def __len__(self) -> int:
        """How many images are written."""
        return len(self._entries)

    def describe(self, at_most: int = sys.maxsize) -> dict[str, Any]:
        """The index as plain data; images, no more than asked, in the order of the names."""
        images = [json.loads(self._entries[name]) for name in islice(self._written(), at_most)]
        return {**self._head(), "images": images}

    def finish(self) -> Path:
        """Write the index and return its path. Raises OutputError where it cannot be written."""
        path = self.folder / INDEX
        write_pieces(path, self._index())
        return path

    def _written(self) -> Iterator[str]:
        return (name for name in self._order if name in self._entries)

    def _head(self) -> dict[str, Any]:
        """What the index says of all images."""
        head: dict[str, Any] = {"graphgbp": __version__, "style": self._style}
        if self._manifest is not None:
            manifest = self._manifest
            head |= {"model": manifest.source, "score": manifest.score, "target_layers": manifest.target_layers}
            head |= {"methods": manifest.methods}
        return cast(dict[str, Any], _plain(head))

    def _index(self) -> Iterator[bytes]:
        """The file, image by image: of many images it is too long to be made at once."""
        head = _json(self._head()).removesuffix("\n}")
        yield f'{head},\n  "images": ['.encode()
        separator = "\n"
        for name in self._written():
            yield (separator + indent(self._entries[name], "    ")).encode()
            separator = ",\n"
        yield b"\n  ]\n}\n"


@dataclass(frozen=True)
class Page:
    """One image of a result, and what is written of it; `n` is its place in the batch."""

    result: Explained
    n: int
    name: str
    fact: Fact
    photo: Any
    source: str | None


def require_place(
    folder: str | os.PathLike[str], names: Sequence[str], force: bool, consent: str = "force=True"
) -> None:
    """Refuse, before any work, what an Album of these names would refuse; nothing is written.

    `consent` is what the user types to replace files.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"'{folder}' is a file; name a folder")
    _require_file_names(names)
    if not force:
        files = [folder / f"{name}{suffix}" for name in names for suffix in (".png", ".npz")]
        refuse_existing([*files, folder / INDEX], f"choose another folder, or replace with {consent}")


def _require_file_names(names: Sequence[str]) -> None:
    for name in names:
        if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise RequestError(f"{name!r} is no file name; name an image without slashes")
    twice = [name for name, count in Counter(name.casefold() for name in names).items() if count > 1]
    if twice:
        raise RequestError(f"the name '{twice[0]}' comes twice; name each image differently")


def _require_one_each(count: int, **given: Sequence[Any] | None) -> None:
    for what, values in given.items():
        if values is not None and len(values) != count:
            raise RequestError(f"{len(values)} {what} for {count} images; give one for each")


# -- one image of a batch ---------------------------------------------------------------------------------------


def _tiles(result: Explained, n: int, photo: Any, style: str, channels: str) -> list[panel.Tile]:
    """The tiles of image n; none where its maps are no images."""
    layout = result.manifest.input.get("layout")
    if layout is None or result.images.ndim != 4:
        return []
    maps = {
        role: _channels_last(array[n], layout)
        for role, array in result.maps.items()
        if _is_picture(role, array, result)
    }
    image = _channels_last(result.images[n], layout)
    if photo is None:
        return panel.tiles(_stretched(image, channels), maps, style, channels, heading="Input, stretched")
    return panel.tiles(_checked_photo(photo, image.shape[:2]), maps, style, channels)


def _is_picture(role: str, array: np.ndarray, result: Explained) -> bool:
    """Whether a map lies over the main image: not a layer's tensor, not another input's."""
    layout = result.manifest.input["layout"]
    axes = [0, *(layout.index(axis) for axis in "HW")]
    sizes = [result.images.shape[axis] for axis in axes]
    other = any(
        role.endswith(f"/{entry['name']}") for entry in result.manifest.inputs if entry != result.manifest.input
    )
    is_map = contract.method_of(role) in contract.METHODS and not other
    return is_map and array.ndim == result.images.ndim and [array.shape[axis] for axis in axes] == sizes


def _channels_last(array: np.ndarray, layout: str) -> np.ndarray:
    return array.transpose(1, 2, 0) if layout == "NCHW" else array


def _stretched(image: np.ndarray, channels: str) -> np.ndarray:
    """An input [H, W, C] as uint8 [H, W, 3]: lowest value black, highest white."""
    values = image.astype(np.float64)
    if image.shape[-1] != 3:
        values = values.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    elif channels == "BGR":
        values = values[..., ::-1]
    low, high = values.min(), values.max()
    return np.round(255 * (values - low) / (high - low if high > low else 1)).astype(np.uint8)


def _checked_photo(photo: Any, size: tuple[int, ...]) -> np.ndarray:
    array = np.asarray(photo)
    if array.dtype != np.uint8 or array.shape != (*size, 3):
        raise ImageError(
            f"a photo of shape {list(array.shape)} and type {array.dtype} cannot lie under a map; "
            f"give uint8 {[*size, 3]}, as the model saw it"
        )
    return array


def _arrays(result: Explained, n: int) -> bytes:
    arrays = {name: values[n] for name, values in result.maps.items()}
    arrays |= {"target_class": result.target_class[n], "target_score": result.target_score[n]}
    for name, values in result.outputs.items():
        arrays[f"outputs/{name}"] = values[n] if values.ndim and len(values) == len(result.images) else values
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value in what JSON has: None for what is infinite or not a number."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
