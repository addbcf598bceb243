"""What is explained: the output that is chosen, post-processing left alone, whole outputs, neurons."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import graphgbp
from graphgbp.analysis import Analysis
from graphgbp.prepare import prepare
from tests.build import drawn, model
from tests.rules.harness import run

WEIGHTS = {
    "w": drawn(12, 5, seed=1),
    "v": drawn(12, 7, seed=2),
    "pixels": drawn(5, 3, 1, 1, seed=3),
    "k": np.array([2]),
    "t43": np.array([-1, 3, 4]),
    "w4": drawn(4, 6, seed=4),
    "labels": np.arange(5) + 10,
}
FLAT = ["f = Flatten(x)", "z = MatMul(f, w)"]
X = drawn(3, 3, 2, 2, seed=9)


def made(nodes, outputs, *, batch="N", typed=None):
    return model(nodes, {"x": (batch, 3, 2, 2)}, outputs, WEIGHTS, output_types=typed)


def torch_saliency(score):
    """d score(x) / dx by torch, of the sum over images."""
    x = torch.from_numpy(X).requires_grad_()
    score(x).sum().backward()
    return x.grad.numpy()


def dense(key="w"):
    return lambda x: x.flatten(1) @ torch.from_numpy(WEIGHTS[key])


@pytest.mark.parametrize(
    ("nodes", "outputs", "output", "words"),
    [
        ([*FLAT, "e = MatMul(f, v)", "y = Softmax(z)"], ["e", "y"], "y", r"the first \[N, K\] behind a Softmax"),
        ([*FLAT, "m = Conv(x, pixels)", "y = Identity(z)"], ["m", "y"], "y", r"the first of shape \[N, K\]"),
        ([*FLAT, "m = Conv(x, pixels)", "a = Softmax(m)"], ["z", "a"], "z", r"the first of shape \[N, K\]"),
        (["c = Conv(x, pixels)", "m = Relu(c)", "a = Sigmoid(c)"], ["m", "a"], "a", "ends in a class activation"),
        ([*FLAT, "e = MatMul(f, v)"], ["z", "e"], "z", r"the first of shape \[N, K\] of 2 outputs"),
        (["a = Conv(x, pixels)", "b = Relu(a)"], ["a", "b"], "a", "the first of 2 outputs"),
        (
            ["a = Reshape(x, t43)", "b = Sigmoid(a)", "q = MatMul(b, w4)"],
            ["b", "q"],
            "q",
            "the first that are no boxes",
        ),
        (["s = Shape(x)", "c = Cast<to=1>(s)", *FLAT], ["c", "z"], "z", "output 'z'"),
    ],
)
def test_among_several_outputs_one_is_chosen_with_a_reason(nodes, outputs, output, words):
    score = Analysis(prepare(made(nodes, outputs))).score
    assert score.output == output
    assert re.search(words, score.reason)


def test_an_output_is_explained_by_its_name():
    source = made([*FLAT, "e = MatMul(f, v)", "y = Softmax(z)"], ["y", "e"])
    got = run(graphgbp.convert(source, ["saliency"], output="e"), {"x": X, "target": np.array([6])})
    np.testing.assert_allclose(got["saliency"], torch_saliency(lambda x: dense("v")(x)[:, 6]), rtol=1e-5)


POST_PROCESSING = {
    "ArgMax": (["y = ArgMax<axis=1>(z)"], ["y"], {"y": 7}),
    "ArgMax behind a Softmax": (
        ["p = Softmax(z)", "a = ArgMax<axis=1, keepdims=0>(p)", "y = Cast<to=6>(a)"],
        ["y"],
        {"y": 6},
    ),
    "TopK": (["p = Softmax(z)", "y, i = TopK(p, k)"], ["y", "i"], {"i": 7}),
    "TopK's indices": (["t, y = TopK(z, k)"], ["y"], {"y": 7}),
}


@pytest.mark.parametrize("case", POST_PROCESSING)
def test_post_processing_is_left_alone(case):
    tail, outputs, integers = POST_PROCESSING[case]
    source = made([*FLAT, *tail], outputs, typed=integers)
    explained = graphgbp.convert(source, ["saliency"])
    got = run(explained, {"x": X, "target": np.array([0, 3, -1])})
    plain = run(source, {"x": X})
    for name in outputs:
        np.testing.assert_array_equal(got[name], plain[name])
    scores = dense()(torch.from_numpy(X))
    assert got["target_class"].tolist() == [0, 3, int(scores[2].argmax())]
    chosen = torch.from_numpy(got["target_class"])
    np.testing.assert_allclose(
        got["saliency"], torch_saliency(lambda x: dense()(x).gather(1, chosen[:, None])), rtol=1e-5
    )


def test_zipmap_is_left_alone():
    """As scikit-learn's classifiers are exported: labels by ArrayFeatureExtractor, probabilities in a ZipMap."""
    nodes = [*FLAT, "p = Softmax<axis=1>(z)", "a = ArgMax<axis=1, keepdims=1>(p)"]
    source = made(nodes, ["p"])
    del source.graph.output[:]
    extract = helper.make_node("ArrayFeatureExtractor", ["labels", "a"], ["e"], domain="ai.onnx.ml")
    zipped = helper.make_node("ZipMap", ["p"], ["q"], domain="ai.onnx.ml", classlabels_int64s=range(10, 15))
    source.graph.node.extend([extract, helper.make_node("Reshape", ["e", "flat"], ["label"]), zipped])
    source.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1]), "flat"))
    source.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    pair = helper.make_map_type_proto(TensorProto.INT64, value)
    source.graph.output.append(helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]))
    source.graph.output.append(helper.make_value_info("q", helper.make_sequence_type_proto(pair)))
    explained = graphgbp.convert(source, ["saliency"])
    assert explained.graph.node[: len(source.graph.node)] == source.graph.node[:]
    explainer = graphgbp.Explainer(source, ["saliency"], device="cpu")
    result = explainer.explain(X, [1, 1, 4])
    expected = torch_saliency(lambda x: dense()(x).gather(1, torch.tensor([[1], [1], [4]])))
    np.testing.assert_allclose(result.saliency, expected, rtol=1e-5)
    assert "Softmax" in explainer.manifest.score["reason"]


def test_scores_of_one_image_without_a_batch_axis():
    source = made([*FLAT, "y = Squeeze(z)"], ["y"], batch=1)
    explainer = graphgbp.Explainer(source, ["saliency"], device="cpu")
    assert explainer.classes == 5
    for image in X:
        got = explainer.explain(image[None], [3])
        assert got.target_class.tolist() == [3]
        np.testing.assert_allclose(got.saliency, WEIGHTS["w"][:, 3].reshape(1, 3, 2, 2), rtol=1e-6)


# -- a cotangent, neurons -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "shape", "forward"),
    [
        ([*FLAT, "y = Softmax(z)"], (3, 5), lambda x: dense()(x).softmax(1)),
        (
            ["y = Conv(x, pixels)"],
            (3, 5, 2, 2),
            lambda x: torch.nn.functional.conv2d(x, torch.from_numpy(WEIGHTS["pixels"])),
        ),
        (["y = ReduceMax<keepdims=0>(x)"], (), lambda x: x.max()),
    ],
)
def test_a_cotangent_has_the_outputs_own_shape(nodes, shape, forward):
    source = made(nodes, ["y"])
    explained = graphgbp.convert(source, ["saliency"], target="cotangent")
    assert [value.name for value in explained.graph.input] == ["x", "target_cotangent"]
    cotangent = np.asarray(drawn(*shape, seed=4) if shape else 2.5, np.float32)
    got = run(explained, {"x": X, "target_cotangent": cotangent})
    x = torch.from_numpy(X).requires_grad_()
    terms = forward(x) * torch.from_numpy(cotangent)
    terms.sum().backward()
    np.testing.assert_allclose(got["saliency"], x.grad.numpy(), rtol=1e-4, atol=1e-6)
    expected = terms.detach().numpy().reshape(shape[0] if shape else 1, -1).sum(1)
    np.testing.assert_allclose(got["target_score"], expected, rtol=1e-4)
    result = graphgbp.Explainer(source, ["saliency"], target="cotangent", device="cpu").explain(X, cotangent)
    np.testing.assert_array_equal(result.saliency, got["saliency"])
    assert (result.target_class == -1).all()


def test_a_cotangent_of_another_shape_is_refused():
    source = made([*FLAT, "y = Softmax(z)"], ["y"])
    explained = graphgbp.convert(source, ["saliency"], target="cotangent")
    with pytest.raises(Exception, match="graphgbp/target/weights_of_other_size"):
        run(explained, {"x": X, "target_cotangent": drawn(1, 5)})
    explainer = graphgbp.Explainer(explained, device="cpu")
    with pytest.raises(graphgbp.TargetError, match=r"shape \[1, 5\] and must have that of 'y' \[3, 5\]"):
        explainer.explain(X, drawn(1, 5))
    with pytest.raises(graphgbp.TargetError, match="takes a cotangent"):
        explainer.explain(X)


CONV = {"w1": drawn(4, 3, 3, 3, seed=1), "w2": drawn(6, 4, 3, 3, seed=2)}


def conv_net():
    nodes = ["a = Conv(x, w1)", "r = Relu(a)", "b = Conv(r, w2)", "q = GlobalAveragePool(b)", "y = Flatten(q)"]
    return model(nodes, {"x": ("N", 3, 8, 8)}, ["y"], CONV)


def layer_b(x):
    w1, w2 = (torch.from_numpy(CONV[key]) for key in ("w1", "w2"))
    return torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, w1).relu(), w2)


@pytest.mark.parametrize(
    ("channel", "position"), [(2, [1, 3]), (2, [-1, 0]), (0, [-1, -1]), (-1, [3, 3]), (-1, [-1, -1]), (5, None)]
)
def test_a_neuron_is_a_channel_and_a_position(channel, position):
    images = drawn(2, 3, 8, 8, seed=5)
    explainer = graphgbp.Explainer(conv_net(), ["saliency", "guided_backprop"], target_tensor="b", device="cpu")
    got = explainer.explain(images, channel, position=position)
    x = torch.from_numpy(images).requires_grad_()
    z = layer_b(x)
    rows, columns = (slice(None) if at == -1 else slice(at, at + 1) for at in position or (-1, -1))
    z = z[:, :, rows, columns]
    score = (z.amax(1) if channel == -1 else z[:, channel]).sum((1, 2))
    score.sum().backward()
    np.testing.assert_allclose(got.target_score, score.detach().numpy(), rtol=1e-4)
    np.testing.assert_allclose(got.saliency, x.grad.numpy(), rtol=1e-4, atol=1e-6)
    assert not np.allclose(got.saliency, got.guided_backprop)


def test_each_image_has_its_own_neuron():
    images = drawn(2, 3, 8, 8, seed=5)
    explainer = graphgbp.Explainer(conv_net(), ["saliency"], target_tensor="b", device="cpu")
    both = explainer.explain(images, [1, 4], position=[[0, 1], [3, -1]]).saliency
    one, other = explainer.explain(images, 1, position=[0, 1]), explainer.explain(images, 4, position=[3, -1])
    np.testing.assert_allclose(both[0], one.saliency[0], atol=1e-6)
    np.testing.assert_allclose(both[1], other.saliency[1], atol=1e-6)


@pytest.mark.parametrize("position", [[4, 0], [0, 4], [-2, 0], [0, 0, 0]])
def test_a_position_that_is_not_there_is_refused(position):
    explained = graphgbp.convert(conv_net(), ["saliency"], target_tensor="b")
    with pytest.raises(graphgbp.TargetError, match="position"):
        graphgbp.Explainer(explained, device="cpu").explain(drawn(2, 3, 8, 8), 0, position=position)
    if len(position) == 2:
        feeds = {"x": drawn(2, 3, 8, 8), "target": np.array([0]), "target_position": np.array([position])}
        with pytest.raises(Exception, match="graphgbp/target/position_out_of_range"):
            run(explained, feeds)


def test_a_neuron_without_positions():
    explained = graphgbp.convert(made([*FLAT, "h = Relu(z)", "y = Softmax(h)"], ["y"]), ["saliency"], target_tensor="z")
    assert [value.name for value in explained.graph.input] == ["x", "target"]
    got = run(explained, {"x": X, "target": np.array([2])})
    np.testing.assert_allclose(got["saliency"], torch_saliency(lambda x: dense()(x)[:, 2]), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "words"), [("x", "no float tensor that the model computes"), ("bb", "no tensor or node named 'bb'")]
)
def test_what_is_no_neuron_is_refused(name, words):
    with pytest.raises(graphgbp.RequestError, match=words):
        graphgbp.convert(conv_net(), ["saliency"], target_tensor=name)


# -- which axis holds the classes ---------------------------------------------------------------------------

HEADS = {
    "k15": drawn(15, 3, 1, 1, seed=11),
    "k5": drawn(5, 3, 1, 1, seed=12),
    "one": drawn(1, 3, 1, 1, seed=13),
    "up": drawn(3, 5, 2, 2, seed=14),
    "dense": drawn(3, 5, seed=15),
    "flat": np.array([0, -1, 5]),
    "split": np.array([0, 3, 5, 4, 4]),
    "rows": np.array([-1, 3]),
    "map": np.array([-1, 4, 4, 5]),
    "first": np.array([[[0], [3], [1]]]),
    "middle": np.array([1]),
    "both": np.array([1, 2]),
}
LAST = "t = Transpose<perm=[0,2,3,1]>(c)"
CLASS_AXES = {
    "anchors, laid out last": (["c = Conv(x, k15)", LAST, "y = Reshape(t, flat)"], 2),
    "anchors, split": (
        ["c = Conv(x, k15)", "s = Reshape(c, split)", "t = Transpose<perm=[0,3,4,1,2]>(s)", "y = Reshape(t, flat)"],
        2,
    ),
    "two levels": (
        [
            "c = Conv(x, k15)", LAST, "a = Reshape(t, flat)", "d = Conv<strides=[2,2]>(x, k5)",
            "e = Transpose<perm=[0,2,3,1]>(d)", "b = Reshape(e, flat)", "y = Concat<axis=1>(a, b)",
        ],
        2,
    ),
    "boxes and classes side by side": (
        ["c = Conv(x, k5)", "m = ReduceMax<keepdims=1>(x, middle)", "a = Concat<axis=1>(m, c)", "y = Relu(a)"],
        1,
    ),
    "the best rows": (
        [
            "c = Conv(x, k5)", LAST, "r = Reshape(t, flat)", "i = Expand(first, shape)",
            "y = GatherElements<axis=1>(r, i)",
        ],
        2,
    ),
    "Gemm, one row": (
        ["f = ReduceMean(x, both)", "g = Squeeze(f, both)", "h = Gemm(g, mix)", "y = Unsqueeze(h, middle)"], 2
    ),
    "Einsum": (["y = Einsum<equation=\"nchw,ck->nhwk\">(x, dense)"], 3),
    "dense over channels last": (
        ["t = Transpose<perm=[0,2,3,1]>(x)", "r = Reshape(t, rows)", "d = MatMul(r, dense)", "y = Reshape(d, map)"], 3
    ),
    "one score, channels last": (["c = Conv(x, one)", "y = Transpose<perm=[0,2,3,1]>(c)"], 3),
    "one score, squeezed": (["c = Conv(x, one)", "y = Squeeze(c, middle)"], None),
    "transposed convolution, channels last": (["c = ConvTranspose(x, up)", "y = Transpose<perm=[0,2,3,1]>(c)"], 3),
}  # fmt: skip


def head(name: str):
    nodes, axis = CLASS_AXES[name]
    weights = {**HEADS, "shape": np.array([2, 3, 5]), "mix": drawn(4, 5, seed=16)}
    weights["both"] = np.array([1, 2])
    return model(nodes, {"x": (2, 3, 4, 4)}, [nodes[-1].split(" =")[0]], weights), axis


@pytest.mark.parametrize("name", CLASS_AXES)
def test_the_class_axis_is_where_the_network_writes_its_features(name):
    proto, axis = head(name)
    score = Analysis(prepare(proto)).score
    assert score.class_axis == axis and "nothing tells" not in score.reason


@pytest.mark.parametrize("name", ["anchors, laid out last", "two levels", "the best rows", "Einsum"])
def test_scores_of_every_row_are_those_of_the_class(name):
    """The saliency is the slope of the sum of class 3 over all rows, by central differences of the untouched model."""
    proto, axis = head(name)
    x, v = drawn(2, 3, 4, 4, seed=17), drawn(2, 3, 4, 4, seed=18)
    pixels = {"mask": np.ones((1, 1))} if name == "Einsum" else {}
    got = graphgbp.Explainer(proto, ["saliency"], device="cpu").explain(x, 3, **pixels)
    high, low = (run(proto, {"x": (x + step * v).astype(np.float32)}) for step in (0.5, -0.5))
    slope = sum(float((high[key].astype(np.float64) - low[key]).take(3, axis).sum()) for key in high)
    np.testing.assert_allclose((got.saliency * v).sum(), slope, rtol=1e-4)


def test_a_class_axis_that_nothing_tells_is_said_and_can_be_named():
    proto = model(["y = Relu(x)"], {"x": ("N", 4, 6)}, ["y"])
    assert "nothing tells its class axis, so axis 1 is taken" in graphgbp.inspect(proto).score["reason"]
    assert graphgbp.inspect(proto, class_axis=-1).score["class_axis"] == 2
    x = np.abs(drawn(1, 4, 6)) + 0.1
    got = run(graphgbp.convert(proto, ["saliency"], class_axis=2), {"x": x, "target": np.array([5])})
    expected = np.zeros((1, 4, 6))
    expected[:, :, 5] = 1
    np.testing.assert_array_equal(got["saliency"], expected)
    with pytest.raises(graphgbp.RequestError, match="class_axis=3 is none of 'y'"):
        graphgbp.convert(proto, ["saliency"], class_axis=3)


def test_a_depth_map_has_one_score_at_each_pixel():
    proto, _ = head("one score, squeezed")
    x = drawn(2, 3, 4, 4, seed=17)
    mask = np.zeros((4, 4))
    mask[1, 2] = 1
    got = graphgbp.Explainer(proto, ["saliency"], device="cpu").explain(x, [1, 0], mask=mask)
    expected = np.zeros_like(x)
    expected[:, :, 1, 2] = HEADS["one"][0, :, 0, 0] * np.array([[1], [-1]])
    np.testing.assert_allclose(got.saliency, expected, atol=1e-7)


def test_a_batch_declared_too_small_is_no_obstacle():
    proto = made([*FLAT, "y = Identity(z)"], ["y"])
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    got = graphgbp.Explainer(proto, ["saliency"], device="cpu").explain(X, [3, 1, -1])
    assert got.target_class[:2].tolist() == [3, 1]
    np.testing.assert_allclose(got.saliency[1], WEIGHTS["w"][:, 1].reshape(3, 2, 2), rtol=1e-6)


def test_a_neuron_of_a_single_feature_has_positions():
    proto, _ = head("one score, squeezed")
    x = drawn(2, 3, 4, 4, seed=17)
    got = graphgbp.Explainer(proto, ["saliency"], target_tensor="y", device="cpu").explain(x, position=[1, 2])
    expected = np.zeros_like(x)
    expected[:, :, 1, 2] = HEADS["one"][0, :, 0, 0]
    np.testing.assert_allclose(got.saliency, expected, atol=1e-7)
    assert got.target_class.tolist() == [-1, -1]
