import numpy as np
import pytest
import torch

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.build import model
from tests.rules.harness import check_rule, normal, run, run_by_reference, single_op

OPSETS = (16, 19, 21, 23, 24, 26)  # each has another version of Identity and Cast
SHAPES = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((4,), (2, 3, 4)), ((2, 1, 4), (1, 3, 1)), ((), (2, 3))]
BINARY = [
    ("Add", torch.add),
    ("Sub", torch.sub),
    ("Mul", torch.mul),
    ("Div", torch.div),
    ("Max", torch.maximum),
    ("Min", torch.minimum),
    ("Pow", torch.pow),
]


def _operands(op, shapes, dtype="float32"):
    a, b = (normal(*shape, seed=index + 1) for index, shape in enumerate(shapes))
    if op == "Div":
        b = b + 3 * np.sign(b)
    if op == "Pow":
        a = np.abs(a) + 0.2
    return [np.asarray(a, dtype), np.asarray(b, dtype)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("op", "reference"), BINARY)
def test_binary(op, reference, shapes, dynamic):
    check_rule(op, _operands(op, shapes), reference, wrt=(0, 1), dynamic=dynamic)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize(("op", "reference"), BINARY)
def test_binary_in_double(op, reference, opset):
    operands = _operands(op, ((2, 3, 4), (3, 1)), "float64")
    check_rule(op, operands, reference, wrt=(0, 1), opset=opset, tolerance=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("op", "combine"), [("Sum", torch.add), ("Max", torch.maximum), ("Min", torch.minimum)])
def test_variadic(op, combine, count, dynamic):
    def reference(first, *others):
        result = first.clone()
        for other in others:
            result = combine(result, other)
        return result

    shapes = [(2, 3, 4), (3, 1), (1, 1, 4)][:count]
    inputs = [normal(*shape, seed=index) for index, shape in enumerate(shapes)]
    check_rule(op, inputs, reference, wrt=range(count), dynamic=dynamic)


@pytest.mark.parametrize(("op", "reference"), [("Max", torch.amax), ("Min", torch.amin)])
def test_ties_share_in_equal_parts(op, reference):
    a, b, c = (np.array(values, np.float32) for values in ([1, 1, 2, 3], [1, 2, 2, 3], [1, 0, 5, 3]))
    check_rule(op, [a, b, c], lambda *x: reference(torch.stack(x), 0), wrt=(0, 1, 2))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_where(shapes, dynamic):
    rows = torch.broadcast_shapes(*shapes)[-2]
    condition = np.arange(rows)[:, None] % 2 == 0
    a, b = (normal(*shape, seed=index) for index, shape in enumerate(shapes))
    check_rule("Where", [condition, a, b], torch.where, wrt=(1, 2), constants=[], dynamic=dynamic)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "int32"])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, -1, [[0], [2], [3]]])
def test_power_of_any_base(exponent, dtype, known):
    bases = np.concatenate([normal(3, 4), np.zeros((3, 1))], 1)
    powers = np.asarray(exponent, dtype)
    bases = bases[:, :4] if np.any(powers < 0) else bases  # 0^-1 has no derivative
    constants = [1] if known else []
    check_rule("Pow", [bases.astype(np.float32), powers], torch.pow, constants=constants)


def test_power_of_zero():
    base, exponent = np.array([0, 0, 0, 2], np.float32), np.array([0, 1, 2.5, 0], np.float32)
    check_rule("Pow", [base, exponent], torch.pow, wrt=(0, 1))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_mean(count, dynamic):
    shapes = [(2, 3, 4), (3, 1), (1, 1, 4)][:count]
    inputs = [normal(*shape, seed=index + 1) for index, shape in enumerate(shapes)]
    mean = lambda *terms: sum(terms) / len(terms)  # noqa: E731
    check_rule("Mean", inputs, mean, wrt=range(count), dynamic=dynamic)
    doubles = [value.astype(np.float64) for value in inputs]
    check_rule("Mean", doubles, mean, wrt=range(count), evaluate=run_by_reference, tolerance=1e-12)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((4,), (2, 3, 4))])
def test_mod(shapes, dtype, dynamic, opset):
    a, b = (normal(*shape, seed=index + 1).astype(dtype) for index, shape in enumerate(shapes))
    check_rule("Mod", [9 * a, b + np.sign(b)], torch.fmod, wrt=(0, 1), dynamic=dynamic, opset=opset, fmod=1)


def test_mod_with_the_divisors_sign_is_refused():
    model = single_op("Mod", [normal(3), normal(3)], opset=18)
    with pytest.raises(UnsupportedOperatorError, match="'node': ONNX gives real numbers no remainder without fmod=1"):
        graphgbp.vjp(model)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_erf(dynamic, opset):
    x = normal(3, 4, 5, seed=1)
    check_rule("Erf", [2 * x], torch.erf, opset=opset, dynamic=dynamic)
    check_rule("Erf", [x.astype(np.float64)], torch.erf, opset=opset, evaluate=run_by_reference, tolerance=1e-7)


GELU = ["t = Div(x, root)", "e = Erf(t)", "s = Add(e, one)", "p = Mul(half, s)", "y = Mul(x, p)"]
NUMBERS = {"root": np.float32(np.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5)}


def test_numbers_meet_in_one_factor():
    """A GELU written out: 1/2, 2/sqrt(pi) and 1/sqrt(2) multiply its cotangent once, as they do not one by one."""
    made = model(GELU, {"x": ["N", 64]}, ["y"], NUMBERS)
    explained = graphgbp.vjp(made)
    added = [node.op_type for node in explained.graph.node[len(GELU) :] if node.op_type != "Identity"]
    assert sorted(added) == ["Add", "Div", "Exp", "Mul", "Mul", "Mul", "Mul"]
    x, dy = 3 * normal(4, 64), normal(4, 64, seed=1)
    exact = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    torch.nn.functional.gelu(exact).backward(torch.from_numpy(dy).double())
    got = run(explained, {"x": x, "y_grad": dy})["x_grad"]
    np.testing.assert_allclose(got, exact.grad, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "nodes",
    [
        ["a = Mul(x, huge)", "y = Mul(a, huge)"],
        ["a = Mul(x, tiny)", "y = Mul(a, tiny)"],
        ["a = Mul(x, nought)", "y = Mul(a, huge)"],
        ["a = Mul(x, row)", "y = Mul(a, huge)"],
    ],
    ids=["beyond float32", "below float32", "zero", "no number"],
)
def test_numbers_that_do_not_meet(nodes):
    """Where their product is none of float32's, they multiply one by one."""
    weights = {"huge": np.float32(1e30), "tiny": np.float32(1e-30), "nought": np.float32(0), "row": normal(4)}
    explained = graphgbp.vjp(model(nodes, {"x": [3, 4]}, ["y"], weights))
    assert [node.op_type for node in explained.graph.node[2:]] == ["Mul", "Mul", "Identity"]
    got = run(explained, {"x": normal(3, 4), "y_grad": np.full((3, 4), 1e-20, np.float32)})["x_grad"]
    names = [node.split("(")[1].rstrip(")").split(", ")[1] for node in nodes]
    expected = np.full((3, 4), 1e-20) * np.prod(
        [np.broadcast_to(weights[name], (3, 4)) for name in names], 0, np.float64
    )
    assert np.isfinite(got[np.abs(expected) < 1e38]).all()
    np.testing.assert_allclose(got[np.abs(expected) < 1e38], expected[np.abs(expected) < 1e38], rtol=1e-6, atol=1e-38)


UNARY = [
    ("Neg", torch.neg),
    ("Abs", torch.abs),
    ("Sqrt", torch.sqrt),
    ("Exp", torch.exp),
    ("Log", torch.log),
    ("Reciprocal", torch.reciprocal),
    ("Identity", torch.clone),
    ("Dropout", torch.clone),
]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("op", "reference"), UNARY)
def test_unary(op, reference, dtype, dynamic, opset):
    x = normal(3, 4, 5)
    if op in ("Sqrt", "Log", "Reciprocal"):
        x = np.abs(x) + 0.3
    check_rule(op, [x.astype(dtype)], reference, opset=opset, dynamic=dynamic)


def test_absolute_value_at_zero():
    check_rule("Abs", [np.array([-1, 0, -0.0, 2], np.float32)], torch.abs)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("source", "target"), [("float32", "float64"), ("float64", "float32"), ("float32", "float32")])
def test_cast_between_real_types(source, target, opset):
    to = {"float32": 1, "float64": 11}[target]
    check_rule("Cast", [normal(3, 4).astype(source)], torch.clone, opset=opset, to=to)


def test_cast_to_integers_carries_nothing():
    model = single_op("Cast", [normal(4)], opset=18, to=7)
    model.graph.node.add(op_type="Cast", input=["y0"], output=["z"]).attribute.add(name="to", type=2, i=1)
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.elem_type = "z", 1
    got = run(graphgbp.vjp(model), {"x0": normal(4), "z_grad": np.ones(4, np.float32)})
    np.testing.assert_array_equal(got["x0_grad"], 0)


def test_cast_to_eight_bits_is_refused():
    model = single_op("Cast", [normal(4)], opset=19, to=17)
    model.graph.node.add(op_type="Cast", input=["y0"], output=["z"]).attribute.add(name="to", type=2, i=1)
    model.graph.output[0].name, model.graph.output[0].type.tensor_type.elem_type = "z", 1
    with pytest.raises(UnsupportedOperatorError, match=r"node 'node'.*float8_e4m3fn"):
        graphgbp.vjp(model)


@pytest.mark.parametrize("opset", [16, 22])
@pytest.mark.parametrize("outputs", [1, 2])
def test_dropout_at_inference(outputs, opset):
    ratio, off = np.array(0.7, np.float32), np.array(False)
    reference = lambda x, *_: x.clone()  # noqa: E731
    check_rule("Dropout", [normal(3, 4), ratio, off], reference, opset=opset, outputs=outputs)
    check_rule("Dropout", [normal(3, 4), ratio], reference, opset=opset, outputs=outputs)


@pytest.mark.parametrize(("constants", "reason"), [([2], "is true"), ([], "only at run time")])
def test_dropout_in_training_is_refused(constants, reason):
    model = single_op("Dropout", [normal(3), None, np.array(True)], opset=18, constants=constants)
    with pytest.raises(UnsupportedOperatorError, match=f"'node': its training_mode .*{reason}"):
        graphgbp.vjp(model, inputs=["x0"])


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize(("source", "wanted"), [("float32", "float64"), ("float64", "float32"), ("float32", "float32")])
def test_cast_like(source, wanted, opset):
    def reference(x, like):
        return x + 0 * like.sum()

    inputs = [normal(3, 4).astype(source), normal(2).astype(wanted)]
    check_rule("CastLike", inputs, reference, wrt=(0, 1), opset=opset)  # seen as a Cast
