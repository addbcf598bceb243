import numpy as np
import pytest
import torch
from torch.nn import functional

from tests.rules.harness import check_rule, normal

INDICES = [1, -1, -3, [0], [2, 0, 2], [-1, 1], [[0, -1], [-2, 2]]]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("indices", INDICES)
def test_gather(indices, axis, known, dynamic):
    def reference(x, indices):
        axis_last = x.movedim(axis, -1)[..., indices]
        lead = axis % x.dim()
        order = [*range(lead), *range(x.dim() - 1, axis_last.dim()), *range(lead, x.dim() - 1)]
        return axis_last.permute(order)

    inputs = [normal(3, 4, 3), np.array(indices, np.int64)]
    check_rule("Gather", inputs, reference, constants=[1] if known else [], dynamic=dynamic, axis=axis)


@pytest.mark.parametrize("opset", [16, 21, 26])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_gather_of_every_type(index_dtype, dtype, opset):
    for indices in (2, [2, 2, 0]):
        inputs = [normal(3, 4).astype(dtype), np.array(indices, index_dtype)]
        check_rule("Gather", inputs, lambda x, indices: x[indices], opset=opset)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("start", "limit", "delta"), [(0.5, 4, 0.75), (2, -1, -0.4), (1, 1, 1)])
def test_range(start, limit, delta, dtype, opset):
    inputs = [np.array(value, dtype) for value in (start, limit, delta)]
    count = max(int(np.ceil((limit - start) / delta)), 0)

    def reference(start, limit, delta):
        return start + delta * torch.arange(count) + 0 * limit

    check_rule("Range", inputs, reference, wrt=(0, 1, 2), opset=opset)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot(axis, dynamic):
    def reference(indices, depth, values):
        hot = functional.one_hot(indices % int(depth), int(depth))
        return values[hot].movedim(-1, axis)

    inputs = [np.array([[0, 3, -1], [2, 2, 1]]), np.array(5), normal(2)]
    check_rule("OneHot", inputs, reference, wrt=(2,), dynamic=dynamic, axis=axis)
