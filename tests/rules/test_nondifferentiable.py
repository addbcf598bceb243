"""What is declared without a derivative has none: no real output, or an output that no small step moves."""

import numpy as np
import onnx
import pytest
from onnx import helper

import graphgbp
from graphgbp import registry
from graphgbp.rules import nondifferentiable as declarations
from tests.rules.harness import normal, run, single_op

SEEN_AS_ANOTHER = ("DynamicQuantizeLinear",)
DECLARED = sorted(
    key
    for key, entry in registry.table().items()
    if entry is registry.NONDIFFERENTIABLE and key[1] not in SEEN_AS_ANOTHER
)
REAL = {"tensor(float)", "tensor(double)", "tensor(float16)", "tensor(bfloat16)"}
PIECEWISE_CONSTANT = ("Bernoulli", "Ceil", "Floor", "Hardmax", "Round", "Sign")
NO_VALUE_READ = ("EyeLike", "RandomNormalLike", "RandomUniformLike")
NO_REAL_INPUT = (
    *("Constant", "ConstantOfShape", "RandomNormal", "RandomUniform"),
    *("BlackmanWindow", "HammingWindow", "HannWindow", "TfIdfVectorizer"),
)


def test_the_table_holds_the_declarations():
    families = (
        *(declarations.NO_REAL_NUMBER, declarations.NO_VALUE_READ),
        *(declarations.NO_REAL_INPUT, declarations.PIECEWISE_CONSTANT),
    )
    assert len(DECLARED) == sum(len(versions) for family in families for versions in family.values())


def _schema(key: registry.Key) -> onnx.defs.OpSchema:
    domain, op, version = key
    return onnx.defs.get_schema(op, version, domain)


def _takes(formal: onnx.defs.OpSchema.FormalParameter) -> bool:
    return not REAL.isdisjoint(formal.types)


@pytest.mark.parametrize("key", DECLARED, ids=lambda key: f"{key[1]}-{key[2]}")
def test_a_declared_operator_has_a_reason(key):
    schema = _schema(key)
    reads_real = any(_takes(x) for x in schema.inputs)
    makes_real = any(_takes(y) for y in schema.outputs)
    if reads_real and makes_real:
        assert key[1] in PIECEWISE_CONSTANT + NO_VALUE_READ
    elif makes_real:
        assert key[1] in NO_REAL_INPUT


@pytest.mark.parametrize("op", ["Ceil", "Floor", "Hardmax", "Round", "Sign"])
def test_a_small_step_moves_no_output(op):
    x = normal(50)
    model = single_op(op, [x], opset=18)
    np.testing.assert_array_equal(run(model, {"x0": x})["y0"], run(model, {"x0": x + np.float32(1e-6)})["y0"])


@pytest.mark.parametrize("op", ["EyeLike", "RandomNormalLike", "RandomUniformLike"])
def test_the_output_reads_no_value(op):
    first, second = normal(5, 5), 100 * normal(5, 5, seed=1)
    seed = {} if op == "EyeLike" else {"seed": 1.0}
    model = single_op(op, [first], opset=18, **seed)
    np.testing.assert_array_equal(run(model, {"x0": first})["y0"], run(model, {"x0": second})["y0"])


@pytest.mark.parametrize("op", ["Ceil", "Floor", "Hardmax", "Round", "Sign", "EyeLike"])
def test_the_gradient_is_zero(op):
    x = normal(4, 4)
    explained = graphgbp.vjp(single_op(op, [x], opset=18))
    np.testing.assert_array_equal(run(explained, {"x0": x, "y0_grad": normal(4, 4)})["x0_grad"], 0)


def test_a_gradient_passes_beside_them():
    """y = x * float(x > 0) + shape(x): the comparison and the size carry nothing, the product does."""
    nodes = [
        helper.make_node("Greater", ["x", "zero"], ["positive"]),
        helper.make_node("Cast", ["positive"], ["mask"], to=1),
        helper.make_node("Mul", ["x", "mask"], ["gated"]),
        helper.make_node("Size", ["x"], ["count"]),
        helper.make_node("Cast", ["count"], ["real_count"], to=1),
        helper.make_node("Add", ["gated", "real_count"], ["y"]),
    ]
    info = helper.make_tensor_value_info
    zero = onnx.numpy_helper.from_array(np.zeros((), np.float32), "zero")
    graph = helper.make_graph(nodes, "masked", [info("x", 1, ["n"])], [info("y", 1, ["n"])], [zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    x, dy = normal(20), normal(20, seed=1)
    got = run(graphgbp.vjp(model), {"x": x, "y_grad": dy})
    np.testing.assert_array_equal(got["x_grad"], np.where(x > 0, dy, 0))
