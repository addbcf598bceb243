import numpy as np
import pytest
import torch

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, single_op


def _product(x, dims, keepdims):
    """torch.prod takes one axis; its own derivative is exact at zeros."""
    for dim in sorted((dim % x.dim() for dim in dims), reverse=True):
        x = x.prod(dim, keepdim=keepdims)
    return x


REDUCTIONS = {
    "ReduceSum": torch.sum,
    "ReduceMean": torch.mean,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceL1": lambda x, dims, keepdims: x.abs().sum(dims, keepdims),
    "ReduceL2": lambda x, dims, keepdims: torch.linalg.vector_norm(x, 2, dims, keepdims),
    "ReduceSumSquare": lambda x, dims, keepdims: x.square().sum(dims, keepdims),
    "ReduceLogSum": lambda x, dims, keepdims: x.sum(dims, keepdims).log(),
    "ReduceLogSumExp": torch.logsumexp,
}
AXES = [[0], [1, 2], [-1], [2, 0], [0, 1, 2], None]
OPS = pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"])
COMPOSED_OPS = pytest.mark.parametrize(
    "op", ["ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp"]
)


def _check(op, x, axes, keepdims, opset, **options):
    """`axes` as an input where the opset has that, else as an attribute."""
    dims = list(range(x.ndim)) if axes is None else axes
    reference = lambda x, *_: REDUCTIONS[op](x, dims, bool(keepdims))  # noqa: E731
    inputs = [x]
    if axes is not None and (opset >= 18 or op == "ReduceSum"):
        inputs.append(np.array(axes, np.int64))
    elif axes is not None:
        options["axes"] = axes
    check_rule(op, inputs, reference, opset=opset, keepdims=keepdims, **options)


@pytest.mark.parametrize("opset", [16, 18, 21])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", AXES)
@OPS
def test_reduction(op, axes, keepdims, dynamic, opset):
    _check(op, normal(2, 3, 4), axes, keepdims, opset, dynamic=dynamic)


@pytest.mark.parametrize("opset", [16, 18])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", AXES)
@COMPOSED_OPS
def test_composed_reduction(op, axes, keepdims, dynamic, opset):
    _check(op, _terms(op, "float32"), axes, keepdims, opset, dynamic=dynamic)


@COMPOSED_OPS
def test_composed_reduction_in_double(op):
    _check(op, _terms(op, "float64"), [1], 1, 26, tolerance=1e-12)


def _terms(op, dtype):
    x = normal(2, 3, 4, seed=1).astype(dtype)
    return np.abs(x) if op == "ReduceLogSum" else x


@pytest.mark.parametrize("keepdims", [0, 1])
@COMPOSED_OPS
def test_composed_reduction_of_empty_axes(op, keepdims):
    """Without an axis nothing is summed, the rest is done all the same: ReduceL1 is |x|."""
    empty, options = np.zeros(0, np.int64), {"keepdims": keepdims, "noop_with_empty_axes": 1}
    alone = {"ReduceL1": torch.abs, "ReduceL2": torch.abs, "ReduceSumSquare": torch.square, "ReduceLogSum": torch.log}
    reference = lambda x, *_: alone.get(op, torch.clone)(x)  # noqa: E731
    check_rule(op, [_terms(op, "float32")], reference, **options)
    check_rule(op, [_terms(op, "float32"), empty], reference, **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_product_with_zeros(dynamic):
    """Of one zero the others' product is the slope; of two both slopes are 0."""
    x = np.array([[2, 3, -1, 4], [2, 0, -1, 4], [0, 3, 0, 4], [0, 0, 0, 0]], np.float32)
    _check("ReduceProd", x, [1], 0, 18, dynamic=dynamic)
    _check("ReduceProd", x[1:2], None, 1, 16, dynamic=dynamic)


@pytest.mark.parametrize("op", ["ReduceL1", "ReduceL2"])
def test_norms_at_zero(op):
    _check(op, np.array([[3, 0, -4], [0, 0, 0]], np.float32), [1], 0, 18)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("exclusive", "reverse"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_cumulative_sum(exclusive, reverse, dtype, known, dynamic, opset):
    def reference(x, axis):
        x = x.flip(1) if reverse else x
        y = x.cumsum(1) - (x if exclusive else 0)
        return y.flip(1) if reverse else y

    for axis in (1, -2):
        inputs = [normal(2, 5, 3, seed=1).astype(dtype), np.array(axis)]
        options = {"constants": [1] if known else [], "dynamic": dynamic, "opset": opset}
        check_rule("CumSum", inputs, reference, exclusive=exclusive, reverse=reverse, **options)


@OPS
def test_reduction_in_double(op):
    _check(op, normal(2, 3, 4).astype(np.float64), [1], 1, 26, tolerance=1e-12)


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("dynamic", [False, True])
@OPS
def test_empty_axes(op, dynamic, keepdims):
    x, empty = normal(2, 3, 4), np.zeros(0, np.int64)
    options = {"dynamic": dynamic, "keepdims": keepdims}
    everything = lambda x, *_: REDUCTIONS[op](x, [0, 1, 2], bool(keepdims))  # noqa: E731
    nothing = lambda x, *_: x.clone()  # noqa: E731
    check_rule(op, [x, empty], everything, noop_with_empty_axes=0, **options)
    check_rule(op, [x, empty], nothing, noop_with_empty_axes=1, **options)
    check_rule(op, [x], nothing, noop_with_empty_axes=1, **options)


@pytest.mark.parametrize("axes", [[0], [0, 1]])
@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_ties_share_in_equal_parts(op, axes):
    _check(op, np.array([[1, 2, 3, 0], [1, 0, 3, 3], [0, 2, 3, 0]], np.float32), axes, 0, 18)


def test_run_time_axes_are_refused():
    model = single_op("ReduceMean", [normal(2, 3), np.array([1])], opset=18)
    with pytest.raises(UnsupportedOperatorError, match="'node': its axes are known only at run time"):
        graphgbp.vjp(model, inputs=["x0"])
