"""Operators for ONNX's reference evaluator in place of its own.

Its windows and its scattering are slow, element by element or by huge copies: here each loops over the taps of its
window and treats all positions at once. It refuses negative pads and indices smaller than the data, and computes Erf
and the places of GridSample in float32. What is not covered here (ceil_mode, output_shape) goes to the evaluator's.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv_transpose import ConvTranspose as ReferenceConvTranspose
from onnx.reference.ops.op_max_pool import MaxPool as ReferenceMaxPool

_STEEP = 2.0**10  # no activation is as steep


class _Window:
    """The geometry of a window over sizes: strides, dilations and pads, with those that are left out filled in."""

    def __init__(self, sizes: Sequence[int], kernel: Sequence[int], attributes: dict[str, Any]) -> None:
        rank = len(kernel)
        self.kernel = tuple(kernel)
        self.strides = attributes["strides"] or [1] * rank
        self.dilations = attributes["dilations"] or [1] * rank
        pads = attributes["pads"] or [0] * (2 * rank)
        self.pads = list(zip(pads[:rank], pads[rank:], strict=True))
        if attributes["auto_pad"] in ("SAME_UPPER", "SAME_LOWER"):
            self.pads = [self._same(n, axis, attributes["auto_pad"]) for axis, n in enumerate(sizes)]

    def _same(self, n: int, axis: int, auto_pad: str) -> tuple[int, int]:
        """Pads that give one window per stride, the odd one at the end or at the beginning."""
        stride, span = self.strides[axis], (self.kernel[axis] - 1) * self.dilations[axis] + 1
        total = max(0, (-(-n // stride) - 1) * stride + span - n)
        return (total // 2, total - total // 2) if auto_pad == "SAME_UPPER" else (total - total // 2, total // 2)

    def pad(self, x: np.ndarray, value: float = 0) -> np.ndarray:
        return np.pad(x, [(0, 0)] * (x.ndim - len(self.pads)) + self.pads, constant_values=value)

    def counts(self, padded: Sequence[int]) -> list[int]:
        """How many windows fit along each axis."""
        axes = zip(padded, self.kernel, self.dilations, self.strides, strict=True)
        return [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in axes]

    def extent(self, counts: Sequence[int]) -> list[int]:
        """How far that many windows reach."""
        axes = zip(counts, self.kernel, self.dilations, self.strides, strict=True)
        return [(n - 1) * s + (k - 1) * d + 1 for n, k, d, s in axes]

    def taps(self, counts: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Any]]:
        """(tap, the index over the last axes of what it meets as the window moves)"""
        for tap in product(*map(range, self.kernel)):
            axes = zip(tap, self.dilations, counts, self.strides, strict=True)
            yield tap, (..., *(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in axes))


class Conv(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, w: np.ndarray, b: Any = None, **attributes: Any) -> tuple[np.ndarray]:
        window, groups = _Window(x.shape[2:], w.shape[2:], attributes), attributes["group"] or 1
        padded = window.pad(x).reshape(x.shape[0], groups, -1, *_padded(window, x))
        counts = window.counts(padded.shape[3:])
        weights = w.reshape(groups, -1, *w.shape[1:])
        y = np.zeros((x.shape[0], groups, weights.shape[1], *counts), x.dtype)
        for tap, at in window.taps(counts):
            y += _mixed(weights[(slice(None),) * 3 + tap], padded[at])
        y = y.reshape(x.shape[0], -1, *counts)
        return (y if b is None else y + b.reshape(-1, *[1] * len(counts)),)


def _padded(window: _Window, x: np.ndarray) -> list[int]:
    return [n + sum(pads) for n, pads in zip(x.shape[2:], window.pads, strict=True)]


def _mixed(matrices: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Channels mixed group by group: matrices [groups, to, from], x [N, groups, from, ...]."""
    if matrices.shape[1:] == (1, 1):
        return x * matrices.reshape(-1, *[1] * (x.ndim - 2))
    mixed = matrices @ x.reshape(*x.shape[:3], -1)
    return mixed.reshape(*mixed.shape[:3], *x.shape[3:])


class ConvTranspose(ReferenceConvTranspose):
    def _run(self, x: np.ndarray, w: np.ndarray, b: Any = None, **attributes: Any) -> tuple[np.ndarray]:  # type: ignore[override]
        """Each tap adds its share at one offset, every stride; then the padding is cut off."""
        if attributes["output_shape"] or attributes["auto_pad"] not in (None, "NOTSET", "VALID"):
            return super()._run(x, w, b, **attributes)
        window, groups = _Window(x.shape[2:], w.shape[2:], attributes), attributes["group"] or 1
        counts = x.shape[2:]
        extra = attributes["output_padding"] or [0] * len(counts)
        size = [n + more for n, more in zip(window.extent(counts), extra, strict=True)]
        images = x.reshape(x.shape[0], groups, -1, *counts)
        weights = w.reshape(groups, -1, *w.shape[1:])
        y = np.zeros((x.shape[0], groups, w.shape[1], *size), x.dtype)
        for tap, at in window.taps(counts):
            y[at] += _mixed(weights[(slice(None),) * 3 + tap].swapaxes(1, 2), images)
        inside: Any = (..., *(slice(a, n - z) for n, (a, z) in zip(size, window.pads, strict=True)))
        y = y[inside]
        y = y.reshape(x.shape[0], -1, *y.shape[3:])
        return (y if b is None else y + b.reshape(-1, *[1] * len(counts)),)


class MaxPool(ReferenceMaxPool):
    def _run(self, x: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:  # type: ignore[override]
        """The running maximum over the taps of the window, first come first served, and its place."""
        if attributes["ceil_mode"] or attributes["storage_order"]:
            return super()._run(x, **attributes)
        window = _Window(x.shape[2:], attributes["kernel_shape"], attributes)
        padded, places = window.pad(x, -np.inf), window.pad(np.arange(x.size).reshape(x.shape))
        counts = window.counts(padded.shape[2:])
        best, place = np.full((*x.shape[:2], *counts), -np.inf), np.zeros((*x.shape[:2], *counts), np.int64)
        for _, at in window.taps(counts):
            place = np.where(padded[at] > best, places[at], place)
            best = np.maximum(best, padded[at])
        return (best, place)[: len(self.output)]


_erf = np.vectorize(math.erf, otypes=[np.float64])


class Erf(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (_erf(x),)


class Gelu(OpRun):
    """A function of operators to the evaluator, which takes its own Erf for it."""

    op_domain = ""

    def _run(self, x: np.ndarray, approximate: str = "none") -> tuple[np.ndarray]:
        if approximate == "tanh":
            gate = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        else:
            gate = _erf(x / math.sqrt(2))
        return ((x * (1 + gate) / 2).astype(x.dtype),)


class HardSigmoid(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, alpha: Any = None, beta: Any = None) -> tuple[np.ndarray]:
        """A steep one is a mask, 0 or 1 of every float32: in double it is so in between as well."""
        y = np.clip(alpha * x + beta, 0, 1)
        return (np.ceil(y) if abs(alpha) >= _STEEP else y,)


class GridSample(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, grid: np.ndarray, **attributes: Any) -> tuple[np.ndarray]:
        """Pictures, bilinear; other kinds are refused, because the evaluator's own computes places in float32."""
        clamped = attributes["padding_mode"] == "border"
        if x.ndim != 4 or attributes["mode"] != "linear" or attributes["padding_mode"] == "reflection":
            raise NotImplementedError("GridSample other than bilinear of pictures, in double precision")
        corners = []  # of each axis, from the last: the two neighbours, their weights, 0 outside
        for axis, n in enumerate(x.shape[:1:-1]):
            place = (grid[..., axis] + 1) / 2
            place = place * (n - 1) if attributes["align_corners"] else place * n - 0.5
            place = np.clip(place, 0, n - 1) if clamped else place
            low = np.floor(place)
            pairs = ((low, 1 - (place - low)), (low + 1, place - low))
            corners.append([(np.clip(i, 0, n - 1).astype(int), w * ((i >= 0) & (i < n))) for i, w in pairs])
        images = np.arange(len(x)).reshape(-1, 1, 1)
        y = sum(x[images, :, i, j] * (u * v)[..., np.newaxis] for j, v in corners[0] for i, u in corners[1])
        return (np.moveaxis(np.asarray(y), -1, 1),)


class LRN(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, alpha: float, beta: float, bias: float, size: int) -> tuple[np.ndarray]:
        """The window over channels begins (size - 1) // 2 before each."""
        before = (size - 1) // 2
        squares = np.pad(np.square(x), [(0, 0), (before, size - 1 - before)] + [(0, 0)] * (x.ndim - 2))
        total = sum(squares[:, first : first + x.shape[1]] for first in range(size))
        return (x / (bias + alpha / size * total) ** beta,)


class GlobalMaxPool(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (x.max(tuple(range(2, x.ndim)), keepdims=True),)


class Pad(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, pads: np.ndarray, value: Any = None, axes: Any = None, mode: str = "constant") -> Any:
        """Negative pads cut off."""
        amounts = np.zeros((x.ndim, 2), np.int64)
        amounts[slice(None) if axes is None else axes] = np.reshape(pads, (2, -1)).T
        x = x[tuple(slice(max(0, -a), n - max(0, -z)) for n, (a, z) in zip(x.shape, amounts, strict=True))]
        fill = {} if mode != "constant" else {"constant_values": 0 if value is None else np.asarray(value).item()}
        return (np.pad(x, np.maximum(amounts, 0), mode=mode, **fill),)  # type: ignore[call-overload]


class GatherElements(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, indices: np.ndarray, axis: Any = None) -> tuple[np.ndarray]:
        return (x[_places(x, indices, axis)],)


class ScatterElements(OpRun):
    op_domain = ""

    def _run(
        self, x: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: Any = None, reduction: Any = None
    ) -> tuple[np.ndarray]:
        y, places = x.copy(), _places(x, indices, axis)
        if reduction in (None, "none"):
            y[places] = updates
        else:
            _REDUCTIONS[reduction].at(y, places, updates)
        return (y,)


def _places(x: np.ndarray, indices: np.ndarray, axis: int | None) -> tuple[np.ndarray, ...]:
    """What the indices along an axis stand for, as numpy indexes x."""
    along = (axis or 0) % x.ndim
    places: list[np.ndarray] = list(np.indices(indices.shape, sparse=True))
    places[along] = np.where(indices < 0, indices + x.shape[along], indices)
    return tuple(places)


_REDUCTIONS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
OPERATORS = [
    Conv,
    ConvTranspose,
    Erf,
    Gelu,
    HardSigmoid,
    MaxPool,
    GlobalMaxPool,
    GridSample,
    LRN,
    Pad,
    GatherElements,
    ScatterElements,
]
