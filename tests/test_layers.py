"""Candidate target layers, and the automatic choice."""

import numpy as np
import pytest
import torch

import graphgbp
from graphgbp.analysis import Analysis
from graphgbp.prepare import prepare
from tests.build import drawn, model, small_cnn
from tests.rules.harness import run

WEIGHTS = {
    "w": drawn(4, 3, 3, 3, scale=0.4),
    "v": drawn(4, 4, 3, 3, seed=1, scale=0.4),
    "h": drawn(4, 5, seed=2),
    "scale": np.ones(4, np.float32),
    "bias": np.zeros(4, np.float32),
}
CONV = "pads=[1,1,1,1]"
STEM = [f"a = Conv<{CONV}>(x, w)", "r = Relu(a)"]
HEAD = ["p = GlobalAveragePool(last)", "f = Flatten(p)", "y = MatMul(f, h)"]


def analysis(nodes, shape=("N", 3, 8, 8)):
    return Analysis(prepare(model(nodes, {"x": shape}, ["y"], WEIGHTS)))


def auto(nodes, shape=("N", 3, 8, 8)):
    return analysis(nodes, shape).layer("auto").tensor.name


def test_a_chain_ends_at_its_last_activation():
    assert auto([*STEM, f"b = Conv<{CONV}>(r, v)", "last = Relu(b)", *HEAD]) == "last"


def test_a_residual_block_offers_only_its_sum():
    nodes = [*STEM, f"b = Conv<{CONV}>(r, v)", "c = Relu(b)", "s = Add(c, r)", "last = Relu(s)", *HEAD]
    found = [layer.tensor.name for layer in analysis(nodes).layers]
    assert found == ["a", "r", "s", "last"]


def test_dense_concatenation_is_crossed_where_it_joins():
    nodes = [*STEM, f"b = Conv<{CONV}>(r, v)", "j = Add(b, r)", "m = Mul(b, j)", "last = Relu(m)", *HEAD]
    found = [layer.tensor.name for layer in analysis(nodes).layers]
    assert "b" not in found and "j" not in found and found[-1] == "last"


def test_dropout_and_pooling_behind_the_activation_are_passed_over():
    nodes = [*STEM, "d = Dropout(r)", "last = AveragePool<kernel_shape=[2,2]>(d)", *HEAD]
    assert auto(nodes) == "r"


def test_max_pooling_belongs_to_the_features():
    assert auto([*STEM, "last = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)", *HEAD]) == "last"


def test_batch_normalization_and_activation_at_the_end():
    nodes = [*STEM, "n = BatchNormalization(r, scale, bias, bias, scale)", "last = Relu(n)", *HEAD]
    assert auto(nodes) == "last"


def test_a_mean_over_positions_is_the_pooling():
    tail = ["last = ReduceMean<keepdims=1>(r, axes)", "f = Flatten(last)", "y = MatMul(f, h)"]
    made = model([*STEM, *tail], {"x": ("N", 3, 8, 8)}, ["y"], WEIGHTS | {"axes": np.array([2, 3])})
    assert Analysis(prepare(made)).layer("auto").tensor.name == "r"


def test_the_reason_is_told():
    layer = analysis([*STEM, "last = MaxPool<kernel_shape=[2,2]>(r)", *HEAD]).layer("auto")
    assert "every path" in layer.reason and "after MaxPool" in layer.reason and "GlobalAveragePool" in layer.reason


def test_no_layer_where_every_channel_is_a_class():
    made = model([f"last = Conv<{CONV}>(x, w)", *HEAD[:2], "y = Identity(f)"], {"x": ("N", 3, 8, 8)}, ["y"], WEIGHTS)
    with pytest.raises(graphgbp.RequestError, match=r"are the classes: .* candidates are last"):
        graphgbp.convert(made)
    found = run(graphgbp.convert(made, ["gradcam"], target_layer="last"), {"x": drawn(1, 3, 8, 8), "target": [2]})
    np.testing.assert_allclose(found["gradcam"][:, 0], np.maximum(found["gradcam_features"][:, 2] / 64, 0), rtol=1e-5)


def test_no_spatial_tensor():
    made = model(["y = MatMul(x, h)"], {"x": ("N", 4)}, ["y"], WEIGHTS)
    with pytest.raises(graphgbp.RequestError, match="no spatial tensor"):
        graphgbp.convert(made)
    graphgbp.convert(made, ["saliency"])


def test_a_layer_by_tensor_and_by_node_name():
    made = small_cnn()
    made.graph.node[1].name = "first_relu"
    x = {"x": drawn(1, 3, 8, 8), "target": np.array([0])}
    by_tensor = run(graphgbp.convert(made, target_layer="r1"), x)["gradcam"]
    by_node = run(graphgbp.convert(made, target_layer="first_relu"), x)["gradcam"]
    last = run(graphgbp.convert(made), x)["gradcam"]
    np.testing.assert_array_equal(by_tensor, by_node)
    assert not np.allclose(by_tensor, last)


def test_a_layer_the_score_does_not_depend_on():
    made = model([*STEM, "side = Relu(a)", "last = Relu(r)", *HEAD], {"x": ("N", 3, 8, 8)}, ["y"], WEIGHTS)
    with pytest.raises(graphgbp.RequestError, match="does not depend on 'side'"):
        graphgbp.convert(made, target_layer="side")


def test_channels_last_input():
    """A network that reads NHWC photos, as TensorFlow exports them, gives NHWC maps."""
    nodes = ["t = Transpose<perm=[0,3,1,2]>(x)", f"a = Conv<{CONV}>(t, w)", "last = Relu(a)", *HEAD]
    last = graphgbp.convert(model(nodes, {"x": ("N", 8, 6, 3)}, ["y"], WEIGHTS))
    first = graphgbp.convert(
        model([f"a = Conv<{CONV}>(x, w)", "last = Relu(a)", *HEAD], {"x": ("N", 3, 8, 6)}, ["y"], WEIGHTS)
    )
    x, target = drawn(2, 3, 8, 6), np.array([1, 2])
    got = run(last, {"x": x.transpose(0, 2, 3, 1), "target": target})
    expected = run(first, {"x": x, "target": target})
    for method in ("gradcam", "guided_backprop", "guided_gradcam"):
        np.testing.assert_allclose(got[method], expected[method].transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


def test_a_layer_in_channels_last_order():
    nodes = [
        f"a = Conv<{CONV}>(x, w)",
        "t = Transpose<perm=[0,2,3,1]>(a)",
        "n = Relu(t)",
        "u = Transpose<perm=[0,3,1,2]>(n)",
        "last = Sigmoid(u)",
        *HEAD,
    ]
    made = model(nodes, {"x": ("N", 3, 8, 8)}, ["y"], WEIGHTS)
    x = {"x": drawn(2, 3, 8, 8), "target": np.array([0])}
    there, back = (run(graphgbp.convert(made, ["gradcam"], target_layer=layer), x) for layer in ("n", "u"))
    assert there["gradcam_features"].shape == (2, 8, 8, 4)
    np.testing.assert_allclose(there["gradcam"], back["gradcam"], rtol=1e-5, atol=1e-6)


def test_a_dense_layer_over_channels_keeps_them_last():
    """NHWC features behind a dense layer: Grad-CAM by hand."""
    weights = WEIGHTS | {"d": drawn(4, 6, seed=7), "k": drawn(6, 5, seed=8), "axes": np.array([1, 2])}
    nodes = [
        f"a = Conv<{CONV}>(x, w)",
        "t = Transpose<perm=[0,2,3,1]>(a)",
        "m = MatMul(t, d)",
        "n = Relu(m)",
        "p = ReduceMean<keepdims=0>(n, axes)",
        "y = MatMul(p, k)",
    ]
    made = model(nodes, {"x": ("N", 3, 8, 8)}, ["y"], weights)
    options = {"target_layer": "n", "relu_attributions": False}
    got = run(graphgbp.convert(made, ["gradcam"], **options), {"x": drawn(2, 3, 8, 8), "target": np.array([2])})
    expected = (got["gradcam_features"] * weights["k"][:, 2] / 64).sum(-1)
    np.testing.assert_allclose(got["gradcam"][:, 0], expected, rtol=1e-4, atol=1e-6)


def test_a_layer_whose_channel_axis_nothing_tells():
    weights = WEIGHTS | {"s": np.array([0, 8, 32, 1]), "back": np.array([0, 4, 8, 8])}
    tail = ["b = Reshape(a, s)", "n = Relu(b)", "last = Reshape(n, back)", "f = Flatten(last)", "y = ReduceSum(f, one)"]
    made = model([f"a = Conv<{CONV}>(x, w)", *tail], {"x": ("N", 3, 8, 8)}, ["y"], weights | {"one": np.array([1])})
    with pytest.raises(graphgbp.RequestError, match=r"which axis of 'n' .* holds the channels"):
        graphgbp.convert(made, target_layer="n")


def test_a_shuffled_layer_is_told_by_the_convolution_that_reads_it():
    weights = WEIGHTS | {"s": np.array([0, 2, 2, 8, 8]), "back": np.array([0, 4, 8, 8])}
    shuffle = ["q = Reshape(r, s)", "t = Transpose<perm=[0,2,1,3,4]>(q)", "u = Reshape(t, back)"]
    nodes = [*STEM, *shuffle, f"last = Conv<{CONV}>(u, v)", *HEAD]
    made = model(nodes, {"x": ("N", 3, 8, 8)}, ["y"], weights)
    assert Analysis(prepare(made)).layer("u").layout.channel_axis == 1


@pytest.mark.parametrize(
    ("shape", "nodes", "layout"),
    [
        (("N", 3, 8, 8), [f"y = Conv<{CONV}>(x, w)"], "NCHW"),
        (("N", 3, "H", 3), [f"y = Conv<{CONV}>(x, w)"], "NCHW"),
        (("N", 8, 8, 3), ["t = Transpose<perm=[0,3,1,2]>(x)", "y = Conv(t, w)"], "NHWC"),
        (("N", 8, 3, 3), ["t = Relu(x)", "y = Relu(t)"], "NHWC"),
        (("N", 3, 8, 8), ["t = Relu(x)", "y = Relu(t)"], "NCHW"),
        (("N", 3, 8, 3), ["t = Relu(x)", "y = Relu(t)"], None),
        (("N", 16, 8, 8), ["t = Relu(x)", "y = Relu(t)"], None),
        (("N", 3), ["y = Relu(x)"], None),
    ],
)
def test_layout(shape, nodes, layout):
    assert analysis(nodes, shape).image.layout == layout


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("opset", [16, 18])
@pytest.mark.parametrize("size", [8, 21, "S"])
def test_the_map_is_resized_as_torch_does(mode, opset, size):
    made = small_cnn(size=size, opset=opset)
    pixels = 13 if size == "S" else size
    feeds = {"x": drawn(2, 3, pixels, pixels), "target": np.array([3])}
    got = run(graphgbp.convert(made, ["gradcam"], interpolate_mode=mode, relu_attributions=False), feeds)
    features, gradients = (torch.from_numpy(got[f"gradcam_{kind}"]).double() for kind in ("features", "gradients"))
    cam = (gradients.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True)
    options = {"align_corners": False} if mode == "bilinear" else {}
    expected = torch.nn.functional.interpolate(cam, (pixels, pixels), mode=mode, **options)
    np.testing.assert_allclose(got["gradcam"], expected.numpy(), rtol=1e-4, atol=1e-6)
    assert (got["gradcam"] < 0).any()
