import json

import numpy as np
import onnx
import pytest

import graphgbp
from tests.build import model
from tests.cli.conftest import refused
from tests.verification.test_few_bits import fused, qdq


def test_says_what_can_be_explained(run, folder):
    result = run("inspect", "model.onnx")
    assert result.exit_code == 0 and result.stderr == ""
    for words in ("x  float", "[N, 3, 8, 8]  NCHW", "5 classes", "before Softmax", "2 Relu", "can be explained"):
        assert words in result.stdout
    chosen = [line for line in result.stdout.splitlines() if line.startswith(" *")]
    assert len(chosen) == 1 and " r2 " in chosen[0]
    assert not [line for line in result.stdout.splitlines() if line != line.rstrip()]


def test_rectifiers_and_look_alikes_are_told_with_their_reason(run, folder):
    nodes = ["a = Relu(x)", "s = Add(a, three)", "c = Clip(s, zero, six)", "m = Mul(a, c)", "y = ReduceMean(m, axes)"]
    weights = {"three": np.float32(3), "zero": np.float32(0), "six": np.float32(6), "axes": np.array([2, 3])}
    onnx.save(model(nodes, {"x": ["N", 4, 3, 3]}, ["y"], weights), folder / "gate.onnx")
    lines = [" ".join(line.split()) for line in run("inspect", "gate.onnx").stdout.splitlines()]
    assert "masked 1 Relu ONNX's ReLU" in lines
    assert "not masked 1 Clip(x, 0, 6) x + 3 between 0 and 6, scaled: the gate of a HardSigmoid or HardSwish" in lines


def test_json_is_the_inspection(run, folder):
    result = run("inspect", "model.onnx", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(graphgbp.inspect("model.onnx").to_dict()))


def test_a_converted_file_says_what_it_holds(run, folder):
    run("convert", "model.onnx", "-o", "out.onnx")
    text = run("inspect", "out.onnx").stdout
    assert f"by graphgbp {graphgbp.__version__}: guided_backprop, gradcam, guided_gradcam" in text


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_a_gap_is_shown(run, folder, json_flag):
    onnx.save(model(["d = Det(x)", "y = Identity(d)"], {"x": ["N", 4, 3, 3]}, ["y"]), folder / "gap.onnx")
    result = run("inspect", "gap.onnx", *json_flag)
    assert result.exit_code == 0 and "Det" in result.stdout
    if not json_flag:
        assert "cannot be explained as it is" in result.stdout and "1 node(s) without a rule" in result.stdout


def test_no_model_is_refused(run, folder):
    refused(run("inspect", "photo.png"), 3, "photo.png", "not an ONNX file")
    refused(run("inspect", "none.onnx", "--json"), 3, "none.onnx")


def test_says_where_the_weights_are(run, folder):
    made = onnx.load("model.onnx")
    inline = sum(tensor.ByteSize() for tensor in made.graph.initializer)
    stated = json.loads(run("inspect", "model.onnx", "--json").stdout)["weights"]
    assert 0.5 * inline < stated["inline"] < inline and stated["external"] == {}
    assert "in the file" in run("inspect", "model.onnx").stdout
    onnx.save(made, "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    size = (folder / "model.data").stat().st_size
    assert json.loads(run("inspect", "model.onnx", "--json").stdout)["weights"]["external"] == {"model.data": size}
    assert "in model.data, beside the file" in run("inspect", "model.onnx").stdout


def test_says_how_a_file_was_deployed(run, folder):
    made = qdq()
    made.producer_name, made.producer_version = "onnx.quantize", "0.1.0"
    onnx.save(made, folder / "int8.onnx")
    onnx.save(fused(), folder / "fused.onnx")
    lines = [" ".join(line.split()) for line in run("inspect", "int8.onnx").stdout.splitlines()]
    assert "made by onnx.quantize 0.1.0" in lines and "precision float32" in lines
    assert "quantised QDQ, weights int8, activations uint8" in lines
    assert "surrogates 4 quantisers that the gradient goes straight through" in lines
    text = run("inspect", "fused.onnx").stdout
    assert "2 FusedConv" in text and "com.microsoft 1" in text and "2 Relu in FusedConv" in text
