"""The interval of a tensor holds what ONNX Runtime computes, and is as tight where that matters: at zero."""

import numpy as np
import pytest
from onnx import numpy_helper

from graphgbp.plain.intervals import Intervals
from graphgbp.prepare import flatten
from tests.build import drawn, model
from tests.rules.harness import run

NEVER_NEGATIVE = {
    "x * x": ["y = Mul(x, x)"],
    "x * x, each quantised by itself": [
        "q = QuantizeLinear(x, s, z128)",
        "a = DequantizeLinear(q, s, z128)",
        "b = DequantizeLinear(q, s, z128)",
        "y = Mul(a, b)",
    ],
    "pow 2": ["y = Pow(x, two)"],
    "a variance": ["m = ReduceMean<keepdims=1>(x)", "c = Sub(x, m)", "p = Mul(c, c)", "y = ReduceMean(p)"],
    "a sum of squares": ["y = ReduceSumSquare(x)"],
    "1 - sigmoid": ["g = Sigmoid(x)", "y = Sub(one, g)"],
    "(tanh + 1) / 2": ["t = Tanh(x)", "a = Add(t, one)", "y = Div(a, two)"],
    "erf + 1": ["e = Erf(x)", "y = Add(e, one)"],
    "1 - HardSigmoid": ["g = HardSigmoid(x)", "y = Sub(one, g)"],
    "the larger of x and -x": ["n = Neg(x)", "y = Max(n, x)"],
    "abs - min": ["a = Abs(x)", "n = Neg(a)", "m = Min(n, one)", "y = Neg(m)"],
    "x between 1 and 2": ["c = Clip(x, one, two)", "y = Sub(c, one)"],
    "2 - Clip": ["c = Clip(x, , two)", "y = Sub(two, c)"],
    "LRN": ["y = LRN<size=3>(r)"],
    "GlobalLpPool": ["y = GlobalLpPool(x)"],
    "LpPool": ["y = LpPool<kernel_shape=[2,2]>(x)"],
    "a blur": ["y = Conv<group=4>(r, blur)"],
    "a transposed blur": ["y = ConvTranspose<group=4, strides=[2,2]>(r, blur)"],
    "softmax @ V": ["p = Softmax(x)", "y = MatMul(p, r)"],
    "Gemm": ["f = Flatten(r)", "y = Gemm<transB=1, beta=0.5>(f, ones, one)"],
    "a quotient": ["e = Exp(x)", "a = Add(e, one)", "y = Div(r, a)"],
    "roots": ["a = Add(r, one)", "y = Sqrt(a)"],
    "a choice": ["c = Greater(x, one)", "e = Exp(x)", "y = Where(c, r, e)"],
    "poolings": ["m = MaxPool<kernel_shape=[2,2]>(r)", "y = AveragePool<kernel_shape=[2,2]>(m)"],
    "moved": ["t = Transpose<perm=[0,1,3,2]>(r)", "c = Concat<axis=1>(t, r)", "y = Pad(c, pads)"],
    "resized": ["y = Resize<mode=\"linear\">(r, , twice)"],
    "quantised with the least zero point": ["q = QuantizeLinear(x, s, z0)", "y = DequantizeLinear(q, s, z0)"],
    "erf + 1 behind a quantiser": [
        "e = Erf(x)",
        "q = QuantizeLinear(e, hundredth, z128)",
        "d = DequantizeLinear(q, hundredth, z128)",
        "y = Add(d, one)",
    ],
    "a quantised sigmoid subtracted": [
        "q = QuantizeLinear(x, s, z0)",
        "d = DequantizeLinear(q, s, z0)",
        "y = Sub(end, d)",
    ],
    "a dynamic quantiser": ["q, scale, zero = DynamicQuantizeLinear(x)", "y = Mul(scale, two)"],
}  # fmt: skip
MAYBE_NEGATIVE = {
    "a convolution": ["y = Conv(r, signed)"],
    "a difference": ["y = Sub(r, one)"],
    "pow 3": ["y = Pow(x, three)"],
    "a mean": ["y = ReduceMean(x)"],
    "a pooling": ["y = MaxPool<kernel_shape=[2,2]>(x)"],
    "a linear interpolation": ["y = Resize<mode=\"linear\">(x, , twice)"],
    "the larger of two": ["a = Add(x, one)", "b = Neg(a)", "y = Max(x, b)"],
    "a product": ["g = Sigmoid(x)", "y = Mul(x, g)"],
    "by what may be 0": ["y = Div(one, x)"],
    "filled with -1": ["y = Pad(r, pads, minus)"],
    "a quantiser in the middle": ["q = QuantizeLinear(x, s, z128)", "y = DequantizeLinear(q, s, z128)"],
    "an exponential of rectified values, less 2": ["e = Exp(r)", "y = Sub(e, two)"],
}  # fmt: skip
WEIGHTS = {
    **{name: np.float32(value) for name, value in {"one": 1, "two": 2, "three": 3, "minus": -1, "s": 0.02}.items()},
    "end": np.float32(255 * 0.0200001),
    "hundredth": np.float32(0.01),
    "z0": np.uint8(0),
    "z128": np.uint8(128),
    "blur": np.full((4, 1, 2, 2), 0.25, np.float32),
    "ones": np.ones((3, 64), np.float32),
    "signed": drawn(4, 4, 3, 3, seed=1),
    "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "twice": np.array([1, 1, 2, 2], np.float32),
}


@pytest.mark.parametrize("case", [*NEVER_NEGATIVE, *MAYBE_NEGATIVE])
def test_an_interval_holds_what_is_computed(case):
    nodes = ["r = Relu(x)", *{**NEVER_NEGATIVE, **MAYBE_NEGATIVE}[case]]
    made = model(nodes, {"x": ["N", 4, 4, 4]}, ["y"], WEIGHTS)
    (y,) = flatten(made).graph.outputs
    low, high = Intervals().of(y)
    for scale in (0.3, 1.0, 4.0):
        values = run(made, {"x": drawn(20, 4, 4, 4, seed=3, scale=scale)})["y"]
        assert low - 1e-2 <= values.min(), "by less than half a step of a quantiser"
        assert values.max() <= high + 1e-2
    assert (low >= -1e-4) == (case in NEVER_NEGATIVE)


def test_a_long_chain_is_worked_out_once():
    """Two readers of everything: without a memory 2^400 walks; without a stack of its own too deep for Python."""
    nodes = ["t0 = Relu(x)", *(f"t{i + 1} = Add(t{i}, t{i})" for i in range(3000))]
    made = model(nodes, {"x": [2]}, ["t3000"])
    (y,) = flatten(made).graph.outputs
    assert Intervals().of(y).low == 0


def test_a_large_weight_is_not_looked_into():
    made = model(["r = Relu(x)", "y = MatMul(r, w)"], {"x": [1, 300]}, ["y"], {"w": np.ones((300, 300), np.float32)})
    assert numpy_helper.to_array(made.graph.initializer[0]).min() == 1
    (y,) = flatten(made).graph.outputs
    assert Intervals().of(y).low == -np.inf
