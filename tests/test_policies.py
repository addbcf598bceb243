"""The policies at one activation between two matrices, against their formulas with torch's derivative in them.

guided      dx = dy f'(x) 1(x > 0) 1(dy > 0)
deconvnet   dx = dy 1(dy > 0)
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import graphgbp
from tests.build import drawn, model
from tests.rules.harness import assert_close, run

RECTIFIERS = {
    "Relu": ["h = Relu(a)"],
    "Clip": ["h = Clip(a, zero)"],
    "Max": ["h = Max(a, zero)"],
    "Max, zero first": ["h = Max(zero, a)"],
    "Where": ["c = GreaterOrEqual(a, zero)", "h = Where(c, a, zero)"],
    "Where, zero first": ["c = Less(a, zero)", "h = Where(c, zero, a)"],
}
SMOOTH = {
    "LeakyRelu": (["h = LeakyRelu<alpha=0.2>(a)"], lambda a: F.leaky_relu(a, 0.2)),
    "Elu": (["h = Elu(a)"], F.elu),
    "Softplus": (["h = Softplus(a)"], F.softplus),
    "HardSwish": (["h = HardSwish(a)"], F.hardswish),
    "SiLU": (["s = Sigmoid(a)", "h = Mul(a, s)"], F.silu),
    "SiLU, gate first": (["s = Sigmoid(a)", "h = Mul(s, a)"], F.silu),
}
WEIGHTS = {"w": drawn(4, 6), "v": drawn(6, 3, seed=1), "zero": np.float32(0)}
X = np.concatenate([2 * drawn(20, 4, seed=2), np.zeros((1, 4), np.float32)])  # the last at every kink


def maps(activation: list[str], rectifiers: str) -> dict[str, np.ndarray]:
    made = model(["a = MatMul(x, w)", *activation, "y = MatMul(h, v)"], {"x": ("N", 4)}, ["y"], WEIGHTS)
    explained = graphgbp.convert(made, ["guided_backprop", "deconvnet"], rectifiers=rectifiers)
    return run(explained, {"x": X, "target": np.array([1])})


def formulas(function) -> dict[str, torch.Tensor]:
    w, v = (torch.from_numpy(WEIGHTS[name]).double() for name in "wv")
    a = (torch.from_numpy(X).double() @ w).requires_grad_()
    dh = v[:, 1].expand(len(X), -1)
    rising = dh * (dh > 0)
    (slope,) = torch.autograd.grad(function(a).sum(), a)
    assert ((dh < 0) & (a > 0)).any() and ((dh > 0) & (a < 0)).any()
    return {
        "gradient": (dh * slope) @ w.T,
        "guided_backprop": (rising * slope * (a > 0)) @ w.T,
        "deconvnet": rising @ w.T,
    }


@pytest.mark.parametrize("rectifiers", ["relu", "all"])
@pytest.mark.parametrize("clothing", RECTIFIERS)
def test_at_a_rectifier(clothing, rectifiers):
    got, expected = maps(RECTIFIERS[clothing], rectifiers), formulas(torch.relu)
    for method in ("guided_backprop", "deconvnet"):
        assert_close(got[method], expected[method].detach().numpy(), 1e-5, f"{method} at {clothing}")


@pytest.mark.parametrize("rectifiers", ["relu", "all"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_at_a_smooth_activation(activation, rectifiers):
    """It passes its gradient; `all` masks it in the guided pass, and leaves the deconvnet's rule to rectifiers."""
    nodes, function = SMOOTH[activation]
    got, expected = maps(nodes, rectifiers), formulas(function)
    expected["deconvnet"] = expected["gradient"]
    if rectifiers == "relu":
        expected["guided_backprop"] = expected["gradient"]
    for method in ("guided_backprop", "deconvnet"):
        assert_close(got[method], expected[method].detach().numpy(), 1e-5, f"{method} at {activation}")
