"""Normalizations by the statistics of the input itself: instance, group, layer, root mean square, mean and variance.

All but the last are y = scale x^ + bias with x^ = (x - mean) r, mean and r = 1 / deviation taken over some axes.
With dx^ = dy scale,

    dx = r (dx^ - mean(dx^) - x^ mean(dx^ x^))

The statistics are computed again: most nodes do not give them out, or in another type. Sixteen-bit numbers are
normalized in float32, as the operators do.
"""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.refusals import unknown_rank
from graphgbp.shapes import is_static


class _Standardized:
    """x^ = (x - mean) r with r = 1 / sqrt(variance + epsilon) over axes; uncentred, x / sqrt(mean(x^2) + epsilon).

    Where the network itself runs `LayerNormalization` (`whole`), in float32 and with known sizes, one more of it,
    without scale, gives x^ and r; else seven nodes do. Double is among those: there the operator gives r as float32. So
    are the other normalizations: ONNX Runtime before 1.27 has a LayerNormalization that loses the variance of a tensor
    far from 0, where theirs does not.
    """

    def __init__(
        self,
        g: Emitter,
        x: gs.Tensor,
        axes: Sequence[int],
        epsilon: float,
        *,
        centred: bool = True,
        whole: bool = False,
    ) -> None:
        self._g, self._axes, self._dtype = g, axes, x.dtype
        self._centred = centred
        wide = g.cast(x, np.float32 if np.dtype(x.dtype).itemsize < 4 else x.dtype)
        one = whole and _are_last(axes, x) and wide.dtype == np.float32
        value, self._inverse = self._in_one(wide, epsilon) if one else self._by_moments(wide, epsilon)
        self._value = g.with_shape(value, x)

    def _in_one(self, x: gs.Tensor, epsilon: float) -> tuple[gs.Tensor, gs.Tensor]:
        g, axis = self._g, self._axes[0]
        ones = g.op("Expand", g.like(x, 1), g.ints(x.shape[axis:]))
        value, _, inverse = g.ops("LayerNormalization", x, ones, outputs=3, axis=axis, epsilon=epsilon)
        return value, inverse

    def _by_moments(self, x: gs.Tensor, epsilon: float) -> tuple[gs.Tensor, gs.Tensor]:
        g = self._g
        deviation = self._less_mean(x)
        variance = g.reduce_mean(g.mul(deviation, deviation), self._axes)
        inverse = g.op("Reciprocal", g.sqrt(g.add(variance, g.like(x, epsilon))))
        return g.mul(deviation, inverse), inverse

    @property
    def value(self) -> gs.Tensor:
        """x^, in x's type and shape"""
        return self._g.cast(self._value, self._dtype)

    def vjp(self, dvalue: gs.Tensor) -> gs.Tensor:
        """dx from dx^"""
        g = self._g
        dvalue = g.cast(dvalue, self._value.dtype)
        along = g.mul(self._value, g.reduce_mean(g.mul(dvalue, self._value), self._axes))
        dx = g.mul(g.sub(self._less_mean(dvalue), along), self._inverse)
        return g.cast(g.with_shape(dx, self._value), self._dtype)

    def _less_mean(self, x: gs.Tensor) -> gs.Tensor:
        return self._g.sub(x, self._g.reduce_mean(x, self._axes)) if self._centred else x


@vjp("InstanceNormalization", versions=(6, 22), wrt=(0, 1, 2), refuse=unknown_rank(0))
def instance_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """over the spatial axes; scale and bias of a channel"""
    x, scale, _ = node.inputs
    rank = len(x.shape)
    spatial = range(2, rank)
    standard = _Standardized(g, x, spatial, node.attrs["epsilon"])
    return [
        lambda: standard.vjp(g.mul(dy, g.unsqueeze(scale, range(1, rank - 1)))),
        lambda: g.reduce_sum(g.mul(dy, standard.value), [0, *spatial], keepdims=False),
        lambda: g.reduce_sum(dy, [0, *spatial], keepdims=False),
    ]


@vjp("GroupNormalization", versions=(18, 21), wrt=(0, 1, 2), refuse=unknown_rank(0))
def group_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """over the channels of a group and the spatial axes; scale and bias of a group, from opset 21 on of a channel"""
    x, scale, _ = node.inputs
    groups = [0, node.attrs["num_groups"], -1]
    standard = _Standardized(g, g.reshape(x, groups), [2], node.attrs["epsilon"])
    rows = [0, g.size(x, 1), -1] if g.opset >= 21 else groups  # [N, as many as scales, the rest]
    dy = g.reshape(dy, rows)

    def to_x() -> gs.Tensor:
        scaled = g.mul(dy, g.unsqueeze(scale, [1]))
        return g.reshape_like(standard.vjp(g.reshape(scaled, groups)), x)

    def to_scale() -> gs.Tensor:
        return g.reduce_sum(g.mul(dy, g.reshape(standard.value, rows)), [0, 2], keepdims=False)

    return [to_x, to_scale, lambda: g.reduce_sum(dy, [0, 2], keepdims=False)]


@vjp("LayerNormalization", versions=(17,), wrt=(0, 1, 2), broadcast=True, refuse=unknown_rank(0))
def layer_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """over the axes from `axis` on; scale and bias broadcast to x"""
    x, scale = node.inputs[:2]
    standard = _Standardized(g, x, _axes_from(node), node.attrs["epsilon"], whole=True)
    to_x, to_scale = _scaled(g, standard, dy, scale, x)
    return [to_x, to_scale, dy]


@vjp("RMSNormalization", versions=(23,), wrt=(0, 1), broadcast=True, refuse=unknown_rank(0))
def rms_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """over the axes from `axis` on, x^ = x / sqrt(mean(x^2) + epsilon); scale broadcasts to x"""
    x, scale = node.inputs
    standard = _Standardized(g, x, _axes_from(node), node.attrs["epsilon"], centred=False)
    return _scaled(g, standard, dy, scale, x)


@vjp("MeanVarianceNormalization", versions=(13,))
def mean_variance_normalization(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = (x - mean) / (s + 1e-9), s the standard deviation, whose slope (x - mean) / s counts as 0 where s = 0

    dx = (dy - mean(dy) - (x - mean) / s mean(dy y)) / (s + 1e-9)
    """
    (x,), (y,) = node.inputs, node.outputs
    axes = node.attrs["axes"]
    centred = g.sub(x, g.reduce_mean(x, axes))
    s = g.sqrt(g.reduce_mean(g.mul(centred, centred), axes))
    slope = g.div(centred, g.maximum(s, g.like(x, np.finfo(x.dtype).tiny)))
    along = g.mul(slope, g.reduce_mean(g.mul(dy, y), axes))
    return [g.div(g.sub(g.sub(dy, g.reduce_mean(dy, axes)), along), g.add(s, g.like(x, 1e-9)))]


def _scaled(g: Emitter, standard: _Standardized, dy: gs.Tensor, scale: gs.Tensor, x: gs.Tensor) -> list[Cotangent]:
    """To x and to scale, where y = x^ scale, both broadcast"""
    return [
        lambda: standard.vjp(g.with_shape(g.mul(dy, scale), x)),
        lambda: g.mul(dy, standard.value),
    ]


def _are_last(axes: Sequence[int], x: gs.Tensor) -> bool:
    """Whether these are the last axes of x, all of known size."""
    return list(axes) == list(range(axes[0], len(x.shape))) and is_static(x.shape[axes[0] :])


def _axes_from(node: gs.Node) -> range:
    rank = len(node.inputs[0].shape)
    return range(node.attrs["axis"] % rank, rank)
