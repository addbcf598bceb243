"""Raising old models: against the original in ONNX Runtime and, for the mended operators, against their definition."""

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser, version_converter
from onnx.external_data_helper import convert_model_to_external_data

from graphgbp import opset
from graphgbp.errors import MissingWeightsError, OpsetError
from graphgbp.opset import raise_opset
from tests.light_models import input_name, light_input, light_model
from tests.rules.harness import run

F = TensorProto.FLOAT


def build(nodes, inputs, outputs, version, weights=None, ir_version=8, domains=(), **graph):
    """A model; `inputs` maps names to shapes, `weights` names to arrays; IR 3 lists the weights as inputs."""
    weights = {name: np.asarray(value) for name, value in (weights or {}).items()}
    infos = [helper.make_tensor_value_info(name, F, shape) for name, shape in inputs.items()]
    if ir_version < 4:
        kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in weights.items()}
        infos += [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in weights.items()]
    results = [helper.make_tensor_value_info(name, F, None) for name in outputs]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "graph", infos, results, initializers, **graph)
    imports = [helper.make_opsetid("", version), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=imports, ir_version=ir_version))


def normal(*shape, seed=7):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def produced(graph):
    return {name for node in graph.node for name in node.output if name}


def assert_only_nodes_changed(raised, model):
    """Everything but nodes, opset and inlined functions is the original's, and no name of a tensor is lost."""
    assert [(entry.domain, entry.version) for entry in raised.opset_import] == [
        (entry.domain, entry.version if entry.domain else 16) for entry in model.opset_import
    ]
    assert produced(model.graph) <= produced(raised.graph)
    copies = []
    for proto in (raised, model):
        copy = type(proto).FromString(proto.SerializeToString())
        del copy.graph.node[:], copy.opset_import[:], copy.functions[:]
        copies.append(copy.SerializeToString(deterministic=True))
    assert copies[0] == copies[1]


def check(model, feeds, expected=None, *, mended=None):
    """Raise, and hold the result against the original in ONNX Runtime and against `expected`."""
    before = model.SerializeToString(deterministic=True)
    raised, record = raise_opset(model, None)
    assert model.SerializeToString(deterministic=True) == before
    assert_only_nodes_changed(raised, model)
    onnx.checker.check_model(raised, full_check=True)
    old, new = run(model, feeds), run(raised, feeds)
    for name, value in old.items():
        np.testing.assert_allclose(new[name], value, rtol=0, atol=1e-6 * max(np.abs(value).max(), 1), err_msg=name)
    if expected is not None:
        np.testing.assert_allclose(new["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if mended is not None:
        assert record["mended"] == mended
    assert record["source"] == model.opset_import[0].version
    assert record["raised_to"] == 16
    return raised, record


def converter_is_wrong(model, feeds, expected):
    found = run(version_converter.convert_version(model, 16), feeds)["y"]
    return np.abs(found - expected).max() > 0.1 * np.abs(expected).max()


# -- real networks ------------------------------------------------------------------------------------------


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


# -- the mended faults --------------------------------------------------------------------------------------


def resized(x, scales, mode):
    """Upsample and Resize before opset 11 by their definition: axis by axis, sampled at i / scale."""
    for axis, scale in enumerate(scales):
        size = x.shape[axis]
        at = np.arange(math.floor(size * scale)) / scale
        if mode == "nearest":
            at = np.ceil(at - 1e-6) if scale < 1 else np.floor(at + 1e-6)
        at = np.minimum(at, size - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if other == axis else 1 for other in range(x.ndim)])
        high = np.minimum(low + 1, size - 1)
        x = (1 - weight) * x.take(low, axis) + weight * x.take(high, axis)
    return x


def resize_model(version, mode, scales, shape):
    if version < 9:
        node = helper.make_node("Upsample", ["x"], ["u"], "up1", mode=mode, scales=[float(scale) for scale in scales])
        weights = {}
    else:
        node = helper.make_node("Upsample" if version == 9 else "Resize", ["x", "scales"], ["u"], "up1", mode=mode)
        weights = {"scales": np.array(scales, np.float32)}
    # the mended node is not the output: the converter renames such a tensor
    return build([node, helper.make_node("Neg", ["u"], ["y"])], {"x": shape}, ["y"], version, weights)


@pytest.mark.parametrize("version", [7, 8, 9, 10])
@pytest.mark.parametrize(
    ("mode", "scales", "shape"),
    [
        ("linear", [1, 1, 2, 2], [1, 2, 4, 5]),
        ("linear", [1, 1, 2.5, 1.3], [2, 2, 4, 5]),
        ("linear", [2, 3], [4, 5]),
        ("nearest", [1, 1, 2.5, 1.3], [2, 2, 4, 5]),
        ("nearest", [1, 1, 1.7], [1, 2, 6]),
    ],
)
def test_enlarging(version, mode, scales, shape):
    model, x = resize_model(version, mode, scales, shape), normal(*shape)
    expected = -resized(x, np.float32(scales), mode)
    assert converter_is_wrong(model, {"x": x}, expected)
    check(model, {"x": x}, expected, mended=[f"{model.graph.node[0].op_type} 'up1': {mode}, asymmetric"])


@pytest.mark.parametrize(
    ("mode", "scales", "how"),
    [
        ("linear", [1, 1, 0.6, 0.5], "linear, asymmetric"),
        ("nearest", [1, 1, 0.6, 0.4], "nearest, asymmetric, rounding up"),
        ("nearest", [1, 1, 0.77, 1.7], "nearest, asymmetric, enlarged rounding down, then shrunk rounding up"),
    ],
)
def test_shrinking(mode, scales, how):
    model, x = resize_model(10, mode, scales, [1, 2, 7, 9]), normal(1, 2, 7, 9)
    expected = -resized(x, np.float32(scales), mode)
    assert converter_is_wrong(model, {"x": x}, expected)
    check(model, {"x": x}, expected, mended=[f"Resize 'up1': {how}"])


@pytest.mark.parametrize("scales", [[1, 1, 2.5, 1.3], [1, 1, 0.6, 0.4], [1, 1, 0.6, 2.5]])
def test_scales_known_at_run_time_only(scales):
    model, x = resize_model(10, "nearest", scales, [1, 2, 7, 9]), normal(1, 2, 7, 9)
    model.graph.node[0].input[1] = "computed"
    model.graph.node.insert(0, helper.make_node("Identity", ["scales"], ["computed"]))
    how = "Resize 'up1': nearest, asymmetric, enlarged rounding down, then shrunk rounding up"
    check(model, {"x": x}, -resized(x, np.float32(scales), "nearest"), mended=[how])


@pytest.mark.parametrize("version", [7, 11, 12])
@pytest.mark.parametrize("axis", [None, 0, 1, -2])
def test_hardmax(version, axis):
    if version < 11 and axis is not None and axis < 0:
        pytest.skip("negative axes came with opset 11")
    attributes = {} if axis is None else {"axis": axis}
    model = build([helper.make_node("Hardmax", ["x"], ["y"], "hard", **attributes)], {"x": [2, 3, 4]}, ["y"], version)
    x = normal(2, 3, 4)
    axis = 1 if axis is None else axis
    flat = x.reshape(math.prod(x.shape[:axis]), -1)
    expected = np.eye(flat.shape[1], dtype=np.float32)[flat.argmax(1)].reshape(x.shape)
    assert converter_is_wrong(model, {"x": x}, expected)
    check(model, {"x": x}, expected, mended=[f"Hardmax 'hard': over all axes from {axis} on"])


def test_scatter_keeps_its_name():
    nodes = [
        helper.make_node("Scatter", ["x", "at", "new"], ["s"], "put", axis=1),
        helper.make_node("Neg", ["s"], ["y"]),
    ]
    weights = {"at": np.array([[2, 0]]), "new": normal(1, 2)}
    model = build(nodes, {"x": [2, 4]}, ["y"], 9, weights)
    assert "s" not in produced(version_converter.convert_version(model, 16).graph)
    x = normal(2, 4)
    expected = x.copy()
    expected[0, [2, 0]] = weights["new"]
    check(model, {"x": x}, -expected, mended=["Scatter 'put': ScatterElements, its output's name kept"])


def test_inside_a_subgraph():
    """An Upsample of an outer tensor in the branch of an If, with a weight of the branch's own."""
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    branches = {}
    for name, mode in (("then_branch", "linear"), ("else_branch", "nearest")):
        node = helper.make_node("Upsample", ["h", "scales"], [name], f"{name}/up", mode=mode)
        branches[name] = helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, F, None)], [scales])
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
        helper.make_node("Cast", ["total"], ["condition"], to=TensorProto.BOOL),
        helper.make_node("If", ["condition"], ["y"], **branches),
    ]
    model = build(nodes, {"x": [1, 1, 3, 3]}, ["y"], 9)
    x = normal(1, 1, 3, 3)
    expected = resized(np.maximum(x, 0), [1, 1, 2, 2], "linear")
    assert converter_is_wrong(model, {"x": x}, expected)
    raised, record = check(model, {"x": x}, expected)
    assert sorted(record["mended"]) == [
        "Upsample 'else_branch/up': nearest, asymmetric",
        "Upsample 'then_branch/up': linear, asymmetric",
    ]
    (branch,) = (a.g for a in raised.graph.node[-1].attribute if a.name == "then_branch")
    assert list(branch.initializer) == [scales]


def test_unsorted_nodes():
    nodes = [
        helper.make_node("Hardmax", ["u"], ["y"], "hard"),
        helper.make_node("Upsample", ["r"], ["u"], "up", mode="linear", scales=[1.0, 1.0, 2.0, 2.0]),
        helper.make_node("Relu", ["x"], ["r"]),
    ]
    model = build(nodes, {"x": [1, 3, 4, 4]}, ["y"], 8)
    raised, record = raise_opset(model, None)
    assert len(record["mended"]) == 2
    feeds = {"x": normal(1, 3, 4, 4)}
    np.testing.assert_array_equal(run(raised, feeds)["y"], run(model, feeds)["y"])


@pytest.mark.parametrize("version", [9, 12])
def test_local_functions_are_inlined(version):
    """The converter drops the functions; each call must become its body, mended where need be."""
    body = [helper.make_node("Neg", ["a"], ["b"], "negate"), helper.make_node("Hardmax", ["b"], ["c"], "hard")]
    imports = [helper.make_opsetid("", version)]
    function = helper.make_function("local", "Twist", ["a"], ["c"], body, imports)
    nodes = [
        helper.make_node("Twist", ["x"], ["t"], domain="local"),
        helper.make_node("Twist", ["t"], ["y"], domain="local"),
    ]
    model = build(nodes, {"x": [2, 3, 4]}, ["y"], version, domains=["local"])
    model.functions.append(function)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", F, [2, 3, 4]))
    x = normal(2, 3, 4)
    assert not version_converter.convert_version(model, 16).functions
    raised, record = check(model, {"x": x})
    assert not raised.functions
    assert record["mended"][0] == "function 'local::Twist': inlined"
    assert len([line for line in record["mended"] if line.startswith("Hardmax")]) == 2


def test_a_functions_default_is_kept():
    """ONNX's inliner loses it."""
    function = parser.parse_function(
        '<domain: "f", opset_import: ["" : 13]> act <slope: float = 0.5> (x) => (y) '
        "{ y = LeakyRelu <alpha: float = @slope> (x) }"
    )
    model = build([helper.make_node("act", ["x"], ["y"], domain="f")], {"x": [2, 3]}, ["y"], 13, domains=["f"])
    model.functions.append(function)
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", F, [2, 3]))
    x = normal(2, 3)
    check(model, {"x": x}, np.where(x > 0, x, x / 2))


# -- the proof ----------------------------------------------------------------------------------------------


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


# -- what stays ---------------------------------------------------------------------------------------------


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
