"""Cotangents that are zero outside a part: the same gradient as with the zeros, and none of the work on them."""

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

import graphgbp
from graphgbp import jacobian
from graphgbp.emit import Emitter
from tests.build import drawn, model
from tests.rules.harness import run

TOKENS, WIDTH = 6, 8
BLOCK = [
    "n = LayerNormalization(x, scale, bias)",
    "h = MatMul(n, w1)",
    "e = Erf(h)",
    "s = Add(e, row)",
    "m = Mul(h, s)",
    "o = MatMul(m, w2)",
    "r = Add(x, o)",
    "d = Div(r, row)",
    "c = Sub(d, place)",
    "b = Mul(c, d)",
]
WEIGHTS = {
    "scale": drawn(WIDTH, seed=1), "bias": drawn(WIDTH, seed=2), "w1": drawn(WIDTH, WIDTH, seed=3),
    "w2": drawn(WIDTH, WIDTH, seed=4), "row": 2 + np.abs(drawn(WIDTH, seed=5)), "place": drawn(1, 1, seed=6),
    "first": np.array(0), "end": np.array(-1), "one": np.array([1]), "three": np.array([3]),
    "four": np.array([4]), "five": np.array([5]),
}  # fmt: skip


def block(x: torch.Tensor) -> torch.Tensor:
    w = {name: torch.from_numpy(np.asarray(value, np.float64)) for name, value in WEIGHTS.items()}
    h = functional.layer_norm(x, (WIDTH,), w["scale"], w["bias"]) @ w["w1"]
    c = (x + (h * (torch.erf(h) + w["row"])) @ w["w2"]) / w["row"] - w["place"]
    return c * (c + w["place"])


def both(made: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The gradient with parts alone, and with their zeros."""
    lowered = graphgbp.vjp(made)
    monkeypatch.setattr(jacobian, "PartwiseEmitter", Emitter)
    return lowered, graphgbp.vjp(made)


def ours(made: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in made.graph.node if node.op_type == op and node.name.startswith("graphgbp/")]


TAKES = {
    "first": ("y = Gather<axis=1>(b, first)", lambda b: b[:, 0], 1),
    "last": ("y = Gather<axis=1>(b, end)", lambda b: b[:, -1], 1),
    "slice": ("y = Slice(b, three, five, one)", lambda b: b[:, 3:5], 2),
    "most": ("y = Slice(b, one, five, one)", lambda b: b[:, 1:5], TOKENS),
}


@pytest.mark.parametrize("tokens", [TOKENS, "T"])
@pytest.mark.parametrize("taken", TAKES)
def test_only_the_part_is_computed(taken, tokens, monkeypatch):
    node, take, count = TAKES[taken]
    made = model([*BLOCK, node], {"x": ["N", tokens, WIDTH]}, ["y"], WEIGHTS)
    lowered, simple = both(made, monkeypatch)
    x = drawn(3, TOKENS, WIDTH, seed=7)
    exact = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    y = take(block(exact))
    dy = drawn(*y.shape, seed=8)
    y.backward(torch.from_numpy(dy).double())
    feeds, expected = {"x": x, "y_grad": dy}, exact.grad.numpy()
    for file in (lowered, simple):
        got = run(file, feeds)["x_grad"]
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    where_is_open = tokens == "T" and taken in ("last", "slice")
    assert sizes_of_products(lowered, feeds) == {TOKENS if where_is_open else count}
    assert sizes_of_products(simple, feeds) == {TOKENS}


def sizes_of_products(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> set[int]:
    """On how many tokens our products of matrices work."""
    shown = onnx.ModelProto()
    shown.CopyFrom(made)
    names = [node.output[0] for node in ours(made, "MatMul")]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    values = run(shown, feeds)
    return {values[name].shape[1] for name in names}


@pytest.mark.parametrize("order", ["qkv", "vqk"])
def test_parts_that_fill_an_axis_are_joined(order, monkeypatch):
    takes = [f"{name} = Gather<axis=0>(p, {index})" for name, index in zip(order, ("i0", "i1", "i2"), strict=True)]
    nodes = ["p = Transpose<perm=[1, 0, 2]>(x)", *takes, "a = Mul(q, k)", "y = Mul(a, v)"]
    weights = {f"i{index}": np.array(index) for index in range(3)}
    lowered, simple = both(model(nodes, {"x": ["N", 3, 4]}, ["y"], weights), monkeypatch)
    feeds = {"x": drawn(2, 3, 4), "y_grad": drawn(2, 4, seed=1)}
    assert np.array_equal(run(lowered, feeds)["x_grad"], run(simple, feeds)["x_grad"])
    assert [len(ours(lowered, op)) for op in ("Concat", "Pad", "Sum")] == [1, 0, 0]
    assert [len(ours(simple, op)) for op in ("Pad", "Sum")] == [3, 1]


@pytest.mark.parametrize(
    "nodes",
    [
        ["a = Gather<axis=1>(x, i0)", "b = Gather<axis=1>(x, i1)", "y = Mul(a, b)"],
        ["a = Gather<axis=1>(x, i0)", "b = Gather<axis=2>(x, i0)", "s = ReduceSum<keepdims=0>(b, axis)",
         "y = Mul(a, s)"],
        ["a = Gather<axis=1>(x, i0)", "b = Gather<axis=1>(x, i0)", "c = Gather<axis=1>(x, i2)", "d = Mul(a, b)",
         "y = Mul(d, c)"],
        ["t = MatMul(left, x)", "y = Gather<axis=1>(t, i0)"],
        ["t = MatMul(x, w)", "y = Gather<axis=2>(t, i0)"],
        ["t = MatMul(x, x)", "y = Gather<axis=1>(t, i0)"],
        ["t = Mul(x, sizes)", "y = Gather<axis=1>(t, i0)"],
        ["t = Softmax<axis=1>(x)", "y = Gather<axis=1>(t, i0)"],
        ["t = ReduceSum<keepdims=0>(x, axis)", "u = Mul(x, t)", "y = Gather<axis=1>(u, i0)"],
        ["t = Mul(x, tall)", "y = Gather<axis=1>(t, i0)"],
    ],
)  # fmt: skip
def test_what_needs_the_whole(nodes, monkeypatch):
    """Parts that leave gaps or meet on several axes, products that sum along the axis, factors of other ranks."""
    weights = {"i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "left": drawn(4, 4, seed=2),
               "w": drawn(4, 4, seed=3), "axis": np.array([1]), "sizes": drawn(4, 1, seed=4),
               "tall": drawn(2, 1, 4, 1, seed=5)}  # fmt: skip
    made = model(nodes, {"x": [4, 4, 4]}, ["y"], weights)
    lowered, simple = both(made, monkeypatch)
    feeds = {"x": drawn(4, 4, 4)}
    feeds["y_grad"] = drawn(*run(made, feeds)["y"].shape, seed=1)
    np.testing.assert_allclose(run(lowered, feeds)["x_grad"], run(simple, feeds)["x_grad"], rtol=1e-5, atol=1e-6)
