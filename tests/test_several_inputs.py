"""Models of several inputs: which are explained, how their maps are named, how the others are fed."""

import numpy as np
import pytest
import torch

import graphgbp
from graphgbp import contract
from tests.build import drawn, model

WEIGHTS = {
    "w1": drawn(4, 3, 3, 3, seed=1),
    "w2": drawn(4, 1, 3, 3, seed=2),
    "v": drawn(2, 4, seed=3),
    "h": drawn(4, 5, seed=4),
}
NODES = [
    "a = Conv<pads=[1,1,1,1]>(left, w1)", "b = Conv<pads=[1,1,1,1]>(right, w2)", "s = Add(a, b)", "r = Relu(s)",
    "p = GlobalAveragePool(r)", "f = Flatten(p)", "m = MatMul(meta, v)", "g = Add(f, m)", "z = MatMul(g, h)",
    "y = Softmax(z)",
]  # fmt: skip
INPUTS = {"left": ("N", 3, 8, 8), "right": ("N", 1, 8, 8), "meta": ("N", 2)}
FEEDS = {"left": drawn(3, 3, 8, 8, seed=5), "right": drawn(3, 1, 8, 8, seed=6), "meta": drawn(3, 2, seed=7)}


@pytest.fixture(scope="module")
def source():
    return model(NODES, INPUTS, ["y"], WEIGHTS)


def torch_maps(target):
    """Saliency, guided backpropagation and Grad-CAM at `r`, by hand."""
    w1, w2, v, h = (torch.from_numpy(WEIGHTS[key]) for key in ("w1", "w2", "v", "h"))
    left, right, meta = (torch.from_numpy(FEEDS[key]).requires_grad_() for key in INPUTS)
    s = torch.nn.functional.conv2d(left, w1, padding=1) + torch.nn.functional.conv2d(right, w2, padding=1)
    r = s.relu()
    score = ((r.mean((2, 3)) + meta @ v) @ h)[:, target].sum()
    saliency = torch.autograd.grad(score, [left, right, meta], retain_graph=True)
    (dr,) = torch.autograd.grad(score, r, retain_graph=True)
    guided = torch.autograd.grad(s, [left, right], dr.relu() * (s > 0))
    cam = (dr.mean((2, 3), keepdim=True) * r).sum(1, keepdim=True).relu()
    return saliency, guided, cam.detach()


def test_every_float_input_is_explained(source):
    explainer = graphgbp.Explainer(source, contract.METHODS, device="cpu")
    result = explainer.explain(FEEDS, 2)
    saliency, guided, cam = torch_maps(2)
    for name, expected in zip(INPUTS, saliency, strict=True):
        np.testing.assert_allclose(result.maps[f"saliency/{name}"], expected.numpy(), rtol=1e-4, atol=1e-6)
        product = FEEDS[name] * expected.numpy()
        np.testing.assert_allclose(result.maps[f"input_x_gradient/{name}"], product, rtol=1e-4, atol=1e-6)
    for name, expected in zip(("left", "right"), guided, strict=True):
        np.testing.assert_allclose(result.maps[f"guided_backprop/{name}"], expected.numpy(), rtol=1e-4, atol=1e-6)
        product = (expected * cam).numpy()
        np.testing.assert_allclose(result.maps[f"guided_gradcam/{name}"], product, rtol=1e-4, atol=1e-6)
    for method in ("gradcam", "hirescam", "xgradcam"):  # the gradient at `r` is the same at every position
        np.testing.assert_allclose(result.maps[method], cam.numpy(), rtol=1e-4, atol=1e-6)
    assert "guided_gradcam/meta" not in result.maps
    assert [entry["name"] for entry in explainer.manifest.inputs] == ["left", "right", "meta"]


def test_a_named_input_alone_is_explained(source):
    explainer = graphgbp.Explainer(source, ["saliency", "guided_gradcam"], inputs="right", device="cpu")
    result = explainer.explain(FEEDS, 2)
    saliency, guided, cam = torch_maps(2)
    np.testing.assert_allclose(result.saliency, saliency[1].numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.guided_gradcam, (guided[1] * cam).numpy(), rtol=1e-4, atol=1e-6)
    assert explainer.input["name"] == "right" and result.images.shape == (3, 1, 8, 8)


def test_batches_cut_every_input(source):
    whole = graphgbp.Explainer(source, ["saliency"], device="cpu").explain(FEEDS, [0, 1, 2])
    parts = graphgbp.Explainer(source, ["saliency"], device="cpu", batch_size=2).explain(FEEDS, [0, 1, 2])
    for role, array in whole.maps.items():
        np.testing.assert_allclose(parts.maps[role], array, atol=1e-6)


def test_maps_are_saved(source, tmp_path):
    result = graphgbp.Explainer(source, device="cpu").explain(FEEDS, 1)
    result.save(tmp_path)
    arrays = np.load(tmp_path / "image_0.npz")
    assert {"guided_backprop/left", "guided_backprop/meta", "gradcam"} <= set(arrays.files)
    assert (tmp_path / "image_0.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (FEEDS["left"], "takes 3 inputs; give a mapping with left, right, meta"),
        ({"left": FEEDS["left"]}, "'right' is missing"),
        ({**FEEDS, "more": 1}, "there is no input 'more'"),
        ({**FEEDS, "meta": FEEDS["left"]}, "input 'meta' takes"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(source, images, words):
    with pytest.raises(graphgbp.ImageError, match=words):
        graphgbp.Explainer(source, ["saliency"], device="cpu").explain(images)


def test_an_input_the_score_does_not_depend_on_is_left_out_unless_named():
    source = model([*NODES, "e = Relu(extra)"], {**INPUTS, "extra": ("N", 2)}, ["y", "e"], WEIGHTS)
    explainer = graphgbp.Explainer(source, ["saliency"], device="cpu")
    assert [entry["name"] for entry in explainer.manifest.inputs] == ["left", "right", "meta"]
    result = explainer.explain({**FEEDS, "extra": np.ones((3, 2), np.float32)})
    assert "saliency/extra" not in result.maps
    with pytest.raises(graphgbp.RequestError, match="does not depend on input 'extra'"):
        graphgbp.convert(source, ["saliency"], inputs=["left", "extra"])


def test_integer_inputs_are_fed_and_not_explained():
    nodes = ["e = Gather(table, tokens)", "m = ReduceMean<keepdims=0>(e, axes)", "q = Mul(x, m)", "y = MatMul(q, h)"]
    weights = {"table": drawn(9, 4, seed=1), "axes": np.array([1]), "h": drawn(4, 5, seed=2)}
    source = model(nodes, {"x": ("N", 4), "tokens": ("N", 3)}, ["y"], weights)
    source.graph.input[1].type.tensor_type.elem_type = 7
    x, tokens = drawn(2, 4, seed=3), np.array([[0, 1, 2], [5, 5, 8]])
    got = graphgbp.Explainer(source, ["saliency"], device="cpu").explain({"x": x, "tokens": tokens}, 3)
    expected = weights["table"][tokens].mean(1) * weights["h"][:, 3]
    np.testing.assert_allclose(got.saliency, expected, rtol=1e-5)
