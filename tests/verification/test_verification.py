"""verify: good files of every kind pass, and each kind of damage fails the check that is there for it."""

import json

import numpy as np
import onnx
import pytest

import graphgbp
from graphgbp import contract
from tests.build import drawn, model, small_cnn
from tests.verification.files import (
    clothings,
    converted,
    failures,
    segmentation,
    two_inputs,
    weights_as_inputs,
)
from tests.verification.networks import ALL, network, with_branches, with_functions

# -- good files ------------------------------------------------------------------------------------------------------


two_classes = small_cnn(("y = Sigmoid(z)",), classes=1)


GOOD = {
    "every method": (network(), {"methods": ALL}),
    "default": (network(), {}),
    "input_x_gradient alone": (network(), {"methods": "input_x_gradient"}),
    **{f"{cam} alone": (network(), {"methods": cam}) for cam in contract.CAMS},
    "CAMs of both signs": (network(), {"methods": contract.CAMS, "target_layer": "s", "relu_attributions": False}),
    "guided_gradcam alone": (network(), {"methods": "guided_gradcam"}),
    "opset 16": (network(16), {"methods": ALL}),
    "opset 26": (network(26), {"methods": ALL}),
    "raised": (small_cnn(opset=12), {"methods": ALL}),
    "IR 3": (weights_as_inputs(small_cnn(ir_version=3)), {"methods": ALL}),
    "weights as inputs": (weights_as_inputs(network()), {"methods": ALL}),
    "optional": (network(), {"methods": ALL, "target": "optional"}),
    "weights": (network(), {"methods": ALL, "target": "weights"}),
    "cotangent": (network(), {"methods": ALL, "target": "cotangent"}),
    "probability": (network(), {"methods": ALL, "score": "probability"}),
    "neuron": (network(), {"methods": ALL, "target_tensor": "d", "target_layer": "r1"}),
    "several layers": (network(), {"methods": ALL, "target_layer": ["r1", "r3"]}),
    "mean of layers": (network(), {"methods": ALL, "target_layer": ["r1", "r3"], "aggregate": "mean"}),
    "nearest, signed": (network(), {"interpolate_mode": "nearest", "relu_attributions": False}),
    "segmentation": (segmentation(), {"methods": ALL, "target_layer": "r"}),
    "two inputs": (two_inputs(), {"methods": ALL}),
    "functions": (with_functions(network()), {"methods": ALL}),
    "a layer in a function": (with_functions(network()), {"methods": ALL, "target_layer": "call block/r2"}),
    "branches": (with_branches(network()), {"methods": ALL}),
    "clothings": (clothings(), {"methods": ALL}),
    "two classes in one": (two_classes, {"methods": ALL}),
    "two probabilities in one": (two_classes, {"methods": ALL, "score": "probability"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_passes(name):
    source, options = GOOD[name]
    found = graphgbp.verify(graphgbp.convert(source, **options), source)
    unproven = [check for check in found.checks if check.status != "pass"]
    assert [check.name for check in unproven] == (["grad-cam"] if name == "guided_gradcam alone" else []), unproven
    expected = {"fingerprint", "appended only", "names", "forward", "score", "gradient", "rectifiers"}
    assert expected | {"kernels CPU", "kernels CUDA"} <= {check.name for check in found.checks}


def test_a_vjp_file_passes():
    for source in (network(), two_inputs()):
        found = graphgbp.verify(graphgbp.vjp(source), source)
        assert found.passed and found.kind == "vjp" and found["gradient"].figures["error"] < 1e-6


def test_smooth_activations_that_are_masked():
    """An operator is told by differences, one that is written out is not, and that is said."""
    swish = model(
        ["a = Conv(x, w)", "r = LeakyRelu(a)", "p = GlobalAveragePool(r)", "y = Flatten(p)"],
        {"x": ["N", 3, 9, 9]},
        ["y"],
        {"w": drawn(6, 3, 3, 3)},
    )
    assert graphgbp.verify(graphgbp.convert(swish, "guided_backprop", rectifiers="all"), swish).passed
    found = graphgbp.verify(graphgbp.convert(network(), "guided_backprop", rectifiers="all"), network())
    assert not found.failures and [check.name for check in found.unchecked] == ["guided gradient"]


def test_a_transformer_passes():
    """Erf, LayerNormalization, Softmax: smooth, so the smallest steps must not drown in rounding."""
    nodes = [
        "e = Conv<strides=[4,4]>(x, w1)",
        "t = Reshape(e, tokens)",
        "u = Transpose<perm=[0,2,1]>(t)",
        "n = LayerNormalization<axis=-1>(u, scale)",
        "q = MatMul(n, w2)",
        "k = Transpose<perm=[0,2,1]>(q)",
        "s = MatMul(q, k)",
        "p = Softmax<axis=-1>(s)",
        "v = MatMul(p, n)",
        "f = Erf(v)",
        "g = Mul(f, v)",
        "h = Add(g, u)",
        "m = ReduceMean<keepdims=0>(h, axis)",
        "y = MatMul(m, w3)",
    ]
    weights = {"w1": drawn(6, 3, 4, 4, scale=0.3), "scale": drawn(6), "w2": drawn(6, 6, scale=0.4), "w3": drawn(6, 4)}
    weights |= {"tokens": np.array([0, 6, -1]), "axis": np.array([1])}
    source = model(nodes, {"x": ["N", 3, 16, 16]}, ["y"], weights)
    found = graphgbp.verify(graphgbp.convert(source, "saliency"), source)
    assert found.passed and found["gradient"].figures["error"] < 1e-6


def test_figures_are_those_of_a_run():
    found = graphgbp.verify(converted(), network())
    assert found["gradient"].figures["error"] < 1e-6 and found["gradient"].figures["float32_distance"] < 1e-5
    directions = found["gradient"].figures["directions"]
    assert len(directions) == 5 and all(direction["settled"] for direction in directions)
    assert found["forward"].figures["bit_equal"] is True
    assert found["appended only"].figures["nodes"] == len(network().graph.node)
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_the_demo_model_passes(tmp_path):
    graphgbp.save(graphgbp.convert("models/efficientnet_lite0.onnx", "saliency"), tmp_path / "out.onnx")
    assert graphgbp.verify(tmp_path / "out.onnx", "models/efficientnet_lite0.onnx").passed


@pytest.mark.parametrize("methods", [["saliency"], ["guided_gradcam", "gradcam"], ALL])
def test_a_file_of_open_size(methods):
    """Sizes of inner tensors are declared in it, and none of an output."""
    nodes = (
        "y = Conv <pads=[1, 1, 1, 1]> (x, k)",
        "r = Relu (y)",
        "p = GlobalAveragePool (r)",
        "f = Flatten (p)",
        "z = Gemm (f, m)",
    )
    source = model(nodes, {"x": ["n", 3, "h", "w"]}, ["z"], {"k": drawn(16, 3, 3, 3), "m": drawn(16, 4)})
    made = graphgbp.convert(source, methods)
    found = graphgbp.verify(made, source)
    assert found.passed, found.failures


# -- the source ------------------------------------------------------------------------------------------------------


def test_the_source_is_found_beside_the_file(tmp_path):
    onnx.save(network(16), tmp_path / "another.onnx")
    onnx.save(small_cnn(opset=12), tmp_path / "source.onnx")
    graphgbp.save(graphgbp.convert(tmp_path / "source.onnx", "saliency"), tmp_path / "out.onnx")
    found = graphgbp.verify(tmp_path / "out.onnx")
    assert found.passed and found.source == str(tmp_path / "source.onnx")


def test_the_source_is_recovered_from_the_file():
    assert graphgbp.verify(converted()).source == "recovered"
    assert graphgbp.verify(converted()).passed


def test_what_needs_a_source_is_left_unchecked_without_one():
    raised = graphgbp.convert(small_cnn(opset=12), ALL)
    found = graphgbp.verify(raised)
    assert found.source is None and not found.passed and not found.failures
    assert [check.name for check in found.unchecked] == ["fingerprint", "appended only", "forward"]


def test_external_weights(tmp_path):
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    graphgbp.save(graphgbp.convert(tmp_path / "m.onnx", "saliency"), tmp_path / "out.onnx")
    assert graphgbp.verify(tmp_path / "out.onnx").passed
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[5] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    found = graphgbp.verify(tmp_path / "out.onnx")
    assert [check.name for check in found.failures] == ["fingerprint"] and "m.data" in found["fingerprint"].detail


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(graphgbp.ModelFileError, match="not converted"):
        graphgbp.verify(network())
    with pytest.raises(graphgbp.AlreadyConvertedError, match="the source"):
        graphgbp.verify(converted(), converted())
    with pytest.raises(graphgbp.ModelFileError, match="no file"):
        graphgbp.verify(converted(), tmp_path / "none.onnx")


@pytest.mark.parametrize("methods", [["saliency", "gradcam"], ["guided_backprop"]])
def test_a_large_models_weights_stay_where_they_are(tmp_path, monkeypatch, methods):
    """What is said of it is what is said of a small one, but for the precision."""
    (tmp_path / "new").mkdir()
    path, out = tmp_path / "m.onnx", tmp_path / "new" / "out.onnx"
    onnx.save(small_cnn(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    graphgbp.save(graphgbp.convert(path, methods), out, weights_from=tmp_path)
    small = graphgbp.verify(out, path)
    monkeypatch.setattr("graphgbp.verification.subject._LIMIT", 1000)
    monkeypatch.setattr("graphgbp.verification.subject.with_small_weights", lambda *_: pytest.fail("read in"))
    large = graphgbp.verify(out, path)
    assert small.passed and not large.failures
    assert [check.name for check in large.checks] == [check.name for check in small.checks]
    assert "too large to be read in" in large["gradient"].detail and large["gradient"].status == "pass"
    assert {check.name for check in large.unchecked} <= {"guided gradient"}
    data = bytearray((tmp_path / "new" / "m.data").read_bytes())
    data[5] ^= 64
    (tmp_path / "new" / "m.data").write_bytes(data)
    found = graphgbp.verify(out, path)
    assert {"fingerprint", "forward"} <= {check.name for check in found.failures}
    assert "beside the file lie other weights" in found["fingerprint"].detail


def test_a_large_models_gradient_that_is_wrong_is_noticed(tmp_path, monkeypatch):
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(small_cnn(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    made = graphgbp.convert(path, ["saliency"])
    scaled = next(node for node in reversed(made.graph.node) if "saliency" in node.output)
    scaled.output[0] = "graphgbp/unscaled"
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.2), "graphgbp/scale"))
    made.graph.node.add(
        op_type="Mul", name="graphgbp/scaled", input=["graphgbp/unscaled", "graphgbp/scale"], output=["saliency"]
    )
    graphgbp.save(made, out)
    monkeypatch.setattr("graphgbp.verification.subject._LIMIT", 1000)
    assert [check.name for check in graphgbp.verify(out, path).failures] == ["gradient"]


def test_sparse_weights():
    made = model(["f = Flatten(x)", "h = MatMul(f, w)", "r = Relu(h)", "y = MatMul(r, v)"], {"x": ("N", 2, 3)}, ["y"],
                 {"w": drawn(6, 5), "v": drawn(5, 4)})  # fmt: skip
    dense = next(tensor for tensor in made.graph.initializer if tensor.name == "w")
    kept, places = onnx.numpy_helper.to_array(dense).reshape(-1)[::3], onnx.numpy_helper.from_array(np.arange(0, 30, 3))
    sparse = onnx.helper.make_sparse_tensor(onnx.numpy_helper.from_array(kept, "w"), places, [6, 5])
    made.graph.sparse_initializer.append(sparse)
    made.graph.initializer.remove(dense)
    assert graphgbp.verify(graphgbp.convert(made, ["saliency", "guided_backprop"]), made).passed


def test_weights_that_overflow_fail_quietly(tmp_path):
    """In the file of weights that it shares with its source; warnings of numpy are errors here."""
    path = tmp_path / "model.onnx"
    onnx.save(network(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    graphgbp.save(graphgbp.convert(path), tmp_path / "out.onnx")
    (tmp_path / "model.data").write_bytes(np.full((tmp_path / "model.data").stat().st_size // 4, 1e38, "f4").tobytes())
    assert {"fingerprint", "forward", "score"} <= {
        check.name for check in graphgbp.verify(tmp_path / "out.onnx").failures
    }


def test_another_source_fails():
    other = network()
    weight = onnx.numpy_helper.to_array(other.graph.initializer[0]) * np.float32(1.1)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    assert {"fingerprint", "appended only", "forward", "score", "gradient"} <= failures(converted(), other)
