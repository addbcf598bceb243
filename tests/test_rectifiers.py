"""Relu is found in any clothing, and what only looks like one is left alone."""

import numpy as np
import pytest

from graphgbp.prepare import prepare
from graphgbp.rectifiers import find_rectifiers, find_smooth
from tests.build import model

ZERO = {"zero": np.float32(0), "six": np.float32(6), "three": np.float32(3), "half": np.float32(0.5)}
ZERO |= {"one": np.float32(1), "zeros": np.zeros((1, 3, 1), np.float32), "sixth": np.float32(1 / 6)}


def found(nodes, finder=find_rectifiers):
    view = prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], ZERO))
    return [(rectifier.node.op, rectifier.x.name) for rectifier in finder(view.graph.nodes)]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (["y = Relu(x)"], [("Relu", "x")]),
        (["y = Clip(x, zero)"], [("Clip", "x")]),
        (["y = Clip(x, zero, six)"], [("Clip", "x")]),
        (["y = Max(x, zero)"], [("Max", "x")]),
        (["y = Max(zeros, x)"], [("Max", "x")]),
        (["s = Shape(x)", "o = ConstantOfShape(s)", "y = Max(x, o)"], [("Max", "x")]),
        (["s = Shape(x)", "o = Expand(zero, s)", "c = Greater(x, o)", "y = Where(c, x, o)"], [("Where", "x")]),
        (["y = LeakyRelu<alpha=0.0>(x)"], [("LeakyRelu", "x")]),
        (["y = ThresholdedRelu<alpha=0.0>(x)"], [("ThresholdedRelu", "x")]),
        (["y = PRelu(x, zeros)"], [("PRelu", "x")]),
        (["c = Greater(x, zero)", "y = Where(c, x, zero)"], [("Where", "x")]),
        (["c = GreaterOrEqual(x, zero)", "y = Where(c, x, zero)"], [("Where", "x")]),
        (["c = Less(zero, x)", "y = Where(c, x, zero)"], [("Where", "x")]),
        (["c = LessOrEqual(x, zero)", "y = Where(c, zero, x)"], [("Where", "x")]),
        (["c = Greater(zero, x)", "y = Where(c, zero, x)"], [("Where", "x")]),
    ],
)
def test_relu_in_any_clothing(nodes, expected):
    assert found(nodes) == expected


@pytest.mark.parametrize(
    "nodes",
    [
        ["y = Clip(x, half, six)"],
        ["y = Clip(x, , six)"],
        ["y = Max(x, half)"],
        ["s = Shape(x)", "o = ConstantOfShape<value = float[1] {1.0}>(s)", "y = Max(x, o)"],
        ["s = Shape(x)", "o = Expand(half, s)", "y = Max(x, o)"],
        ["y = Max(x, x)"],
        ["y = LeakyRelu(x)"],
        ["y = ThresholdedRelu(x)"],
        ["y = PRelu(x, half)"],
        ["c = Greater(x, half)", "y = Where(c, x, zero)"],
        ["c = Less(x, zero)", "y = Where(c, x, zero)"],
        ["s = Add(x, three)", "h = Clip(s, zero, six)", "y = Div(h, six)"],
        ["s = Add(three, x)", "h = Clip(s, zero, six)", "g = Mul(x, h)", "y = Div(g, six)"],
        ["m = Mul(x, sixth)", "s = Add(m, half)", "y = Clip(s, zero, one)"],
        ["y = HardSwish(x)"],
        ["y = HardSigmoid(x)"],
    ],
)
def test_look_alikes_are_none(nodes):
    assert found(nodes) == []


def test_a_shifted_relu6_that_nothing_scales_is_a_rectifier():
    assert found(["s = Add(x, three)", "h = Clip(s, zero, six)", "y = Sqrt(h)"]) == [("Clip", "s")]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (["y = LeakyRelu(x)"], [("LeakyRelu", "x")]),
        (["y = HardSwish(x)"], [("HardSwish", "x")]),
        (["s = Sigmoid(x)", "y = Mul(x, s)"], [("Mul", "x")]),
        (["s = HardSigmoid(x)", "y = Mul(s, x)"], [("Mul", "x")]),
        (["y = PRelu(x, half)"], [("PRelu", "x")]),
        (["y = ThresholdedRelu(x)"], [("ThresholdedRelu", "x")]),
        (["y = Mish(x)"], [("Mish", "x")]),
        (["p = Softplus(x)", "t = Tanh(p)", "y = Mul(x, t)"], [("Softplus", "x"), ("Mul", "x")]),
        (["p = Softplus(x)", "t = Tanh(p)", "y = Mul(p, t)"], [("Softplus", "x")]),
        (["y = PRelu(x, zeros)"], []),
        (["y = Relu(x)"], []),
        (["y = LeakyRelu<alpha=0.0>(x)"], []),
        (["y = Sigmoid(x)"], []),
    ],
)
def test_smooth_activations(nodes, expected):
    assert found(nodes, find_smooth) == expected
