"""Normalizations: softmax with its logarithm, by a norm, batch, local response."""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphgbp import masks
from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.refusals import unknown_rank


@vjp("Softmax", versions=(13,))
def softmax(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = y (dy - sum(y dy))"""
    (y,) = node.outputs
    return [g.mul(y, g.sub(dy, g.reduce_sum(g.mul(dy, y), [node.attrs["axis"]])))]


@vjp("LogSoftmax", versions=(13,))
def log_softmax(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dx = dy - exp(y) sum(dy)"""
    (y,) = node.outputs
    return [g.sub(dy, g.mul(g.op("Exp", y), g.reduce_sum(dy, [node.attrs["axis"]])))]


@vjp("LpNormalization", versions=(1, 22))
def lp_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x / n with n the sum of |x|, or the root of that of x^2; dx = (dy - dn sum(dy y)) / n

    dn = sign(x), or y. Where n = 0 ONNX has y = 0, and dx = 0.
    """
    (x,), (y,) = node.inputs, node.outputs
    axes = [node.attrs["axis"]]
    if node.attrs["p"] == 1:
        norm, slope = g.reduce_sum(g.op("Abs", x), axes), g.op("Sign", x)
    else:
        norm, slope = g.sqrt(g.reduce_sum(g.mul(x, x), axes)), y
    dx = g.div(g.sub(dy, g.mul(slope, g.reduce_sum(g.mul(dy, y), axes))), norm)
    return [masks.keep(g, dx, g.greater(norm, g.like(norm, 0)))]


def _trains(node: gs.Node) -> str | None:
    if node.attrs["training_mode"]:
        return "it is in training mode and normalizes by the batch; export the model for inference"
    shape = node.inputs[0].shape
    if shape is None or len(shape) < 2:
        return f"its input '{node.inputs[0].name}' must have a known rank of at least 2"
    return None


@vjp("BatchNormalization", versions=(15,), wrt=(0, 1, 2, 3, 4), refuse=_trains)
def batch_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y = (x - mean) r scale + bias with r = 1 / sqrt(variance + epsilon), all constants of a channel

    dx = dy scale r;  dscale = sum(dy (x - mean)) r;  dbias = sum(dy);  dmean = -sum(dy) scale r;
    dvariance = -1/2 sum(dy (x - mean)) scale r^3
    """
    x, scale, _, mean, variance = node.inputs
    inner = range(1, len(x.shape) - 1)
    others = [axis for axis in range(len(x.shape)) if axis != 1]

    def per_channel(value: gs.Tensor) -> gs.Tensor:
        return g.unsqueeze(g.cast(value, x.dtype), inner)

    def deviation() -> gs.Tensor:
        spread = g.op("Add", variance, g.like(variance, node.attrs["epsilon"]))
        return g.cast(g.sqrt(spread), x.dtype)

    def gain() -> gs.Tensor:
        return g.div(g.cast(scale, x.dtype), deviation())

    def total(value: gs.Tensor) -> gs.Tensor:
        return g.reduce_sum(value, others, keepdims=False)

    def moment() -> gs.Tensor:
        return g.div(total(g.mul(dy, g.sub(x, per_channel(mean)))), deviation())

    def to_variance() -> gs.Tensor:
        slope = g.div(gain(), g.scale(deviation(), -2))
        return g.mul(moment(), slope)

    return [
        lambda: g.mul(dy, per_channel(gain())),
        lambda: g.cast(moment(), scale.dtype),
        lambda: g.cast(total(dy), scale.dtype),
        lambda: g.cast(g.neg(g.mul(total(dy), gain())), mean.dtype),
        lambda: g.cast(to_variance(), variance.dtype),
    ]


@vjp("LRN", versions=(13,), refuse=unknown_rank(0))
def lrn(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y_c = x_c s_c^-beta with s_c = bias + alpha mean(x_j^2, j in the window of c)

    dx_j = dy_j s_j^-beta - 2 alpha beta x_j mean(dy_c x_c s_c^(-beta-1), c whose window has j)
    """
    (x,) = node.inputs
    alpha, beta, size = node.attrs["alpha"], node.attrs["beta"], node.attrs["size"]
    below, above = (size - 1) // 2, size // 2
    mean_square = _channel_mean(g, g.mul(x, x), below, above)
    s = g.add(g.scale(mean_square, alpha), g.like(x, node.attrs["bias"]))
    damping = g.pow(s, -beta)
    spill = _channel_mean(g, g.mul(dy, g.div(g.mul(x, damping), s)), above, below)
    return [g.sub(g.mul(dy, damping), g.scale(g.mul(x, spill), 2 * alpha * beta))]


def _channel_mean(g: Emitter, x: gs.Tensor, below: int, above: int) -> gs.Tensor:
    """Mean over the channels c - below to c + above, those that do not exist counting as 0."""
    rows: Sequence[int | gs.Tensor] = [g.size(x, 0), 1, g.size(x, 1), -1]
    pooled = g.op(
        "AveragePool",
        g.reshape(x, rows),
        kernel_shape=[below + above + 1, 1],
        pads=[below, 0, above, 0],
        count_include_pad=1,
    )
    return g.reshape_like(pooled, x)
