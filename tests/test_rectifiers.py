"""Relu is found in any clothing, and what only looks like one is left alone."""

import json

import numpy as np
import pytest

import graphgbp
from graphgbp.prepare import prepare
from graphgbp.rectifiers import find_activations
from tests.build import drawn, model
from tests.rules.harness import run

ZERO = {"zero": np.float32(0), "six": np.float32(6), "three": np.float32(3), "half": np.float32(0.5)}
ZERO |= {"one": np.float32(1), "zeros": np.zeros((1, 3, 1), np.float32), "sixth": np.float32(1 / 6)}
ZERO |= {"root": np.float32(2**0.5)}
ZERO |= {"gain": drawn(3, 1, seed=3), "bias": drawn(3, 1, seed=4), "twos": np.full((3, 1), 2, np.float32)}


def found(nodes, kind="rectifiers", opset=18):
    view = prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], ZERO, opset=opset))
    return [(each.node.op, each.x.name) for each in getattr(find_activations(view.graph.nodes), kind)]


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
        (["c = Less(x, zero)", "b = Cast<to=9>(c)", "y = Where(b, zero, x)"], [("Where", "x")]),
        (["c = Greater(x, zero)", "f = Cast<to=1>(c)", "y = Mul(x, f)"], [("Mul", "x")]),
        (["c = Less(zero, x)", "f = Cast<to=1>(c)", "y = Mul(f, x)"], [("Mul", "x")]),
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
        ["m = Mul(x, half)", "s = Add(m, sixth)", "y = Clip(s, zero, one)"],
        ["m = Div(x, six)", "s = Sub(m, sixth)", "h = Max(s, zero)", "y = Min(h, one)"],
        ["s = Add(x, one)", "h = Clip(s, zero, three)", "y = Div(h, three)"],
        ["y = Shrink<lambd=0.5>(x)"],
        ["b = Abs(x)", "y = Add(x, b)"],
        ["m = Relu(x)", "l = Mul(x, gain)", "y = Add(m, l)"],
        ["y = HardSwish(x)"],
        ["y = HardSigmoid(x)"],
        ["c = Less(x, zero)", "f = Cast<to=1>(c)", "y = Mul(x, f)"],
        ["v = Max(x, zero)", "y = Sqrt(v)"],
        ["v = Clip(x, zero)", "e = Add(v, half)", "d = Sqrt(e)", "y = Div(x, d)"],
    ],
)
def test_look_alikes_are_none(nodes):
    assert found(nodes) == []


@pytest.mark.parametrize(
    ("nodes", "reason"),
    [
        (["y = Clip(x, half, six)"], "its lower bound is 0.5, not 0"),
        (["y = Clip(x, , six)"], "it has no lower bound"),
        (["m = ReduceMax(x)", "y = Clip(x, m)"], "its bounds are known only at run time"),
        (["y = Max(x, half)"], "its lower bound is 0.5, not 0"),
        (["c = Less(x, zero)", "y = Where(c, x, zero)"], "it keeps x below 0"),
        (["c = Greater(x, zero)", "y = Where(c, x, half)"], "what it gives below 0 is not 0"),
        (["c = Less(x, zero)", "f = Cast<to=1>(c)", "y = Mul(x, f)"], "it keeps x where x < 0"),
        (["s = Add(x, three)", "h = Clip(s, zero, six)", "y = Div(h, six)"], "the gate of a HardSigmoid or HardSwish"),
        (["s = Add(x, three)", "m = Max(s, zero)", "h = Min(m, six)", "y = Div(h, six)"], "the gate of a HardSigmoid"),
        (["v = Max(x, zero)", "e = Add(v, half)", "y = Sqrt(e)"], "only a square root reads it"),
        (["r = Neg(x)", "y = Max(x, zero, r)"], "the largest of several tensors"),
        (["b = Abs(x)", "y = Add(x, b)"], "a ReLU by its values, but scaled"),
        (
            ["p = Relu(x)", "n = Neg(x)", "r = Relu(n)", "s = Mul(r, half)", "y = Sub(p, s)"],
            "part of f(x) - g(x) at 'y'",
        ),
        (
            ["p = Max(x, zero)", "b = Abs(x)", "n = Neg(b)", "e = Exp(n)", "l = Add(e, one)", "g = Log(l)",
             "s = Add(p, g)", "t = Tanh(s)", "y = Mul(x, t)"],
            "part of x * Tanh(Softplus)(x) at 'y'",
        ),
    ],
)  # fmt: skip
def test_look_alikes_are_left_alone_for_a_reason(nodes, reason):
    activations = find_activations(prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], ZERO)).graph.nodes)
    assert not activations.rectifiers
    assert reason in activations.look_alikes[0].reason


@pytest.mark.parametrize(
    "nodes",
    [
        ["n = Neg(zero)", "y = Max(x, n)"],
        ["z = Cast<to=10>(zero)", "k = Cast<to=1>(z)", "y = Clip(x, k)"],
        ["i = Identity(x)", "k = Cast<to=11>(i)", "l = Cast<to=1>(k)", "c = Greater(l, zero)", "y = Where(c, x, zero)"],
        ["o = Identity(zeros)", "j = Identity(x)", "m = Max(j, o)", "y = Identity(m)"],
        ["k = Cast<to=11>(wide)", "l = Cast<to=1>(k)", "y = Max(x, l)"],
        ["c = Greater(x, zero)", "n = Not(c)", "y = Where(n, zero, x)"],
        ["y = Clip(x, zero, huge)"],
    ],
)
def test_zero_and_x_by_another_way(nodes):
    weights = ZERO | {"wide": np.zeros((400, 3, 4), np.float32), "huge": np.finfo(np.float32).max}
    view = prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], weights))
    assert [each.x.name for each in find_activations(view.graph.nodes).rectifiers] in (["x"], ["j"])


def test_a_relu_that_is_read_elsewhere_too_is_one():
    nodes = ["p = Relu(x)", "n = Neg(x)", "r = Relu(n)", "s = Mul(r, half)", "d = Sub(p, s)", "m = ReduceMax(p)"]
    nodes.append("y = Add(d, m)")
    assert [name for _, name in found(nodes)] == ["x", "n"]


def test_a_relu_whose_last_nodes_are_read_elsewhere_too_is_listed():
    nodes = ["b = Abs(x)", "s = Add(x, b)", "r = Mul(s, half)", "m = ReduceMax(s)", "y = Add(r, m)"]
    activations = find_activations(prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], ZERO)).graph.nodes)
    assert not activations.rectifiers
    assert "read elsewhere" in activations.look_alikes[-1].reason


def test_every_activation_has_its_reason():
    nodes = ["a = Relu(b)", "s = Add(a, three)", "c = Clip(s, zero, six)", "m = Mul(a, c)", "h = Div(m, six)"]
    weights = ZERO | {"w": drawn(4, 5), "k": drawn(5, 5, seed=1)}
    made = model(["b = MatMul(x, w)", *nodes, "y = MatMul(h, k)"], {"x": ("N", 4)}, ["y"], weights)
    told = graphgbp.inspect(made)
    assert [(each["node"], each["clothing"], each["reason"]) for each in told.rectifiers] == [
        ("a", "Relu", "ONNX's ReLU")
    ]
    (gate,) = told.not_rectifiers
    assert gate == {
        "node": "c",
        "tensor": "c",
        "clothing": "Clip(x, 0, 6)",
        "reason": "x + 3 between 0 and 6, scaled: the gate of a HardSigmoid or HardSwish",
    }
    assert [each["reason"] for each in told.passed_through] == ["HardSwish, written as x times its gate"]
    manifest = json.loads(graphgbp.convert(made, ["guided_backprop"]).metadata_props[-1].value)
    assert manifest["rectifiers"] == told.rectifiers and manifest["passed_through"] == told.passed_through


@pytest.mark.parametrize(("gain", "bias"), [("gain", "bias"), ("twos", "bias"), ("gain", "twos"), ("twos", "twos")])
@pytest.mark.parametrize("high", ["one", "six"])
def test_a_normalization_before_a_bounded_relu_makes_it_no_gate(gain, bias, high):
    nodes = [f"m = Mul(x, {gain})", f"s = Add(m, {bias})", f"y = Clip(s, zero, {high})"]
    assert found(nodes) == [("Clip", "s")]


@pytest.mark.parametrize("nodes", [["n = Add(x, pos)", "r = Relu(n)", "c = MatMul(r, w)", "y = Add(n, c)"]])
def test_a_relu_in_a_residual_branch_is_one(nodes):
    weights = {"pos": drawn(3, 4), "w": drawn(4, 4, seed=1)}
    view = prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], weights))
    assert [each.x.name for each in find_activations(view.graph.nodes).rectifiers] == ["n"]


def test_a_shifted_relu6_that_nothing_scales_is_a_rectifier():
    assert found(["s = Add(x, three)", "h = Clip(s, zero, six)", "y = Sqrt(h)"]) == [("Clip", "s")]


@pytest.mark.parametrize("readers", [["s = Sqrt(v)", "y = Add(s, v)"], ["e = Add(v, half)", "y = Mul(e, e)"]])
def test_a_maximum_that_not_only_a_root_reads_is_a_rectifier(readers):
    assert found(["v = Max(x, zero)", *readers]) == [("Max", "x")]


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        (["y = LeakyRelu(x)"], [("LeakyRelu", "x")]),
        (["y = HardSwish(x)"], [("HardSwish", "x")]),
        (["s = Sigmoid(x)", "y = Mul(x, s)"], [("Mul", "x")]),
        (["s = HardSigmoid(x)", "y = Mul(s, x)"], [("Mul", "x")]),
        (["s = Add(x, three)", "h = Clip(s, zero, six)", "g = Mul(x, h)", "y = Div(g, six)"], [("Mul", "x")]),
        (["s = Add(x, three)", "h = Clip(s, zero, six)", "d = Div(h, six)", "y = Mul(d, x)"], [("Mul", "x")]),
        (["m = Mul(x, sixth)", "s = Add(m, half)", "h = Clip(s, zero, one)", "y = Mul(h, x)"], [("Mul", "x")]),
        (["s = Softplus(x)", "t = Tanh(s)", "y = Mul(x, t)"], [("Mul", "x")]),
        (["y = Softplus(x)"], [("Softplus", "x")]),
        (["y = PRelu(x, half)"], [("PRelu", "x")]),
        (["y = ThresholdedRelu(x)"], [("ThresholdedRelu", "x")]),
        (["y = Mish(x)"], [("Mish", "x")]),
        (["y = Shrink<lambd=0.5>(x)"], [("Shrink", "x")]),
        (["m = Relu(x)", "l = Mul(x, gain)", "y = Add(m, l)"], [("Add", "x")]),
        (["d = Div(x, root)", "e = Erf(d)", "a = Add(e, one)", "m = Mul(x, a)", "y = Mul(m, half)"], [("Mul", "x")]),
        (["h = Mul(x, half)", "d = Div(x, root)", "e = Erf(d)", "a = Add(e, one)", "y = Mul(h, a)"], [("Mul", "h")]),
        (["p = Softplus(x)", "t = Tanh(p)", "y = Mul(p, t)"], [("Softplus", "x")]),
        (["y = PRelu(x, zeros)"], []),
        (["y = Relu(x)"], []),
        (["y = LeakyRelu<alpha=0.0>(x)"], []),
        (["g = Sigmoid(x)", "u = Relu(x)", "y = Mul(u, g)"], []),
        (["y = Sigmoid(x)"], []),
        (["y = HardSigmoid(x)"], []),
        (["s = Sigmoid(x)", "y = Add(x, s)"], []),
        (["b = Abs(x)", "y = Add(x, b)"], []),
        (["s = Add(x, half)", "y = Add(s, x)"], []),
    ],
)
def test_smooth_activations(nodes, expected):
    assert found(nodes, "smooth") == expected


@pytest.mark.parametrize("call", ["Elu(x)", "Selu(x)", "Celu(x)", "PRelu(x, half)", "Gelu(x)", "Mish(x)", "Swish(x)"])
def test_smooth_activations_that_are_one_operator(call):
    assert found([f"y = {call}"], "smooth", opset=24) == [(call.partition("(")[0], "x")]


HARD_SWISH = {
    "operator": ["h = HardSwish(a)"],
    "x * clip / 6": ["s = Add(a, three)", "c = Clip(s, zero, six)", "m = Mul(a, c)", "h = Div(m, six)"],
    "x * (clip / 6)": ["s = Add(a, three)", "c = Clip(s, zero, six)", "m = Div(c, six)", "h = Mul(a, m)"],
    "x * HardSigmoid": ["s = HardSigmoid<alpha=0.16666667, beta=0.5>(a)", "h = Mul(s, a)"],
}


@pytest.mark.parametrize("rectifiers", ["relu", "all"])
@pytest.mark.parametrize("method", ["guided_backprop", "deconvnet"])
@pytest.mark.parametrize("writing", list(HARD_SWISH)[1:])
def test_operator_and_decomposition_give_equal_maps(writing, method, rectifiers):
    weights = ZERO | {"w": drawn(5, 3, 3, 3), "v": drawn(4, 5, 1, 1, seed=1)}
    feeds = {"x": 3 * drawn(2, 3, 6, 6, seed=2), "target": np.array([1])}
    maps = []
    for nodes in (HARD_SWISH["operator"], HARD_SWISH[writing]):
        nodes = ["a = Conv(x, w)", *nodes, "b = Conv(h, v)", "y = GlobalAveragePool(b)"]
        made = model(nodes, {"x": ("N", 3, 6, 6)}, ["y"], weights)
        explained = graphgbp.convert(made, [method], rectifiers=rectifiers)
        maps.append(run(explained, feeds)[method])
    np.testing.assert_allclose(*maps, rtol=1e-4, atol=1e-5 * np.abs(maps[0]).max())


def test_masking_all_activations_is_another_map():
    """`rectifiers="all"`: dx = dy f'(x) 1(x > 0) 1(dy > 0), by hand for one SiLU."""
    weights = {"w": drawn(4, 3), "v": drawn(3, 2, seed=1)}
    nodes = ["a = MatMul(x, w)", "s = Sigmoid(a)", "h = Mul(a, s)", "y = MatMul(h, v)"]
    made = model(nodes, {"x": ("N", 4)}, ["y"], weights)
    x = drawn(3, 4, seed=2)
    a = x @ weights["w"]
    s = 1 / (1 + np.exp(-a))
    dh = np.broadcast_to(weights["v"][:, 1], a.shape)
    slope = s * (1 + a * (1 - s))
    for rectifiers, mask in (("all", (a > 0) * (dh > 0)), ("relu", 1)):
        explained = graphgbp.convert(made, ["guided_backprop"], rectifiers=rectifiers)
        got = run(explained, {"x": x, "target": np.array([1])})["guided_backprop"]
        np.testing.assert_allclose(got, (dh * slope * mask) @ weights["w"].T, rtol=1e-4, atol=1e-6)
