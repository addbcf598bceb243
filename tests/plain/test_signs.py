"""Which quantisers have swallowed a ReLU: zero point the least, may read negative values, but not the model's input."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

import graphgbp
from graphgbp.model_file import read_manifest
from tests.build import drawn, model
from tests.oracles import distance
from tests.rules.harness import run

CONV = "c = Conv<pads=[1,1,1,1]>(x, w)"
WEIGHTS = {
    "w": drawn(4, 3, 3, 3, seed=1, scale=0.3),
    "w2": drawn(5, 4, 8, 8, seed=2, scale=0.1),
    "s": np.float32(0.02),
    "coarse": np.float32(0.9),
    "z": np.uint8(0),
    "row": np.full(4, 0.02, np.float32),
    "zeros": np.zeros(4, np.uint8),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "root": np.float32(2**0.5),
    "mean": np.float32([0.5, 0.4, 0.3]).reshape(3, 1, 1),
    "twice": np.array([1, 1, 2, 2], np.float32),
}


def rectifiers(nodes: list[str], made_from: str, scale: str = "s") -> int:
    """How many are masked in a file that ends in a quantiser with zero point 0."""
    tail = [f"q = QuantizeLinear({made_from}, {scale}, z)", f"d = DequantizeLinear(q, {scale}, z)"]
    nodes = [*nodes, *tail, "m = GlobalAveragePool(d)", "y = Flatten(m)"]
    made = model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], WEIGHTS)
    return len(read_manifest(graphgbp.convert(made, methods=["guided_backprop"])).rectifiers)


SWALLOWED = {
    "a convolution": [CONV, "t = Identity(c)"],
    "behind a max pooling": [CONV, "t = MaxPool<kernel_shape=[2,2]>(c)"],
    "behind an average pooling": [CONV, "t = AveragePool<kernel_shape=[2,2]>(c)"],
    "behind a global pooling": [CONV, "t = GlobalAveragePool(c)"],
    "behind a mean": [CONV, "t = ReduceMean<keepdims=1>(c)"],
    "behind a resize": [CONV, 't = Resize<mode="linear">(c, , twice)'],
    "a gate of something else": [CONV, "p = GlobalAveragePool(c)", "g = Sigmoid(p)", "t = Mul(c, g)"],
    "a residual sum": [CONV, "r = Sigmoid(c)", "t = Add(r, c)"],
}
NOT_SWALLOWED = {
    "a GELU's erf + 1": [CONV, "a = Div(c, root)", "e = Erf(a)", "t = Add(e, one)"],
    "a GELU written out": [
        CONV, "a = Div(c, root)", "e = Erf(a)", "b = Add(e, one)", "p = Mul(c, b)", "t = Mul(p, half)",
    ],
    "a SiLU written out": [CONV, "g = Sigmoid(c)", "t = Mul(c, g)"],
    "a HardSwish": [CONV, "t = HardSwish(c)"],
    "a HardSwish, averaged": [CONV, "h = HardSwish(c)", "t = GlobalAveragePool(h)"],
    "an ELU, pooled": [CONV, "e = Elu(c)", "t = MaxPool<kernel_shape=[2,2]>(e)"],
    "a square": [CONV, "t = Mul(c, c)"],
    "the image": ["t = Identity(x)"],
    "the image, normalised": ["a = Sub(x, mean)", "t = Div(a, half)"],
    "the image, pooled": ["t = AveragePool<kernel_shape=[2,2]>(x)"],
    "the image, resized": ['t = Resize<mode="cubic">(x, , twice)'],
    "the image twice": ["t = Concat<axis=1>(x, x)"],
}  # fmt: skip


@pytest.mark.parametrize("case", SWALLOWED)
def test_a_swallowed_relu_is_masked(case):
    assert rectifiers(SWALLOWED[case], "t") == 1


@pytest.mark.parametrize("case", NOT_SWALLOWED)
def test_what_swallowed_none_is_not(case):
    assert rectifiers(NOT_SWALLOWED[case], "t") == 0


@pytest.mark.parametrize(("below", "swallowed"), [(0.4, 0), (0.5, 1)])
def test_what_is_rounded_to_zero_is_not_cut_off(below, swallowed):
    """The quantiser's step is 0.9."""
    nodes = [f"b = Constant<value_float={below}>()", CONV, "g = Sigmoid(c)", "t = Sub(g, b)"]
    assert rectifiers(nodes, "t", "coarse") == swallowed


TAIL = ["o = Conv(d, w2)", "y = Flatten(o)"]
SPELLINGS = {
    "without a zero point": ["q = QuantizeLinear(c, s)", "d = DequantizeLinear(q, s)"],
    "by channel": ["q = QuantizeLinear<axis=1>(c, row, zeros)", "d = DequantizeLinear<axis=1>(q, row, zeros)"],
}


def guided(nodes: list[str], dtype: type = np.float32) -> tuple[onnx.ModelProto, np.ndarray]:
    weights = {k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in WEIGHTS.items()}
    kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
    file = model([CONV, *nodes, *TAIL], {"x": ["N", 3, 8, 8]}, ["y"], weights, opset=19, ir_version=9, dtype=kind)
    made = graphgbp.convert(file, methods=["guided_backprop"])
    feeds = {"x": drawn(2, 3, 8, 8, seed=5).astype(dtype), "target": np.array([1, 4])}
    return made, run(made, feeds)["guided_backprop"]


PER_TENSOR = ["q = QuantizeLinear(c, s, z)", "d = DequantizeLinear(q, s, z)"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_of_the_same_quantiser(spelling):
    (_, expected), (made, found) = guided(PER_TENSOR), guided(SPELLINGS[spelling])
    assert len(read_manifest(made).rectifiers) == 1
    assert np.allclose(found, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def test_a_scale_in_half_precision():
    (_, expected), (made, found) = guided(PER_TENSOR), guided(PER_TENSOR, np.float16)
    assert len(read_manifest(made).rectifiers) == 1
    assert distance(torch.from_numpy(found), torch.from_numpy(expected)) < 5e-3


def test_a_quantiser_by_channel_with_a_half_scale():
    made, _ = guided(SPELLINGS["by channel"], np.float16)
    assert len(read_manifest(made).rectifiers) == 1


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_a_gate_of_rectified_values(kind):
    """QLinearMul of what cannot be negative: one rectifier, at the convolution's quantiser."""
    low = np.iinfo(kind).min
    nodes = [
        CONV,
        "cq = QuantizeLinear(c, s, least)",
        "gq = com.microsoft.QLinearSigmoid(cq, s, least, s, least)",
        "mq = com.microsoft.QLinearMul(cq, s, least, gq, s, least, s, least)",
        "d = DequantizeLinear(mq, s, least)",
        *TAIL,
    ]
    made = model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], {**WEIGHTS, "least": kind(low)})
    found = read_manifest(graphgbp.convert(made, methods=["guided_backprop"]))
    assert [entry["clothing"] for entry in found.rectifiers] == ["Relu swallowed by QuantizeLinear"]


GATES = {
    "its Clip dropped before the quantiser": ["a = Add(c, three)", "q = QuantizeLinear(a, step, z)"],
    "its Clip there": ["a = Add(c, three)", "b = Clip(a, nought, six)", "q = QuantizeLinear(b, step, z)"],
    "its sum quantised too": [
        *["a = Add(c, three)", "e = QuantizeLinear(a, wide, mid)", "f = DequantizeLinear(e, wide, mid)"],
        *["b = Clip(f, nought, six)", "q = QuantizeLinear(b, step, z)"],
    ],
}


@pytest.mark.parametrize("gate", GATES)
def test_the_gate_of_a_hard_swish_that_is_written_out_and_quantised(gate):
    """c Clip(c + 3, 0, 6) / 6 holds no rectifier; nor does the quantiser that cuts off where the Clip did."""
    steps = {"step": np.float32(6 / 255), "wide": np.float32(0.05), "mid": np.uint8(100)}
    values = WEIGHTS | steps | {"six": np.float32(6), "three": np.float32(3), "nought": np.float32(0)}
    tail = ["d = DequantizeLinear(q, step, z)", "g = Div(d, six)", "h = Mul(c, g)", "m = GlobalAveragePool(h)"]
    made = model([CONV, *GATES[gate], *tail, "y = Flatten(m)"], {"x": ["N", 3, 8, 8]}, ["y"], values)
    assert not read_manifest(graphgbp.convert(made, methods=["guided_backprop"])).rectifiers
