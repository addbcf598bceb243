import numpy as np
import pytest
from onnx import parser
from torch.nn import functional

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, run, run_by_reference, single_op

SHAPES = [(2, 6, 5), (2, 6, 3, 4), (2, 6, 2, 3, 2)]


def _inputs(shape, *parameters, dtype="float32"):
    """x off centre, and its scale and bias"""
    drawn = [normal(*parameter, seed=index + 2) for index, parameter in enumerate(parameters)]
    return [np.asarray(value, dtype) for value in (2 * normal(*shape, seed=1) + 0.7, *drawn)]


@pytest.mark.parametrize("opset", [16, 18, 22, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_instance_normalization(shape, wrt, dynamic, opset):
    reference = lambda x, scale, bias: functional.instance_norm(x, weight=scale, bias=bias, eps=0.1)  # noqa: E731
    inputs = _inputs(shape, (6,), (6,))
    check_rule("InstanceNormalization", inputs, reference, wrt=wrt, dynamic=dynamic, opset=opset, epsilon=0.1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 6)])
def test_group_normalization(shape, groups, wrt, dynamic):
    """Up to opset 20 a scale and a bias for each group, from 21 on for each channel."""
    reference = lambda x, scale, bias: functional.group_norm(x, groups, scale, bias, 0.1)  # noqa: E731
    by_group = lambda x, *pair: reference(x, *(v.repeat_interleave(6 // groups) for v in pair))  # noqa: E731
    options = {"wrt": wrt, "dynamic": dynamic, "num_groups": groups, "epsilon": 0.1}
    for opset in (18, 20):
        inputs = _inputs(shape, (groups,), (groups,))
        check_rule("GroupNormalization", inputs, by_group, opset=opset, **options)
    for opset in (21, 26):
        check_rule("GroupNormalization", _inputs(shape, (6,), (6,)), reference, opset=opset, **options)


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        ("GroupNormalization<num_groups=2>(x, pair, pair)", 18),
        ("GroupNormalization<num_groups=2>(x, four, four)", 21),
        ("MeanVarianceNormalization<axes=[1, 2]>(x)", 18),
    ],
)
def test_what_follows_knows_their_shapes(node, opset):
    """ONNX's inference does not look into these; a Slice of unknown rank would be refused."""
    made = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        single (float[N, 4, 5] x) => (float[N, 1, 5] y)
        <float[2] pair = {{1, 1}}, float[4] four = {{1, 1, 1, 1}}, int64[1] one = {{1}}, int64[1] two = {{2}}>
        {{ h = {node}  y = Slice(h, one, two, one) }}
    """)
    got = run(graphgbp.vjp(made), {"x": normal(3, 4, 5), "y_grad": normal(3, 1, 5, seed=1)})
    assert got["x_grad"].shape == (3, 4, 5)


@pytest.mark.parametrize("opset", [17, 18, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("axis", [0, 1, -1, -2, None])
def test_layer_normalization(axis, wrt, dynamic, opset):
    attributes = {} if axis is None else {"axis": axis}
    shape = (2, 3, 4)[-1 if axis is None else axis :]
    reference = lambda x, scale, bias: functional.layer_norm(x, shape, scale, bias, 1e-5)  # noqa: E731
    inputs = _inputs((2, 3, 4), shape, shape)
    check_rule("LayerNormalization", inputs, reference, wrt=wrt, dynamic=dynamic, opset=opset, **attributes)


@pytest.mark.parametrize("offset", [0, 30])
def test_its_statistics_by_one_node_or_by_seven(offset, monkeypatch):
    """The operator itself gives x^ and 1 / deviation; the moments written out say the same."""
    x, scale, bias = _inputs((2, 5, 96), (96,), (96,))
    made = single_op("LayerNormalization", [x + offset, scale, bias], opset=18, constants=(1, 2))
    feeds = {"x0": x + np.float32(offset), "y0_grad": normal(2, 5, 96, seed=9)}
    lowered = graphgbp.vjp(made)
    monkeypatch.setattr("graphgbp.rules.standardization._are_last", lambda axes, x: False)
    simple = graphgbp.vjp(made)
    assert [[node.op_type for node in m.graph.node].count("LayerNormalization") for m in (lowered, simple)] == [2, 1]
    assert len(lowered.graph.node) == len(simple.graph.node) - 6
    found, expected = (run(m, feeds)["x0_grad"] for m in (lowered, simple))
    np.testing.assert_allclose(found, expected, rtol=0, atol=(1 + offset) * 1e-6)


def test_layer_normalization_without_bias():
    reference = lambda x, scale: functional.layer_norm(x, (4,), scale, None, 0.1)  # noqa: E731
    check_rule("LayerNormalization", _inputs((2, 3, 4), (4,)), reference, wrt=(0, 1), epsilon=0.1)
    unnamed = [*_inputs((2, 3, 4), (4,)), None]  # ONNX Runtime 1.31 crashes on that
    options = {"epsilon": 0.1, "evaluate": run_by_reference}
    check_rule("LayerNormalization", unnamed, lambda x, scale, _: reference(x, scale), wrt=(0, 1), **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1), (1, 4)])
def test_layer_normalization_broadcasts_its_scale(shape, dynamic):
    reference = lambda x, scale, bias: functional.layer_norm(x, (3, 4)) * scale + bias  # noqa: E731
    inputs = _inputs((2, 3, 4), shape, shape)
    options = {"wrt": (0, 1, 2), "dynamic": dynamic, "axis": 1, "evaluate": run_by_reference}
    check_rule("LayerNormalization", inputs, reference, **options)


def test_layer_normalization_in_half_precision():
    """The squares of x are beyond float16; they are taken in float32."""
    reference = lambda x, scale, bias: functional.layer_norm(x, (8,), scale, bias)  # noqa: E731
    x, scale, bias = _inputs((3, 8), (8,), (8,), dtype="float16")
    check_rule("LayerNormalization", [400 * x, scale, bias], reference, wrt=(0, 1, 2), tolerance=5e-3)


@pytest.mark.parametrize("output", [1, 2])
def test_a_gradient_of_the_statistics_is_refused(output):
    model = single_op("LayerNormalization", _inputs((3, 4), (4,)), opset=18, outputs=3, constants=[1])
    with pytest.raises(UnsupportedOperatorError, match=f"no rule takes the gradient of its output 'y{output}'"):
        graphgbp.vjp(model, inputs=["x0"], outputs=[f"y{output}"])
    model.graph.node.add(op_type="Add", input=["y0", f"y{output}"], output=["z"])
    model.graph.output.add().CopyFrom(model.graph.output[0])
    model.graph.output[-1].name = "z"
    with pytest.raises(UnsupportedOperatorError, match=f"no rule takes the gradient of its output 'y{output}'"):
        graphgbp.vjp(model, inputs=["x0"], outputs=["z"])


@pytest.mark.parametrize("opset", [23, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (0, 1)])
@pytest.mark.parametrize("axis", [0, 1, -1, -2, None])
def test_root_mean_square_normalization(axis, wrt, dynamic, opset):
    attributes = {} if axis is None else {"axis": axis}
    shape = (2, 3, 4)[-1 if axis is None else axis :]
    reference = lambda x, scale: functional.rms_norm(x, shape, scale, 1e-5)  # noqa: E731
    inputs = _inputs((2, 3, 4), shape)
    check_rule("RMSNormalization", inputs, reference, wrt=wrt, dynamic=dynamic, opset=opset, **attributes)


def _standardized(x, axes):
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axes", [None, [0, 2, 3], [1, 2, 3], [2, -1], [-1]])
def test_mean_variance_normalization(axes, dynamic, opset):
    reference = lambda x: _standardized(x, axes or [0, 2, 3])  # noqa: E731
    attributes = {} if axes is None else {"axes": axes}
    check_rule(
        "MeanVarianceNormalization", _inputs((2, 3, 4, 5)), reference, dynamic=dynamic, opset=opset, **attributes
    )


def test_mean_variance_normalization_of_a_constant_stays_finite():
    x = np.full((1, 2, 3, 3), 0.5, np.float32)
    model = single_op("MeanVarianceNormalization", [x], opset=18)
    got = run_by_reference(graphgbp.vjp(model), {"x0": x, "y0_grad": normal(*x.shape)})["x0_grad"]
    assert np.isfinite(got).all()


@pytest.mark.parametrize("op", ["InstanceNormalization", "GroupNormalization", "LayerNormalization"])
def test_normalization_in_double(op):
    """To the digits of epsilon, which is a float32."""
    references = {
        "InstanceNormalization": (lambda x, s, b: functional.instance_norm(x, weight=s, bias=b), 6, {}),
        "GroupNormalization": (lambda x, *sb: functional.group_norm(x, 3, *sb), 6, {"num_groups": 3, "stash_type": 11}),
        "LayerNormalization": (lambda x, s, b: functional.layer_norm(x, (4,), s, b), 4, {}),
    }
    reference, size, attributes = references[op]
    inputs = _inputs((2, 6, 4), (size,), (size,), dtype="float64")
    options = {"wrt": (0, 1, 2), "opset": 21, "evaluate": run_by_reference, "tolerance": 1e-10}
    check_rule(op, inputs, reference, **options, **attributes)


@pytest.mark.parametrize("op", ["InstanceNormalization", "GroupNormalization"])
def test_only_a_network_that_runs_layer_normalization_gets_another(op):
    """ONNX Runtime before 1.27 loses there the variance of a tensor far from 0."""
    inputs = _inputs((2, 4, 6), (4,), (4,)) if op[0] == "I" else _inputs((2, 4, 6), (2,), (2,))
    attributes = {} if op[0] == "I" else {"num_groups": 2}
    made = graphgbp.vjp(single_op(op, inputs, opset=18, constants=(1, 2), **attributes))
    assert "LayerNormalization" not in {node.op_type for node in made.graph.node}
