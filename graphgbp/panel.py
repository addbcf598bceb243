"""Attribution maps as people look at them: pixels by the field's conventions, and one panel per image.

A CAM is laid over the photo, each map over its own maximum. Guided maps, and the other gradients, are shown in one of
two ways: in colour (mean 0, standard deviation 0.1, plus 0.5, clipped), or as one channel (summed over the channels, of
the asked sign, scaled at the value below which 98 % of the total attribution lies, as Captum's `outlier_perc=2`). The
scale stands under every map, and a map of zeros is shown as such, never amplified.
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from graphgbp import contract
from graphgbp.errors import RequestError

STYLES = ("auto", "colour", "absolute", "positive", "negative", "all")
SHOWN = 0.98
"""The share of the total attribution that a one-channel map shows below its scale."""

HEADINGS = {
    contract.GRADCAM: "Grad-CAM",
    contract.HIRESCAM: "HiResCAM",
    contract.LAYERCAM: "LayerCAM",
    contract.GRADCAM_PLUSPLUS: "Grad-CAM++",
    contract.XGRADCAM: "XGrad-CAM",
    contract.GUIDED_BACKPROP: "Guided Backpropagation",
    contract.GUIDED_GRADCAM: "Guided Grad-CAM",
    contract.SALIENCY: "Saliency",
    contract.INPUT_X_GRADIENT: "Input x Gradient",
    contract.DECONVNET: "DeconvNet",
}
"""The maps in the order of a panel."""

_SEQUENTIAL = "inferno"
_DIVERGING = "RdBu_r"
_OVERLAY = 0.6
ALL_ZERO = "all zero"


@dataclass(frozen=True)
class Bar:
    """A strip of a colour map, and the values at its ends."""

    colours: str
    low: float
    high: float


@dataclass(frozen=True)
class Tile:
    """One picture of a panel: float pixels [H, W, 3] in [0, 1], a heading above, the scale below.

    A stamp lies over a picture that shows nothing and says why; `method` is the map's, none for the photo.
    """

    heading: str
    pixels: np.ndarray
    caption: str = ""
    bar: Bar | None = None
    scale: dict[str, float] = field(default_factory=dict)
    stamp: str = ""
    method: str = ""


def colour(values: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """Pixels of a guided map [H, W, C]: mean 0, standard deviation 0.1, plus 0.5, clipped to [0, 1]."""
    values = values.astype(np.float64)
    mean, std = values.mean(), values.std()
    spread = (values - mean) / std if std else values * 0
    return np.clip(0.1 * spread + 0.5, 0, 1), {"mean": float(mean), "std": float(std)}


def one_channel(values: np.ndarray, sign: str) -> tuple[np.ndarray, dict[str, float]]:
    """A guided map [H, W, C] as [H, W] in [0, 1], or [-1, 1] for the sign "all", and the value that became 1.

    Summed over the channels; of the sign "absolute", "positive", "negative" (shown as positive) or "all"; divided by
    the smallest value below which, itself included, 98 % of the total magnitude lies; clipped.
    """
    total = values.astype(np.float64).sum(axis=-1)
    signed = {
        "absolute": np.abs(total),
        "positive": np.maximum(total, 0),
        "negative": np.maximum(-total, 0),
        "all": total,
    }[sign]
    scale = _outlier_threshold(np.abs(signed))
    return np.clip(signed / scale, -1, 1) if scale else signed, {"scale": float(scale)}


def _outlier_threshold(magnitudes: np.ndarray) -> float:
    ordered = np.sort(magnitudes, axis=None)
    cumulative = np.cumsum(ordered)
    return float(ordered[np.searchsorted(cumulative, SHOWN * cumulative[-1])])


def overlay(photo: np.ndarray, cam: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
    """A CAM [H, W] over its own maximum, in colour over the photo, float [H, W, 3], in grey.

    A map with negative values (`relu_attributions=False`) goes over its largest magnitude, in diverging colours.
    """
    maximum = float(np.abs(cam).max())
    relative = cam / maximum if maximum else cam
    grey = photo.mean(axis=-1, keepdims=True)
    return _OVERLAY * _coloured(relative, _is_signed(cam)) + (1 - _OVERLAY) * grey, {"maximum": maximum}


def _is_signed(cam: np.ndarray) -> bool:
    return bool((cam < 0).any())


def _coloured(values: np.ndarray, signed: bool) -> np.ndarray:
    """Values in [0, 1] in sequential colours, or in [-1, 1] in diverging ones centred on 0."""
    from matplotlib import colormaps

    pixels = colormaps[_DIVERGING]((values + 1) / 2) if signed else colormaps[_SEQUENTIAL](values)
    return cast(np.ndarray, pixels[..., :3])


def tiles(
    photo: np.ndarray,
    maps: Mapping[str, np.ndarray],
    style: str = "auto",
    channels: str = "RGB",
    heading: str = "Photo",
) -> list[Tile]:
    """The photo and each map of one image, in the panel's order.

    Args:
        photo: uint8 [H, W, 3], RGB, as the model sees it.
        maps: by method, or by role where a method has several, float [H, W, C] ([H, W, 1] for a CAM).
        style: of the guided maps; "auto" is colour where they have 1 or 3 channels, else absolute.
        channels: the order of the model's colour channels, "RGB" or "BGR".

    Raises RequestError for an unknown style, or colour where the channels are none.
    """
    require_style(style)
    light = photo / 255.0
    drawn = [Tile(heading, light)]
    order = list(HEADINGS)
    for role in sorted(maps, key=lambda role: order.index(contract.method_of(role))):
        method, _, of = role.partition("/")
        is_cam = method in contract.CAMS
        tile = _cam_tile(light, maps[role]) if is_cam else _guided_tile(maps[role], style, channels)
        drawn.append(replace(tile, heading=f"{HEADINGS[method]} {of}".rstrip(), method=role))
    return drawn


def require_style(style: str) -> None:
    """Raises RequestError for an unknown style."""
    if style not in STYLES:
        raise RequestError(f"unknown style '{style}'; choose among {', '.join(STYLES)}")


def _cam_tile(photo: np.ndarray, cam: np.ndarray) -> Tile:
    if not np.isfinite(cam).all():
        return _broken_tile(cam)
    pixels, scale = overlay(photo, cam[..., 0])
    if not scale["maximum"]:
        return Tile("", pixels, "no region speaks for this class", scale=scale, stamp=ALL_ZERO)
    return Tile("", pixels, bar=_bar(scale["maximum"], _is_signed(cam)), scale=scale)


def _guided_tile(values: np.ndarray, style: str, channels: str) -> Tile:
    if not np.isfinite(values).all():
        return _broken_tile(values)
    coloured = values.shape[-1] in (1, 3)
    if style == "colour" and not coloured:
        raise RequestError(f"{values.shape[-1]} channels are no colours; choose the style 'absolute'")
    if style == "auto":
        style = "colour" if coloured else "absolute"
    tile = _colour_tile(values, channels) if style == "colour" else _one_channel_tile(values, style)
    return tile if values.any() else replace(tile, caption="every value is 0", bar=None, stamp=ALL_ZERO)


def _colour_tile(values: np.ndarray, channels: str) -> Tile:
    pixels, scale = colour(values)
    photo_order = pixels[..., ::-1] if channels == "BGR" else pixels
    caption = f"mean {number(scale['mean'])}, std {number(scale['std'])}"
    return Tile("", np.broadcast_to(photo_order, (*values.shape[:2], 3)), caption, scale=scale)


def _one_channel_tile(values: np.ndarray, sign: str) -> Tile:
    levels, scale = one_channel(values, sign)
    pixels = _coloured(levels, signed=sign == "all")
    if not scale["scale"]:
        return Tile("", pixels, f"no {sign} values", scale=scale, stamp=ALL_ZERO)
    end = -scale["scale"] if sign == "negative" else scale["scale"]
    return Tile("", pixels, bar=_bar(end, signed=sign == "all"), scale=scale)


def _broken_tile(values: np.ndarray) -> Tile:
    share = 100 * (~np.isfinite(values)).mean()
    caption = f"{number(share)} % of its values are not finite"
    return Tile("", np.full((*values.shape[:2], 3), 0.5), caption, stamp="not finite")


def _bar(end: float, signed: bool) -> Bar:
    return Bar(_DIVERGING, -end, end) if signed else Bar(_SEQUENTIAL, 0.0, end)


def number(value: float, digits: int = 3) -> str:
    """A value as it is written under a map."""
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


# -- the panel: sizes in pixels -----------------------------------------------------------------------------------

_WIDTH, _GAP, _MARGIN = 480, 26, 35
_HEADER, _HEADING, _FOOTER = 141, 54, 74
_BAR = 11
_INK, _FAINT = "#1b1b1f", "#5f5f68"


@dataclass(frozen=True)
class _Type:
    """A font of matplotlib's, its size and colour."""

    file: str
    size: float
    ink: str

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        return _font(self.file, self.size)


_TITLE = _Type("DejaVuSans-Bold.ttf", 38, _INK)
_SUBTITLE = _Type("DejaVuSans.ttf", 23, _FAINT)
_HEADLINE = _Type("DejaVuSans.ttf", 27, _INK)
_SCALE = _Type("DejaVuSans.ttf", 21, _FAINT)


@cache
def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path

    return ImageFont.truetype(f"{get_data_path()}/fonts/ttf/{file}", size)


def draw(tiles: Sequence[Tile], title: str, subtitle: str = "") -> Image.Image:
    """The tiles side by side under a title."""
    rows, columns = tiles[0].pixels.shape[:2]
    height = round(_WIDTH * rows / columns)
    width = 2 * _MARGIN + len(tiles) * (_WIDTH + _GAP) - _GAP
    picture = Image.new("RGB", (width, _HEADER + _HEADING + height + _FOOTER), "white")
    pen = ImageDraw.Draw(picture)
    _write(pen, title, 67, _TITLE)
    _write(pen, subtitle, 112, _SUBTITLE)
    for index, tile in enumerate(tiles):
        _place(picture, pen, tile, _MARGIN + index * (_WIDTH + _GAP), height)
    return picture


def _write(pen: ImageDraw.ImageDraw, text: str, baseline: int, style: _Type) -> None:
    """A line from the left margin; what does not fit is left out at its end."""
    room, shown = pen.im.size[0] - 2 * _MARGIN, text
    while (excess := style.font.getlength(shown) / room) > 1:
        text = text[: min(len(text) - 1, int(len(text) / excess))]
        shown = f"{text}\N{HORIZONTAL ELLIPSIS}"
    pen.text((_MARGIN, baseline), shown, style.ink, style.font, "ls")


def _place(picture: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, left: int, height: int) -> None:
    top, right = _HEADER + _HEADING, left + _WIDTH
    picture.paste(_enlarged(tile.pixels, height), (left, top))
    pen.text((left, top - 14), tile.heading, _HEADLINE.ink, _HEADLINE.font, "ls")
    baseline = top + height + _FOOTER - 26
    pen.text((left, baseline), tile.caption, _SCALE.ink, _SCALE.font, "ls")
    if tile.bar:
        picture.paste(_enlarged(_strip(tile.bar.colours), _BAR), (left, top + height + 8))
        pen.text((left, baseline), number(tile.bar.low), _SCALE.ink, _SCALE.font, "ls")
        pen.text((right, baseline), number(tile.bar.high), _SCALE.ink, _SCALE.font, "rs")
    if tile.stamp:
        middle = (left + _WIDTH // 2, top + height // 2)
        x0, y0, x1, y1 = pen.textbbox(middle, tile.stamp, _HEADLINE.font, "mm")
        pen.rounded_rectangle((x0 - 12, y0 - 12, x1 + 12, y1 + 12), 10, "white")
        pen.text(middle, tile.stamp, _HEADLINE.ink, _HEADLINE.font, "mm")


def _enlarged(pixels: np.ndarray, height: int) -> Image.Image:
    """Float pixels [H, W, 3] in [0, 1], each a square of one colour, a tile wide."""
    return Image.fromarray(np.round(255 * pixels).astype(np.uint8)).resize((_WIDTH, height), Image.Resampling.NEAREST)


@cache
def _strip(colours: str) -> np.ndarray:
    """A colour map from left to right, [1, 256, 3]."""
    from matplotlib import colormaps

    return colormaps[colours](np.linspace(0, 1, 256)[None])[..., :3]


def png(picture: Image.Image) -> bytes:
    """The content of the panel's PNG file; by runs alone, which repeated pixels are, and five times as fast."""
    buffer = io.BytesIO()
    picture.save(buffer, format="png", compress_type=zlib.Z_RLE)
    return buffer.getvalue()
