"""Networks as ONNX Runtime optimises them are explained as they were: Captum's maps and torch's hooks still hold."""

import numpy as np
import pytest
import torch
from torch import nn

import graphgbp
from tests import test_captum
from tests.build import drawn, model
from tests.maps import assert_maps_equal, explain
from tests.optimised import operators, optimised
from tests.oracles import GuidedRectifier
from tests.rules.harness import assert_close, run
from tests.test_transformers import NETWORKS, TARGET, exported, images, network
from tests.transformers import hooked_cams

# torch's tracer warns of every size that a network asks for
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
CONVOLUTIONAL = {
    "resnet_basic": {"FusedConv"},
    "vgg": {"FusedConv", "FusedGemm"},
    "densenet": {"FusedConv"},
    "googlenet": {"FusedConv"},
    "mobilenet": {"FusedConv"},
}


@pytest.mark.parametrize("architecture", CONVOLUTIONAL)
def test_every_map_equals_captums(architecture):
    original = test_captum.exported(architecture)
    made = optimised(original, "extended")
    fused = {name for name in CONVOLUTIONAL[architecture] if operators(made)[f"com.microsoft.{name}"]}
    assert fused == CONVOLUTIONAL[architecture]
    found = test_captum.samples(architecture, (64, 64))
    got = explain(made, found.images, found.targets, interpolate_mode="nearest")
    assert_maps_equal(got, test_captum.as_captum(found), architecture)
    seen, was = graphgbp.inspect(made), graphgbp.inspect(original)
    assert [r["tensor"] for r in seen.rectifiers] == [r["tensor"] for r in was.rectifiers]
    dressed = [r for r in seen.rectifiers if any(f"in {name}" in r["clothing"] for name in fused)]
    assert len(dressed) == sum(operators(made)[f"com.microsoft.{name}"] for name in fused) > 0


@pytest.mark.parametrize(
    ("name", "exporter", "opset", "fused"),
    [
        ("vit", "torchscript", 14, "LayerNormalization"),
        ("vit", "torchscript", 18, "com.microsoft.BiasGelu"),
        ("deit", "dynamo", 18, "com.microsoft.SkipLayerNormalization"),
        ("vit, torch's attention", "dynamo", 18, "com.microsoft.FusedMatMul"),
        ("swin", "torchscript", 16, "com.microsoft.BiasGelu"),
    ],
)
def test_transformers(name, exporter, opset, fused):
    _, layer, others, grid = NETWORKS[name]
    x = images(name)
    original = exported(name, exporter, opset)
    made = optimised(original, "extended")
    assert operators(made)[fused] > operators(original)[fused]
    cams = hooked_cams(network(name), layer(network(name)), x, TARGET, others, grid)
    expected = {"gradcam": nn.functional.interpolate(cams["gradcam"], x.shape[2:], mode="bilinear").numpy()}
    got = explain(made, x.numpy(), np.array([TARGET]), ["gradcam", "saliency"], relu_attributions=False)
    assert_maps_equal(got, expected, f"{name} {exporter} {opset}")
    image = x.clone().requires_grad_()
    network(name)(image)[:, TARGET].sum().backward()
    assert_maps_equal(got, {"saliency": image.grad.numpy()}, f"{name} {exporter} {opset}")
    passed, was = (graphgbp.inspect(m).passed_through for m in (made, original))
    assert len(passed) == len(was) > 0


FUSED = {
    "FusedConv": 'h = com.microsoft.FusedConv<activation="Relu">(x, w, b, z)',
    "FusedConv, Clip": 'h = com.microsoft.FusedConv<activation="Clip", activation_params=[0.0, 0.8]>(x, w, b, z)',
}


@pytest.mark.parametrize("written", FUSED)
def test_a_relu_fused_with_a_residual_is_guided(written):
    x, w, b, z = drawn(2, 3, 6, 6), drawn(4, 3, 3, 3, seed=1), drawn(4, seed=2), drawn(2, 4, 4, 4, seed=3)
    head = drawn(4, 5, seed=4)
    bound = 0.8 if "Clip" in written else float("inf")

    def scores(rectifier):
        image = torch.from_numpy(x).double().requires_grad_()
        parts = [torch.from_numpy(part).double() for part in (w, b, z, head)]
        h = rectifier(nn.functional.conv2d(image, parts[0], parts[1]) + parts[2])
        (h.mean((2, 3)) @ parts[3])[:, 1].sum().backward()
        return image.grad.numpy()

    nodes = [FUSED[written], "p = GlobalAveragePool(h)", "f = Flatten(p)", "y = MatMul(f, head)"]
    made = model(nodes, {"x": x.shape}, ["y"], {"w": w, "b": b, "z": z, "head": head})
    explained = graphgbp.convert(made, ["saliency", "guided_backprop"])
    got = run(explained, {"x": x, "target": np.array([1])})
    plain, guided = scores(lambda a: a.clamp(0, bound)), scores(lambda a: GuidedRectifier.apply(a, bound))
    assert np.abs(plain - guided).max() > 0.1 * np.abs(plain).max()
    assert_close(got["saliency"], plain, 1e-5, "saliency")
    assert_close(got["guided_backprop"], guided, 1e-5, "guided")
