"""The CAM family: L = relu(sum_k w_k A_k), each method with a weight w of its own, from A and g = dS/dA at one layer.

Grad-CAM     w_k = mean of g_k over the positions                    Selvaraju et al. 2017, arXiv 1610.02391
HiResCAM     w = g, at each position its own                         Draelos & Carin 2020, arXiv 2011.08891
LayerCAM     w = relu(g)                                             Jiang et al. 2021, IEEE TIP 30
Grad-CAM++   w_k = sum a relu(g_k), a = g^2 / (2 g^2 + sum(A_k) g^3) Chattopadhay et al. 2018, arXiv 1710.11063
XGrad-CAM    w_k = sum(g_k A_k) / sum(A_k)                           Fu et al. 2020, arXiv 2008.02312

Nothing is added to a denominator. Grad-CAM++'s a is written 1 / (2 + sum(A_k) g): the same where relu(g) is not 0, and
no power of g underflows. A factor that all its weights share (the derivative of the exponential through which the paper
lets the score pass) is left out. Where no feature is negative that denominator is at least 2, and XGrad-CAM's is 0 for
a channel of zeros alone. Where features have both signs either may vanish: one that is lost in the rounding of its own
terms counts as infinite, so that what it divides counts for nothing.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import contract
from graphgbp.emit import Emitter

Weight = Callable[[Emitter, gs.Tensor, gs.Tensor, Sequence[int]], gs.Tensor]

_FLOAT32 = np.finfo(np.float32)


def _mean(g: Emitter, a: gs.Tensor, da: gs.Tensor, positions: Sequence[int]) -> gs.Tensor:
    return g.reduce_mean(da, positions)


def _gradient(g: Emitter, a: gs.Tensor, da: gs.Tensor, positions: Sequence[int]) -> gs.Tensor:
    return da


def _positive_gradient(g: Emitter, a: gs.Tensor, da: gs.Tensor, positions: Sequence[int]) -> gs.Tensor:
    return g.relu(da)


def _plus_plus(g: Emitter, a: gs.Tensor, da: gs.Tensor, positions: Sequence[int]) -> gs.Tensor:
    positive = g.relu(da)
    below = g.add(g.mul(g.reduce_sum(a, positions), positive), g.like(a, 2))
    rounding = g.like(a, 4 * _FLOAT32.eps)  # where it vanishes, 2 - 2 is left
    return g.reduce_sum(_ratio(g, positive, below, rounding), positions)


def _feature_weighted(g: Emitter, a: gs.Tensor, da: gs.Tensor, positions: Sequence[int]) -> gs.Tensor:
    size = g.reduce_sum(g.op("Abs", a), positions)
    rounding = g.add(g.scale(size, float(_FLOAT32.eps)), g.like(a, _FLOAT32.tiny))
    return _ratio(g, g.reduce_sum(g.mul(da, a), positions), g.reduce_sum(a, positions), rounding)


def _ratio(g: Emitter, above: gs.Tensor, below: gs.Tensor, rounding: gs.Tensor) -> gs.Tensor:
    """above / below, and 0 where below is nothing but rounding; no division is by 0."""
    real = g.greater(g.op("Abs", below), rounding)
    return g.div(above, g.where(real, below, g.like(below, np.inf)))


WEIGHTS: Mapping[str, Weight] = {
    contract.GRADCAM: _mean,
    contract.HIRESCAM: _gradient,
    contract.LAYERCAM: _positive_gradient,
    contract.GRADCAM_PLUSPLUS: _plus_plus,
    contract.XGRADCAM: _feature_weighted,
}
"""(g, A, dS/dA, axes of the positions) -> w, which broadcasts to A; all float32."""
