"""The derivative of any operator that only moves elements: follow each one's place.

Let the operator move the places 0, 1, 2, ... of x's elements instead of the elements. What comes out says, for every
element of y, where in x it was taken from; there its cotangent is added. It is exact in every corner, at the
price of an index for each element, so it serves where no plain movement is the derivative.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter


def places(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """int64, in x's shape: the place of each element in x laid out flat."""
    flat = g.op("Range", g.constant(np.int64(0)), g.count(x), g.constant(np.int64(1)))
    return g.reshape_like(flat, x)


def add_at(g: Emitter, dy: gs.Tensor, taken_from: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """In x's shape: at each place the sum of the entries of dy that were taken from it."""
    flat = g.op("Expand", g.like(x, 0), g.op("Reshape", g.count(x), g.ints([1])))
    whole = [g.reshape(tensor, [-1]) for tensor in (taken_from, dy)]
    return g.reshape_like(g.op("ScatterElements", flat, *whole, axis=0, reduction="add"), x)
