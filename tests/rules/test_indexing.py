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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_elements(axis, known, dynamic):
    reference = lambda x, indices: x.gather(axis, indices % x.shape[axis])  # noqa: E731
    inputs = [normal(3, 4, 3), np.array([[[0, -1, 0], [2, 2, 0]], [[1, 1, -3], [2, 0, 1]]])]
    check_rule("GatherElements", inputs, reference, constants=[1] if known else [], dynamic=dynamic, axis=axis)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("indices", [[1], [[0], [-1], [0]], [[2, 0], [2, 0]], [[[0, -4, 1]], [[2, 3, 0]]]])
def test_gather_nd(indices, known, dynamic):
    reference = lambda x, indices: x[tuple(indices.movedim(-1, 0))]  # noqa: E731
    inputs = [normal(3, 4, 2), np.array(indices)]
    check_rule("GatherND", inputs, reference, constants=[1] if known else [], dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("batch_dims", [1, 2])
def test_gather_nd_in_batches(batch_dims, known, dynamic):
    def reference(x, indices):
        batches = zip(x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1), strict=True)
        rows = [part[tuple(index.movedim(-1, 0))] for part, index in batches]
        return torch.stack(rows).unflatten(0, x.shape[:batch_dims])

    indices = np.random.default_rng(0).integers(-2, 2, (2, 3, 4, 1))
    inputs = [normal(2, 3, 2, 5), indices]
    options = {"constants": [1] if known else [], "dynamic": dynamic, "batch_dims": batch_dims}
    check_rule("GatherND", inputs, reference, **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_compress(axis, known, dynamic):
    condition = np.array([True, False, True, True])

    def reference(x, condition):
        x = x.reshape(-1) if axis is None else x.movedim(axis, 0)
        return x[: len(condition)][condition].movedim(0, axis or 0)

    attributes = {} if axis is None else {"axis": axis}
    options = {"constants": [1] if known else [], "dynamic": dynamic}
    check_rule("Compress", [normal(4, 4, 4), condition], reference, **options, **attributes)


@pytest.mark.parametrize("opset", [16, 24, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_top_k(axis, largest, dynamic, opset):
    for known in (True, False):
        reference = lambda x, k: x.topk(2, axis, largest=bool(largest)).values  # noqa: E731
        options = {"constants": [1] if known else [], "dynamic": dynamic, "opset": opset}
        inputs = [normal(3, 4, 5), np.array([2])]
        check_rule("TopK", inputs, reference, outputs=2, axis=axis, largest=largest, **options)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("op", ["GatherElements", "GatherND", "Compress", "TopK"])
def test_choice_in_every_type(op, dtype, opset):
    x = normal(3, 4).astype(dtype)
    choose = {
        "GatherElements": (np.array([[2, 0, 2, 1]]), lambda x, indices: x.gather(0, indices)),
        "GatherND": (np.array([[2], [2]]), lambda x, indices: x[indices[:, 0]]),
        "Compress": (np.array([True, True]), lambda x, condition: x.reshape(-1)[:2]),
        "TopK": (np.array([3]), lambda x, k: x.topk(3).values),
    }
    check_rule(op, [x, choose[op][0]], choose[op][1], opset=opset, outputs=2 if op == "TopK" else 1)


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
