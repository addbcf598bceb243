import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import helper, numpy_helper
from torch.nn import functional

import graphgbp
from graphgbp import masks
from graphgbp.append import append
from graphgbp.emit import Emitter
from graphgbp.prepare import prepare
from tests.rules.harness import check_rule, normal, run, run_by_reference, single_op

OPSETS = (16, 18, 22, 26)
ACTIVATIONS = {
    "Relu": (torch.relu, {}),
    "Sigmoid": (torch.sigmoid, {}),
    "Tanh": (torch.tanh, {}),
    "Softplus": (functional.softplus, {}),
    "Elu": (lambda x: functional.elu(x, 0.7), {"alpha": 0.7}),
    "LeakyRelu": (lambda x: functional.leaky_relu(x, 0.2), {"alpha": 0.2}),
    "HardSigmoid": (lambda x: torch.clamp(0.3 * x + 0.4, 0, 1), {"alpha": 0.3, "beta": 0.4}),
    "HardSwish": (functional.hardswish, {}),
    "Selu": (lambda x: functional.selu(x) * 1.5, {"gamma": 1.5 * 1.0507009873554804934}),
    "Celu": (lambda x: functional.celu(x, 0.7), {"alpha": 0.7}),
    "ThresholdedRelu": (lambda x: functional.threshold(x, 0.6, 0), {"alpha": 0.6}),
    "Shrink": (lambda x: functional.softshrink(x, 0.6), {"lambd": 0.6, "bias": 0.6}),
    "Softsign": (functional.softsign, {}),
    "Mish": (functional.mish, {}),
    "Gelu": (functional.gelu, {}),
    "Swish": (lambda x: x * torch.sigmoid(1.5 * x), {"alpha": 1.5}),
}
FIRST_OPSET = {"Mish": 18, "Gelu": 20, "Swish": 24}


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "Softplus", "Elu", "LeakyRelu", "HardSigmoid", "HardSwish"])
def test_activation(op, dynamic, opset):
    _check(op, dynamic, opset)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", ["Selu", "Celu", "ThresholdedRelu", "Shrink", "Softsign", "Mish", "Gelu", "Swish"])
def test_later_activation(op, dynamic, opset):
    _check(op, dynamic, max(opset, FIRST_OPSET.get(op, 16)))


def _check(op, dynamic, opset):
    reference, attributes = ACTIVATIONS[op]
    evaluate = run_by_reference if (op, opset) == ("Swish", 26) else run  # where ONNX Runtime lacks it
    check_rule(op, [4 * normal(3, 4, 5)], reference, opset=opset, dynamic=dynamic, evaluate=evaluate, **attributes)


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "LeakyRelu"])
def test_activation_in_double(op):
    reference, attributes = ACTIVATIONS[op]
    check_rule(op, [4 * normal(3, 4, 5).astype(np.float64)], reference, tolerance=1e-7, **attributes)


@pytest.mark.parametrize("op", ["Selu", "ThresholdedRelu", "Shrink", "Softsign", "Mish", "Gelu", "Swish"])
def test_later_activation_in_double(op):
    reference, attributes = ACTIVATIONS[op]
    x = 4 * normal(3, 4, 5, seed=1).astype(np.float64)
    check_rule(op, [x], reference, opset=24, evaluate=run_by_reference, tolerance=1e-7, **attributes)


@pytest.mark.parametrize("opset", [20, 26])
@pytest.mark.parametrize("dynamic", [False, True])
def test_gelu_by_tanh(dynamic, opset):
    reference = lambda x: functional.gelu(x, approximate="tanh")  # noqa: E731
    x = 4 * normal(3, 4, 5)
    check_rule("Gelu", [x], reference, opset=opset, dynamic=dynamic, approximate="tanh")


@pytest.mark.parametrize(("dtype", "large"), [("float16", 300), ("float32", 1e19), ("float64", 1e100)])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_of_large_numbers(approximate, dtype, large):
    """Far out it is 0 or x, though powers of x overflow."""
    x = np.array([-large, -9.9, -0.5, 0.5, 9.9, large], dtype)
    model = single_op("Gelu", [x], opset=20, approximate=approximate)
    with np.errstate(over="ignore"):
        got = run_by_reference(graphgbp.vjp(model), {"x0": x, "y0_grad": np.ones_like(x)})["x0_grad"]
    np.testing.assert_allclose(got[[0, 1, 4, 5]], [0, 0, 1, 1], atol=1e-3)


SLOPES = [(), (1,), (4,), (3, 1, 1), (1, 3, 1, 4), (2, 3, 1, 4)]


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (0, 1)])
@pytest.mark.parametrize("shape", SLOPES)
def test_prelu(shape, wrt, dynamic, opset):
    x, slope = normal(2, 3, 1, 4), np.asarray(normal(*shape, seed=1))
    reference = lambda x, slope: torch.where(x > 0, x, slope * x)  # noqa: E731
    check_rule("PRelu", [x, slope], reference, wrt=wrt, dynamic=dynamic, opset=opset)


def test_prelu_is_torchs():
    x, slope = np.array([[-1, 0, 2], [-0.0, 3, -4]], np.float32), normal(3, seed=1)
    check_rule("PRelu", [x, slope], functional.prelu, wrt=(0, 1))
    doubles = [x.astype(np.float64), slope.astype(np.float64)]
    check_rule("PRelu", doubles, functional.prelu, wrt=(0, 1), evaluate=run_by_reference, tolerance=1e-12)


def test_default_attributes():
    x = 4 * normal(30)
    check_rule("Elu", [x], functional.elu)
    check_rule("LeakyRelu", [x], lambda x: functional.leaky_relu(x, 0.01))
    check_rule("HardSigmoid", [x], lambda x: torch.clamp(0.2 * x + 0.5, 0, 1))
    check_rule("Selu", [x], functional.selu)
    check_rule("Celu", [x], functional.celu)
    check_rule("ThresholdedRelu", [x], lambda x: functional.threshold(x, 1, 0))
    check_rule("Shrink", [x], functional.hardshrink)
    check_rule("Swish", [x], functional.silu, opset=24)


BOUNDS = [(0, 6), (0, None), (0, 1), (0, 3.7), (0, 255), (-1, 1), (None, 2), (-2, None), (0.5, 3), (None, None)]


def _clip(x: torch.Tensor, low: torch.Tensor | None, high: torch.Tensor | None) -> torch.Tensor:
    """relu, relu6 and its like where the lower bound is 0, else clamp: they differ at the bounds."""
    if low is None and high is None:
        return x.clone()
    if low is None or low != 0:
        return torch.clamp(x, low, high)
    return torch.relu(x) if high is None else functional.hardtanh(x, 0, float(high))


@pytest.mark.parametrize("opset", [16, 21])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_clip(bounds, dtype, dynamic, opset):
    low, high = (None if bound is None else np.array(bound, dtype) for bound in bounds)
    kinks = [bound for bound in (low, high) if bound is not None]
    near = [np.nextafter(kink, to).astype(dtype) for kink in kinks for to in (-np.inf, np.inf) if kink]
    x = np.concatenate([4 * normal(40), kinks, near, [-0.0]]).astype(dtype)
    check_rule("Clip", [x, low, high], _clip, opset=opset, dynamic=dynamic)


def test_clip_between_run_time_bounds():
    bounds = [np.array(value, np.float32) for value in (-1, 2)]
    check_rule("Clip", [4 * normal(40), *bounds], torch.clamp, constants=[])
    check_rule("Clip", [4 * normal(40), None, bounds[1]], lambda x, _, high: torch.clamp(x, max=high), constants=[])


@pytest.mark.parametrize(
    ("op", "reference", "kinks"),
    [
        ("Relu", torch.relu, [0.0]),
        ("LeakyRelu", lambda x: functional.leaky_relu(x, 0.01), [0.0]),
        ("HardSwish", functional.hardswish, [-3.0, 0.0, 3.0]),
        ("Elu", functional.elu, [0.0]),
        ("Selu", functional.selu, [0.0]),
        ("Celu", functional.celu, [0.0]),
        ("ThresholdedRelu", lambda x: functional.threshold(x, 1, 0), [1.0]),
        ("Shrink", functional.hardshrink, [-0.5, 0.5]),
        ("Softsign", functional.softsign, [0.0]),
    ],
)
def test_kinks_follow_torch(op, reference, kinks):
    check_rule(op, [np.array([*kinks, -0.0, -9, 9], np.float32)], reference)


def test_hard_sigmoid_at_its_kinks():
    x = np.array([-2, 0, 2, -2.5, 2.5], np.float32)  # 0.25 x + 0.5 is exact there
    check_rule("HardSigmoid", [x], lambda x: functional.hardsigmoid(1.5 * x), alpha=0.25, beta=0.5)


# -- masks ---------------------------------------------------------------------------------------------------


def _mask(x: np.ndarray, bound: float | None) -> np.ndarray:
    """where_below's (or, without a bound, where_positive's) mask of x, as the runtime computes it."""
    info = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), ["n"])
    graph = helper.make_graph([], "masks", [info], [], [numpy_helper.from_array(np.ones(1, x.dtype), "one")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    view = prepare(model)
    g = Emitter(view.graph, view.opset)
    (tensor,) = view.graph.inputs
    ones = g.op("Expand", gs.Constant("one", np.ones(1, x.dtype)), g.op("Shape", tensor))
    mask = masks.where_positive(g, ones, tensor) if bound is None else masks.where_below(g, ones, tensor, bound)
    append(model, view, g, [], [g.name_output(mask, "mask")])
    onnx.checker.check_model(model)
    return run(model, {"x": x})["mask"]


def _floats(*around: float) -> np.ndarray:
    """A million random bit patterns, subnormal and infinite ones among them, and the neighbours of some values."""
    bits = np.random.default_rng(0).integers(0, 2**32, 1_000_000, dtype=np.uint32)
    centres = np.array(around, np.float32).view(np.uint32).astype(np.int64)
    offsets = np.arange(-1000, 1001)
    neighbours = (centres[:, None] + offsets).clip(0, 0x7F800000).astype(np.uint32).ravel()
    subnormal = np.arange(2000, dtype=np.uint32)
    values = np.concatenate([bits, neighbours, subnormal, subnormal | np.uint32(1 << 31)]).view(np.float32)
    return values[~np.isnan(values)]


@pytest.mark.parametrize("bound", [6, 1, 3.7, 8, 255, 1e-3, 1e6, 1e-30, 1e-40, 3e38, np.inf])
def test_the_mask_below_a_bound_is_exact(bound):
    x = _floats(0, 6, min(bound, 3e38))
    np.testing.assert_array_equal(_mask(x, bound), (x < np.float32(bound)).astype(np.float32))


def test_the_mask_of_positive_numbers_is_exact_but_at_subnormal_ones():
    x = _floats(0, 6, np.finfo(np.float32).tiny)
    got, expected = _mask(x, None), (x > 0).astype(np.float32)
    subnormal = (x > 0) & (x < np.finfo(np.float32).tiny)
    np.testing.assert_array_equal(got[~subnormal], expected[~subnormal])
    assert np.all((got[subnormal] >= 0) & (got[subnormal] <= 1))


@pytest.mark.parametrize("bound", [None, 6, 3.7, 1e-300])
def test_masks_in_double_are_exact(bound):
    x = np.concatenate([normal(1000), [0, -0.0, 6, np.nextafter(6, 0), 3.7, 5e-324, 1e-300, np.inf, -np.inf]])
    np.testing.assert_array_equal(_mask(x, bound), x > 0 if bound is None else x < bound)
