"""The blocked layout of ONNX Runtime's CPU provider, and how a backward pass stays in it.

It keeps images as [N, C / 16, H, W, 16] from one convolution to the next, and converts a tensor back and forth, at the
price of two more passes over it, wherever an operator does not know that layout. A tensor is in it

- behind a convolution with constant weights, and behind a pooling of 16, 32, ... channels, wherever its input is;
- behind Add, Sum, Mul, Concat, Relu, Sigmoid, Tanh, HardSigmoid where all inputs are in it, and can be shown to have
  equal sizes: hence `append` declares the sizes that the runtime cannot find by itself;
- behind a Mul by one constant for each channel, which becomes a convolution, but not behind one by a scalar.

Elsewhere, and on CUDA, what is written here is what it says: a number of nodes that costs no more than the plain one.
"""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter

_BLOCK = 16
_LAYERS = ("Conv", "BatchNormalization", "MaxPool", "AveragePool", "Concat", "Add", "Sum", "Mul")
_ACTIVATIONS = ("Relu", "Clip", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish")


def enter(g: Emitter, dx: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """dx, the cotangent of x, by a pooling of windows of one element: in the layout where x is, the numbers as before.

    For a cotangent that an operator outside the layout made; where x is not in the layout, dx itself.
    """
    dx = g.with_shape(dx, x)
    if not _fits(dx) or dx.shape[1] % _BLOCK or _keeps_it(dx) or not _keeps_it(x):
        return dx
    return g.with_shape(g.op("AveragePool", dx, kernel_shape=[1, 1]), x)


def _keeps_it(x: gs.Tensor) -> bool:
    return bool(x.inputs) and x.inputs[0].op in _LAYERS + _ACTIVATIONS


def one_minus(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    """1 - x, for x between 0 and 1."""
    if x.dtype == np.float32:
        return g.op("HardSigmoid", x, alpha=-1.0, beta=1.0)
    return g.sub(g.like(x, 1), x)


def scale(g: Emitter, x: gs.Tensor, factor: float) -> gs.Tensor:
    """x times a number: once for each channel, where x is an image."""
    if factor == 1 or not _fits(x):
        return g.scale(x, factor)
    return g.mul(x, g.constant(np.full([x.shape[1], 1, 1], factor, x.dtype)))


def _fits(x: gs.Tensor) -> bool:
    return x.dtype == np.float32 and x.shape is not None and len(x.shape) == 4 and isinstance(x.shape[1], int)
