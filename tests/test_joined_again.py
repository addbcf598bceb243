"""A Concat of what an earlier one has joined: its cotangent is cut in few pieces, and no gradient changes by it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor

import graphgbp
from graphgbp import lowerings
from graphgbp.contract import role_of
from tests.build import drawn, model
from tests.maps import assert_maps_equal, explain
from tests.rules.harness import run

SHAPES = {"static": (2, 3, 4), "open": ("n", "c", "l")}


def layer(x: Tensor) -> Tensor:
    return torch.tanh(x).sum(1, keepdim=True)


def layer_nodes(x: str, y: str) -> list[str]:
    return [f"{y}_tanh = Tanh({x})", f"{y} = ReduceSum<keepdims=1>({y}_tanh, one)"]


class Case(NamedTuple):
    """Nodes behind x and a = layer(x), their outputs, the same in torch, and how many pieces its Splits make."""

    nodes: Sequence[str]
    outputs: Sequence[str]
    same: Callable[[Tensor, Tensor], Sequence[Tensor]]
    pieces: int


def dense(x: Tensor, a: Tensor) -> list[Tensor]:
    b = layer(torch.cat([x, a], 1))
    c = layer(torch.cat([x, a, b], 1))
    return [torch.cat([x, a, b, c], 1)]


def seeded(x: Tensor, a: Tensor) -> list[Tensor]:
    z = torch.cat([x, a], 1)
    return [torch.cat([x, a, layer(z)], 1), z]


Z = "z = Concat<axis=1>(x, a)"
CASES = {
    "a dense block": Case(
        [
            Z, *layer_nodes("z", "b"), "u = Concat<axis=1>(x, a, b)", *layer_nodes("u", "c"),
            "y = Concat<axis=1>(x, a, b, c)",
        ],
        ["y"], dense, 6,
    ),
    "an earlier one that is an output": Case(
        [Z, *layer_nodes("z", "b"), "y = Concat<axis=1>(x, a, b)"], ["y", "z"], seeded, 4
    ),
    "an earlier one that no layer reads": Case(
        [Z, "s = Size(z)", "f = Cast<to=11>(s)", "m = Mul(a, f)", "y = Concat<axis=1>(x, a, m)"],
        ["y"], lambda x, a: [torch.cat([x, a, a * 2 * 4 * 4], 1)], 4,
    ),
    "the axis counted from the end": Case(
        ["z = Concat<axis=-2>(x, a)", *layer_nodes("z", "b"), "y = Concat<axis=1>(x, a, b)"],
        ["y"], lambda x, a: seeded(x, a)[:1], 4,
    ),
    "the same once more": Case(
        [Z, "y = Concat<axis=1>(x, a)", "t = Tanh(z)"],
        ["y", "t"], lambda x, a: [torch.cat([x, a], 1), torch.cat([x, a], 1).tanh()], 2,
    ),
    "one tensor many times": Case(
        ["z = Concat<axis=1>(x, x)", *layer_nodes("z", "b"), "y = Concat<axis=1>(x, x, b, x, z)"],
        ["y"], lambda x, a: [torch.cat([x, x, layer(torch.cat([x, x], 1)), x, x, x], 1)], 6,
    ),
    "another order": Case(
        [Z, *layer_nodes("z", "b"), "y = Concat<axis=1>(a, x, b)"],
        ["y"], lambda x, a: [torch.cat([a, x, layer(torch.cat([x, a], 1))], 1)], 5,
    ),
    "another axis": Case(
        ["z = Concat<axis=2>(x, x)", *layer_nodes("z", "b"), "c = Concat<axis=2>(a, a)", "d = Mul(b, c)",
         "e = Concat<axis=1>(x, x, a)", *layer_nodes("e", "h"), "y = Concat<axis=2>(d, h)"],
        ["y"],
        lambda x, a: [torch.cat([layer(torch.cat([x, x], 2)) * torch.cat([a, a], 2),
                                 layer(torch.cat([x, x, a], 1))], 2)],
        9,
    ),
}  # fmt: skip


def pieces(made: onnx.ModelProto) -> int:
    return sum(len(n.output) for n in made.graph.node if n.op_type == "Split" and n.name.startswith("graphgbp/"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_vjp_equals_torch(case: str, shape: str) -> None:
    nodes, outputs, same, count = CASES[case]
    made = model(
        [*layer_nodes("x", "a"), *nodes], {"x": SHAPES[shape]}, outputs, {"one": np.array([1])},
        dtype=TensorProto.DOUBLE,
    )  # fmt: skip
    x = drawn(2, 3, 4).astype(np.float64)
    leaf = torch.from_numpy(x).requires_grad_()
    results = same(leaf, layer(leaf))
    cotangents = [drawn(*y.shape, seed=index + 1).astype(np.float64) for index, y in enumerate(results)]
    expected = torch.autograd.grad(results, leaf, [torch.from_numpy(dy) for dy in cotangents])[0]
    explained = graphgbp.vjp(made)
    got = run(explained, {"x": x, **{f"{y}_grad": dy for y, dy in zip(outputs, cotangents, strict=True)}})
    np.testing.assert_allclose(got["x_grad"], expected.numpy(), rtol=1e-12, atol=1e-12)
    assert pieces(explained) == count


class GuidedReLU(torch.autograd.Function):
    """A ReLU that hands back no negative cotangent."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.relu() * (ctx.saved_tensors[0] > 0)


METHODS = ["saliency", "guided_backprop", "gradcam"]
WEIGHTS = {"w1": drawn(4, 3, 3, 3, seed=1), "w2": drawn(4, 4, 3, 3, seed=2), "w3": drawn(4, 8, 3, 3, seed=3),
           "w4": drawn(4, 12, 3, 3, seed=4), "w5": drawn(16, 5, seed=5)}  # fmt: skip
CLASSIFIER = [
    "c1 = Conv<pads=[1,1,1,1]>(image, w1)", "r1 = Relu(c1)",
    "c2 = Conv<pads=[1,1,1,1]>(r1, w2)", "r2 = Relu(c2)", "z = Concat<axis=1>(r1, r2)",
    "c3 = Conv<pads=[1,1,1,1]>(z, w3)", "r3 = Relu(c3)", "u = Concat<axis=1>(r1, r2, r3)",
    "c4 = Conv<pads=[1,1,1,1]>(u, w4)", "r4 = Relu(c4)", "v = Concat<axis=1>(r1, r2, r3, r4)",
    "p = GlobalAveragePool(v)", "f = Flatten(p)", "y = MatMul(f, w5)",
]  # fmt: skip


def classifier(image: Tensor, relu: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The same in torch: its score of each class, and the tensors that may be a target layer."""
    w1, w2, w3, w4, w5 = (torch.from_numpy(w).double() for w in WEIGHTS.values())
    r1 = relu(torch.conv2d(image, w1, padding=1))
    r2 = relu(torch.conv2d(r1, w2, padding=1))
    z = torch.cat([r1, r2], 1)
    r3 = relu(torch.conv2d(z, w3, padding=1))
    u = torch.cat([r1, r2, r3], 1)
    r4 = relu(torch.conv2d(u, w4, padding=1))
    return {"r2": r2, "z": z, "u": u, "y": torch.cat([r1, r2, r3, r4], 1).mean([2, 3]) @ w5}


@pytest.mark.parametrize("layers", [["z"], ["u"], ["r2"], ["z", "u", "r2"]], ids=" ".join)
@pytest.mark.parametrize("size", [8, "s"])
def test_a_target_layer_gets_its_own_cotangent_and_not_what_went_past_it(size: int | str, layers: list[str]) -> None:
    """The target layer is a join, or one of what is joined; the image gets the whole, in both passes."""
    made = model(CLASSIFIER, {"image": ["n", 3, size, size]}, ["y"], WEIGHTS)
    images, targets = drawn(2, 3, 8, 8), np.array([1, 3])
    x = torch.from_numpy(images).double().requires_grad_()
    guided, plain = classifier(x, GuidedReLU.apply), classifier(x, torch.relu)
    wanted = [x, *(plain[layer] for layer in layers)]
    saliency, *of_layers = torch.autograd.grad(plain["y"][[0, 1], targets].sum(), wanted)
    expected = {
        "saliency": saliency,
        "guided_backprop": torch.autograd.grad(guided["y"][[0, 1], targets].sum(), x)[0],
        **{
            role_of("gradcam_gradients", *([layer] if len(layers) > 1 else [])): gradient
            for layer, gradient in zip(layers, of_layers, strict=True)
        },
    }
    got = explain(made, images, targets, METHODS, target_layer=layers)
    assert_maps_equal(got, {name: value.numpy() for name, value in expected.items()}, "dense", tolerance=1e-5)


def test_equals_the_simple_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(CLASSIFIER, {"image": ["n", 3, 8, 8]}, ["y"], WEIGHTS)
    images, targets = drawn(2, 3, 8, 8), np.array([1, 3])
    ours, count = explain(made, images, targets, METHODS), pieces(graphgbp.convert(made, METHODS))
    monkeypatch.setattr(lowerings, "_nested", lambda view, wanted: ())
    simple = explain(made, images, targets, METHODS)
    assert count < pieces(graphgbp.convert(made, METHODS))
    maps = {name: simple[name] for name in ("saliency", "guided_backprop", "gradcam_gradients")}
    assert_maps_equal(ours, maps, "what is joined again in few pieces", tolerance=2e-6)
