"""A result on disk and on the screen: a panel and the arrays of every image, and one index of them all."""

import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from graphgbp import contract, panel
from graphgbp._version import __version__
from graphgbp.contract import Manifest
from graphgbp.errors import ImageError, OutputError, RequestError
from graphgbp.files import make_folder, refuse_existing, write_whole

INDEX = "index.json"
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
    ) -> None:
        self.folder = Path(folder)
        self._class_names, self._style, self._channels = class_names, style, channels
        self._manifest: Manifest | None = None
        self._entries: list[dict[str, Any]] = []
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

        `photos` are uint8 [H, W, 3], RGB, as the model saw them; without, the input itself is drawn, stretched to
        the full range. `sources` are the files they came from.

        Raises OutputError where a file cannot be written, ImageError where a photo does not fit its maps.
        """
        unknown = [name for name in names if name not in self._order]
        if unknown:
            raise RequestError(f"'{unknown[0]}' is not among the names this album was made for")
        _require_one_each(len(result.images), names=names, photos=photos, sources=sources)
        make_folder(self.folder)
        self._manifest = result.manifest
        entries = []
        for n, fact in enumerate(facts(result, self._class_names)):
            tiles = _tiles(result, n, None if photos is None else photos[n], self._style, self._channels)
            source = None if sources is None else str(sources[n])
            entry = {"name": names[n], "file": source, **fact.to_dict(), "panel": None, "arrays": f"{names[n]}.npz"}
            if tiles:
                entry["panel"] = f"{names[n]}.png"
                subtitle = f"{fact.subtitle} · {Path(source).name if source else names[n]}"
                write_whole(self.folder / f"{names[n]}.png", panel.png(panel.draw(tiles, fact.title, subtitle)))
            write_whole(self.folder / f"{names[n]}.npz", _arrays(result, n))
            entry["scales"] = {tile.method: tile.scale for tile in tiles if tile.method}
            entries.append(entry)
        self._entries += entries
        return entries

    def describe(self) -> dict[str, Any]:
        """The index as plain data; images in the order of the names."""
        images = sorted(self._entries, key=lambda entry: self._order[entry["name"]])
        index: dict[str, Any] = {"graphgbp": __version__, "style": self._style, "images": images}
        if self._manifest is not None:
            manifest = self._manifest
            index |= {"model": manifest.source, "score": manifest.score, "target_layers": manifest.target_layers}
            index |= {"methods": manifest.methods}
        return cast(dict[str, Any], _plain(index))

    def finish(self) -> Path:
        """Write the index and return its path. Raises OutputError where it cannot be written."""
        path = self.folder / INDEX
        write_whole(path, (json.dumps(self.describe(), indent=2, ensure_ascii=False) + "\n").encode())
        return path


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


# -- what is said of an image -----------------------------------------------------------------------------------


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
    """Every class of every image, highest first."""
    try:
        return result.top(sys.maxsize)
    except RequestError:  # a score at every position, such as a segmentation's
        return [[] for _ in result.images]


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


def _plain(value: Any) -> Any:
    """The value in what JSON has: None for what is infinite or not a number."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
