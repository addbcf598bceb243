"""The reading view: order, types, symbols, known values, defaults."""

import cProfile

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

import graphgbp
from graphgbp.prepare import prepare
from tests.build import drawn, model, small_cnn
from tests.rules.harness import run


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


ZERO, ONE, TWO, MINUS = (np.array([value]) for value in (0, 1, 2, -1))
NUMBERS = {"zero": ZERO, "one": ONE, "two": TWO, "four": np.array([4]), "minus": MINUS, "first": np.int64(0)}
NUMBERS |= {"last": np.array([2, 3]), "half": np.float32(0.5), "floattwo": np.float32([2]), "three": np.array([3])}
COMPUTED = {
    "the batch, and the rest": [
        "s = Shape(x)", "n = Gather(s, zero)", "t = Concat<axis=0>(n, minus)", "y = Reshape(x, t)",
    ],
    "a scalar of the shape": [
        "s = Shape(x)", "n = Gather(s, first)", "u = Unsqueeze(n, zero)", "t = Concat<axis=0>(u, four, minus)",
        "y = Reshape(x, t)",
    ],
    "channels in groups": [
        "s = Shape(x)", "c = Slice(s, one, two)", "h = Div(c, two)", "n = Shape<end=1>(x)", "r = Shape<start=2>(x)",
        "t = Concat<axis=0>(n, two, h, r)", "a = Reshape(x, t)", "b = Transpose<perm=[0,2,1,3,4]>(a)",
        "y = Reshape(b, s)",
    ],
    "batch and channels as one": [
        "n = Shape<end=1>(x)", "m = Mul(n, four)", "r = Gather(s, last)", "s = Shape(x)", "t = Concat<axis=0>(m, r)",
        "a = Reshape(x, t)", "u = Concat<axis=0>(n, minus, r)", "y = Reshape(a, u)",
    ],
    "tokens, and one in front": [
        "n = Shape<end=1>(x)", "t = Concat<axis=0>(n, four, minus)", "a = Reshape(x, t)",
        "b = Transpose<perm=[0,2,1]>(a)",
        "ones = ConstantOfShape<value = int64[1] {1}>(three)", "e = Concat<axis=0>(n, minus, minus)",
        "m = Mul(ones, minus)", "q = Equal(e, m)", "w = Where(q, ones, e)", "k = Expand(token, w)",
        "y = Concat<axis=1>(k, b)",
    ],
    "as large as the input": [
        "p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)", "q = Shape<end=2>(p)", "r = Shape<start=2>(x)",
        "t = Concat<axis=0>(q, r)", "u = Resize(p, , , t)", "y = Add(u, x)",
    ],
    "twice as large, by real numbers": [
        "r = Shape<start=2>(x)", "f = Cast<to=1>(r)", "m = Mul(f, floattwo)", "g = Floor(m)", "i = Cast<to=7>(g)",
        "q = Shape<end=2>(x)", "t = Concat<axis=0>(q, i)", "y = Resize(x, , , t)",
    ],
    "pixels out of channels": ["y = DepthToSpace<blocksize=2>(x)"],
    "channels out of pixels, and repeated": ["a = DepthToSpace<blocksize=2>(x)", "b = SpaceToDepth<blocksize=2>(a)",
                                             "t = Concat<axis=0>(one, two, one, one)", "y = Tile(b, t)"],
}  # fmt: skip


@pytest.mark.parametrize("case", COMPUTED)
def test_computed_sizes_are_followed(case):
    """What the symbols stand for, put in their place, is the shape at run time."""
    weights = NUMBERS | {"token": drawn(1, 1, 4), "three": np.array([3])}
    made = model(
        sorted(COMPUTED[case], key=lambda node: node != "s = Shape(x)"), {"x": ("N", 4, "H", "W")}, ["y"], weights
    )
    del made.graph.value_info[:]
    tensors = prepare(made).tensors
    for sizes in ((2, 6, 4), (5, 2, 8)):
        found = run(made, {"x": drawn(sizes[0], 4, *sizes[1:])})["y"].shape
        named = dict(zip("NHW", sizes, strict=True))
        assert tuple(eval(str(size), named) for size in tensors["y"].shape) == found, tensors["y"].shape


def test_sizes_are_not_told_where_they_are_not_known():
    nodes = ["n = Shape<end=1>(x)", "m = Add(n, n)", "t = Concat<axis=0>(m, minus)", "y = Reshape(x, t)"]
    shape = prepare(model(nodes, {"x": ("N", 4, "H", "W")}, ["y"], NUMBERS)).tensors["y"].shape
    assert len(shape) == 2 and not {"N", "H", "W"} & set(shape)


def test_reading_takes_steps_in_proportion_to_the_nodes():
    """Twice the nodes, twice the calls of functions."""

    def steps(count: int) -> int:
        nodes = [node for i in range(count) for node in (f"s{i} = Sigmoid(y{i})", f"y{i + 1} = Add(s{i}, y{i})")]
        head = [f"p = GlobalAveragePool(y{count})", "f = Flatten(p)", "y = MatMul(f, w)"]
        made = model([*nodes, *head], {"y0": ("N", 4, "H", "W")}, ["y"], {"w": drawn(4, 3)})
        with cProfile.Profile() as profile:
            graphgbp.convert(made, ["guided_backprop", "gradcam"])
            graphgbp.inspect(made)
        return sum(entry.callcount for entry in profile.getstats())

    steps(10)
    assert steps(160) < 2.2 * steps(80)


def test_an_operator_that_onnx_has_withdrawn_is_refused_as_one_without_a_rule():
    made = model(["y = Relu(x)"], {"x": (3, 3)}, ["y"], {"i": np.array([[1]]), "u": drawn(1, 1)})
    made.graph.node[0].op_type = "Scatter"
    made.graph.node[0].input.extend(["i", "u"])
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"Scatter .*it has no derivative rule"):
        graphgbp.vjp(made)
