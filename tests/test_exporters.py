"""Files as TensorFlow, Paddle, JAX and scikit-learn write them, held to their own evaluation in float64.

The rectifiers and the target layer of each file are listed by hand.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

import graphgbp
from graphgbp import contract
from tests.build import drawn, model
from tests.finite_differences import random_direction, sweep
from tests.float64 import Float64Model
from tests.maps import assert_maps_equal
from tests.oracles import cams_of

MODELS = Path(__file__).parent.parent / "models"
RELU, RELU6 = float("inf"), 6.0


@dataclass(frozen=True)
class File:
    """A file in models/: its score, its rectifiers with their upper bounds, its target layer, and images for it."""

    name: str
    score: str
    rectifiers: dict[str, float]
    layer: str | None = None
    channel_axis: int = 1
    shape: tuple[int, ...] = (32, 32, 3)
    images: Callable[[np.ndarray], np.ndarray] = field(default=lambda noise: noise)
    seed: int = 0

    @property
    def methods(self) -> list[str]:
        return [method for method in contract.METHODS if self.layer or method not in contract.LAYER_METHODS]


KERAS = "functional_1_1"
FILES = {
    "keras_residual": File(
        "keras_residual",
        "functional_1/dense_1/BiasAdd:0",
        dict.fromkeys([f"functional_1/re_lu_{number}/Relu:0" for number in ("1", "1_2", "2_1")], RELU),
        "functional_1/re_lu_2_1/Relu:0",
    ),
    "keras_mobile": File(
        "keras_mobile",
        f"{KERAS}/flatten_1/Reshape:0",
        {f"{KERAS}/re_lu_3_1/Relu6:0": RELU6, f"{KERAS}/conv2d_6_1/Relu:0": RELU, f"{KERAS}/re_lu_5_1/Relu6:0": RELU6},
        f"{KERAS}/re_lu_5_1/Relu6:0",
        images=lambda noise: np.clip(128 + 50 * noise, 0, 255),
    ),
    "paddle_mobile": File(
        "paddle_mobile",
        "p2o.pd_op.add.2.0",
        {"p2o.pd_op.relu.0.0": RELU, "p2o.pd_op.relu.1.0": RELU, "Clip.1": RELU6},
        "p2o.pd_op.pool2d.1.0",
        shape=(3, 32, 32),
    ),
    "jax_residual": File(
        "jax_residual",
        "out_1",
        {f"relu_out_{number}": RELU for number in range(5)},
        "relu_out_4",
        channel_axis=3,
    ),
    "sklearn_mlp": File(
        "sklearn_mlp",
        "add_result2",
        {"next_activations": RELU, "next_activations1": RELU},
        shape=(64,),
        images=lambda noise: np.abs(noise) / 3,
    ),
}
IMAGES = 3


@cache
def read(name: str) -> onnx.ModelProto:
    return onnx.load(MODELS / f"{name}.onnx")


@cache
def explained(name: str) -> onnx.ModelProto:
    return graphgbp.convert(read(name), FILES[name].methods)


def images(file: File) -> np.ndarray:
    return file.images(drawn(IMAGES, *file.shape, seed=file.seed)).astype(np.float32)


@cache
def targets(name: str) -> np.ndarray:
    """Each image's best class: the gradient of another one may leave Grad-CAM nothing."""
    scores = Float64Model(read(name), FILES[name].score)(torch.from_numpy(images(FILES[name])).double())
    return scores.argmax(1).numpy()


def run(model: onnx.ModelProto, file: File) -> dict[str, object]:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {model.graph.input[0].name: images(file), "target": targets(file.name)}
    feeds = {value.name: feeds[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def score_of(file: File, **options: object) -> Callable[[torch.Tensor], torch.Tensor]:
    """The sum of the images' scores; `.model` holds the kept tensors."""
    model = Float64Model(read(file.name), file.score, **options)

    def score(x: torch.Tensor) -> torch.Tensor:
        return model(x)[torch.arange(IMAGES), torch.from_numpy(targets(file.name))].sum()

    score.model = model
    return score


def expected_maps(file: File) -> dict[str, np.ndarray]:
    x = torch.from_numpy(images(file)).double().requires_grad_()
    guided = score_of(file, guided=file.rectifiers)
    found = {"guided_backprop": torch.autograd.grad(guided(x), x)[0]}
    plain = score_of(file, keep=[file.layer] if file.layer else [])
    score = plain(x)
    found["saliency"] = torch.autograd.grad(score, x, retain_graph=True)[0]
    found["input_x_gradient"] = x * found["saliency"]
    if file.layer:
        features = plain.model.values[file.layer]
        gradients = torch.autograd.grad(score, features)[0]
        size = [length for length in file.shape if length != 3]
        for method, raw in cams_of(*(value.movedim(file.channel_axis, 1) for value in (features, gradients))).items():
            cam = F.interpolate(raw.relu(), size, mode="bilinear").squeeze(1)
            found[method] = cam.unsqueeze(1 + file.shape.index(3))
        found["guided_gradcam"] = found["guided_backprop"] * found["gradcam"]
        found |= {"gradcam_features": features, "gradcam_gradients": gradients}
    return {name: value.detach().numpy() for name, value in found.items()}


@pytest.mark.parametrize("name", FILES)
def test_the_original_outputs_are_unchanged(name):
    before, after = run(read(name), FILES[name]), run(explained(name), FILES[name])
    for output, value in before.items():
        np.testing.assert_array_equal(after[output], value)


@pytest.mark.parametrize("name", FILES)
def test_maps_equal_those_in_float64(name):
    file = FILES[name]
    assert_maps_equal(run(explained(name), file), expected_maps(file), name)


@pytest.mark.parametrize("name", FILES)
def test_saliency_equals_central_differences(name):
    file = FILES[name]
    score = score_of(file)

    def evaluate(x: np.ndarray) -> tuple[float, list[torch.Tensor]]:
        return float(score(torch.from_numpy(x))), score.model.sides

    x = images(file).astype(np.float64)
    direction = random_direction(x, seed=5)
    found = sweep(evaluate, x, direction)
    slope = float((run(explained(name), file)["saliency"] * direction).sum())
    assert found.uncertainty < 1e-4, f"no step can be trusted:\n{found}"
    assert abs(slope / found.slope - 1) < 1e-3, f"saliency says {slope:.8e}:\n{found}"


@pytest.mark.parametrize("name", FILES)
def test_inspect_says_what_conversion_then_does(name):
    file, said = FILES[name], graphgbp.inspect(read(name))
    manifest = json.loads(next(e.value for e in explained(name).metadata_props if e.key == contract.MANIFEST_KEY))
    assert said.gaps == [] and said.score["tensor"] == manifest["score"]["tensor"]
    assert said.rectifiers == manifest["rectifiers"]
    assert {rectifier["tensor"] for rectifier in said.rectifiers} == set(file.rectifiers)
    assert [layer["tensor"] for layer in said.layers if layer["chosen"]] == [
        layer["tensor"] for layer in manifest["target_layers"]
    ]
    assert [layer["tensor"] for layer in manifest["target_layers"]] == [file.layer] * bool(file.layer)


def weights_as_constants(model: onnx.ModelProto) -> None:
    """As paddle2onnx writes large networks."""
    constants = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in model.graph.initializer]
    nodes = [*constants, *model.graph.node]
    del model.graph.initializer[:], model.graph.node[:]
    model.graph.node.extend(nodes)


def weights_as_inputs(model: onnx.ModelProto) -> None:
    """As IR version 3 demanded it."""
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in model.graph.initializer
    )


def nameless_and_backwards(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for node in model.graph.node:
        node.name = ""


@pytest.mark.parametrize("rewrite", [weights_as_constants, weights_as_inputs, nameless_and_backwards])
@pytest.mark.parametrize("name", ["keras_mobile", "paddle_mobile"])
def test_the_same_file_in_another_form(name, rewrite):
    model = onnx.ModelProto()
    model.CopyFrom(read(name))
    rewrite(model)
    file = FILES[name]
    assert_maps_equal(run(graphgbp.convert(model, file.methods), file), expected_maps(file), f"{name} {rewrite}")


def test_trees_are_refused_by_name():
    """As onnxmltools writes a LightGBM or XGBoost classifier."""
    node = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "y"], "trees", domain="ai.onnx.ml", classlabels_int64s=[0, 1],
        class_ids=[0, 1], class_nodeids=[1, 2], class_treeids=[0, 0], class_weights=[1.0, 1.0],
        nodes_falsenodeids=[2, 0, 0], nodes_truenodeids=[1, 0, 0], nodes_featureids=[0, 0, 0], nodes_nodeids=[0, 1, 2],
        nodes_treeids=[0, 0, 0], nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_values=[0.0, 0.0, 0.0],
        post_transform="NONE",
    )  # fmt: skip
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 2])
    label = helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["N"])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 1)]
    model = helper.make_model(helper.make_graph([node], "trees", [x], [label, y]), opset_imports=opsets)
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"'trees': a tree is constant between its thresholds"):
        graphgbp.convert(model, ["saliency"])
    assert [gap["op"] for gap in graphgbp.inspect(model).gaps] == ["TreeEnsembleClassifier"]


def test_a_model_that_takes_pixels_as_bytes():
    """Preprocessing inside the graph: the maps are those of the network behind it, by a pixel as a real number."""
    inner = [
        "a = Conv(image, w, b)", "r = Relu(a)", "p = GlobalAveragePool(r)", "f = Flatten(p)", "y = Gemm(f, v)",
    ]  # fmt: skip
    outer = ["c = Cast<to=1>(pixels)", "t = Transpose<perm=[0, 3, 1, 2]>(c)", "s = Sub(t, m)", "image = Div(s, d)"]
    weights = {"w": drawn(6, 3, 3, 3), "b": drawn(6), "v": drawn(6, 4)}
    constants = {"m": np.float32(127), "d": np.float32(128)}
    bare = model(inner, {"image": ["n", 3, 12, 12]}, ["y"], weights)
    whole = model(
        [*outer, *inner],
        {"pixels": ["n", 12, 12, 3]},
        ["y"],
        weights | constants,
        dtype=TensorProto.UINT8,
        output_types={"y": TensorProto.FLOAT},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    images = ((pixels.astype(np.float32) - 127) / 128).transpose(0, 3, 1, 2)
    methods = ["guided_backprop", "gradcam"]
    found = graphgbp.Explainer(whole, methods).explain(pixels, [1, 2])
    wanted = graphgbp.Explainer(bare, methods).explain(images, [1, 2])
    assert found.guided_backprop.dtype == np.float32
    np.testing.assert_allclose(found.guided_backprop.transpose(0, 3, 1, 2) * 128, wanted.guided_backprop, rtol=1e-5)
    np.testing.assert_allclose(found.gradcam.transpose(0, 3, 1, 2), wanted.gradcam, rtol=1e-5)
