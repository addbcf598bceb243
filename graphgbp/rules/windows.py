"""Sliding windows: the geometry that convolution and pooling share, and the transpose of a sum over windows.

Along one axis of size n, window i reads x[i stride - begin + t dilation] for t = 0 ... kernel - 1, where it exists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.shapes import window_count

Pads = tuple[int, int]  # begin and end; a negative one crops


@dataclass(frozen=True)
class Window:
    """The windows along one axis. `size` is None where it is known at run time only; `pads` is None where they are.

    Unknown pads are those of auto_pad SAME_UPPER or (`upper` false) SAME_LOWER on an unknown size.
    """

    size: int | None
    kernel: int
    stride: int
    dilation: int
    pads: Pads | None
    upper: bool = True
    ceil: bool = False

    @property
    def span(self) -> int:
        """How far one window reaches."""
        return self.dilation * (self.kernel - 1) + 1

    @property
    def slack(self) -> int | None:
        """How far the last window reaches beyond the last element, the padding included; None where unknown."""
        if self.pads is None:
            return None
        if self.stride == 1:
            return self.pads[1]
        if self.size is None:
            return None
        count = window_count(self.size, self.span, self.stride, self.pads, self.ceil)
        return (count - 1) * self.stride + self.span - self.pads[0] - self.size

    @property
    def least_slack(self) -> int:
        """A lower bound of the slack: the windows leave out less than one stride."""
        if self.slack is not None:
            return self.slack
        if self.pads is None:
            return min(0, self.span - self.stride)
        return self.pads[1] - (self.stride - 1)


def windows(node: gs.Node, kernel: Sequence[int]) -> list[Window]:
    """The windows of a Conv or pooling node with a kernel of this shape, one entry for each spatial axis."""
    shape = node.inputs[0].shape
    rank = len(kernel)
    strides = node.attrs.get("strides") or [1] * rank
    dilations = node.attrs.get("dilations") or [1] * rank
    explicit = node.attrs.get("pads") or [0] * (2 * rank)
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    found = []
    for axis in range(rank):
        size = shape[axis + 2] if shape is not None and isinstance(shape[axis + 2], int) else None
        span = dilations[axis] * (kernel[axis] - 1) + 1
        pads: Pads | None = (explicit[axis], explicit[axis + rank])
        if auto_pad == "VALID":
            pads = (0, 0)
        elif auto_pad.startswith("SAME"):
            pads = _same_pads(size, span, strides[axis], auto_pad == "SAME_UPPER")
        ceil = bool(node.attrs.get("ceil_mode")) and not auto_pad.startswith("SAME")
        upper = auto_pad != "SAME_LOWER"
        found.append(Window(size, kernel[axis], strides[axis], dilations[axis], pads, upper, ceil))
    return found


def _same_pads(size: int | None, span: int, stride: int, upper: bool) -> Pads | None:
    if size is None and stride > 1:
        return None
    total = max(0, _same_total(size, span, stride))
    less, more = total // 2, total - total // 2
    return (less, more) if upper else (more, less)


def _same_total(size: int | None, span: int, stride: int) -> int:
    """What the ceil(size / stride) windows of auto_pad SAME_* reach beyond the size; the least, where it is unknown."""
    return span - stride + (0 if size is None else -(-size // stride) * stride - size)


def lowest_same_padding(node: gs.Node, kernel: Sequence[int]) -> int:
    """The least total padding that auto_pad SAME_* asks for along any axis; negative where windows leave gaps."""
    if not node.attrs.get("auto_pad", "NOTSET").startswith("SAME"):
        return 0
    return min(_same_total(window.size, window.span, window.stride) for window in windows(node, kernel))


def begin_and_end(g: Emitter, x: gs.Tensor, axis: int, window: Window) -> tuple[Size, Size]:
    """The pads of one axis: ints where they are known, else int64 tensors of shape [1]."""
    if window.pads is not None:
        return window.pads
    n = g.as_int_vector(g.size(x, axis))
    stride, two = g.ints([window.stride]), g.ints([2])
    gaps = g.div(g.sub(n, g.ints([1])), stride)  # ceil(n / stride) - 1
    total = g.maximum(g.sub(g.add(g.mul(gaps, stride), g.ints([window.span])), n), g.ints([0]))
    less = g.div(total, two)
    more = g.sub(total, less)
    return (less, more) if window.upper else (more, less)


# -- the transpose -----------------------------------------------------------------------------------------------


def transpose(
    g: Emitter, dy: gs.Tensor, kernel: gs.Tensor, axes: Sequence[Window], x: gs.Tensor, group: int = 1
) -> gs.Tensor:
    """The transpose of y = Conv(x, kernel): each window adds what it weighed, times dy, to where it read it.

    `kernel` is [M, C / group, k...]; dy is [N, M, o...]; the result has the spatial sizes of x and C channels.
    Of the ways to write it the first that is at hand is the fastest on CPU: ONNX Runtime's convolution is blocked and
    runs on all threads, its ConvTranspose is neither, and goes through the groups one by one.
    """
    if all(window.stride == 1 for window in axes):
        return _by_convolution(g, dy, kernel, axes, group)
    return _in_size_of(g, x, axes, partial(_strided, g, dy, kernel, axes, group))


def _by_convolution(g: Emitter, dy: gs.Tensor, kernel: gs.Tensor, axes: Sequence[Window], group: int) -> gs.Tensor:
    """Stride 1: the convolution with the mirrored kernel, faster than ConvTranspose."""
    pads = [
        (window.span - 1 - begin, window.span - 1 - end) for window in axes for begin, end in [window.pads or (0, 0)]
    ]
    return g.op(
        "Conv",
        _cropped(g, dy, pads),
        mirrored(g, kernel, axes, group),
        pads=[max(0, begin) for begin, _ in pads] + [max(0, end) for _, end in pads],
        dilations=[window.dilation for window in axes],
        group=group,
    )


def mirrored(g: Emitter, kernel: gs.Tensor, axes: Sequence[Window], group: int) -> gs.Tensor:
    """[M, C / group, k...] -> [C, M / group, k...], each filter read backwards; folded by the runtime at load."""
    kernel = g.flip(kernel, [axis + 2 for axis, window in enumerate(axes) if window.kernel > 1])
    filters, channels, *sizes = kernel.shape
    spatial = range(2, len(kernel.shape))
    if group == 1:
        return g.transpose(kernel, [1, 0, *spatial])
    per_group = g.reshape(kernel, [group, filters // group, channels, *sizes])
    if 1 not in (filters // group, channels):
        per_group = g.transpose(per_group, [0, 2, 1, *(axis + 1 for axis in spatial)])
    return g.reshape(per_group, [group * channels, filters // group, *sizes])


def _cropped(g: Emitter, dy: gs.Tensor, pads: Sequence[Pads]) -> gs.Tensor:
    """dy without the windows that lie in the padding alone: as many as a pad is negative."""
    axes = [axis for axis, sides in enumerate(pads) if min(sides) < 0]
    if not axes:
        return dy
    starts = [max(0, -pads[axis][0]) for axis in axes]
    ends = [pads[axis][1] if pads[axis][1] < 0 else np.iinfo(np.int64).max for axis in axes]
    return g.slice(dy, starts, ends, [axis + 2 for axis in axes])


def _strided(
    g: Emitter,
    dy: gs.Tensor,
    kernel: gs.Tensor,
    axes: Sequence[Window],
    group: int,
    pads: Sequence[int],
    beyond: Sequence[int],
) -> gs.Tensor:
    """Any stride: what ConvTranspose gives with symmetric `pads` and `beyond` as output_padding.

    One tap mixes channels before the result is spread out. A depthwise convolution has so little work for each
    element that it is done on the spread out dy, most of which is 0.
    """
    if all(window.kernel == 1 for window in axes) and not any(pads):
        return _spread(g, _by_convolution(g, dy, kernel, axes, group), group * kernel.shape[1], axes, beyond)
    margins = [window.span - 1 - pad for window, pad in zip(axes, pads, strict=True)]
    if kernel.shape[0] == group > 1 and min(margins) >= 0:
        return g.op(
            "Conv",
            _spread(g, dy, group, axes, [0] * len(axes)),
            mirrored(g, kernel, axes, group),
            pads=[*margins, *(margin + more for margin, more in zip(margins, beyond, strict=True))],
            dilations=[window.dilation for window in axes],
            group=group,
        )
    return g.op(
        "ConvTranspose",
        dy,
        kernel,
        strides=[window.stride for window in axes],
        pads=[*pads, *pads],
        dilations=[window.dilation for window in axes],
        output_padding=list(beyond),
        group=group,
    )


def _spread(g: Emitter, x: gs.Tensor, channels: int, axes: Sequence[Window], beyond: Sequence[int]) -> gs.Tensor:
    """x with stride - 1 zeros between neighbours, and `beyond` zeros at the end: ConvTranspose with one tap, a 1."""
    one = g.constant(np.ones([channels, 1] + [1] * len(axes), x.dtype))
    strides = [window.stride for window in axes]
    return g.op("ConvTranspose", x, one, strides=strides, output_padding=list(beyond), group=channels)


def _in_size_of(
    g: Emitter, x: gs.Tensor, axes: Sequence[Window], make: Callable[[list[int], list[int]], gs.Tensor]
) -> gs.Tensor:
    """make(pads, output_padding), wide enough for every size x may have, then cut to x.

    The pads are symmetric, since CUDA's ConvTranspose takes no others; output_padding stays below the stride.
    """
    pads, output_padding = [], []
    starts: list[Size] = []
    ends: list[Size] = []
    cut = []
    for axis, window in enumerate(axes, start=2):
        slack = window.least_slack
        pad = min(window.pads[0], slack + window.stride - 1) if window.pads else 0
        pads.append(pad)
        output_padding.append(max(0, pad - slack))
        if window.slack is None or window.pads is None or window.pads[0] != pad or slack > pad:
            begin, _ = begin_and_end(g, x, axis, window)
            start = begin - pad if isinstance(begin, int) else begin
            cut.append(axis)
            starts.append(start)
            ends.append(_end(g, start, g.size(x, axis)))
    wide = make(pads, output_padding)
    return g.slice(wide, starts, ends, cut) if cut else wide


def _end(g: Emitter, start: Size, size: Size) -> Size:
    if isinstance(start, int):
        if isinstance(size, int):
            return start + size
        if start == 0:
            return size
    return g.add(g.as_int_vector(start), g.as_int_vector(size))
