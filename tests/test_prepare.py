"""The reading view: order, types, symbols, known values, defaults."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import graphgbp
from graphgbp.prepare import prepare
from tests.build import drawn, model, small_cnn


def test_nodes_are_put_in_order():
    made = model(["a = Relu(x)", "b = Sigmoid(a)", "y = Add(a, b)"], {"x": (2,)}, ["y"])
    nodes = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend(nodes[::-1])
    view = prepare(made)
    assert [node.op for node in view.graph.nodes] == ["Relu", "Sigmoid", "Add"]
    assert [node.op_type for node in made.graph.node] == ["Add", "Sigmoid", "Relu"], "the model itself is not changed"


def test_a_long_chain_in_reverse_order():
    made = model([f"t{i + 1} = Relu(t{i})" for i in range(3000)], {"t0": (2,)}, ["t3000"])
    nodes = list(made.graph.node)
    del made.graph.node[:]
    made.graph.node.extend(nodes[::-1])
    assert [node.outputs[0].name for node in prepare(made).graph.nodes][:2] == ["t1", "t2"]


def test_a_cycle_is_refused():
    made = model(["a = Relu(x)", "y = Relu(a)"], {"x": (2,)}, ["y"])
    made.graph.node[0].input[0] = "y"
    with pytest.raises(graphgbp.ModelFileError, match="cycle"):
        prepare(made)


def test_equal_geometry_gives_equal_symbols():
    weights = {"w": drawn(4, 4, 3, 3), "p": drawn(4, 4, 1, 1)}
    nodes = [
        "a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w)",
        "b = Conv<strides=[2,2]>(x, p)",
        "y = Add(a, b)",
        "c = Conv<pads=[1,1,1,1]>(y, w)",
    ]
    tensors = prepare(model(nodes, {"x": ("N", 4, "H", "W")}, ["c"], weights)).tensors
    assert tensors["a"].shape == tensors["b"].shape == tensors["y"].shape == tensors["c"].shape
    assert tensors["a"].shape[0] == "N" and tensors["a"].shape[2] != tensors["a"].shape[3]


def test_different_geometry_gives_different_symbols():
    nodes = ["a = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)", "y = MaxPool<kernel_shape=[3,3], strides=[2,2]>(x)"]
    tensors = prepare(model(nodes, {"x": ("N", 4, "H", "H")}, ["y"])).tensors
    assert tensors["a"].shape[2] != tensors["y"].shape[2]


def test_shape_arithmetic_is_folded_where_the_shape_is_known():
    nodes = [
        "s = Shape(x)",
        "n = Gather(s, zero)",
        "m = Unsqueeze(n, first)",
        "t = Concat<axis=0>(m, rest)",
        "y = Reshape(x, t)",
    ]
    weights = {"zero": np.int64(0), "first": np.array([0]), "rest": np.array([-1])}
    tensors = prepare(model(nodes, {"x": (2, 3, 4)}, ["y"], weights)).tensors
    assert isinstance(tensors["t"], gs.Constant) and tensors["t"].values.tolist() == [2, -1]
    assert tensors["y"].shape == (2, 12)


def test_a_wrong_declared_shape_does_not_count():
    made = small_cnn()
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1000
    assert prepare(made).tensors["y"].shape == ("N", 5)


def test_constant_nodes_and_defaults():
    made = model(["k = Constant<value_float=2.0>()", "a = LeakyRelu(x)", "y = Mul(a, k)"], {"x": (2, 3)}, ["y"])
    view = prepare(made)
    assert isinstance(view.tensors["k"], gs.Constant)
    leaky = next(node for node in view.graph.nodes if node.op == "LeakyRelu")
    assert leaky.attrs["alpha"] == pytest.approx(0.01)


def test_a_node_that_does_not_fit_its_inputs_is_named():
    made = model(["y = MatMul(x, w)"], {"x": (2, 3)}, ["y"], {"w": drawn(3, 4)})
    made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(drawn(5, 4), "w"))
    with pytest.raises(graphgbp.ModelFileError, match="MatMul"):
        prepare(made)


def test_the_batch_keeps_its_symbol_through_a_reshape():
    nodes = ["a = Reshape(x, flat)", "y = Reshape(a, back)"]
    weights = {"flat": np.array([-1, 12]), "back": np.array([-1, 4, 3])}
    tensors = prepare(model(nodes, {"x": ("N", 3, 4)}, ["y"], weights)).tensors
    assert tensors["a"].shape == ("N", 12) and tensors["y"].shape == ("N", 4, 3)


def test_a_reshape_that_mixes_the_batch_gets_a_symbol_of_its_own():
    tensors = prepare(model(["y = Reshape(x, s)"], {"x": ("N", 3, 4)}, ["y"], {"s": np.array([-1, 4])})).tensors
    assert tensors["y"].shape[0] != "N"


def test_an_operator_that_onnx_has_withdrawn_is_refused_as_one_without_a_rule():
    made = model(["y = Relu(x)"], {"x": (3, 3)}, ["y"], {"i": np.array([[1]]), "u": drawn(1, 1)})
    made.graph.node[0].op_type = "Scatter"
    made.graph.node[0].input.extend(["i", "u"])
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"Scatter .*it has no derivative rule"):
        graphgbp.vjp(made)
