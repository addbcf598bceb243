"""Convolution: y[n, m, i] = b[m] + sum over c, t of x[n, c, i stride - pad + t dilation] w[m, c, t]."""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.windows import Window, begin_and_end, lowest_same_padding, transpose, windows
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
        lambda: transpose(g, dy, w, axes, x, group),
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
