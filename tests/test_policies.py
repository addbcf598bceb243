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
    "Where of tf2onnx": [
        "c = Greater(a, zero)",
        "t = Cast<to=1>(c)",
        "n = Not(c)",
        "f = Cast<to=1>(n)",
        "o = Mul(zero, f)",
        "k = Mul(t, a)",
        "h = Add(k, o)",
    ],
    "Identities of Paddle": ["i = Identity(zero)", "j = Identity(a)", "m = Max(j, i)", "h = Identity(m)"],
}


def _leaky_by_max(a: torch.Tensor) -> torch.Tensor:
    return torch.maximum(a, 0.2 * a)  # at a = 0 both take a share


def _celu_by_bounds(a: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(a)
    return torch.maximum(a, zero) + 0.5 * (torch.exp(torch.minimum(a, zero) / 0.5) - 1)


def _softplus_by_bounds(a: torch.Tensor) -> torch.Tensor:
    return torch.maximum(a, torch.zeros_like(a)) + torch.log(1 + torch.exp(-a.abs()))


SMOOTH = {
    "LeakyRelu": (["h = LeakyRelu<alpha=0.2>(a)"], lambda a: F.leaky_relu(a, 0.2)),
    "LeakyRelu by Where": (
        ["c = Greater(a, zero)", "s = Mul(a, fifth)", "h = Where(c, a, s)"],
        lambda a: F.leaky_relu(a, 0.2),
    ),
    "LeakyRelu by Where, mirrored": (
        ["c = Less(a, zero)", "s = Mul(fifth, a)", "h = Where(c, s, a)"],
        lambda a: torch.where(a < 0, 0.2 * a, a),
    ),
    "LeakyRelu by Max": (["s = Mul(fifth, a)", "h = Max(a, s)"], _leaky_by_max),
    "LeakyRelu by a sum of products": (
        [
            "c = Greater(a, zero)", "t = Cast<to=1>(c)", "n = Not(c)", "f = Cast<to=1>(n)",
            "s = Mul(a, fifth)", "k = Mul(t, a)", "o = Mul(s, f)", "h = Add(k, o)",
        ],
        lambda a: F.leaky_relu(a, 0.2),
    ),
    "PRelu": (["h = PRelu(a, slopes)"], lambda a: F.prelu(a, torch.from_numpy(SLOPES).double())),
    "PRelu of Keras": (
        ["p = Relu(a)", "m = Neg(a)", "n = Relu(m)", "s = Mul(n, minus)", "h = Add(p, s)"],
        lambda a: F.relu(a) - torch.from_numpy(SLOPES) * F.relu(-a),
    ),
    "Elu": (["h = Elu(a)"], F.elu),
    "Elu by Where": (["c = Greater(a, zero)", "e = Exp(a)", "s = Sub(e, one)", "h = Where(c, a, s)"], F.elu),
    "Elu of jax": (
        [
            "c = Greater(a, zero)", "s0 = Shape(a)", "o = Expand(zero, s0)", "m = Where(c, o, a)", "e = Exp(m)",
            "s = Sub(e, one)", "h = Where(c, a, s)",
        ],
        F.elu,
    ),
    "Celu": (["h = Celu<alpha=0.5>(a)"], lambda a: F.celu(a, 0.5)),
    "Celu of jax": (
        [
            "p = Max(a, zero)", "n = Min(a, zero)", "d = Div(n, half)", "e = Exp(d)", "s = Sub(e, one)",
            "m = Mul(half, s)", "h = Add(p, m)",
        ],
        _celu_by_bounds,
    ),
    "ThresholdedRelu": (["h = ThresholdedRelu<alpha=0.5>(a)"], lambda a: F.threshold(a, 0.5, 0)),
    "ThresholdedRelu by Where": (
        ["c = LessOrEqual(a, half)", "h = Where(c, zero, a)"],
        lambda a: F.threshold(a, 0.5, 0),
    ),
    "Softplus": (["h = Softplus(a)"], F.softplus),
    "Softplus of dynamo": (["s = Softplus(a)", "c = Greater(a, twenty)", "h = Where(c, a, s)"], F.softplus),
    "Softplus of dynamo, steeper": (
        ["m = Mul(a, two)", "s = Softplus(m)", "d = Div(s, two)", "c = Greater(m, one)", "h = Where(c, a, d)"],
        lambda a: F.softplus(a, 2, 1),
    ),
    "Softplus of jax": (
        [
            "p = Max(a, zero)", "s = Sub(a, zero)", "q = Equal(s, s)", "n = Not(q)", "k = Add(a, zero)", "b = Abs(s)",
            "m = Neg(b)", "e = Exp(m)", "l = Add(e, one)", "g = Log(l)", "t = Add(p, g)", "h = Where(n, k, t)",
        ],
        _softplus_by_bounds,
    ),
    "HardSwish": (["h = HardSwish(a)"], F.hardswish),
    "HardSwish of jax": (
        ["s = Add(a, three)", "m = Max(s, zero)", "b = Min(m, six)", "g = Div(b, six)", "h = Mul(a, g)"],
        F.hardswish,
    ),
    "HardSwish by Min and Max": (
        ["s = Add(a, three)", "m = Min(s, six)", "b = Max(m, zero)", "g = Mul(a, b)", "h = Div(g, six)"],
        F.hardswish,
    ),
    "HardSwish of Paddle": (
        [
            "i = Identity(a)", "p = Mul(i, one)", "s = Add(p, three)", "j = Identity(s)", "b = Clip(j, zero, six)",
            "k = Identity(b)", "g = Mul(a, k)", "h = Mul(g, sixth)",
        ],
        F.hardswish,
    ),
    "SiLU": (["s = Sigmoid(a)", "h = Mul(a, s)"], F.silu),
    "SiLU, gate first": (["s = Sigmoid(a)", "h = Mul(s, a)"], F.silu),
    "Swish": (["m = Mul(a, two)", "s = Sigmoid(m)", "h = Mul(a, s)"], lambda a: a * torch.sigmoid(2 * a)),
    "GELU by Erf": (
        ["d = Div(a, root)", "e = Erf(d)", "p = Add(e, one)", "m = Mul(a, p)", "h = Mul(m, half)"],
        F.gelu,
    ),
    "GELU by Tanh": (
        [
            "q = Mul(a, a)", "c = Mul(a, q)", "b = Mul(c, cubic)", "s = Add(a, b)", "u = Mul(s, steep)", "t = Tanh(u)",
            "p = Add(t, one)", "m = Mul(a, p)", "h = Mul(m, half)",
        ],
        lambda a: F.gelu(a, approximate="tanh"),
    ),
    "GELU by Tanh and Pow": (
        [
            "k = Mul(a, half)", "c = Pow(a, three)", "b = Mul(cubic, c)", "s = Add(a, b)", "u = Mul(steep, s)",
            "t = Tanh(u)", "p = Add(one, t)", "h = Mul(k, p)",
        ],
        lambda a: F.gelu(a, approximate="tanh"),
    ),
    "GELU by Tanh, factored": (
        [
            "q = Mul(a, a)", "b = Mul(q, cubic)", "r = Add(b, one)", "s = Mul(a, r)", "u = Mul(steep, s)",
            "t = Tanh(u)", "p = Add(one, t)", "k = Mul(p, half)", "h = Mul(a, k)",
        ],
        lambda a: F.gelu(a, approximate="tanh"),
    ),
    "Mish": (["h = Mish(a)"], F.mish),
    "Mish of dynamo": (
        ["s = Softplus(a)", "c = Greater(a, twenty)", "p = Where(c, a, s)", "t = Tanh(p)", "h = Mul(a, t)"],
        F.mish,
    ),
    "Mish of jax": (
        [
            "p = Max(a, zero)", "b = Abs(a)", "m = Neg(b)", "e = Exp(m)", "l = Add(e, one)", "g = Log(l)",
            "s = Add(p, g)", "t = Tanh(s)", "h = Mul(a, t)",
        ],
        lambda a: a * torch.tanh(_softplus_by_bounds(a)),
    ),
}  # fmt: skip
SLOPES = np.array([0.1, 0.2, 0.3, 0.05, 0.5, 0.25], np.float32)
NUMBERS = {"zero": 0, "fifth": 0.2, "half": 0.5, "one": 1, "two": 2, "three": 3, "six": 6, "twenty": 20, "sixth": 1 / 6}
NUMBERS |= {"root": 2**0.5, "cubic": 0.044715, "steep": (2 / np.pi) ** 0.5}
WEIGHTS = {"w": drawn(4, 6), "v": drawn(6, 3, seed=1), "slopes": SLOPES, "minus": -SLOPES}
WEIGHTS |= {name: np.float32(value) for name, value in NUMBERS.items()}
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
