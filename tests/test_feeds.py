"""Images and labels: what is taken, what is refused, and that the maps explain what was asked."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper

from graphgbp import Explainer, ImageError, RequestError, TargetError, UnsupportedError
from tests.build import drawn, model, small_cnn
from tests.scores import check_saliency, per_pixel, run

CLASSES = 5


def test_one_image_without_its_batch_axis(explainer, images):
    one, batch = explainer.explain(images[0], 2), explainer.explain(images[:1], [2])
    np.testing.assert_array_equal(one.saliency, batch.saliency)
    assert one.saliency.shape == (1, 3, 8, 8)


class Photo:
    """Something with `__array__`."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self.values if dtype is None else self.values.astype(dtype)


@pytest.mark.parametrize(
    "wrap",
    [Photo, torch.from_numpy, list, np.ndarray.tolist, lambda x: x.astype(">f4"), lambda x: x.astype(np.float64)],
)
def test_what_numpy_reads_is_taken(explainer, images, wrap):
    expected = explainer.explain(images, [0, 1, 2]).saliency
    np.testing.assert_array_equal(explainer.explain(wrap(images), wrap(np.arange(3.0))).saliency, expected)


def test_images_that_are_not_contiguous(explainer, images):
    turned = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(explainer.explain(turned, 0).saliency, explainer.explain(images, 0).saliency)


def test_images_in_half_precision_fit_a_float16_model(images):
    half = {"w": drawn(4, 3, 3, 3, seed=1).astype(np.float16)}
    proto = model(["a = Conv(x, w)", "r = Relu(a)", "p = GlobalAveragePool(r)", "y = Flatten(p)"],
                  {"x": ["N", 3, 8, 8]}, ["y"], half, dtype=onnx.TensorProto.FLOAT16)  # fmt: skip
    explainer = Explainer(proto, ["saliency"], device="cpu")
    result = explainer.explain(images, 0)
    assert result.images.dtype == np.float16 and result.saliency.dtype == np.float32
    with pytest.raises(ImageError, match="NaN or infinity"):
        explainer.explain(images * 1e6, 0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros((1, 3, 8, 8), np.uint8), r"are uint8 and input 'x' takes float32: preprocess .*pixels / 255 - mean"),
        (np.zeros((8, 8, 3), np.uint8), "preprocess"),
        (np.zeros((1, 3, 8, 8), np.int64), "are int64"),
        (np.zeros((1, 3, 8, 8), bool), "are bool"),
        (np.zeros((1, 3, 8, 8), np.complex64), "array of numbers"),
        ("cat.png", "str gives <U7"),
        (None, "array of numbers"),
        ([[1.0], [1.0, 2.0]], "one numpy array"),
        (torch.zeros(1, 3, 8, 8, requires_grad=True), "one numpy array: .*requires grad"),
        (np.full((1, 3, 8, 8), np.nan, np.float32), "NaN or infinity"),
        (np.full((1, 3, 8, 8), -np.inf, np.float32), "NaN or infinity"),
        (np.full((1, 3, 8, 8), 1e300), "NaN or infinity"),
        (drawn(1, 4, 8, 8), r"shape \[1, 4, 8, 8\], and input 'x' takes \[N, 3, 8, 8\] \(NCHW\); look at axis 1$"),
        (drawn(1, 3, 8, 9), "axis 3$"),
        (drawn(1, 8, 8, 3), r"look like NHWC: np.moveaxis\(images, 3, 1\) makes them NCHW"),
        (drawn(8, 8, 3), r"look like NHWC: np.moveaxis\(images, 3, 1\)"),
        (drawn(8, 8), r"shape \[8, 8\]"),
        (drawn(1, 1, 3, 8, 8), r"shape \[1, 1, 3, 8, 8\]"),
        (np.zeros((0, 3, 8, 8), np.float32), "are empty"),
    ],
)
def test_images_that_do_not_fit(explainer, given, words):
    with pytest.raises(ImageError, match=words) as caught:
        explainer.explain(given)
    assert "\n" not in str(caught.value)


def test_channels_first_for_a_channels_last_model():
    nodes = [
        "t = Transpose<perm=[0,3,1,2]>(x)",
        "a = Conv(t, w)",
        "r = Relu(a)",
        "p = GlobalAveragePool(r)",
        "y = Flatten(p)",
    ]
    proto = model(nodes, {"x": ["N", 8, 8, 3]}, ["y"], {"w": drawn(4, 3, 3, 3)})
    explainer = Explainer(proto, ["gradcam", "saliency"], device="cpu")
    result = explainer.explain(drawn(2, 8, 8, 3), 0)
    assert result.gradcam.shape == (2, 8, 8, 1) and result.saliency.shape == (2, 8, 8, 3)
    with pytest.raises(ImageError, match=r"look like NCHW: np.moveaxis\(images, 1, 3\) makes them NHWC"):
        explainer.explain(drawn(2, 3, 8, 8), 0)


# -- targets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [[4, 0, 2], (4, 0, 2), np.asarray([4, 0, 2], np.uint8), np.asarray([4.0, 0.0, 2.0]), torch.tensor([4, 0, 2]),
     np.eye(5)[[4, 0, 2]], np.eye(5, dtype=bool)[[4, 0, 2]], np.eye(5, dtype=np.int64)[[4, 0, 2]]],
)  # fmt: skip
def test_classes_in_every_clothing(explainer, source, images, labels):
    result = explainer.explain(images, labels)
    np.testing.assert_array_equal(result.target_class, [4, 0, 2])
    np.testing.assert_allclose(result.target_score, run(source, "z", images)[range(3), [4, 0, 2]], rtol=1e-4, atol=1e-6)
    check_saliency(source, "z", images, result.saliency, np.eye(5)[[4, 0, 2]])


@pytest.mark.parametrize("labels", [3, np.int64(3), 3.0, [3], np.asarray(3), np.eye(5)[[3]]])
def test_one_class_for_all(explainer, images, labels):
    np.testing.assert_array_equal(explainer.explain(images, labels).target_class, [3, 3, 3])


@pytest.mark.parametrize("labels", [None, -1, [-1], [-1, -1, -1]])
def test_the_predicted_class(explainer, source, images, labels):
    result = explainer.explain(images, labels)
    np.testing.assert_array_equal(result.target_class, run(source, "z", images).argmax(1))


def test_real_weights(explainer, source, images):
    weights = drawn(3, CLASSES, seed=5)
    result = explainer.explain(images, weights)
    z = run(source, "z", images)
    np.testing.assert_allclose(result.target_score, (z * weights).sum(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(result.target_class, [-1, -1, -1])
    check_saliency(source, "z", images, result.saliency, weights)
    assert result.maps.keys() == explainer.explain(images).maps.keys()
    assert result.gradcam.shape == (3, 1, 8, 8)


def test_weights_are_linear_in_the_classes(explainer, images):
    first, second = (explainer.explain(images, label).saliency for label in (1, 3))
    contrast = np.asarray([[0, 1, 0, -1, 0]])
    np.testing.assert_allclose(explainer.explain(images, contrast).saliency, first - second, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (-2, "class -2 is out of range; give one class from 0 to 4"),
        (5, "class 5 is out of range"),
        ([0, 0, 5], "class 5"),
        ([0, -2, 0], "class -2"),
        ([], "labels are empty"),
        ([0, 1], "2 labels for 3 images"),
        ([0, 1, 2, 3], "4 labels for 3 images"),
        (1.5, "whole numbers"),
        ([0, 1, np.nan], "whole numbers"),
        ([np.inf, 1, 2], "whole numbers"),
        (1e30, "out of range"),
        ("cat", "array of numbers"),
        ([[0], [1], [2]], r"shape \[3, 1\] do not fit"),
        (np.zeros((3, 4)), r"shape \[3, 4\] do not fit; .*weights \[3, 5\]"),
        (np.zeros((2, 5)), "labels for 2 images"),
        (np.full((3, 5), np.nan), "NaN or infinity"),
        (np.full((3, 5), 1e300), "NaN or infinity"),
        (np.full((3, 5, 1), 0.5), r"\[3, 5, 1\] do not fit scores"),
        ([[0], [1, 2]], "one numpy array"),
    ],
)
def test_targets_that_do_not_fit(explainer, images, labels, words):
    with pytest.raises(TargetError, match=words) as caught:
        explainer.explain(images, labels)
    assert "\n" not in str(caught.value)


def test_an_open_number_of_classes_is_guarded_by_the_file():
    nodes = ["r = Relu(x)", "y = ReduceMean<keepdims=0>(r, axes)"]
    proto = model(nodes, {"x": ["N", 3, 8, "K"]}, ["y"], {"axes": np.asarray([1, 2])})
    explainer = Explainer(proto, ["saliency"], device="cpu")
    assert explainer.classes is None
    images = drawn(2, 3, 8, 6)
    result = explainer.explain(images, 5)
    np.testing.assert_allclose(result.saliency[..., 5], (images[..., 5] > 0) / 24, rtol=1e-5)
    assert not result.saliency[..., :5].any()
    assert len(result.top(9)[0]) == 6
    with pytest.raises(TargetError, match="one class per image"):
        explainer.explain(images, 6)


@pytest.mark.parametrize("tail", [("y = Sigmoid(z)",), ("s = Squeeze(z, one)", "y = Sigmoid(s)")])
def test_one_score_for_two_classes(images, tail):
    proto = small_cnn(tail, classes=1) if len(tail) == 1 else squeezed(tail)
    explainer = Explainer(proto, ["saliency"], device="cpu")
    z = run(proto, "z", images).reshape(-1)
    np.testing.assert_array_equal(explainer.explain(images).target_class, z > 0)
    for label, sign in ((0, -1), (1, 1), (True, 1), ([[0, 1]], 1), ([[1, 0]], -1), ([[0.5, 2.5]], 2), ([[0, -2]], -2)):
        result = explainer.explain(images, label)
        np.testing.assert_allclose(result.target_score, sign * z, rtol=1e-4, atol=1e-6)
        check_saliency(proto, "z", images, result.saliency, np.full((3, 1), sign))
    with pytest.raises(TargetError, match="class 2 is out of range; give one class from 0 to 1"):
        explainer.explain(images, 2)
    with pytest.raises(TargetError, match=r"shape \[3, 1\] do not fit"):
        explainer.explain(images, [[0], [1], [1]])


def squeezed(tail) -> onnx.ModelProto:
    proto = small_cnn(("y = Identity(z)",), classes=1)
    del proto.graph.node[-1]
    proto.graph.node.extend(onnx.parser.parse_node(node) for node in tail)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([1]), "one"))
    proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N"]))
    return proto


def test_scores_at_every_position(images):
    proto = per_pixel()
    explainer = Explainer(proto, ["saliency"], device="cpu")
    z = run(proto, "y", images)
    one = explainer.explain(images, 1)
    np.testing.assert_allclose(one.target_score, z[:, 1].sum((1, 2)), rtol=1e-4, atol=1e-3)
    np.testing.assert_array_equal(explainer.explain(images).target_class, [-1, -1, -1])
    same = explainer.explain(images, [[0.0, 2.0]])
    np.testing.assert_allclose(same.saliency, 2 * one.saliency, rtol=1e-4, atol=1e-5)
    weights = drawn(3, 2, 8, 8, seed=8)
    np.testing.assert_allclose(explainer.explain(images, weights).target_score, (z * weights).sum((1, 2, 3)), rtol=1e-3)
    with pytest.raises(TargetError, match=r"\[3, 2, 4, 4\] do not fit scores of shape"):
        explainer.explain(images, drawn(3, 2, 4, 4))
    with pytest.raises(RequestError, match="no single value per image and class"):
        one.top()


def test_weights_at_open_positions_need_the_scores_own_shape(images):
    explainer = Explainer(per_pixel("S"), ["saliency"], device="cpu")
    with pytest.raises(TargetError, match="open sizes"):
        explainer.explain(images, [[0.5, 2.0]])
    weights = drawn(3, 2, 8, 8, seed=8)
    expected = Explainer(per_pixel(), ["saliency"], device="cpu").explain(images, weights).saliency
    np.testing.assert_allclose(explainer.explain(images, weights).saliency, expected, atol=1e-5)


def test_a_model_with_one_score_for_the_whole_batch(images):
    nodes = ["r = Relu(x)", "y = ReduceMean<keepdims=0>(r)"]
    explainer = Explainer(model(nodes, {"x": ["N", 3, 8, 8]}, ["y"]), ["saliency"], device="cpu")
    result = explainer.explain(images[:1])
    np.testing.assert_allclose(result.saliency, (images[:1] > 0) / images[0].size, rtol=1e-5)
    assert result.target_score.shape == (1,)
    with pytest.raises(ImageError, match="one score 'y' for all images; explain one in each call"):
        explainer.explain(images)
    fixed = Explainer(model(nodes, {"x": [2, 3, 8, 8]}, ["y"]), ["saliency"], device="cpu")
    with pytest.raises(UnsupportedError, match="fixed batch of 2; export it with a batch of 1"):
        fixed.explain(images[:2])
