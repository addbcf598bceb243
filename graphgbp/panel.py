"""Attribution maps as people look at them: pixels by the field's conventions, and one panel per image.

A CAM is laid over the photo, each map over its own maximum. Guided maps, and the other gradients, are shown in one of
two ways: in colour (mean 0, standard deviation 0.1, plus 0.5, clipped), or as one channel (summed over the channels, of
the asked sign, scaled at the value below which 98 % of the total attribution lies, as Captum's `outlier_perc=2`). The
scale stands under every map, and a map of zeros is shown as such, never amplified.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from graphgbp import contract
from graphgbp.errors import RequestError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


# -- the panel: sizes in inches ---------------------------------------------------------------------------------

_WIDTH, _GAP, _MARGIN = 3.0, 0.16, 0.22
_HEADER, _HEADING, _FOOTER = 0.88, 0.34, 0.46
_BAR = 0.07
_DPI = 160
_INK, _FAINT = "#1b1b1f", "#5f5f68"
_TITLE: dict[str, Any] = {"fontsize": 17, "weight": "bold", "color": _INK}
_SUBTITLE: dict[str, Any] = {"fontsize": 10.5, "color": _FAINT}


def draw(tiles: Sequence[Tile], title: str, subtitle: str = "") -> "Figure":
    """The tiles side by side under a title: a matplotlib Figure outside all global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = tiles[0].pixels.shape[:2]
    tile_height = _WIDTH * rows / columns
    width = 2 * _MARGIN + len(tiles) * (_WIDTH + _GAP) - _GAP
    height = _HEADER + _HEADING + tile_height + _FOOTER
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    with _letters_may_be_missing():
        _write(figure, title, 0.42, _TITLE)
        _write(figure, subtitle, 0.70, _SUBTITLE)
    for index, tile in enumerate(tiles):
        _place(figure, tile, _MARGIN + index * (_WIDTH + _GAP), tile_height)
    return figure


def _write(figure: "Figure", text: str, below: float, style: dict[str, Any]) -> None:
    """A line `below` the upper edge; what does not fit is left out at its end."""
    width, height = figure.get_size_inches()
    line = figure.text(_MARGIN / width, 1 - below / height, text, parse_math=False, **style)
    while (excess := line.get_window_extent().width / _DPI / (width - 2 * _MARGIN)) > 1:
        text = text[: min(len(text) - 1, int(len(text) / excess))]
        line.set_text(f"{text}\N{HORIZONTAL ELLIPSIS}")


def _place(figure: "Figure", tile: Tile, left: float, tile_height: float) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, _FOOTER / height, _WIDTH / width, tile_height / height))
    axes.imshow(tile.pixels, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    heading = (left / width, (_FOOTER + tile_height + 0.09) / height)
    figure.text(*heading, tile.heading, fontsize=12, color=_INK)
    figure.text(left / width, 0.16 / height, tile.caption, fontsize=9.5, color=_FAINT)
    if tile.bar:
        _place_bar(figure, tile.bar, left)
    if tile.stamp:
        badge = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "boxstyle": "round,pad=0.4"}
        middle = ((left + _WIDTH / 2) / width, (_FOOTER + tile_height / 2) / height)
        figure.text(*middle, tile.stamp, fontsize=12, color=_INK, ha="center", va="center", bbox=badge)


def _place_bar(figure: "Figure", bar: Bar, left: float) -> None:
    width, height = figure.get_size_inches()
    axes = figure.add_axes((left / width, (_FOOTER - 0.05 - _BAR) / height, _WIDTH / width, _BAR / height))
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=bar.colours, aspect="auto")
    axes.set_axis_off()
    right = (left + _WIDTH) / width
    figure.text(left / width, 0.16 / height, number(bar.low), fontsize=9.5, color=_FAINT)
    figure.text(right, 0.16 / height, number(bar.high), fontsize=9.5, color=_FAINT, ha="right")


def png(figure: "Figure") -> bytes:
    """The content of the figure's PNG file."""
    buffer = io.BytesIO()
    with _letters_may_be_missing():
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


@contextmanager
def _letters_may_be_missing() -> Iterator[None]:
    """A box is drawn for a letter that the font lacks, without a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        yield
