"""Convolution: y[n, m, i] = b[m] + sum over c, t of x[n, c, i stride - pad + t dilation] w[m, c, t].

And the transposed convolution, y = A^T x, where x = A y is a convolution without bias.
"""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphgbp import blocked
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.windows import Pads, Window, begin_and_end, lowest_same_padding, transpose, windows
from graphgbp.shapes import is_static

_LOWEST_SAME_PADDING = -2  # below it ONNX Runtime places the windows elsewhere than ONNX says


def _refuse(node: gs.Node) -> str | None:
    weight = node.inputs[1]
    if not is_static(weight.shape):
        return f"the shape of its weight '{weight.name}' is not known before running"
    if lowest_same_padding(node, weight.shape[2:]) < _LOWEST_SAME_PADDING:
        return (
            f"auto_pad={node.attrs['auto_pad']} with a kernel so much smaller than the stride: ONNX Runtime does not "
            "compute what ONNX defines; write the pads out"
        )
    return None


@vjp("Conv", versions=(11, 22), wrt=(0, 1, 2), refuse=_refuse)
def conv(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dx = transpose of the convolution; dw = convolution of x with dy; db = sum of dy"""
    x, w = node.inputs[:2]
    group = node.attrs["group"]
    axes = windows(node, w.shape[2:])
    everything_but_channels = [0, *range(2, len(w.shape))]
    return [
        lambda: blocked.enter(g, transpose(g, dy, w, axes, x, group), x),
        lambda: _weight_cotangent(g, dy, x, axes, group),
        lambda: g.reduce_sum(dy, everything_but_channels, keepdims=False),
    ]


def _weight_cotangent(g: Emitter, dy: gs.Tensor, x: gs.Tensor, axes: Sequence[Window], group: int) -> gs.Tensor:
    """dw[m, c, t] = sum over n, i of dy[n, m, i] x[n, c, i stride - pad + t dilation]: a convolution over the batch.

    The images are its channels, dy its filters; stride and dilation change places.
    """
    spatial = list(range(2, len(axes) + 2))
    pads = [begin_and_end(g, x, axis, window) for axis, window in zip(spatial, axes, strict=True)]
    if any(window.pads is None for window in axes):
        x = g.pad(x, [0, 0, *(begin for begin, _ in pads), 0, 0, *(end for _, end in pads)])
        pads = [(0, 0)] * len(axes)
    dw = g.op(
        "Conv",
        _batch_as_channels(g, x, spatial, group),
        g.transpose(dy, [1, 0, *spatial]),
        strides=[window.dilation for window in axes],
        dilations=[window.stride for window in axes],
        pads=[begin for begin, _ in pads] + [end for _, end in pads],
        group=group,
    )
    longer = [axis for axis, window in zip(spatial, axes, strict=True) if window.stride > window.dilation]
    if longer:  # by what the last window left over
        dw = g.slice(dw, [0] * len(longer), [axes[axis - 2].kernel for axis in longer], longer)
    return g.transpose(dw, [1, 0, *spatial])


def _batch_as_channels(g: Emitter, x: gs.Tensor, spatial: Sequence[int], group: int) -> gs.Tensor:
    """[N, C, n...] -> [C / group, group N, n...]"""
    if group == 1:
        return g.transpose(x, [1, 0, *spatial])
    sizes = [g.size(x, axis) for axis in spatial]
    batch, channels = g.size(x, 0), g.size(x, 1)
    per_group = -1 if not isinstance(channels, int) else channels // group
    split = g.reshape(x, [batch, group, per_group, *sizes])
    turned = g.transpose(split, [2, 1, 0, *(axis + 1 for axis in spatial)])
    flat = -1 if not isinstance(batch, int) else group * batch
    return g.reshape(turned, [g.size(turned, 0), flat, *sizes])


# -- the transposed convolution --------------------------------------------------------------------------------------


def _refuse_transposed(node: gs.Node) -> str | None:
    x, weight = node.inputs[:2]
    y, auto_pad = node.outputs[0], node.attrs["auto_pad"]
    if not is_static(weight.shape):
        return f"the shape of its weight '{weight.name}' is not known before running"
    strides, _, beyond = _steps(node)
    if any(padding >= stride for padding, stride in zip(beyond, strides, strict=True)):
        return "its output_padding is not below its stride; ONNX Runtime refuses that too"
    if node.attrs.get("output_shape"):
        if x.shape is None or not is_static(x.shape[2:]):
            return "output_shape for an input whose size is known at run time only; export it with pads"
        if y.shape is None or len(y.shape) != len(x.shape):
            return "its output_shape is smaller than its input, and ONNX's inference has no shape for that"
    elif auto_pad.startswith("SAME") and (any(beyond) or min(_excess(node)) < 0):
        return f"auto_pad={auto_pad} beyond what its windows reach: ONNX and ONNX Runtime disagree; write the pads out"
    return None


def _steps(node: gs.Node) -> tuple[list[int], list[int], list[int]]:
    """strides, dilations and output_padding, one entry for each spatial axis"""
    rank = len(node.inputs[1].shape) - 2
    defaults = (("strides", 1), ("dilations", 1), ("output_padding", 0))
    strides, dilations, beyond = (list(node.attrs.get(key) or [default] * rank) for key, default in defaults)
    return strides, dilations, beyond


@vjp("ConvTranspose", versions=(11, 22), wrt=(0, 1, 2), refuse=_refuse_transposed)
def conv_transpose(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y = transpose of a convolution + b: dx = that convolution; dw = convolution of dy with x; db = sum of dy"""
    x, w = node.inputs[:2]
    group = node.attrs["group"]
    axes = _windows_on_output(node)
    everything_but_channels = [0, *range(2, len(w.shape))]
    return [
        lambda: _convolved(g, dy, w, axes, group),
        lambda: _weight_cotangent(g, x, dy, axes, group),
        lambda: g.reduce_sum(dy, everything_but_channels, keepdims=False),
    ]


def _windows_on_output(node: gs.Node) -> list[Window]:
    """The windows of y that the elements of x write to."""
    strides, dilations, _ = _steps(node)
    kernel = node.inputs[1].shape[2:]
    return [Window(None, *axis) for axis in zip(kernel, strides, dilations, _output_pads(node), strict=True)]


def _output_pads(node: gs.Node) -> list[Pads]:
    """What is cut off at the begin and the end of each axis of y."""
    auto_pad, rank = node.attrs["auto_pad"], len(node.inputs[1].shape) - 2
    if node.attrs.get("output_shape") or auto_pad.startswith("SAME"):
        totals = [max(0, total) for total in _excess(node)]
        halves = [(total // 2, total - total // 2) for total in totals]
        return halves if auto_pad == "SAME_UPPER" else [(more, less) for less, more in halves]
    pads = (auto_pad == "NOTSET" and node.attrs.get("pads")) or [0] * (2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def _excess(node: gs.Node) -> list[int]:
    """How much more the windows reach than output_shape asks for, or than the size x stride of auto_pad SAME_*."""
    x, w = node.inputs[:2]
    spans = [dilation * (taps - 1) + 1 for taps, dilation in zip(w.shape[2:], _steps(node)[1], strict=True)]
    reach = [span + beyond - stride for span, stride, beyond in zip(spans, *_steps(node)[::2], strict=True)]
    asked = node.attrs.get("output_shape")
    if not asked:
        return reach
    return [
        more + n * stride - o for more, n, stride, o in zip(reach, x.shape[2:], _steps(node)[0], asked, strict=True)
    ]


def _convolved(g: Emitter, dy: gs.Tensor, w: gs.Tensor, axes: Sequence[Window], group: int) -> gs.Tensor:
    pads = [window.pads or (0, 0) for window in axes]
    return g.op(
        "Conv",
        dy,
        w,
        strides=[window.stride for window in axes],
        dilations=[window.dilation for window in axes],
        pads=[begin for begin, _ in pads] + [end for _, end in pads],
        group=group,
    )
