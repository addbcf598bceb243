"""Operators of ONNX Runtime that say what an operator of ONNX says, against torch."""

import numpy as np
import pytest
from torch.nn import functional

from tests.plain.harness import check_form
from tests.rules.harness import normal


@pytest.mark.parametrize("shape", [(8,), (1, 8)])
def test_pad(shape):
    pads = np.array([0, 0, 1, 2, 0, 0, 3, 0]).reshape(shape)
    reference = lambda x, _, value: functional.pad(x, (2, 0, 1, 3), value=0.5)  # noqa: E731
    check_form("Pad", [normal(2, 3, 4, 5), pads, np.array([0.5], np.float32)], reference)


@pytest.mark.parametrize("upper", [0, 1])
def test_trilu(upper):
    reference = lambda x, k: x.triu(1) if upper else x.tril(1)  # noqa: E731
    check_form("Trilu", [normal(2, 4, 5), np.array(1)], reference, upper=upper)


def test_gather_nd():
    indices = np.array([[0, 1], [1, 2], [0, 1]])
    check_form("GatherND", [normal(2, 3, 4), indices], lambda x, i: x[i[:, 0], i[:, 1]])


@pytest.mark.parametrize("axis", [0, 2, -1])
def test_expand_dims(axis):
    check_form("ExpandDims", [normal(2, 3, 4), np.array(axis, np.int32)], lambda x, _: x.unsqueeze(axis))


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_grid_sample(mode, opset):
    def reference(x, grid):
        return functional.grid_sample(x, grid, mode, "border", align_corners=True)

    inputs = [normal(2, 3, 6, 5), normal(2, 4, 4, 2, seed=1) * 0.4]
    options = {"mode": mode, "padding_mode": "border", "align_corners": 1, "opset": opset}
    check_form("GridSample", inputs, reference, wrt=(0, 1) if mode == "bilinear" else (0,), **options)
