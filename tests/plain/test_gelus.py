"""The kinds of GELU against torch, in opsets with and without ONNX's own."""

import pytest
import torch
from torch.nn import functional

from tests.plain.harness import check_form
from tests.rules.harness import normal


def tanh_gelu(x):
    return functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("opset", [16, 20])
@pytest.mark.parametrize(
    ("op", "bias", "reference"),
    [
        ("Gelu", False, functional.gelu),
        ("BiasGelu", True, lambda x, b: functional.gelu(x + b)),
        ("FastGelu", False, tanh_gelu),
        ("FastGelu", True, lambda x, b: tanh_gelu(x + b)),
    ],
)
def test_gelu(op, bias, reference, opset):
    inputs = [normal(2, 3, 8), normal(8, seed=1)][: 1 + bias]
    check_form(op, inputs, reference, wrt=range(len(inputs)), opset=opset, dynamic=not bias)


@pytest.mark.parametrize("alpha", [None, 1.0, 2.5])
def test_quick_gelu(alpha):
    given = {} if alpha is None else {"alpha": alpha}
    reference = lambda x: x * torch.sigmoid((1.702 if alpha is None else alpha) * x)  # noqa: E731
    check_form("QuickGelu", [normal(2, 3, 8)], reference, **given)


def test_bias_split_gelu():
    def reference(x, bias):
        linear, gate = (x + bias).chunk(2, -1)
        return linear * functional.gelu(gate)

    check_form("BiasSplitGelu", [normal(2, 3, 8), normal(8, seed=1)], reference, wrt=(0, 1), kernel=False)
