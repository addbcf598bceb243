import numpy as np
import pytest

from tests.rules.harness import check_rule, normal

REDUCTIONS = {"none": None, "add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
DTYPES = ("float32", "float64")


def _scattered(data, axis, indices, updates, reduction):
    indices = indices % data.shape[axis]
    if reduction == "none":
        return data.scatter(axis, indices, updates)
    return data.scatter_reduce(axis, indices, updates, REDUCTIONS[reduction], include_self=True)


def _first_opset(reduction):
    return 18 if reduction in ("max", "min") else 16


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (2,), (0, 2)])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scatter_elements(reduction, axis, wrt, dynamic):
    """The same element several times, but where nothing is reduced: that has no meaning."""
    indices = np.array([[0, -1, 2], [1, 0, -2]] if reduction == "none" else [[0, -3, 0], [0, -3, 2]])
    reference = lambda data, indices, updates: _scattered(data, axis, indices, updates, reduction)  # noqa: E731
    inputs = [normal(3, 3, seed=1), indices, normal(2, 3, seed=2)]
    options = {"wrt": wrt, "dynamic": dynamic, "axis": axis, "reduction": reduction}
    for opset in {_first_opset(reduction), 26}:
        check_rule("ScatterElements", inputs, reference, opset=opset, **options)
    check_rule("ScatterElements", inputs, reference, constants=[], **options)


@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scatter_elements_of_every_type(reduction, dtype, index_dtype):
    reference = lambda data, indices, updates: _scattered(data, 0, indices.long(), updates, reduction)  # noqa: E731
    inputs = [normal(3, 3).astype(dtype), np.array([[0, 2, 1]], index_dtype), normal(1, 3, seed=2).astype(dtype)]
    check_rule("ScatterElements", inputs, reference, wrt=(0, 2), reduction=reduction, tolerance=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_products_with_zeros(dynamic):
    """Of one zero among the updates of a place, of two, and of a zero in the data."""
    data, indices = np.array([2, 3, 5, 0], np.float32), np.array([0, 0, 1, 1, 1, 2, 2, 3, 3])
    updates = np.array([0, 7, 0, 0, 4, -2, 3, 6, 2], np.float32)
    reference = lambda data, indices, updates: _scattered(data, 0, indices, updates, "mul")  # noqa: E731
    check_rule("ScatterElements", [data, indices, updates], reference, wrt=(0, 2), dynamic=dynamic, reduction="mul")


@pytest.mark.parametrize("reduction", ["max", "min"])
def test_ties_share_in_equal_parts(reduction):
    data, indices = np.array([2, 2, 5, -1], np.float32), np.array([0, 0, 1, 1, 2, 2])
    updates = np.array([2, 2, 2, 7, 1, 1], np.float32)
    reference = lambda data, indices, updates: _scattered(data, 0, indices, updates, reduction)  # noqa: E731
    check_rule("ScatterElements", [data, indices, updates], reference, wrt=(0, 2), reduction=reduction)


SLICES = [  # indices into data of shape [3, 4, 2]
    [[2], [0]],
    [[0, 3], [2, -4], [-1, 1]],
    [[[0, 0, 1]], [[2, 3, 0]]],
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (2,), (0, 2)])
@pytest.mark.parametrize("indices", SLICES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_scatter_nd(reduction, indices, wrt, dynamic):
    indices = np.array(indices if reduction == "none" else [*indices, indices[0]])
    width = indices.shape[-1]
    updates = normal(*indices.shape[:-1], *(3, 4, 2)[width:], seed=2)

    def reference(data, indices, updates):
        """By rows of the leading axes laid flat, an update's row at its index's place"""
        lead = data.shape[:width]
        rows = data.reshape(int(np.prod(lead)), -1)
        places = sum(indices[..., i] % lead[i] * int(np.prod(lead[i + 1 :])) for i in range(width))
        wide = places.reshape(-1, 1).expand(-1, rows.shape[1])
        return _scattered(rows, 0, wide, updates.reshape(wide.shape), reduction).reshape(data.shape)

    inputs = [normal(3, 4, 2, seed=1), indices, updates]
    options = {"wrt": wrt, "dynamic": dynamic, "reduction": reduction}
    for opset in {_first_opset(reduction), 26}:
        check_rule("ScatterND", inputs, reference, opset=opset, **options)
    check_rule("ScatterND", inputs, reference, constants=[], **options)
