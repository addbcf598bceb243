"""Raising old models: against the original in ONNX Runtime and, for the mended operators, against their definition."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, version_converter
from onnx.external_data_helper import convert_model_to_external_data

from graphgbp import opset
from graphgbp.errors import MissingWeightsError, OpsetError
from graphgbp.opset import raise_opset
from tests.light_models import input_name, light_input, light_model
from tests.opset_checks import F, assert_only_nodes_changed, build, check, normal, resize_model
from tests.rules.harness import run

# -- real networks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "densenet121", "resnet50", "inception_v1"])
def test_light_model(name):
    model = light_model(name)
    assert model.ir_version == 3 and model.opset_import[0].version == 9
    _, record = check(model, {input_name(model): light_input(1)})
    assert record["compared_on"] == {input_name(model): [1, 3, 224, 224]}
    scores = next(iter(run(model, {input_name(model): light_input(1)}).values()))
    assert scores.std() > 1e-4, "the weights are not telling"


def test_the_converter_never_sees_large_weights(monkeypatch):
    model = light_model("squeezenet")
    seen = []
    convert = version_converter.convert_version
    monkeypatch.setattr(version_converter, "convert_version", lambda m, to: seen.append(m.ByteSize()) or convert(m, to))
    raise_opset(model, None)
    assert len(seen) == 1 and seen[0] < 100_000 < 4_000_000 < model.ByteSize()


def test_deterministic():
    model = light_model("squeezenet")
    first, second = (raise_opset(model, None)[0].SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("version", [16, 17, 22])
def test_newer_model_comes_back_as_it_is(version):
    model = build([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, ["y"], version)
    raised, record = raise_opset(model, None)
    assert raised is model and record is None


# -- the proof -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [7, 9, 10])
def test_a_fault_that_is_not_mended_is_refused(monkeypatch, version):
    monkeypatch.setattr(opset, "_MENDS", {})
    model = resize_model(version, "linear", [1, 1, 2, 2], [1, 2, 4, 5])
    with pytest.raises(OpsetError, match=r"output 'y' differs by up to .*its largest value"):
        raise_opset(model, None)


def test_a_model_that_does_not_run_is_refused():
    model = build(
        [helper.make_node("Upsample", ["x"], ["y"], width_scale=2.0, height_scale=2.0)], {"x": [1, 1, 4, 4]}, ["y"], 6
    )
    with pytest.raises(OpsetError, match="must run in ONNX Runtime first, and it does not"):
        raise_opset(model, None)


def test_what_the_converter_refuses_is_refused():
    weights = {name: np.ones([2, 3, 3], np.float32) for name in ("s", "b", "m", "v")}
    node = helper.make_node("BatchNormalization", ["x", *weights], ["y"], spatial=0)
    model = build([node], {"x": [1, 2, 3, 3]}, ["y"], 7, weights)
    with pytest.raises(
        OpsetError, match=r"the model has opset 7, and ONNX's converter cannot raise it to 16: .*spatial"
    ):
        raise_opset(model, None)


def test_open_sizes():
    nodes = [
        helper.make_node("AveragePool", ["x"], ["p"], kernel_shape=[32, 32], strides=[32, 32]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    inputs = {"x": ["n", 3, "h", "w_"]}
    _, record = raise_opset(build(nodes, inputs, ["y"], 9, {"w": normal(12, 5)}), None)
    assert record["compared_on"] == {"x": [2, 3, 64, 64]}
    _, record = raise_opset(build(nodes, inputs, ["y"], 9, {"w": normal(147, 5)}), None)
    assert record["compared_on"] == {"x": [2, 3, 224, 224]}
    with pytest.raises(OpsetError, match=r"on shape .*64, 64.*; on shape .*224, 224"):
        raise_opset(build(nodes, inputs, ["y"], 9, {"w": normal(100, 5)}), None)


# -- what stays ------------------------------------------------------------------------------------------------------


def test_documentation_and_names_stay():
    """Numbered tensor names are those the converter likes to give."""
    nodes = [
        helper.make_node("Clip", ["x"], ["_v_1"], "clip", doc_string="six", min=0.0, max=6.0),
        helper.make_node("Slice", ["_v_1"], ["2"], "slice", starts=[0], ends=[3], axes=[1]),
        helper.make_node("Pad", ["2"], ["_v_5"], "pad", pads=[0, 1, 0, 1]),
        helper.make_node("Softmax", ["_v_5"], ["y"], "softmax", axis=0),
        helper.make_node("Neg", ["_v_5"], ["y_intermediate_"], "neg"),
    ]
    infos = [helper.make_tensor_value_info("_v_1", F, [2, 4])]
    model = build(nodes, {"x": [2, 4]}, ["y", "y_intermediate_"], 9, doc_string="a graph", value_info=infos)
    model.doc_string, model.producer_name, model.model_version = "a model", "somebody", 3
    model.metadata_props.add(key="author", value="somebody")
    model.graph.node[1].metadata_props.add(key="line", value="12")
    raised, _ = check(model, {"x": normal(2, 4)})
    by_name = {node.name: node for node in raised.graph.node}
    assert by_name["clip"].doc_string == "six"
    assert by_name["slice"].metadata_props[0].value == "12"


def test_ir_3():
    """What the converter adds must not be an initializer: IR 3 would want it as an input."""
    nodes = [
        helper.make_node("Pad", ["x"], ["p"], pads=[0, 0, 1, 1, 0, 0, 1, 1]),
        helper.make_node("Conv", ["p", "w"], ["y"]),
    ]
    model = build(nodes, {"x": [1, 2, 5, 5]}, ["y"], 9, {"w": normal(3, 2, 3, 3)}, ir_version=3)
    check(model, {"x": normal(1, 2, 5, 5)})


def external_model(tmp_path: Path) -> onnx.ModelProto:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Reshape", ["c", "shape"], ["r"]),
        helper.make_node("Softmax", ["r"], ["y"]),
    ]
    weights = {"w": normal(40, 8, 3, 3), "shape": np.array([1, 40, -1])}
    model = build(nodes, {"x": [1, 8, 6, 6]}, ["y"], 9, weights)
    convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
    onnx.save(model, tmp_path / "model.onnx")
    return onnx.load(tmp_path / "model.onnx", load_external_data=False)


def test_external_data_stays_where_it_is(tmp_path):
    model = external_model(tmp_path)
    raised, _ = raise_opset(model, tmp_path)
    assert_only_nodes_changed(raised, model)
    assert all(tensor.data_location == TensorProto.EXTERNAL for tensor in raised.graph.initializer)
    (tmp_path / "raised.onnx").write_bytes(raised.SerializeToString())
    feeds = {"x": normal(1, 8, 6, 6)}
    loaded = [onnx.load(tmp_path / name) for name in ("model.onnx", "raised.onnx")]
    np.testing.assert_allclose(*(run(each, feeds)["y"] for each in loaded), rtol=1e-6)


def test_external_data_that_is_missing(tmp_path):
    model = external_model(tmp_path)
    with pytest.raises(MissingWeightsError, match="pass the path of the model's file"):
        raise_opset(model, None)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(MissingWeightsError, match="is not in"):
        raise_opset(model, tmp_path)


def test_other_domains_stay():
    nodes = [helper.make_node("Gelu", ["x"], ["g"], domain="com.microsoft"), helper.make_node("Softmax", ["g"], ["y"])]
    raised, _ = raise_opset(build(nodes, {"x": [2, 3, 4]}, ["y"], 12, domains=["com.microsoft"]), None)
    assert ("com.microsoft", 1) in [(entry.domain, entry.version) for entry in raised.opset_import]
    assert raised.graph.node[0] == nodes[0]


SCALE = {name: np.abs(normal(3, seed=index)) + 0.5 for index, name in enumerate("sbmv")}


@pytest.mark.parametrize(
    ("versions", "op", "shape", "attributes", "weights", "outputs"),
    [
        ((7, 9, 10), "Clip", [2, 3], {"min": -0.5, "max": 0.5}, {}, 1),
        ((7, 10), "Clip", [2, 3], {"max": 0.5}, {}, 1),
        ((7, 10), "Pad", [1, 2, 4, 4], {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "value": 0.7}, {}, 1),
        ((7, 10), "Pad", [1, 2, 4, 4], {"pads": [0, 0, 1, 2, 0, 0, 3, 0], "mode": "reflect"}, {}, 1),
        ((7, 9), "Slice", [4, 6], {"starts": [1, -3], "ends": [3, 99], "axes": [0, 1]}, {}, 1),
        ((7, 9), "Slice", [4, 6], {"starts": [1], "ends": [3]}, {}, 1),
        ((7, 10, 11), "Dropout", [2, 3], {"ratio": 0.4}, {}, 1),
        ((7, 9, 13), "BatchNormalization", [2, 3, 4, 4], {"epsilon": 0.01}, SCALE, 1),
        ((7, 11, 12), "Softmax", [2, 3, 4], {}, {}, 1),
        ((7, 11, 12), "Softmax", [2, 3, 4], {"axis": 2}, {}, 1),
        ((11, 12), "Softmax", [2, 3, 4], {"axis": -2}, {}, 1),
        ((7, 12), "LogSoftmax", [2, 3, 4], {"axis": 0}, {}, 1),
        ((7, 13), "Reshape", [2, 3, 4], {}, {"shape": np.array([0, -1])}, 1),
        ((7, 11, 12), "Squeeze", [2, 1, 3, 1], {"axes": [1, 3]}, {}, 1),
        ((7, 12), "Unsqueeze", [2, 3], {"axes": [0, 3]}, {}, 1),
        ((7, 11, 12), "ReduceSum", [2, 3, 4], {"axes": [0, 2], "keepdims": 0}, {}, 1),
        ((7, 12), "ReduceSum", [2, 3, 4], {}, {}, 1),
        ((7, 12), "ReduceMean", [2, 3, 4], {"axes": [1]}, {}, 1),
        ((7, 11, 12), "Split", [6, 4], {"axis": 0, "split": [1, 5]}, {}, 2),
        ((7, 12), "Split", [6, 4], {"axis": 1}, {}, 2),
        ((7, 10), "Flatten", [2, 3, 4], {"axis": 2}, {}, 1),
        ((7, 9), "Gemm", [2, 3], {"transB": 1, "alpha": 0.5}, {"w": normal(5, 3), "b": normal(5)}, 1),
        ((7, 9), "MaxPool", [1, 2, 7, 7], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, {}, 1),
        (
            (7, 10),
            "AveragePool",
            [1, 2, 7, 7],
            {"kernel_shape": [3, 3], "pads": [1] * 4, "count_include_pad": 1},
            {},
            1,
        ),
        ((7, 10), "ConvTranspose", [1, 2, 5, 5], {"strides": [2, 2]}, {"w": normal(2, 3, 3, 3)}, 1),
        ((7, 15), "PRelu", [2, 3, 4, 4], {}, {"slope": normal(3, 1, 1)}, 1),
        ((7, 15), "LeakyRelu", [2, 3], {"alpha": 0.2}, {}, 1),
        ((7, 12), "LRN", [1, 5, 4, 4], {"size": 3}, {}, 1),
        ((7, 10), "DepthToSpace", [1, 8, 2, 2], {"blocksize": 2}, {}, 1),
        (
            (11, 12),
            "Resize",
            [1, 2, 4, 5],
            {"mode": "cubic"},
            {"roi": np.zeros(0, np.float32), "s": np.float32([1, 1, 2, 1.5])},
            1,
        ),
        ((7, 14), "Pow", [2, 3], {}, {"e": np.float32(2)}, 1),
    ],
)
def test_old_operator(versions, op, shape, attributes, weights, outputs):
    names = ["y", *(f"y{index}" for index in range(1, outputs))]
    for version in versions:
        model = build(
            [helper.make_node(op, ["x", *weights], names, "node", **attributes)], {"x": shape}, names, version, weights
        )
        check(model, {"x": normal(*shape)}, mended=[])
