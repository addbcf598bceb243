"""Captum's maps are ours on networks of the blocks that people explain; torch hooks' where Captum does not look."""

import json
from functools import cache

import captum.attr
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphgbp
from graphgbp import contract
from tests import networks
from tests.maps import assert_maps_equal, explain, relative_l2
from tests.oracles import Samples, cams_of, captum_maps, gradient, hook_maps, runs, settled_samples
from tests.rules.harness import run

SIZES = ((64, 64), (80, 56), (47, 65))
CASES = [
    ("resnet_basic", "torchscript"),
    ("resnet_bottleneck", "torchscript"),
    ("resnet_bottleneck", "dynamo"),
    ("vgg", "torchscript"),
    ("vgg", "dynamo"),
    ("densenet", "torchscript"),
    ("densenet", "dynamo"),
    ("googlenet", "torchscript"),
    ("googlenet_lrn", "dynamo"),
    ("squeezenet", "torchscript"),
    ("squeezenet", "dynamo"),
    ("mobilenet", "torchscript"),
]
ALL_OPEN = ("batch", "height", "width")
OPEN = {
    ("resnet_bottleneck", "dynamo"): ("batch",),
    ("squeezenet", "dynamo"): (),
    ("vgg", "torchscript"): ("batch",),  # an adaptive pool needs to know its input's size
    ("vgg", "dynamo"): ("batch",),
}


@cache
def network(architecture: str) -> networks.Classifier:
    return networks.build(architecture)


@cache
def samples(architecture: str, size: tuple[int, int], layer: str | None = None) -> Samples:
    net = network(architecture)
    return settled_samples(net, captum_maps(layer or net.target), size)


@cache
def exported(architecture: str, exporter: str = "torchscript", relu: str = "modules") -> onnx.ModelProto:
    """The network in ONNX; the sizes that stay fixed are those of the samples of 64x64."""
    net = networks.build(architecture, relu)
    open_sizes = OPEN.get((architecture, exporter), ALL_OPEN)
    return networks.export(net, torch.zeros(3, 3, 64, 64), exporter, dynamic=open_sizes)


def sizes(architecture: str, exporter: str = "torchscript") -> tuple[tuple[int, int], ...]:
    return SIZES if OPEN.get((architecture, exporter), ALL_OPEN) == ALL_OPEN else SIZES[:1]


def resized(cam: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    """Captum's LayerAttribution.interpolate, which is torch's (align_corners=False)."""
    return F.interpolate(torch.from_numpy(cam), size, mode=mode).numpy()


def as_captum(found: Samples) -> dict[str, np.ndarray]:
    """The maps as Captum gives them: Grad-CAM resized by its default, and cut by its ReLU as in its Guided Grad-CAM."""
    size, maps = found.images.shape[2:], dict(found.maps)
    maps["gradcam"] = resized(np.maximum(maps.pop("cam"), 0), size, "nearest")
    for method, cam in cams_of(*(torch.from_numpy(maps[name]) for name in contract.LAYER_OUTPUTS)).items():
        maps.setdefault(method, resized(cam.relu().numpy(), size, "nearest"))
    return maps


@pytest.mark.parametrize(("architecture", "exporter"), CASES)
def test_every_map_equals_captums(architecture, exporter):
    """At the layer that `auto` chooses, whose values and gradients are those of the layer torch hooks look at."""
    model = exported(architecture, exporter)
    for size in sizes(architecture, exporter):
        found = samples(architecture, size)
        got = explain(model, found.images, found.targets, interpolate_mode="nearest")
        assert_maps_equal(got, as_captum(found), f"{architecture} {exporter} {size}")
        np.testing.assert_array_equal(got["target_class"], found.targets)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("architecture", ["resnet_basic", "vgg", "densenet", "googlenet", "squeezenet"])
def test_gradcam_before_its_relu(architecture, mode):
    """Guided Grad-CAM keeps the ReLU, before the resize."""
    size = sizes(architecture)[-1]
    found = samples(architecture, size)
    cam, guided = found.maps["cam"], found.maps["guided_backprop"]
    assert (cam < 0).any(), "the ReLU changes nothing here"
    methods = ["gradcam", "guided_gradcam"]
    options = {"interpolate_mode": mode, "relu_attributions": False}
    got = explain(exported(architecture), found.images, found.targets, methods, **options)
    expected = {
        "gradcam": resized(cam, size, mode),
        "guided_gradcam": guided * resized(np.maximum(cam, 0), size, mode),
    }
    assert_maps_equal(got, expected, f"{architecture} {mode}")


@pytest.mark.parametrize("architecture", ["resnet_bottleneck", "densenet"])
def test_gradcam_is_bilinear_by_default(architecture):
    size = SIZES[-1]
    found = samples(architecture, size)
    got = explain(exported(architecture), found.images, found.targets, ["gradcam"])
    expected = resized(np.maximum(found.maps["cam"], 0), size, "bilinear")
    assert_maps_equal(got, {"gradcam": expected}, architecture)


OPERATORS = {
    nn.ReLU: "Relu",
    nn.Conv2d: "Conv",
    nn.BatchNorm2d: "Conv",  # into which the exporter folds it
    nn.MaxPool2d: "MaxPool",
    nn.AvgPool2d: "AveragePool",
    networks.Concatenated: "Concat",
}


def node_of(model: onnx.ModelProto, net: nn.Module, layer: str) -> onnx.NodeProto:
    """The node that a module became: both count the operators of a kind in the order they run."""
    module = net.get_submodule(layer)
    ran = [peer for peer, _ in runs(net, (type(module),), torch.zeros(1, 3, 64, 64))]
    nodes = [node for node in model.graph.node if node.op_type == OPERATORS[type(module)]]
    assert len(nodes) == len(ran)
    return nodes[ran.index(module)]


@pytest.mark.parametrize(
    ("architecture", "layer"),
    [
        ("resnet_basic", "features.4.relu"),
        ("resnet_bottleneck", "features.6.body.3"),
        ("vgg", "features.17"),
        ("densenet", "features.6.3"),
        ("googlenet", "features.10"),
        ("squeezenet", "features.5"),
        ("mobilenet", "features.4.body.4.1"),
    ],
)
def test_gradcam_at_a_layer_that_is_named(architecture, layer):
    size = sizes(architecture)[-1]
    found = samples(architecture, size, layer)
    model, net = exported(architecture), network(architecture)
    node = node_of(model, net, layer)
    expected = as_captum(found)
    assert expected["gradcam_features"].shape != samples(architecture, size).maps["gradcam_features"].shape
    for name in (node.output[0], node.name):
        options = {"target_layer": name, "interpolate_mode": "nearest"}
        got = explain(model, found.images, found.targets, ["gradcam", "guided_gradcam"], **options)
        maps = {role: expected[role] for role in ("gradcam", "guided_gradcam", "gradcam_features", "gradcam_gradients")}
        assert_maps_equal(got, maps, f"{architecture} {layer} as {name}")


@pytest.mark.parametrize("architecture", ["resnet_basic", "vgg", "densenet", "googlenet", "squeezenet"])
def test_however_the_relu_is_written(architecture):
    """Functional, one module everywhere, in place: the very same maps, bit for bit."""
    found = samples(architecture, SIZES[0])
    maps = [
        explain(exported(architecture, relu=relu), found.images, found.targets)
        for relu in ("modules", "functional", "reused", "reused in place")
    ]
    for other in maps[1:]:
        for name, value in maps[0].items():
            np.testing.assert_array_equal(other[name], value, err_msg=name)


@pytest.mark.parametrize("architecture", ["resnet_basic", "vgg"])
def test_captum_does_not_see_a_functional_relu(architecture):
    """Its guided map is the plain gradient then, far from the guided one; a module used again it does see."""
    found = samples(architecture, SIZES[0])
    images, targets = torch.from_numpy(found.images).double(), torch.from_numpy(found.targets)

    def guided(relu: str) -> np.ndarray:
        net = networks.build(architecture, relu).double()
        return captum.attr.GuidedBackprop(net).attribute(images.clone().requires_grad_(), targets).numpy()

    assert relative_l2(guided("functional"), found.maps["saliency"]) < 1e-12
    assert relative_l2(guided("functional"), found.maps["guided_backprop"]) > 0.5
    assert relative_l2(guided("reused"), found.maps["guided_backprop"]) < 1e-12


@pytest.mark.parametrize(
    ("relu", "exporter", "clothing"),
    [
        ("clamp", "torchscript", "Clip(x, 0)"),
        ("maximum", "torchscript", "Max(x, 0)"),
        ("where", "torchscript", "Where(x > 0, x, 0)"),
        ("where, mirrored", "torchscript", "Where(x > 0, x, 0)"),
        ("clamp", "dynamo", "Max(x, 0)"),
        ("maximum", "dynamo", "Max(x, 0)"),
        ("where, mirrored", "dynamo", "Where(x > 0, x, 0)"),
    ],
)
def test_a_relu_in_other_clothing_has_the_relus_maps(relu, exporter, clothing):
    """Down to the zeros_like of a size that is open."""
    architecture = "squeezenet"
    size = sizes(architecture, exporter)[-1]
    found = samples(architecture, size)
    model = graphgbp.convert(exported(architecture, exporter, relu), contract.METHODS, interpolate_mode="nearest")
    assert {rectifier["clothing"] for rectifier in rectifiers_of(model)} == {clothing}
    got = run(model, {"image": found.images, "target": found.targets})
    assert_maps_equal(got, as_captum(found), f"{relu} {exporter}")


def rectifiers_of(model: onnx.ModelProto) -> list[dict[str, str]]:
    (manifest,) = (entry.value for entry in model.metadata_props if entry.key == "graphgbp.manifest")
    return json.loads(manifest)["rectifiers"]


def test_the_hooks_written_here_agree_with_captum():
    found = samples("resnet_basic", SIZES[0])
    net = networks.build("resnet_basic").double()
    images, targets = torch.from_numpy(found.images).double(), torch.from_numpy(found.targets)
    for name, value in hook_maps(net.target)(net, images, targets).items():
        assert relative_l2(value.numpy(), found.maps[name]) < 1e-12, name


@cache
def relu6_network(architecture: str) -> networks.Classifier:
    """Spread so far that the upper bound matters."""
    return networks.build(architecture, nn.ReLU6, spread=4.0)


@pytest.mark.parametrize("architecture", ["mobilenet", "resnet_basic"])
def test_relu6_equals_torch_hooks(architecture):
    """Nothing passes above 6; Captum does not look at nn.ReLU6 at all."""
    net = relu6_network(architecture)
    model = networks.export(net, torch.zeros(2, 3, 64, 64))
    for size in SIZES:
        found = settled_samples(net, hook_maps(net.target), size)
        inputs = [x for _, x in runs(net, (nn.ReLU6,), torch.from_numpy(found.images))]
        assert all((x > 6).float().mean() > 0.01 for x in inputs), "the bound changes nothing here"
        got = explain(model, found.images, found.targets, interpolate_mode="nearest")
        assert_maps_equal(got, as_captum(found), f"{architecture} {size}")


def test_captum_does_not_see_relu6():
    net = relu6_network("mobilenet")
    images, targets = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    guided = captum.attr.GuidedBackprop(net).attribute(images.clone().requires_grad_(), targets).numpy()
    assert relative_l2(guided, gradient(net, images, targets).numpy()) < 1e-6
