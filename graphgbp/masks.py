"""How a cotangent is stopped where a condition on the primal fails: one place, because the spelling decides the speed.

In float32 the mask is a number, 0 or 1, from HardSigmoid(a x + b) = clip(a x + b, 0, 1): ONNX Runtime's CPU provider
runs HardSigmoid and Mul inside its blocked layout, where Greater and Where each cost a reorder of the tensor both ways.
The number is exact because a is a power of two, which scales without rounding. float16 has too little range for it,
bfloat16 too few digits: both are read as float32. Double has other kernels: there it is Greater and Where.

A mask is a constant to any further derivative.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter

_STEEP = 2.0**126  # the largest power of two whose product with the smallest normal float32 is at least 1
_BELOW = -(2.0**-64)  # nothing beside 1, and less than 0 at 0; not 0 itself, which OpenVINO's CPU plugin reads as 0.5


def where_positive(g: Emitter, dy: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """dy where x > 0, else 0. Only the sign of x counts: a Relu's output serves as well as its input.

    The steep mask lets only a part through at a subnormal x > 0 (below 1.2e-38), which many kernels flush to 0.
    """
    if x.dtype == dy.dtype == np.float32:
        return g.mul(dy, g.op("HardSigmoid", x, alpha=_STEEP, beta=_BELOW))
    return keep(g, dy, g.greater(x, g.like(x, 0)))


def where_below(g: Emitter, dy: gs.Tensor, x: gs.Tensor, bound: float) -> gs.Tensor:
    """dy where x < bound, else 0, for a positive bound."""
    if x.dtype == np.float32 and (slope := _slope(bound)):
        return g.mul(dy, g.op("HardSigmoid", x, alpha=-slope, beta=slope * float(np.float32(bound))))
    return keep(g, dy, g.less(x, g.like(x, bound)))


def _slope(bound: float) -> float | None:
    """One over the step from the bound to the float32 below it; None where float32 has no room for that."""
    limit = np.float32(bound)
    if not np.isfinite(limit):
        return None
    slope = 1 / float(limit - np.nextafter(limit, np.float32(0)))
    return slope if slope <= _STEEP else None


def keep(g: Emitter, dy: gs.Tensor, condition: gs.Tensor) -> gs.Tensor:
    """dy where the condition holds, else 0."""
    return g.where(condition, dy, g.like(dy, 0))
