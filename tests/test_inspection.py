"""What is said before a conversion is what the conversion does."""

import numpy as np
import pytest

import graphgbp
from graphgbp.contract import METHODS
from graphgbp.model_file import read_manifest
from tests.build import drawn, model, small_cnn
from tests.scores import per_pixel
from tests.verification import test_few_bits as few_bits

MLP = {"w": drawn(6, 5, seed=1), "v": drawn(5, 3, seed=2)}
MLP_NODES = ["h = MatMul(x, w)", "r = Relu(h)", "y = MatMul(r, v)"]
KERNEL = {"k": drawn(4, 3, 3, 3)}
POOLED = ["p = GlobalAveragePool(r)", "y = Flatten(p)"]
IMAGE = {"x": ("N", 3, 4, 4)}
MODELS = {
    "a classifier": lambda: small_cnn(("y = Softmax(z)",)),
    "an old one": lambda: small_cnn(opset=11),
    "a segmentation": per_pixel,
    "features, no image": lambda: model(MLP_NODES, {"x": ("N", 6)}, ["y"], MLP),
    "two outputs": lambda: model(["c = Conv(x, k)", "r = Relu(c)", *POOLED], IMAGE, ["r", "y"], KERNEL),
    "a gap": lambda: model(["y = Det(x)"], {"x": ("N", 4, 3, 3)}, ["y"]),
    "no path": lambda: model(["s = Sign(x)", "y = ReduceSum(s, a)"], IMAGE, ["y"], {"a": np.array([2, 3])}),
    "an integer input": lambda: integers(),
    "half precision": few_bits.half,
    "a gate and a leaky activation": lambda: model(
        ["h = HardSwish(x)", "r = LeakyRelu(h)", *POOLED], IMAGE, ["y"]
    ),
}  # fmt: skip


def integers():
    proto = model(
        ["e = Gather(table, x)", "y = ReduceSum(e, a)"],
        {"x": ("N", 3)},
        ["y"],
        {"table": drawn(4, 5), "a": np.array([1])},
    )
    proto.graph.input[0].type.tensor_type.elem_type = 7
    return proto


@pytest.mark.parametrize("name", MODELS)
def test_what_is_said_is_what_is_done(name):
    proto = MODELS[name]()
    said = graphgbp.inspect(proto)
    assert said.explainable == bool(said.methods) and (said.methods or said.problems or said.gaps)
    for method in METHODS:
        try:
            converted = graphgbp.convert(proto, method)
        except graphgbp.GraphgbpError as error:
            assert method not in said.methods
            assert said.gaps or str(error) in said.problems
            continue
        assert method in said.methods
        manifest = read_manifest(converted)
        assert said.score == manifest.score and said.explained == manifest.inputs
        assert said.rectifiers == manifest.rectifiers and said.passed_through == manifest.passed_through
        assert said.opset_raised == manifest.opset and said.surrogates == manifest.surrogates
        new = [value.name for value in converted.graph.input][len(proto.graph.input) :]
        assert [manifest.names[role] for role in said.target_inputs] == new
        if manifest.target_layer:
            (chosen,) = [layer for layer in said.layers if layer["chosen"]]
            assert {**chosen, "name": chosen["tensor"]} == {**manifest.target_layer, "chosen": True}


def test_the_models_are_of_every_kind():
    methods = {name: set(graphgbp.inspect(made()).methods) for name, made in MODELS.items()}
    assert methods["a classifier"] == set(METHODS)
    assert methods["features, no image"] == {"saliency", "input_x_gradient", "guided_backprop", "deconvnet"}
    assert not methods["a gap"] and not methods["no path"] and not methods["an integer input"]


def test_how_a_file_was_deployed():
    plain, qdq, integer, dynamic, half, fused = (
        graphgbp.inspect(make())
        for make in (small_cnn, few_bits.qdq, few_bits.qoperator, few_bits.dynamic, few_bits.half, few_bits.fused)
    )
    assert plain.quantisation is None and not (plain.fused or plain.recomputed or plain.surrogates)
    assert plain.precision["type"] == qdq.precision["type"] == "float32" and half.precision["type"] == "float16"
    assert [found.quantisation["form"] for found in (qdq, integer, dynamic)] == [["QDQ"], ["QOperator"], ["dynamic"]]
    for found in (qdq, integer, dynamic):
        assert found.quantisation["weights"] == ["int8"] and found.quantisation["activations"] == ["uint8"]
    assert qdq.surrogates == ["xq", "aq", "mq", "rq"] and integer.surrogates == ["xq", "aq", "bq"]
    assert qdq.quantisation["operators"] == {"DequantizeLinear": 6, "QuantizeLinear": 4}
    assert integer.fused == {"QLinearConv": 2} and fused.fused == {"FusedConv": 2}
    assert set(qdq.recomputed) == {"integer units", "fused or quantised nodes"}
    assert set(fused.recomputed) == {"fused or quantised nodes"}
    assert fused.opsets == {"ai.onnx": 18, "com.microsoft": 1}
    assert [found["clothing"] for found in fused.rectifiers] == ["Relu in FusedConv"] * 2
    assert [found["clothing"] for found in qdq.rectifiers] == ["Relu swallowed by QuantizeLinear", "Relu"]


@pytest.mark.parametrize("name", few_bits.GOOD)
def test_clothing_and_surrogates_are_told_in_the_words_of_the_manifest(name):
    said, manifest = (act(few_bits.GOOD[name]()) for act in (graphgbp.inspect, _manifest))
    assert said.rectifiers == manifest.rectifiers and said.surrogates == manifest.surrogates
    assert bool(said.surrogates) == (name in ("qdq", "signed", "qoperator", "dynamic"))


def _manifest(proto):
    return read_manifest(graphgbp.convert(proto, "saliency"))
