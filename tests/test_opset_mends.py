"""What the version converter gets wrong is mended before it runs."""

import math

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, parser, version_converter

from graphgbp.opset import raise_opset
from tests.opset_checks import F, build, check, converter_is_wrong, normal, produced, resize_model, resized
from tests.rules.harness import run


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
