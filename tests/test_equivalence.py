import re

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from graphgbp.equivalence import RunError, difference, run, run_on_random_input

F = np.float32


@pytest.mark.parametrize(
    ("expected", "found", "says"),
    [
        (F([1, 10]), F([1.00009, 10]), None),
        (F([1, 10]), F([1.0002, 10]), "differs by up to 0.0002 .*largest value is 10"),
        (F([0, 0]), F([0, 0]), None),
        (F([0, 0]), F([0, 1e-9]), "differs by up to 1e-09"),
        (F([np.nan, np.inf, 1]), F([np.nan, np.inf, 1]), None),
        (F([np.nan, 2, 1]), F([3, 2, 1]), "other places"),
        (F([np.inf, 1]), F([-np.inf, 1]), "other places"),
        (F([np.nan]), F([np.nan]), "nowhere finite"),
        (F([1, 2]), F([[1, 2]]), r"is float32\[1, 2\] instead of float32\[2\]"),
        (F([1]), np.float64([1]), "is float64"),
        (np.array([1, 2]), np.array([1, 3]), "other values"),
        (np.array(["a"], object), np.array(["a"], object), None),
        (F([]), F([]), None),
        ([F([1]), {"b": F([2])}], [F([1]), {"b": F([2])}], None),
        ([F([1]), {"b": F([2])}], [F([1]), {"b": F([3])}], "differs by up to 1"),
        ([F([1])], [F([1]), F([1])], "another number"),
    ],
)
def test_difference(expected, found, says):
    what = difference(expected, found, 1e-5)
    assert what is None if says is None else re.search(says, what or "")


def sum_of(types, shapes):
    """A model that casts its inputs to float and adds them."""
    inputs = [
        helper.make_tensor_value_info(f"x{i}", kind, shape)
        for i, (kind, shape) in enumerate(zip(types, shapes, strict=True))
    ]
    nodes = [helper.make_node("Cast", [value.name], [f"c{i}"], to=TensorProto.FLOAT) for i, value in enumerate(inputs)]
    nodes.append(helper.make_node("Sum", [f"c{i}" for i in range(len(inputs))], ["y"]))
    graph = helper.make_graph(nodes, "sum", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def test_open_sizes_and_types():
    types = (TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE)
    shapes = (["n", 3, "h", "h"], ["n", None, "h", None], ["n", 1, 1, 1], [], [3, "h", 1])
    feeds, outputs, failures = run_on_random_input(sum_of(types, shapes), {})
    assert [list(value.shape) for value in feeds.values()] == [
        [2, 3, 64, 64],
        [2, 3, 64, 64],
        [2, 1, 1, 1],
        [],
        [3, 64, 1],
    ]
    assert feeds["x1"].max() > 200 and feeds["x2"].max() <= 1
    assert outputs is not None and not failures
    np.testing.assert_allclose(outputs[0], sum(value.astype(np.float32) for value in feeds.values()), rtol=1e-5)


def test_same_input_every_time():
    model = sum_of([TensorProto.FLOAT], [["n", 5]])
    first, second = (run_on_random_input(model, {})[0]["x0"] for _ in range(2))
    assert np.array_equal(first, second) and first.std() > 0.5


def test_unknown_rank_is_a_batch_of_images():
    model = sum_of([TensorProto.FLOAT], [None])
    assert run_on_random_input(model, {})[0]["x0"].shape == (2, 3, 64, 64)


def test_no_random_input_for_text():
    _, outputs, failures = run_on_random_input(sum_of([TensorProto.STRING], [[1]]), {})
    assert outputs is None and "'x0' is no tensor of numbers" in failures[0]


def test_what_cannot_be_run():
    model = sum_of([TensorProto.FLOAT], [[2]])
    with pytest.raises(RunError, match=r"rank|dimension"):
        run(model, {"x0": np.zeros([2, 2], np.float32)})
    with pytest.raises(RunError):
        run(onnx.ModelProto(), {})
