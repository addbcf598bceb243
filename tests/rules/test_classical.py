"""ai.onnx.ml against torch; that trees are refused with their reason is in tests/test_exporters.py."""

import numpy as np
import pytest
import torch
from onnx import TensorProto

import graphgbp
from tests.build import drawn
from tests.rules.harness import check_rule, run, single_op

DOMAIN = "ai.onnx.ml"


@pytest.mark.parametrize(("scale", "offset"), [([0.5, -2.0, 3.0, 1.5], [0.1, 0.2, -0.3, 0.0]), ([2.5], [0.2])])
@pytest.mark.parametrize("dynamic", [False, True])
def test_scaler(scale, offset, dynamic):
    def reference(x: torch.Tensor) -> torch.Tensor:
        return (x - torch.tensor(offset)) * torch.tensor(scale)

    check_rule("Scaler", [drawn(5, 4)], reference, dynamic=dynamic, domain=DOMAIN, scale=scale, offset=offset)


def test_a_scaler_of_doubles():
    """It gives floats; the gradient is of x's type."""
    x, dy = drawn(5, 4).astype(np.float64), drawn(5, 4, seed=1)
    made = single_op("Scaler", [x], opset=18, domain=DOMAIN, scale=[1.0, -2.0, 3.0, 0.5], offset=[0.0] * 4)
    made.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    got = run(graphgbp.vjp(made), {"x0": x, "y0_grad": dy})["x0_grad"]
    np.testing.assert_allclose(got, dy * np.array([1.0, -2.0, 3.0, 0.5]), rtol=1e-6)
    assert got.dtype == np.float64


def test_a_scale_for_each_feature_of_no_table_is_refused():
    made = single_op("Scaler", [drawn(2, 5, 4)], opset=18, domain=DOMAIN, scale=[1.0, 2.0, 3.0, 4.0], offset=[0.0])
    with pytest.raises(graphgbp.UnsupportedOperatorError, match="'node': it scales each feature, and its input 'x0'"):
        graphgbp.vjp(made)
