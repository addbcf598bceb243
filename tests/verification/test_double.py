"""The evaluator in double precision: the same values as ONNX Runtime's, at any geometry."""

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from graphgbp.verification.double import DoubleError, DoubleModel, in_double
from tests.build import drawn, model
from tests.rules.harness import run, single_op

GEOMETRIES = [
    {},
    {"strides": [2, 3], "pads": [1, 0, 2, 1]},
    {"dilations": [2, 1], "pads": [2, 1, 0, 1]},
    {"strides": [2, 2], "dilations": [1, 2], "pads": [1, 1, 1, 1]},
]


def equal(op: str, inputs: list[np.ndarray], outputs: int = 1, **attributes: object) -> None:
    made = single_op(op, inputs, opset=18, outputs=outputs, **attributes)
    feeds = {f"x{index}": value for index, value in enumerate(inputs)}
    names = [f"y{index}" for index in range(outputs)]
    expected = run(made, feeds)
    for name, found in zip(names, DoubleModel(made).run(names, feeds), strict=True):
        assert found.dtype == (np.float64 if expected[name].dtype == np.float32 else expected[name].dtype)
        np.testing.assert_allclose(found, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_convolutions(geometry, group):
    x = drawn(2, 4, 7, 8, seed=1)
    equal("Conv", [x, drawn(8, 4 // group, 3, 2), drawn(8)], group=group, **geometry)
    equal("ConvTranspose", [x, drawn(4, 3, 3, 2), drawn(3 * group)], group=group, **geometry)


def test_one_and_three_dimensions():
    equal("Conv", [drawn(2, 4, 9), drawn(6, 4, 3)], strides=[2], pads=[1, 0])
    equal("Conv", [drawn(1, 2, 4, 5, 6), drawn(3, 2, 2, 3, 2)], pads=[0, 1, 0, 1, 0, 1])
    equal("ConvTranspose", [drawn(2, 4, 5), drawn(4, 3, 3)], strides=[2], output_padding=[1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_max_pooling_and_its_indices(geometry):
    flat = np.zeros((1, 2, 8, 8), np.float32)
    for x in (drawn(2, 3, 8, 9), flat):
        equal("MaxPool", [x], outputs=2, kernel_shape=[3, 3], **geometry)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_name(auto_pad):
    x = drawn(1, 2, 7, 8)
    equal("MaxPool", [x], outputs=2, kernel_shape=[3, 2], strides=[2, 2], auto_pad=auto_pad)
    equal("Conv", [x, drawn(3, 2, 2, 3)], strides=[2, 1], auto_pad=auto_pad)


def test_what_is_left_to_the_evaluator():
    equal("MaxPool", [drawn(1, 2, 8, 8)], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize("align_corners", [0, 1])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_grid_sample(padding_mode, align_corners, opset):
    x, grid = drawn(2, 3, 5, 6), drawn(2, 4, 7, 2, seed=1)
    mode = "bilinear" if opset < 20 else "linear"
    made = single_op(
        "GridSample", [x, grid], opset=opset, mode=mode, padding_mode=padding_mode, align_corners=align_corners
    )
    feeds = {"x0": x, "x1": grid}
    np.testing.assert_allclose(DoubleModel(made).run(["y0"], feeds)[0], run(made, feeds)["y0"], rtol=1e-5, atol=1e-5)


def test_erf_is_double():
    made = single_op("Erf", [drawn(5)], opset=18)
    (y,) = DoubleModel(made).run(["y0"], {"x0": drawn(5)})
    np.testing.assert_allclose(y, [math.erf(x) for x in drawn(5).astype(float)], rtol=1e-15)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_double(approximate):
    x = drawn(50).astype(np.float64)
    made = single_op("Gelu", [drawn(50)], opset=20, approximate=approximate)
    (found,) = DoubleModel(made).run(["y0"], {"x0": x})
    wanted = torch.nn.functional.gelu(torch.from_numpy(x), approximate=approximate).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-13)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pads_negative_too(mode):
    x = drawn(2, 5, 6)
    equal("Pad", [x, np.array([0, 1, 2, 0, 2, 1])], mode=mode)
    equal("Pad", [x, np.array([-1, 1]), np.asarray(3, np.float32), np.array([2])], mode=mode)


def test_the_global_maximum():
    equal("GlobalMaxPool", [-np.abs(drawn(2, 3, 4, 5)) - 1])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_response_normalization(size):
    equal("LRN", [drawn(2, 7, 3, 3)], size=size, alpha=0.7, beta=0.6, bias=1.5)


@pytest.mark.parametrize("axis", [0, 1])
def test_gathering_fewer(axis):
    equal("GatherElements", [drawn(4, 3), np.array([[0, 2, -1], [1, 0, 1]])], axis=axis)


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scattering(reduction):
    indices = np.array([[0, 2, -1], [1, 0, 1]]) if reduction == "none" else np.array([[0, 0, -1], [0, 1, -1]])
    equal("ScatterElements", [drawn(4, 3), indices, drawn(2, 3, seed=1)], axis=0, reduction=reduction)


def test_constants_and_casts_are_double():
    nodes = ["c = Constant<value_float = 0.1>()", "k = Cast<to = 1>(n)", "a = Mul(x, c)", "y = Add(a, k)"]
    made = model(nodes, {"x": (3,)}, ["y"], {"n": np.array([1, 2, 3])})
    (y,) = DoubleModel(made).run(["y"], {"x": np.full(3, 1e-12)})
    assert y.dtype == np.float64
    np.testing.assert_array_equal(
        y - [1, 2, 3], np.full(3, 1e-12) * np.float64(np.float32(0.1)) + [1, 2, 3] - [1, 2, 3]
    )
    assert {value.type.tensor_type.elem_type for value in in_double(made).graph.input} == {onnx.TensorProto.DOUBLE}


def test_what_it_cannot_run_is_an_error_of_its_own():
    info = helper.make_tensor_value_info("x", 1, [2])
    graph = helper.make_graph([helper.make_node("Foo", ["x"], ["y"], domain="acme")], "g", [info], [])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    with pytest.raises(DoubleError, match="Foo"):
        DoubleModel(helper.make_model(graph, opset_imports=opsets))
