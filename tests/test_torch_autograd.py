"""The plain gradient equals torch's autograd: both exporters, sizes fixed and open, every shape and kind of score."""

import copy
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphgbp
from tests import networks
from tests.maps import assert_maps_equal, explain
from tests.oracles import Samples, Score, gradient, settled_samples
from tests.rules.harness import run

SIZES = ((64, 64), (80, 56), (47, 65))


def saliency(network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
    return {"saliency": gradient(network, images, targets)}


@cache
def network(architecture: str) -> networks.Classifier:
    return networks.build(architecture)


@cache
def samples(architecture: str, size: tuple[int, int]) -> Samples:
    return settled_samples(network(architecture), saliency, size)


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_converted_once_for_every_size_and_batch(exporter):
    model = networks.export(network("resnet_basic"), torch.zeros(2, 3, 72, 88), exporter)
    converted = graphgbp.convert(model, ["saliency"])
    shape = converted.graph.output[-1].type.tensor_type.shape.dim
    assert [bool(size.dim_param) for size in shape] == [True, False, True, True]
    for size in SIZES:
        found = samples("resnet_basic", size)
        for count in (1, 3):
            got = run(converted, {"image": found.images[:count], "target": found.targets[:count]})
            assert_maps_equal(got, {"saliency": found.maps["saliency"][:count]}, f"{exporter} {size} batch of {count}")


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("architecture", ["resnet_basic", "squeezenet"])
def test_sizes_that_are_fixed(architecture, exporter):
    found = samples(architecture, SIZES[2])
    model = networks.export(network(architecture), torch.from_numpy(found.images), exporter, dynamic=())
    got = explain(model, found.images, found.targets, ["saliency"])
    assert_maps_equal(got, found.maps, f"{architecture} {exporter}")


@pytest.mark.parametrize("opened", [(), ("batch", "height", "width")], ids=["fixed", "open"])
def test_vjp_of_every_score_at_once(opened):
    """x_grad = sum_k dz_k/dx z_grad_k for a random cotangent."""
    found = samples("resnet_basic", SIZES[2])
    images = torch.from_numpy(found.images)
    model = networks.export(network("resnet_basic"), images, dynamic=opened)
    cotangent = np.random.default_rng(0).standard_normal((3, networks.CLASSES)).astype(np.float32)
    exact = images.double().requires_grad_()
    scores = copy.deepcopy(network("resnet_basic")).double()(exact)
    (expected,) = torch.autograd.grad(scores, exact, torch.from_numpy(cotangent).double())
    got = run(graphgbp.vjp(model, ["image"], ["scores"]), {"image": found.images, "scores_grad": cotangent})
    assert_maps_equal(got, {"image_grad": expected.numpy()}, "vjp")


class Headed(nn.Module):
    """Two convolutions, a head that gives the scores z, and perhaps an activation behind it."""

    def __init__(self, head: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()]
        self.before = nn.Sequential(*layers, head)
        self.activation = activation or nn.Identity()
        networks.draw(self, torch.Generator().manual_seed(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.before(x))


def pooled(*behind: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), *behind)


def tokens(classes: int = 4) -> nn.Sequential:
    """[N, T, K]: a class for every position."""
    return nn.Sequential(nn.Flatten(2), networks.Function(lambda x: x.transpose(1, 2)), nn.Linear(8, classes))


def at_class(z: Tensor, targets: Tensor) -> Tensor:
    """z[n, t_n], summed over whatever follows."""
    return z[torch.arange(len(z)), targets].flatten(1).sum(1) if z.ndim > 2 else z[torch.arange(len(z)), targets]


def at_last_axis(z: Tensor, targets: Tensor) -> Tensor:
    return at_class(z.transpose(1, 2), targets)


def two_in_one(z: Tensor, targets: Tensor) -> Tensor:
    return z.flatten() * (2 * targets - 1)


def of_two(p: Tensor, targets: Tensor) -> Tensor:
    """The probability of class 1, and of class 0."""
    return torch.where(targets == 1, p.flatten(), 1 - p.flatten())


HEADS: dict[str, tuple[Callable[[], nn.Module], int, Callable[[Tensor, Tensor], Tensor]]] = {
    "[N, K]": (lambda: pooled(nn.Flatten(), nn.Linear(8, 5)), 5, at_class),
    "[N, K, 1, 1]": (lambda: pooled(nn.Conv2d(8, 5, 1)), 5, at_class),
    "[N, K, H, W]": (lambda: nn.Conv2d(8, 5, 3), 5, at_class),
    "[N, 1]": (lambda: pooled(nn.Flatten(), nn.Linear(8, 1)), 2, two_in_one),
    "[N]": (lambda: pooled(nn.Flatten(), nn.Linear(8, 1), nn.Flatten(0)), 2, two_in_one),
}


def check(net: Headed, classes: int, score: Score, option: str = "auto") -> None:
    """Saliency and target score against torch's, converted with score=option."""

    def maps(network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"saliency": gradient(network, images, targets, score)}

    found = settled_samples(net, maps, (18, 22), classes=classes)
    model = networks.export(net, torch.zeros(2, 3, 16, 16))
    got = explain(model, found.images, found.targets, ["saliency"], score=option)
    assert_maps_equal(got, found.maps, "saliency")
    images, targets = torch.from_numpy(found.images).double(), torch.from_numpy(found.targets)
    expected = score(copy.deepcopy(net).double(), images, targets).detach().numpy()
    np.testing.assert_allclose(got["target_score"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", HEADS)
def test_scores_of_every_shape(shape):
    head, classes, score = HEADS[shape]
    check(Headed(head()), classes, lambda net, images, targets: score(net.before(images), targets))


ACTIVATED = {
    "Softmax": ("[N, K]", lambda: nn.Softmax(1)),
    "LogSoftmax": ("[N, K]", lambda: nn.LogSoftmax(1)),
    "Sigmoid of labels": ("[N, K]", nn.Sigmoid),
    "Softmax of pixels": ("[N, K, H, W]", lambda: nn.Softmax(1)),
    "Sigmoid of two classes": ("[N, 1]", nn.Sigmoid),
}


@pytest.mark.parametrize("option", ["auto", "pre_softmax", "probability"])
@pytest.mark.parametrize("activation", ACTIVATED)
def test_before_and_behind_the_final_activation(activation, option):
    shape, make = ACTIVATED[activation]
    head, classes, score = HEADS[shape]
    side = Headed.forward if option == "probability" else lambda net, images: net.before(images)
    if option == "probability" and score is two_in_one:
        score = of_two
    net = Headed(head(), make())
    check(net, classes, lambda net, images, targets: score(side(net, images), targets), option)


def test_a_softmax_over_the_last_axis_says_where_the_classes_are():
    net = Headed(tokens(), nn.Softmax(-1))
    check(net, 4, lambda net, images, targets: at_last_axis(net.before(images), targets))


def greatest(z: Tensor) -> Tensor:
    """The predicted class's score, position by position."""
    return z.amax(1).flatten(1).sum(1) if z.ndim > 2 else z.amax(1)


PREDICTED = {
    "[N, K]": greatest,
    "[N, K, 1, 1]": greatest,
    "[N, K, H, W]": greatest,
    "[N, 1]": lambda z: z.abs().flatten(),
}


@pytest.mark.parametrize("shape", PREDICTED)
def test_the_predicted_class(shape):
    """-1 explains it, also where one target stands for every image."""
    head, _, _ = HEADS[shape]

    def score(net: Headed, images: Tensor, targets: Tensor) -> Tensor:
        return PREDICTED[shape](net.before(images))

    def maps(network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"saliency": gradient(network, images, targets, score)}

    net = Headed(head())
    found = settled_samples(net, maps, (18, 22))
    model = networks.export(net, torch.zeros(2, 3, 16, 16))
    for targets in (np.full(3, -1, np.int64), np.asarray([-1], np.int64)):
        got = explain(model, found.images, targets, ["saliency"])
        assert_maps_equal(got, found.maps, f"{shape} {len(targets)} targets")
