"""A photo read from disk as people see it: upright, opaque, eight bits, in the asked channels."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from graphgbp.errors import ImageError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})
"""What a folder of photos is searched for; a photo named on its own may have any name."""

_WARNINGS = threading.Lock()  # their filters belong to the whole process

PhotoLike = str | os.PathLike[str] | Image.Image


def read_photo(source: PhotoLike, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """The photo in RGB or grey.

    Its EXIF orientation is honoured, transparency is laid on white, of several frames the first is taken, and
    16 bits become 8.

    Raises ImageError, naming the file, where it cannot be read.
    """
    if isinstance(source, Image.Image):
        return _opaque(source, mode, "the image")
    path = Path(source)
    with _opened(path) as image:
        image.load()
        return _opaque(image, mode, f"'{path}'")


def require_photo(path: Path) -> None:
    """Raises ImageError, naming the file, where it does not begin as an image does; its pixels are not read."""
    with _opened(path):
        pass


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise ImageError(f"no photo '{path}'; check the path")
    try:
        with _WARNINGS, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(path)
        with opened as image:
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"'{path}' is not an image in a known format") from None
    except Image.DecompressionBombError:
        raise ImageError(f"'{path}' has too many pixels to be a photo; make it smaller") from None
    except Exception as error:  # Pillow's readers meet a broken file with exceptions of every kind
        raise ImageError(f"cannot read the image '{path}': {error}") from error


def _opaque(image: Image.Image, mode: Literal["RGB", "L"], name: str) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image, name)
    try:
        if image.has_transparency_data:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers)
        return image.convert("RGB").convert(mode)
    except ValueError:
        raise ImageError(f"{name} has colours that cannot be made RGB (mode {image.mode}); save it as RGB") from None


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 0xFFFF:
        raise ImageError(f"the pixels of {name} have no known range (mode {image.mode}); save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
