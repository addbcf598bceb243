"""The CAM family where features and gradients are known: beside the papers' formulas, and where these have no value."""

from functools import cache

import captum.attr
import numpy as np
import onnx
import pytest
import torch

import graphgbp
from graphgbp import contract
from tests import networks
from tests.build import drawn, model, small_cnn
from tests.maps import assert_maps_equal, explain
from tests.oracles import cams_of
from tests.rules.harness import run

SIZE = (5, 4)


@cache
def told(channels: int) -> bytes:
    """A network whose features are its input and whose gradient there is the other input, each at every position."""
    nodes = ["f = Conv(x, one)", "h = Mul(f, gradient)", "y = ReduceSum<keepdims=0>(h, axes)"]
    weights = {"one": np.eye(channels, dtype=np.float32)[..., None, None], "axes": np.array([1, 2, 3])}
    inputs = {"x": ("N", channels, *SIZE), "gradient": ("N", channels, *SIZE)}
    made = model(nodes, inputs, ["y"], weights)
    options = {"inputs": "x", "target_layer": "f", "target": "cotangent", "relu_attributions": False}
    return graphgbp.convert(made, contract.CAMS, **options).SerializeToString()


def cams(features: np.ndarray, gradients: np.ndarray) -> dict[str, np.ndarray]:
    """The family of features and gradients [N, C, *SIZE], each [N, 1, *SIZE], and those two as they came out."""
    made = onnx.ModelProto.FromString(told(features.shape[1]))
    feeds = {"x": features, "gradient": gradients, contract.TARGET_COTANGENT: np.ones(len(features), np.float32)}
    got = run(made, feeds)
    np.testing.assert_array_equal(got["gradcam_features"], features)
    np.testing.assert_array_equal(got["gradcam_gradients"], gradients)
    return {method: got[method] for method in contract.CAMS}


def expected(features: np.ndarray, gradients: np.ndarray) -> dict[str, np.ndarray]:
    found = cams_of(torch.from_numpy(features).double(), torch.from_numpy(gradients).double())
    return {method: cam.numpy() for method, cam in found.items()}


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


@pytest.mark.parametrize("scale", [1e-18, 1e-9, 1e-3, 1.0, 1e3, 1e9])
def test_gradients_of_any_size(scale):
    """The square of the smallest is 0 in float32, the cube of the largest near its end."""
    features, gradients = relu(drawn(3, 6, *SIZE)), drawn(3, 6, *SIZE, seed=1, scale=scale)
    assert_maps_equal(cams(features, gradients), expected(features, gradients), f"{scale}", 1e-5)


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_features_of_any_size(scale):
    features, gradients = scale * relu(drawn(3, 6, *SIZE)), drawn(3, 6, *SIZE, seed=1)
    assert_maps_equal(cams(features, gradients), expected(features, gradients), f"{scale}", 1e-5)


def test_features_of_both_signs():
    features, gradients = drawn(8, 6, *SIZE, seed=2), drawn(8, 6, *SIZE, seed=3, scale=1e-2)
    assert_maps_equal(cams(features, gradients), expected(features, gradients), "both signs", 1e-4)


def test_a_dead_channel_and_a_gradient_of_zero_count_for_nothing():
    features, gradients = relu(drawn(2, 6, *SIZE)), drawn(2, 6, *SIZE, seed=1)
    features[:, 2] = 0
    gradients[:, 4] = 0
    got = cams(features, gradients)
    kept = [channel for channel in range(6) if channel not in (2, 4)]
    assert_maps_equal(got, cams(features[:, kept], gradients[:, kept]), "without them", 1e-6)
    for zero in (cams(0 * features, gradients), cams(features, 0 * gradients)):
        assert not any(cam.any() for cam in zero.values())


def test_features_that_cancel_have_no_xgradcam():
    """sum(A) is 0, or what rounding leaves of it: not a number divided by it, the channel counts for nothing."""
    features, gradients = relu(drawn(2, 3, *SIZE)), drawn(2, 3, *SIZE, seed=1)
    for left in (0.0, 1e-7, 1e-45):
        features[:, 1] = 0
        features[:, 1, 0], features[:, 1, 1], features[0, 1, 2, 0] = 1, -1, left
        got = cams(features, gradients)["xgradcam"]
        if left == 1e-7:  # one part in a hundred million of what was summed
            assert np.isfinite(got).all() and np.abs(got).max() < 1e2
        np.testing.assert_allclose(got, cams(features[:, ::2], gradients[:, ::2])["xgradcam"], rtol=1e-5, atol=1e-6)


def test_where_the_denominator_of_plus_plus_vanishes_a_position_counts_for_nothing():
    """2 + sum(A) g = 0 at one position, and all but 0 at another; elsewhere g is 0 or below."""
    features, gradients = -np.ones((1, 1, *SIZE), np.float32), np.zeros((1, 1, *SIZE), np.float32)
    gradients[0, 0, 0, 0] = np.float32(2 / 20)
    gradients[0, 0, 1, 1] = np.nextafter(np.float32(0.1), np.float32(1))
    gradients[0, 0, 2] = -1
    np.testing.assert_array_equal(cams(features, gradients)["gradcam_plusplus"], 0)
    gradients[0, 0, 3, 3] = 0.05
    found = cams(features, gradients)["gradcam_plusplus"]
    np.testing.assert_allclose(found, -0.05 / (2 - 20 * 0.05), rtol=1e-5)


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1.0, 1e15])
def test_every_value_is_finite(size):
    """Of both signs, near their denominators' zeros as often as chance has it."""
    features, gradients = drawn(400, 4, *SIZE, seed=5, scale=size), drawn(400, 4, *SIZE, seed=6, scale=size)
    for method, cam in cams(features, gradients).items():
        assert np.isfinite(cam).all(), method


def test_before_a_mean_over_positions_hirescam_and_xgradcam_are_captums_gradcam():
    """The gradient there is the same at every position, so it is its mean, however weighted."""
    net = networks.build("resnet_basic").double()
    images, targets = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 5, 8])
    reference = captum.attr.LayerGradCam(net, net.get_submodule(net.target))
    cam = reference.attribute(images.double().requires_grad_(), targets, relu_attributions=True)
    resized = captum.attr.LayerAttribution.interpolate(cam, (64, 64)).detach().numpy()
    exported = networks.export(networks.build("resnet_basic"), torch.zeros(3, 3, 64, 64))
    methods = ["gradcam", "hirescam", "xgradcam"]
    got = explain(exported, images.numpy(), targets.numpy(), methods, interpolate_mode="nearest")
    assert_maps_equal(got, dict.fromkeys(methods, resized), "captum")


def test_several_layers_each_have_every_cam():
    layers = ["r1", "r2"]
    feeds = {"x": drawn(2, 3, 8, 8), "target": np.array([1])}
    got = run(graphgbp.convert(small_cnn(), contract.CAMS, target_layer=layers), feeds)
    for layer in layers:
        alone = run(graphgbp.convert(small_cnn(), contract.CAMS, target_layer=layer), feeds)
        for method in (*contract.CAMS, *contract.LAYER_OUTPUTS):
            np.testing.assert_allclose(got[f"{method}/{layer}"], alone[method], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("methods", [["xgradcam"], ["input_x_gradient", "xgradcam"]])
def test_only_what_is_asked_comes_out(methods):
    names = [output.name for output in graphgbp.convert(small_cnn(), methods).graph.output]
    assert names == ["y", "target_class", "target_score", *methods, *contract.LAYER_OUTPUTS]
