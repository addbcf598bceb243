"""Convolutions whose channels come second, as ONNX has them, or last, as some kernels of ONNX Runtime do."""

from collections.abc import Callable

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import attributes

_CONVOLUTION = ("auto_pad", "dilations", "group", "kernel_shape", "pads", "strides")


def convolution(
    g: Emitter, node: gs.Node, x: gs.Tensor, w: gs.Tensor, b: gs.Tensor | None, channels_last: bool = False
) -> gs.Tensor:
    """Conv with the node's attributes, between two Transposes where the channels come last."""
    kept = attributes(node, *_CONVOLUTION)
    if not channels_last:
        return g.op("Conv", x, w, b, **kept)
    return channels_second(g, x, len(w.shape), lambda x: g.op("Conv", x, w, b, **kept))


def channels_second(g: Emitter, x: gs.Tensor, rank: int, compute: Callable[[gs.Tensor], gs.Tensor]) -> gs.Tensor:
    """What `compute` gives of x, both with their channels last."""
    y = compute(g.transpose(x, [0, rank - 1, *range(1, rank - 1)]))
    return g.transpose(y, [0, *range(2, rank), 1])
