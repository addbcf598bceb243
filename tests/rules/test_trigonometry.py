import numpy as np
import pytest
import torch

from tests.rules.harness import check_rule, normal, run_by_reference

OPSETS = (16, 18, 22, 26)
FUNCTIONS = [
    ("Sin", torch.sin),
    ("Cos", torch.cos),
    ("Tan", torch.tan),
    ("Asin", torch.asin),
    ("Acos", torch.acos),
    ("Atan", torch.atan),
    ("Sinh", torch.sinh),
    ("Cosh", torch.cosh),
    ("Asinh", torch.asinh),
    ("Acosh", torch.acosh),
    ("Atanh", torch.atanh),
]


def _argument(op):
    """Numbers that the function is defined for, not too near the edge."""
    x = 2 * normal(3, 4, 5, seed=1)
    if op in ("Asin", "Acos", "Atanh"):
        return (0.95 * np.sin(x)).astype(np.float32)
    return 1.1 + np.abs(x) if op == "Acosh" else np.sin(x) if op == "Tan" else x


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("op", "reference"), FUNCTIONS)
def test_function(op, reference, dynamic, opset):
    check_rule(op, [_argument(op)], reference, opset=opset, dynamic=dynamic)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize(("op", "reference"), FUNCTIONS)
def test_function_in_double(op, reference, opset):
    x = _argument(op).astype(np.float64)
    check_rule(op, [x], reference, opset=opset, evaluate=run_by_reference, tolerance=1e-12)


@pytest.mark.parametrize(("op", "reference"), FUNCTIONS[6:8])
@pytest.mark.parametrize("x", [[-89.2, 89.2], [-30, 30], [-1e-6, 0, 1e-6]])
def test_hyperbolic_functions_far_out_and_near_zero(x, op, reference):
    """exp(89) overflows in float32, the functions do not; near 0 no digit is lost."""
    check_rule(op, [np.array(x, np.float32)], reference, tolerance=1e-4)


@pytest.mark.parametrize(
    ("op", "reference", "edge"),
    [
        ("Asin", torch.asin, 1),
        ("Acos", torch.acos, -1),
        ("Atanh", torch.atanh, 1),
        ("Acosh", torch.acosh, 1),
    ],
)
def test_next_to_the_edge(op, reference, edge):
    inside = 2 if op == "Acosh" else 0
    x = np.nextafter(np.float32(edge), np.float32(inside))
    check_rule(op, [np.array([x], np.float32)], reference, tolerance=1e-3)
