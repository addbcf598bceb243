import numpy as np
import pytest
import torch

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, single_op

REDUCTIONS = {"ReduceSum": torch.sum, "ReduceMean": torch.mean, "ReduceMax": torch.amax, "ReduceMin": torch.amin}
AXES = [[0], [1, 2], [-1], [2, 0], [0, 1, 2], None]
OPS = pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"])


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
