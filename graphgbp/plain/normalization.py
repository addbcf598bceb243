"""Normalizations among ONNX Runtime's own operators, also those that it writes into ONNX's domain."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain
from graphgbp.plain.fused import silu

_LAYER_SINCE, _RMS_SINCE = 17, 23  # the opsets from which ONNX has the operators


def layer_normalization_of(
    g: Emitter, x: gs.Tensor, scale: gs.Tensor, bias: gs.Tensor | None, axis: int, epsilon: float
) -> gs.Tensor:
    """scale (x - mean) / sqrt(variance + epsilon) + bias over the axes from `axis` on"""
    if g.opset >= _LAYER_SINCE:
        return g.op("LayerNormalization", x, scale, bias, axis=axis, epsilon=epsilon)
    axes = _from(x, axis)
    centred = g.sub(x, g.reduce_mean(x, axes))
    y = g.mul(g.div(centred, _root(g, centred, axes, epsilon)), scale)
    return y if bias is None else g.add(y, bias)


def rms_normalization_of(g: Emitter, x: gs.Tensor, scale: gs.Tensor, axis: int, epsilon: float) -> gs.Tensor:
    """scale x / sqrt(mean of squares + epsilon) over the axes from `axis` on"""
    if g.opset >= _RMS_SINCE:
        return g.op("RMSNormalization", x, scale, axis=axis, epsilon=epsilon)
    return g.mul(g.div(x, _root(g, x, _from(x, axis), epsilon)), scale)


def _root(g: Emitter, x: gs.Tensor, axes: Sequence[int], epsilon: float) -> gs.Tensor:
    return g.sqrt(g.add(g.reduce_mean(g.mul(x, x), axes), g.like(x, epsilon)))


def _from(x: gs.Tensor, axis: int) -> list[int]:
    if x.shape is None:
        raise NotPlainError(f"the rank of its input '{x.name}' cannot be inferred")
    return list(range(axis % len(x.shape), len(x.shape)))


@plain("LayerNormalization")
def layer_normalization(
    g: Emitter, node: gs.Node, x: gs.Tensor, scale: gs.Tensor, bias: gs.Tensor | None = None
) -> gs.Tensor:
    """ONNX's operator, in a file of an opset that has none yet"""
    return layer_normalization_of(g, x, scale, bias, node.attrs.get("axis", -1), node.attrs.get("epsilon", 1e-5))


@plain("SimplifiedLayerNormalization")
def simplified_layer_normalization(g: Emitter, node: gs.Node, x: gs.Tensor, scale: gs.Tensor) -> gs.Tensor:
    """RMSNormalization"""
    return rms_normalization_of(g, x, scale, node.attrs.get("axis", -1), node.attrs.get("epsilon", 1e-5))


Sums = Sequence[gs.Tensor | None]  # the normalized tensor, two statistics of training, the sum


@plain("SkipLayerNormalization", domain=MICROSOFT)
def skip_layer_normalization(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    skip: gs.Tensor,
    scale: gs.Tensor,
    shift: gs.Tensor | None = None,
    bias: gs.Tensor | None = None,
) -> Sums:
    """LayerNormalization of x + skip + bias, and the sum itself"""
    total = _sum(g, x, skip, bias)
    y = layer_normalization_of(g, total, scale, shift, -1, node.attrs.get("epsilon", 1e-12))
    return [y, None, None, total]


@plain("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def skip_simplified_layer_normalization(
    g: Emitter, node: gs.Node, x: gs.Tensor, skip: gs.Tensor, scale: gs.Tensor, bias: gs.Tensor | None = None
) -> Sums:
    """RMSNormalization of x + skip + bias, and the sum itself"""
    total = _sum(g, x, skip, bias)
    return [rms_normalization_of(g, total, scale, -1, node.attrs.get("epsilon", 1e-12)), None, None, total]


def _sum(g: Emitter, x: gs.Tensor, skip: gs.Tensor, bias: gs.Tensor | None) -> gs.Tensor:
    total = g.add(x, skip)
    return total if bias is None else g.add(total, bias)


@plain("GroupNorm", domain=MICROSOFT)
def group_norm(g: Emitter, node: gs.Node, x: gs.Tensor, scale: gs.Tensor, bias: gs.Tensor) -> gs.Tensor:
    """GroupNormalization by channel, the channels last unless it says otherwise, then SiLU where it says so"""
    if x.shape is None:
        raise NotPlainError(f"the rank of its input '{x.name}' cannot be inferred")
    rank, groups = len(x.shape), node.attrs["groups"]
    last = bool(node.attrs.get("channels_last", 1))
    first = g.transpose(x, [0, rank - 1, *range(1, rank - 1)]) if last else x
    ones, zeros = (g.constant(np.full(groups, value, x.dtype)) for value in (1, 0))
    epsilon = node.attrs.get("epsilon", 1e-5)
    normal = g.op("InstanceNormalization", g.reshape(first, [0, groups, -1]), ones, zeros, epsilon=epsilon)
    by_channel = [g.reshape(values, [-1, *[1] * (rank - 2)]) for values in (scale, bias)]
    y = g.add(g.mul(g.reshape_like(normal, first), by_channel[0]), by_channel[1])
    y = silu(g, y) if node.attrs.get("activation") else y
    return g.transpose(y, [0, *range(2, rank), 1]) if last else y


@plain("SkipGroupNorm", domain=MICROSOFT)
def skip_group_norm(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    scale: gs.Tensor,
    shift: gs.Tensor,
    skip: gs.Tensor,
    bias: gs.Tensor | None = None,
) -> Sequence[gs.Tensor]:
    """GroupNorm of x + skip + bias, and the sum itself"""
    if x.shape is None or skip.shape is None:
        raise NotPlainError("the ranks of its inputs cannot be inferred")
    last, spatial = bool(node.attrs.get("channels_last", 1)), range(2, len(x.shape))
    if len(skip.shape) == 2:
        skip = g.unsqueeze(skip, [axis - last for axis in spatial])
    if bias is not None and not last:
        bias = g.unsqueeze(bias, [axis - 1 for axis in spatial])
    total = _sum(g, x, skip, bias)
    return [group_norm(g, node, total, scale, shift), total]
