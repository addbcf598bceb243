"""Detectors, for any cotangent of an output: torch's gradients in float64, and guided maps by its rectifiers.

YOLO-like: SiLU, SPPF, upsampling and concatenation of three scales, distances as expectations over bins.
RT-DETR-like: attention, queries by TopK, deformable attention by GridSample.
"""

import copy

import numpy as np
import pytest
import torch

import graphgbp
from scripts.small_networks import RTDETR, Yolo
from tests import networks
from tests.maps import assert_maps_equal
from tests.oracles import GuidedRectifier, with_rectifiers
from tests.rules.harness import run

DETECTORS = {
    "yolo": (lambda: Yolo(width=8), ["predictions"], "predictions"),
    "rtdetr scores": (RTDETR, ["scores", "boxes"], "scores"),
    "rtdetr boxes": (RTDETR, ["scores", "boxes"], "boxes"),
}


def gradient(network: torch.nn.Module, images: torch.Tensor, index: int, cotangent: torch.Tensor) -> torch.Tensor:
    images = images.double().requires_grad_()
    outputs = network(images)
    chosen = outputs if isinstance(outputs, torch.Tensor) else outputs[index]
    return torch.autograd.grad((chosen * cotangent.double()).sum(), images)[0]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # sizes that attention compares, fixed here
@pytest.mark.parametrize("name", DETECTORS)
def test_cotangent_of_an_output(name):
    build, outputs, explained = DETECTORS[name]
    torch.manual_seed(0)
    network = build()
    networks.draw(network, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 64, 64, generator=generator)
    index = outputs.index(explained)
    with torch.no_grad():
        results = network(images)
    shape = results.shape if isinstance(results, torch.Tensor) else results[index].shape
    cotangent = torch.randn(shape, generator=generator)

    exact = copy.deepcopy(network).double()
    expected = {"saliency": gradient(exact, images, index, cotangent)}
    if any(isinstance(module, torch.nn.ReLU) for module in network.modules()):
        guided = with_rectifiers(exact, GuidedRectifier)
        expected["guided_backprop"] = gradient(guided, images, index, cotangent)
        assert not torch.allclose(*expected.values())

    model = networks.export(network, images, dynamic=("batch",), outputs=outputs)
    explained_model = graphgbp.convert(model, list(expected), target="cotangent", output=explained)
    got = run(explained_model, {"image": images.numpy(), "target_cotangent": cotangent.numpy()})
    assert_maps_equal(got, {key: np.asarray(value) for key, value in expected.items()}, name)
