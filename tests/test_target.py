"""The score and its seed: which tensor is explained, for which class, and which targets are refused at run time."""

import numpy as np
import onnxruntime as ort
import pytest
import torch

import graphgbp
from graphgbp.analysis import Analysis
from graphgbp.options import Request
from graphgbp.prepare import prepare
from tests.build import drawn, model, small_cnn
from tests.rules.harness import run

HEAD = {"w": drawn(12, 5, seed=1), "one": drawn(12, 1, seed=2), "pixels": drawn(5, 3, 1, 1, seed=3)}
FLAT = ["f = Flatten(x)", "z = MatMul(f, w)"]


def score_of(nodes, output=None, kind="auto", inputs=None):
    made = model(nodes, inputs or {"x": ("N", 3, 2, 2)}, ["y"], HEAD)
    return Analysis(prepare(made), Request(kind, output=output)).score


@pytest.mark.parametrize(
    ("tail", "tensor", "activation", "axis"),
    [
        (["y = Identity(z)"], "y", None, 1),
        (["y = Softmax(z)"], "z", "Softmax", 1),
        (["y = LogSoftmax(z)"], "z", "LogSoftmax", 1),
        (["y = Sigmoid(z)"], "z", "Sigmoid", 1),
        (["p = Softmax(z)", "d = Dropout(p)", "y = Cast<to=1>(d)"], "z", "Softmax", 1),
        (["p = Softmax(z)", "u = Identity(p)", "y = Flatten(u)"], "z", "Softmax", 1),
        (["y = Relu(z)"], "y", None, 1),
    ],
)
def test_the_score_is_taken_before_a_final_activation(tail, tensor, activation, axis):
    score = score_of([*FLAT, *tail])
    assert (score.tensor.name, score.activation, score.class_axis, score.classes) == (tensor, activation, axis, 5)


def test_probability_is_the_activations_output():
    assert score_of([*FLAT, "p = Softmax(z)", "y = Identity(p)"], kind="probability").tensor.name == "p"


def test_softmax_says_the_class_axis():
    score = score_of(["t = Transpose<perm=[0,2,3,1]>(x)", "y = Softmax<axis=-1>(t)"])
    assert score.class_axis == 3 and score.classes == 3


CASES = {
    "classes": ([*FLAT, "y = Identity(z)"], 5),
    "softmax": ([*FLAT, "y = Softmax(z)"], 5),
    "pixels": (["y = Conv(x, pixels)"], 5),
    "tokens": (["s = Reshape(x, shape)", "y = Softmax<axis=-1>(s)"], 4),
    "one for two": (["f = Flatten(x)", "z = MatMul(f, one)", "y = Sigmoid(z)"], 2),
    "one for two, flat": (["f = Flatten(x)", "z = MatMul(f, one)", "y = Squeeze(z, axes)"], 2),
    "open class count": (["y = Reshape(x, flexible)"], 6),
}


def scores(name: str, x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The pre-softmax scores by torch, and their class axis."""
    w, one, pixels = (torch.from_numpy(HEAD[key]) for key in ("w", "one", "pixels"))
    match name:
        case "classes" | "softmax":
            return x.flatten(1) @ w, 1
        case "pixels":
            return torch.nn.functional.conv2d(x, pixels), 1
        case "tokens":
            return x.reshape(-1, 3, 4), 2
        case "open class count":
            return x.reshape(-1, 6, 2), 1
        case _:
            z = x.flatten(1) @ one
            return torch.cat([-z, z], 1), 1


@pytest.mark.parametrize("targets", [[-1], [-1, -1, -1], [1], [1, -1, 0]])
@pytest.mark.parametrize("name", CASES)
def test_score_class_and_gradient_equal_torchs(name, targets):
    nodes, classes = CASES[name]
    weights = HEAD | {"shape": np.array([-1, 3, 4]), "axes": np.array([1]), "flexible": np.array([-1, 6, 2])}
    explained = graphgbp.convert(model(nodes, {"x": ("N", 3, 2, 2)}, ["y"], weights), ["saliency"])
    x = drawn(3, 3, 2, 2, seed=9)
    every_pixel = {"target_mask": np.ones((1, 1, 1), np.float32)} if name == "pixels" else {}
    got = run(explained, {"x": x, "target": np.array(targets), **every_pixel})

    leaf = torch.from_numpy(x).requires_grad_()
    z, axis = scores(name, leaf)
    z = z.movedim(axis, 1).reshape(3, classes, -1)
    predicted = z.argmax(1, keepdim=True)
    wanted = torch.tensor(targets).expand(3).reshape(3, 1, 1)
    chosen = torch.where(wanted == -1, predicted, wanted.expand_as(predicted))
    score = z.gather(1, chosen).sum((1, 2))
    score.sum().backward()
    np.testing.assert_allclose(got["target_score"], score.detach().numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got["saliency"], leaf.grad.numpy(), rtol=1e-5, atol=1e-6)
    expected = chosen[:, 0, 0].numpy() if z.shape[2] == 1 else np.broadcast_to(targets, 3)
    np.testing.assert_array_equal(got["target_class"], expected)


def test_a_whole_output_without_classes():
    made = model(["y = ReduceMean<keepdims=0>(x)"], {"x": (2, 3)}, ["y"])
    got = run(graphgbp.convert(made, ["saliency"]), {"x": drawn(2, 3), "target": np.array([-1])})
    np.testing.assert_allclose(got["saliency"], np.full((2, 3), 1 / 6), rtol=1e-6)
    np.testing.assert_allclose(got["target_score"], [drawn(2, 3).mean()], rtol=1e-6)


def test_probability_is_differentiated_through_the_softmax():
    explained = graphgbp.convert(small_cnn(["y = Softmax(z)"]), ["saliency"], score="probability")
    before = graphgbp.convert(small_cnn(["y = Softmax(z)"]), ["saliency"])
    feeds = {"x": drawn(2, 3, 8, 8), "target": np.array([2])}
    probability, score = run(explained, feeds), run(before, feeds)
    np.testing.assert_allclose(probability["target_score"], probability["y"][:, 2], rtol=1e-5)
    assert not np.allclose(probability["saliency"], score["saliency"])


def test_one_probability_for_two_classes():
    made = model([*FLAT[:1], "z = MatMul(f, one)", "y = Sigmoid(z)"], {"x": ("N", 3, 2, 2)}, ["y"], HEAD)
    explained = graphgbp.convert(made, ["saliency"], score="probability")
    x = drawn(6, 3, 2, 2, seed=4)
    got, asked = (run(explained, {"x": x, "target": np.array([k])}) for k in (-1, 0))
    p = got["y"][:, 0]
    assert 0 < (p > 0.5).sum() < 6
    np.testing.assert_array_equal(got["target_class"], (p > 0.5).astype(int))
    np.testing.assert_allclose(got["target_score"], np.maximum(p, 1 - p), rtol=1e-6)
    np.testing.assert_allclose(asked["target_score"], 1 - p, rtol=1e-6)
    slope = (p * (1 - p))[:, None] * HEAD["one"][:, 0]
    np.testing.assert_allclose(asked["saliency"].reshape(6, -1), -slope, rtol=1e-4, atol=1e-7)


def test_weights_are_any_combination_of_classes():
    explained = graphgbp.convert(small_cnn(["y = Softmax(z)"]), ["saliency"], target="weights")
    classes = graphgbp.convert(small_cnn(["y = Softmax(z)"]), ["saliency"])
    assert [x.name for x in explained.graph.input] == ["x", "target_weights"]
    x = drawn(2, 3, 8, 8)
    contrast = np.array([[1, 0, -2, 0, 0], [0, 0, 0, 1, 0]], np.float32)
    got = run(explained, {"x": x, "target_weights": contrast})
    one, three, four = (run(classes, {"x": x, "target": np.array([k])})["saliency"] for k in (0, 2, 3))
    np.testing.assert_allclose(got["saliency"][0], one[0] - 2 * three[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["saliency"][1], four[1], rtol=1e-5, atol=1e-7)
    assert "target_class" not in got


@pytest.mark.parametrize("batch", ["N", 3])
@pytest.mark.parametrize("targets", [[], [-2], [5], [0, 1], [0, 1, 2, 3], [0, 1, 5], [0, -2, 1], [2**40]])
def test_a_target_that_does_not_fit_fails_in_the_file_itself(batch, targets):
    explained = graphgbp.convert(small_cnn(batch=batch))
    with pytest.raises(Exception, match="graphgbp/target/class_out_of_range"):
        run(explained, {"x": drawn(3, 3, 8, 8), "target": np.array(targets, np.int64)})


def test_an_oversized_target_fails_for_one_image_too():
    with pytest.raises(Exception, match="graphgbp/target/class_out_of_range"):
        run(graphgbp.convert(small_cnn()), {"x": drawn(1, 3, 8, 8), "target": np.array([0, 1])})


def test_the_target_is_required_unless_it_is_made_optional():
    x = drawn(2, 3, 8, 8)
    session = ort.InferenceSession(
        graphgbp.convert(small_cnn()).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    with pytest.raises(ValueError, match="target"):
        session.run(None, {"x": x})
    optional = graphgbp.convert(small_cnn(), target="optional")
    got, asked = run(optional, {"x": x}), run(optional, {"x": x, "target": np.array([3])})
    np.testing.assert_array_equal(got["target_class"], got["y"].argmax(1))
    assert asked["target_class"].tolist() == [3, 3]
