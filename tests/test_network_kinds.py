"""Networks of every kind and age: opsets, ways of padding, casts, sequences, volumes and features."""

from collections.abc import Mapping, Sequence

import captum.attr
import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import Tensor, nn

import graphgbp
from tests import networks
from tests.build import Shape, drawn, model
from tests.float64 import Float64Model
from tests.maps import assert_maps_equal
from tests.oracles import gradient
from tests.rules.harness import run

METHODS = ["saliency", "guided_backprop"]
TARGETS = np.array([3, 0])
WEIGHTS = {
    "w1": drawn(6, 3, 3, 3, seed=1, scale=0.4),
    "w2": drawn(8, 6, 3, 3, seed=2, scale=0.3),
    "w3": drawn(8, 5, seed=3),
    "b1": drawn(6, seed=4),
    "b3": drawn(5, seed=5),
    "scale": np.abs(drawn(6, seed=6)) + 0.5,
    "mean": drawn(6, seed=7, scale=0.2),
    "variance": np.abs(drawn(6, seed=8)) + 0.5,
}
HEAD = ["p = GlobalAveragePool(r2)", "f = Flatten(p)", "z = Gemm(f, w3, b3)", "y = Softmax<axis=1>(z)"]


def check(
    nodes: Sequence[str],
    shape: Shape,
    sizes: Sequence[int],
    rectifiers: Sequence[str],
    opset: int = 18,
    extra: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Saliency and the guided map of score `z` against the model's own evaluation in float64."""
    ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)], ignore_unknown=True)
    made = model(nodes, {"x": shape}, ["y"], {**WEIGHTS, **(extra or {})}, opset=opset, ir_version=ir_version)
    used = {name for node in made.graph.node for name in node.input}
    kept = [weight for weight in made.graph.initializer if weight.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    explained = graphgbp.convert(made, METHODS)
    images = drawn(2, *sizes, seed=9)
    got = run(explained, {"x": images, "target": TARGETS})
    np.testing.assert_array_equal(got["y"], run(made, {"x": images})["y"])
    assert_maps_equal(got, {"saliency": of(made, images, {}), "guided_backprop": of(made, images, rectifiers)}, "")


def of(made: onnx.ModelProto, images: np.ndarray, guided: Sequence[str]) -> np.ndarray:
    x = torch.from_numpy(images).double().requires_grad_()
    scores = Float64Model(made, "z", guided=dict.fromkeys(guided, float("inf")))(x)
    return torch.autograd.grad(scores[torch.arange(2), torch.from_numpy(TARGETS)].sum(), x)[0].numpy()


@pytest.mark.parametrize("opset", range(7, 27))
def test_every_opset(opset):
    nodes = [
        "c1 = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1, b1)",
        "n1 = BatchNormalization(c1, scale, b1, mean, variance)",
        "r1 = Relu(n1)",
        "m1 = MaxPool<kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]>(r1)",
        "a1 = AveragePool<kernel_shape=[2,2]>(m1)",
        "c2 = Conv<pads=[1,1,1,1]>(a1, w2)",
        "r2 = Relu(c2)",
        *HEAD,
    ]
    check(nodes, ("N", 3, "H", "W"), (3, 20, 18), ["r1", "r2"], opset)


@pytest.mark.parametrize("sizes", [(3, 15, 18), (3, 16, 13)])
@pytest.mark.parametrize("padding", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_name(padding, sizes):
    nodes = [
        f'c1 = Conv<auto_pad="{padding}", strides=[2,2]>(x, w1, b1)',
        "r1 = Relu(c1)",
        f'm1 = MaxPool<auto_pad="{padding}", kernel_shape=[2,3], strides=[1,2]>(r1)',
        f'a1 = AveragePool<auto_pad="{padding}", kernel_shape=[2,2], strides=[1,1]>(m1)',
        'c2 = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(a1, w2)',
        "r2 = Relu(c2)",
        *HEAD,
    ]
    check(nodes, ("N", 3, "H", "W"), sizes, ["r1", "r2"])


def test_padding_computed_from_the_shape():
    """To a multiple of 4, as detectors do."""
    integers = {"four": np.array([4]), "sides": np.array([2, 3]), "none": np.zeros(4, np.int64)}
    integers |= {"none2": np.zeros(2, np.int64)}
    nodes = [
        "s = Shape(x)",
        "hw = Gather(s, sides)",
        "over = Mod(hw, four)",
        "rest = Sub(four, over)",
        "missing = Mod(rest, four)",
        "pads = Concat<axis=0>(none, none2, missing)",
        "q = Pad(x, pads)",
        "c1 = Conv<strides=[2,2]>(q, w1, b1)",
        "r1 = Relu(c1)",
        "c2 = Conv(r1, w2)",
        "r2 = Relu(c2)",
        *HEAD,
    ]
    for sizes in ((3, 12, 16), (3, 13, 14)):
        check(nodes, ("N", 3, "H", "W"), sizes, ["r1", "r2"], extra=integers)


def test_casts_around_every_relu():
    nodes = ["c1 = Conv(x, w1, b1)", "d1 = Cast<to=11>(c1)", "e1 = Relu(d1)", "r1 = Cast<to=1>(e1)"]
    nodes += ["c2 = Conv(r1, w2)", "d2 = Cast<to=11>(c2)", "e2 = Relu(d2)", "r2 = Cast<to=1>(e2)"]
    check([*nodes, *HEAD], ("N", 3, 9, 9), (3, 9, 9), ["e1", "e2"])


class Mean(nn.Module):
    """Over the time of [N, T, F]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class TransformerBlock(nn.Module):
    """One head of attention and a multilayer perceptron with a ReLU, each behind a LayerNorm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(features) for _ in range(2))
        self.queries, self.keys, self.values = (nn.Linear(features, features) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(features, 24), nn.ReLU(), nn.Linear(24, features))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        attention = (self.queries(y) @ self.keys(y).transpose(1, 2)).softmax(-1)
        x = x + attention @ self.values(y)
        return x + self.mlp(self.norms[1](x))


KINDS = {
    "1-D convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 8, 5, 2, 2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(3, 2, 1)),
            *(nn.Conv1d(8, 8, 3, padding=2, dilation=2, groups=2), nn.ReLU(), nn.AvgPool1d(2)),
            *(nn.ConvTranspose1d(8, 6, 4, 2), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 5)),
        ),
        (3, 40),
    ),
    "3-D convolutions": (
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 6, 3, 1, 1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2)),
            *(nn.Conv3d(6, 6, (1, 3, 3), (1, 2, 2), (0, 1, 1), groups=3), nn.ReLU(), nn.AvgPool3d((1, 2, 2))),
            *(nn.Conv3d(6, 8, 2), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 5)),
        ),
        (2, 6, 14, 16),
    ),
    "features": (
        lambda: nn.Sequential(
            *(nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5)),
        ),
        (7,),
    ),
    "a sequence through a transformer": (
        lambda: nn.Sequential(
            nn.Linear(6, 12), TransformerBlock(12), TransformerBlock(12), nn.LayerNorm(12), Mean(), nn.Linear(12, 5)
        ),
        (9, 6),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_are_no_images(kind):
    build, shape = KINDS[kind]
    torch.manual_seed(0)
    network = build().eval()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.2)
    images = drawn(2, *shape, seed=10)
    x = torch.from_numpy(images)
    made = networks.export(network, x, dynamic=("batch",))
    got = run(graphgbp.convert(made, METHODS), {"image": images, "target": TARGETS})
    exact, targets, x = network.double(), torch.from_numpy(TARGETS), x.double().requires_grad_()
    expected = {
        "saliency": gradient(exact, x.detach(), targets),
        "guided_backprop": captum.attr.GuidedBackprop(exact).attribute(x, targets),
    }
    assert_maps_equal(got, {name: value.detach().numpy() for name, value in expected.items()}, kind)
