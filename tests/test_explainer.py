"""Explainer and the one-liners: batches, models plain and converted, options, a GPU."""

import gc
import threading
import weakref

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.external_data_helper import convert_model_to_external_data

import graphgbp
from graphgbp import (
    DeviceError,
    Explainer,
    GraphgbpError,
    ImageError,
    MissingWeightsError,
    ModelFileError,
    RequestError,
    TargetError,
    contract,
)
from tests.build import drawn, model, small_cnn
from tests.scores import run

SOFTMAX = ("y = Softmax<axis=1>(z)",)
CLASSES = 5


def test_default_methods_and_shapes(source, images):
    explainer = Explainer(source, device="cpu")
    result = explainer.explain(images)
    assert set(result.maps) == {"guided_gradcam", "gradcam", "guided_backprop", "gradcam_features", "gradcam_gradients"}
    assert result.guided_backprop.shape == result.guided_gradcam.shape == images.shape
    assert result.gradcam.shape == (3, 1, 8, 8)
    assert set(result.outputs) == {"y"}
    assert (explainer.device, explainer.device_note, explainer.classes) == ("cpu", None, CLASSES)
    assert explainer.input == {"name": "x", "shape": ["N", 3, 8, 8], "dtype": "float32", "layout": "NCHW"}
    np.testing.assert_array_equal(result.target_class, run(source, "z", images).argmax(1))
    np.testing.assert_allclose(result.target_score, run(source, "z", images).max(1), rtol=1e-5)
    assert result.target_class.dtype == np.int64 and result.target_score.dtype == np.float32


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_split_batches_equal_one(explainer, batch_size):
    images, labels = drawn(7, 3, 8, 8, seed=3), [0, 1, -1, 3, 4, 0, 2]
    whole, split = explainer.explain(images, labels), explainer.explain(images, labels, batch_size=batch_size)
    assert split.maps.keys() == whole.maps.keys() and len(split) == 7
    for name, value in {**whole.maps, **whole.outputs, "target_score": whole.target_score}.items():
        np.testing.assert_allclose(
            {**split.maps, **split.outputs, "target_score": split.target_score}[name], value, atol=1e-6
        )
    np.testing.assert_array_equal(split.target_class, whole.target_class)


@pytest.mark.parametrize("batch", ["N", 2])
def test_equal_batches_are_not_mistaken_for_one(batch):
    explainer = Explainer(small_cnn(SOFTMAX, batch=batch), ["saliency"], device="cpu", batch_size=2)
    result = explainer.explain(np.repeat(drawn(1, 3, 8, 8), 4, axis=0), 1)
    assert len(result.outputs["y"]) == len(result.target_class) == len(result.saliency) == 4


def test_no_batch_is_larger_than_asked(source, monkeypatch):
    explainer = Explainer(source, ["saliency"], device="cpu", batch_size=3)
    sizes, original = [], explainer._session.run
    monkeypatch.setattr(explainer._session, "run", lambda x, *rest: (sizes.append(len(x["x"])), original(x, *rest))[1])
    explainer.explain(drawn(7, 3, 8, 8))
    explainer.explain(drawn(4, 3, 8, 8), batch_size=2)
    assert sizes == [3, 3, 1, 2, 2]


@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_a_fixed_batch_is_filled_and_cut(explainer, count):
    fixed = Explainer(small_cnn(SOFTMAX, batch=4), ["saliency", "gradcam"], device="cpu", batch_size=2)
    images, labels = drawn(count, 3, 8, 8, seed=3), [4, 1, -1, 3, 0][:count]
    got, expected = fixed.explain(images, labels), explainer.explain(images, labels)
    assert len(got.target_class) == len(got.target_score) == len(got.outputs["y"]) == count
    for name, value in expected.maps.items():
        np.testing.assert_allclose(got.maps[name], value, atol=1e-6)
    np.testing.assert_array_equal(got.target_class, expected.target_class)
    weights = drawn(count, CLASSES, seed=9)
    weighted, same = (e.explain(images, weights).saliency for e in (fixed, explainer))
    np.testing.assert_allclose(weighted, same, atol=1e-6)


def test_outputs_without_a_batch_axis(images):
    nodes = ("m = ReduceMax<keepdims=0>(z)", "c = Shape(w3)", "y = Identity(z)")
    proto = small_cnn(nodes)
    proto.graph.output.append(helper.make_tensor_value_info("c", onnx.TensorProto.INT64, [2]))
    for count, size in ((3, 1), (4, 2), (3, 2)):  # two of them as many as the output's own length
        result = Explainer(proto, ["saliency"], device="cpu").explain(drawn(count, 3, 8, 8), batch_size=size)
        np.testing.assert_array_equal(result.outputs["c"], [5, 8])
        assert result.outputs["y"].shape == (count, 5)
    proto.graph.output.append(helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, []))
    explainer = Explainer(proto, ["saliency"], device="cpu", output="y")
    assert explainer.explain(images).outputs["m"].shape == ()
    with pytest.raises(GraphgbpError, match=r"output 'm' of shape .* has no batch axis .* larger batch_size"):
        explainer.explain(images, batch_size=2)


# -- streams ----------------------------------------------------------------------------------------------


def test_a_stream_of_batches(explainer):
    images = drawn(7, 3, 8, 8, seed=3)
    stream = [images[:3], (images[3:5], [1, 2]), [images[5:], 4]]
    found = list(explainer.explain_batches(iter(stream)))
    expected = [explainer.explain(images[:3]), explainer.explain(images[3:5], [1, 2]), explainer.explain(images[5:], 4)]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.saliency, other.saliency)
        np.testing.assert_array_equal(one.target_class, other.target_class)


def test_a_stream_is_taken_one_batch_ahead_and_let_go(explainer):
    taken, seen = [threading.Event() for _ in range(20)], []

    def batches():
        for n, event in enumerate(taken):
            event.set()
            yield drawn(2, 3, 8, 8, seed=n)

    for result in explainer.explain_batches(batches()):
        n = len(seen)
        for event in taken[n : n + 2]:
            assert event.wait(30), "the next batch is not taken meanwhile"
        assert not any(event.is_set() for event in taken[n + 2 :])
        seen.append(weakref.ref(result))
        del result
        assert not any(ref() for ref in seen)
    assert len(seen) == 20


def test_an_error_in_a_stream_comes_in_its_turn(explainer):
    found = explainer.explain_batches([drawn(2, 3, 8, 8), drawn(2, 3, 9, 9), drawn(2, 3, 8, 8)])
    assert len(next(found)) == 2
    with pytest.raises(ImageError, match=r"\[2, 3, 9, 9\]"):
        next(found)


@pytest.mark.parametrize(("options", "expected"), [({}, 4), ({"batch_size": 7}, 7)])
def test_the_batch_size(source, options, expected):
    assert Explainer(source, ["saliency"], device="cpu", **options).batch_size == expected
    assert Explainer(small_cnn(SOFTMAX, batch=2), ["saliency"], device="cpu", **options).batch_size == 2


# -- models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "str", "proto"])
def test_converted_models_are_run_as_they_are(tmp_path, source, images, explainer, kind, monkeypatch):
    converted = graphgbp.convert(source, ["saliency", "guided_backprop"])
    graphgbp.save(converted, tmp_path / "explained.onnx")
    given = {"path": tmp_path / "explained.onnx", "str": str(tmp_path / "explained.onnx"), "proto": converted}[kind]
    monkeypatch.setattr("graphgbp.explainer.convert", None)
    result = Explainer(given, device="cpu").explain(images, 1)
    assert set(result.maps) == {"saliency", "guided_backprop"}
    np.testing.assert_array_equal(result.saliency, explainer.explain(images, 1).saliency)
    assert set(Explainer(given, "saliency", device="cpu").explain(images, 1).maps) == {"saliency"}
    with pytest.raises(RequestError, match=r"holds saliency, guided_backprop and no 'gradcam'; convert its source"):
        Explainer(given, ["saliency", "gradcam"])
    with pytest.raises(RequestError, match="converted already, so target_layer cannot be chosen"):
        Explainer(given, target_layer="r2")
    with pytest.raises(RequestError, match=r"takes classes and no weights; .*target='weights'"):
        Explainer(given, device="cpu").explain(images, drawn(3, 5))


def test_a_file_converted_for_weights(source, images, explainer):
    weighted = Explainer(graphgbp.convert(source, ["saliency"], target="weights"), device="cpu")
    weights = drawn(3, 5, seed=4)
    expected = explainer.explain(images, weights)
    np.testing.assert_array_equal(weighted.explain(images, weights).saliency, expected.saliency)
    result = weighted.explain(images, [0, 4, 1])
    np.testing.assert_array_equal(result.target_class, [0, 4, 1])
    np.testing.assert_allclose(result.saliency, explainer.explain(images, [0, 4, 1]).saliency, atol=1e-6)
    for labels in (None, [0, -1, 2]):
        with pytest.raises(TargetError, match="does not choose the predicted class"):
            weighted.explain(images, labels)


def test_a_path_with_external_data(tmp_path, images, explainer):
    proto = small_cnn(SOFTMAX)
    convert_model_to_external_data(proto, location="weights.bin", size_threshold=0)
    onnx.save(proto, tmp_path / "model.onnx")
    result = Explainer(tmp_path / "model.onnx", ["saliency"], device="cpu").explain(images, drawn(3, 5))
    np.testing.assert_array_equal(result.saliency, explainer.explain(images, drawn(3, 5)).saliency)
    bare = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    with pytest.raises(MissingWeightsError, match=r"in 'weights\.bin', and nothing says where"):
        Explainer(bare)


def test_a_model_that_changed_is_not_mixed_with_the_old_one(tmp_path, images):
    onnx.save(small_cnn(SOFTMAX), tmp_path / "model.onnx")
    explainer = Explainer(tmp_path / "model.onnx", ["saliency"], device="cpu")
    onnx.save(small_cnn(("y = Identity(z)",)), tmp_path / "model.onnx")
    for _ in range(2):
        with pytest.raises(RequestError, match="has changed"):
            explainer.explain(images, drawn(3, 5))


@pytest.mark.parametrize("given", [b"bytes", None, 3])
def test_what_is_no_model(given):
    with pytest.raises(RequestError, match=r"a path or an onnx\.ModelProto, and this is"):
        Explainer(given)


def test_errors_of_files_come_through(tmp_path):
    with pytest.raises(ModelFileError, match="no file"):
        Explainer(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelFileError, match="vjp graph"):
        Explainer(graphgbp.vjp(small_cnn()), device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ["lime"]}, "lime"),
        ({"methods": []}, "none given"),
        ({"target": "weights"}, r"in explain\(\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size"),
        ({"batch_size": True}, "batch_size"),
        ({"threads": 0}, "threads=0"),
        ({"target_layer": "nowhere"}, "nowhere"),
    ],
)
def test_options_that_do_not_exist(source, options, words):
    with pytest.raises(RequestError, match=words):
        Explainer(source, **options)


def test_devices_are_passed_on(source):
    with pytest.raises(DeviceError, match="device 'tpu' is unknown"):
        Explainer(source, device="tpu")


def test_batch_size_is_checked_in_each_call(explainer, images):
    with pytest.raises(RequestError, match="batch_size=-1"):
        explainer.explain(images, batch_size=-1)


def test_nothing_is_left_behind(source, images):
    explainer = Explainer(source, ["saliency"], device="cpu")
    explainer.explain(images, drawn(3, 5))
    sessions = [weakref.ref(explainer._session._session), weakref.ref(explainer._weighted._session)]
    del explainer
    gc.collect()
    assert [session() for session in sessions] == [None, None]


# -- one-liners --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one_liner", "method"),
    [
        (graphgbp.Saliency, "saliency"),
        (graphgbp.GuidedBackprop, "guided_backprop"),
        (graphgbp.DeconvNet, "deconvnet"),
        (graphgbp.InputXGradient, "input_x_gradient"),
        (graphgbp.GradCAM, "gradcam"),
        (graphgbp.HiResCAM, "hirescam"),
        (graphgbp.LayerCAM, "layercam"),
        (graphgbp.GradCAMPlusPlus, "gradcam_plusplus"),
        (graphgbp.XGradCAM, "xgradcam"),
        (graphgbp.GuidedGradCAM, "guided_gradcam"),
    ],
)
def test_one_liners(source, images, one_liner, method):
    expected = Explainer(source, contract.METHODS, device="cpu").explain(images, [1, 0, 3]).maps[method]
    tool = one_liner(source, device="cpu", batch_size=2)
    np.testing.assert_allclose(tool.explain(images, [1, 0, 3]), expected, atol=1e-6)
    assert tool.explain(images).shape == ((3, 1, 8, 8) if method in contract.CAMS else images.shape)
    assert list(tool.explainer.manifest.methods) == [method]


def test_one_liners_take_options(source, images):
    signed = graphgbp.GradCAM(source, relu_attributions=False, target_layer="r1", device="cpu").explain(images, 1)
    assert (signed < 0).any()
    np.testing.assert_allclose(
        graphgbp.GradCAM(source, target_layer="r1", device="cpu").explain(images, 1).max(), signed.max(), rtol=1e-4
    )


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("targets", [None, 3, "weights"])
def test_cuda_gives_the_cpus_maps(source, images, targets):
    targets = drawn(3, 5, seed=2) if targets == "weights" else targets
    cuda, cpu = (Explainer(source, device=device).explain(images, targets) for device in ("cuda", "cpu"))
    for name, value in cpu.maps.items():
        assert np.abs(cuda.maps[name] - value).max() <= 1e-4 * max(np.abs(value).max(), 1e-6), name
    np.testing.assert_array_equal(cuda.target_class, cpu.target_class)


@pytest.mark.cuda
def test_an_open_number_of_classes_is_guarded_on_cuda():
    nodes = ["r = Relu(x)", "y = ReduceMean<keepdims=0>(r, axes)"]
    proto = model(nodes, {"x": ["N", 3, 8, "K"]}, ["y"], {"axes": np.asarray([1, 2])})
    with pytest.raises(TargetError, match="one class per image"):
        Explainer(proto, ["saliency"], device="cuda").explain(drawn(2, 3, 8, 6), 6)
