"""Four operators for ONNX's reference evaluator, which computes them slowly: element by element, or by huge copies.

Each loops over the taps of its window and treats all positions at once. What is not covered (auto_pad, ceil_mode, ...)
goes to the evaluator's own.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_conv import Conv as ReferenceConv
from onnx.reference.ops.op_conv_transpose import ConvTranspose as ReferenceConvTranspose
from onnx.reference.ops.op_max_pool import MaxPool as ReferenceMaxPool


class _Window:
    """The geometry of a window: strides, dilations and pads, with those that are left out filled in."""

    def __init__(self, kernel: Sequence[int], attributes: dict[str, Any]) -> None:
        rank = len(kernel)
        self.kernel = tuple(kernel)
        self.strides = attributes["strides"] or [1] * rank
        self.dilations = attributes["dilations"] or [1] * rank
        pads = attributes["pads"] or [0] * (2 * rank)
        self.pads = list(zip(pads[:rank], pads[rank:], strict=True))

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


def _is_plain(attributes: dict[str, Any]) -> bool:
    return attributes["auto_pad"] in (None, "NOTSET")


class Conv(ReferenceConv):
    def _run(self, x: np.ndarray, w: np.ndarray, b: Any = None, **attributes: Any) -> tuple[np.ndarray]:  # type: ignore[override]
        if not _is_plain(attributes):
            return super()._run(x, w, b, **attributes)
        window, groups = _Window(w.shape[2:], attributes), attributes["group"] or 1
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
        if attributes["output_shape"] or not _is_plain(attributes):
            return super()._run(x, w, b, **attributes)
        window, groups = _Window(w.shape[2:], attributes), attributes["group"] or 1
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
        if attributes["ceil_mode"] or attributes["storage_order"] or not _is_plain(attributes):
            return super()._run(x, **attributes)
        window = _Window(attributes["kernel_shape"], attributes)
        padded, places = window.pad(x, -np.inf), window.pad(np.arange(x.size).reshape(x.shape))
        counts = window.counts(padded.shape[2:])
        best, place = np.full((*x.shape[:2], *counts), -np.inf), np.zeros((*x.shape[:2], *counts), np.int64)
        for _, at in window.taps(counts):
            place = np.where(padded[at] > best, places[at], place)
            best = np.maximum(best, padded[at])
        return (best, place)[: len(self.output)]


class ScatterElements(OpRun):
    op_domain = ""

    def _run(
        self, x: np.ndarray, indices: np.ndarray, updates: np.ndarray, axis: Any = None, reduction: Any = None
    ) -> tuple[np.ndarray]:
        axis = (axis or 0) % x.ndim
        places: list[np.ndarray] = list(np.indices(indices.shape, sparse=True))
        places[axis] = np.where(indices < 0, indices + x.shape[axis], indices)
        y = x.copy()
        if reduction in (None, "none"):
            y[tuple(places)] = updates
        else:
            _REDUCTIONS[reduction].at(y, tuple(places), updates)
        return (y,)


_REDUCTIONS = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}
OPERATORS = [Conv, ConvTranspose, MaxPool, ScatterElements]
