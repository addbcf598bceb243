"""ReLUs and other activations by formulas of torch: equal maps, however they are written.

The reference is the formula itself, differentiated by torch in float64 and masked at its own input and output.
"""

import io
import warnings
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

import graphgbp
from tests.rules.harness import run

Formula = Callable[[torch.Tensor], torch.Tensor]
METHODS = ["saliency", "guided_backprop", "deconvnet"]


def zeros(t: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(t)


RELU: dict[str, Formula] = {
    "relu": torch.relu,
    "(x + |x|) / 2": lambda t: (t + t.abs()) / 2,
    "0.5 * (|x| + x)": lambda t: 0.5 * (t.abs() + t),
    "x / 2 + |x| / 2": lambda t: t / 2 + t.abs() / 2,
    "x - min(x, 0)": lambda t: t - torch.minimum(t, zeros(t)),
    "x - clamp(x, max=0)": lambda t: t - t.clamp(max=0),
    "-min(-x, 0)": lambda t: -torch.minimum(-t, zeros(t)),
    "-clamp(-x, max=0)": lambda t: -((-t).clamp(max=0)),
    "x * (sign(x) + 1) / 2": lambda t: t * (torch.sign(t) + 1) / 2,
    "x * ((sign(x) + 1) / 2)": lambda t: t * ((torch.sign(t) + 1) / 2),
    "x * heaviside": lambda t: t * torch.sign(t).clamp(min=0),
    "x + relu(-x)": lambda t: t + torch.relu(-t),
}
OTHER: dict[str, tuple[Formula, Formula]] = {
    "ELU, exp(x) - 1 bounded": (F.elu, lambda t: torch.relu(t) + torch.minimum(torch.exp(t) - 1, zeros(t))),
    "ELU, max and min": (F.elu, lambda t: torch.maximum(zeros(t), t) + torch.minimum(zeros(t), torch.exp(t) - 1)),
    "ELU, clamps": (F.elu, lambda t: t.clamp(min=0) + (torch.exp(t) - 1).clamp(max=0)),
    "ELU, two relus": (F.elu, lambda t: torch.relu(t) - torch.relu(1 - torch.exp(t))),
    "ELU, exp(-relu(-x))": (F.elu, lambda t: torch.relu(t) + torch.exp(-torch.relu(-t)) - 1),
    "ELU, exp(min(x, 0))": (F.elu, lambda t: torch.relu(t) + torch.exp(t.clamp(max=0)) - 1),
    "CELU": (
        lambda t: F.celu(t, 2.0),
        lambda t: torch.maximum(zeros(t), t) + torch.minimum(zeros(t), 2 * (torch.exp(t / 2) - 1)),
    ),
    "SELU": (
        F.selu,
        lambda t: (
            1.0507009873554805
            * (torch.maximum(zeros(t), t) + torch.minimum(zeros(t), 1.6732632423543772 * (torch.exp(t) - 1)))
        ),
    ),
    "leaky, a x + b relu(x)": (lambda t: F.leaky_relu(t, 0.1), lambda t: 0.1 * t + 0.9 * torch.relu(t)),
    "leaky, x + b relu(-x)": (lambda t: F.leaky_relu(t, 0.1), lambda t: t + 0.9 * torch.relu(-t)),
    "leaky, |x|": (lambda t: F.leaky_relu(t, 0.1), lambda t: 0.55 * t + 0.45 * t.abs()),
    "leaky, x - b min(x, 0)": (lambda t: F.leaky_relu(t, 0.1), lambda t: t - 0.9 * t.clamp(max=0)),
    "leaky, -min": (lambda t: F.leaky_relu(t, 0.1), lambda t: -torch.minimum(-t, -0.1 * t)),
    "leaky to 4": (
        lambda t: F.leaky_relu(t, 0.1).clamp(max=4),
        lambda t: torch.minimum(torch.maximum(t, zeros(t)), torch.full((), 4.0)) - 0.1 * torch.relu(-t),
    ),
    "Softshrink": (F.softshrink, lambda t: torch.relu(t - 0.5) - torch.relu(-t - 0.5)),
    "Softshrink, as torch exports it": (F.softshrink, F.softshrink),
    "Squareplus": (
        lambda t: 0.5 * t + 0.5 * torch.sqrt(t**2 + 4),
        lambda t: (t + torch.sqrt(t * t + 4)) / 2,
    ),
    "Softplus": (F.softplus, lambda t: torch.relu(t) + torch.log1p(torch.exp(-t.abs()))),
}
GATES: dict[str, tuple[Formula, Formula]] = {
    "HardSigmoid, 0.5 x + 0.2": (lambda t: torch.clip(0.5 * t + 0.2, 0, 1),) * 2,
    "HardSigmoid, 0.2 x + 0.5": (lambda t: torch.clip(0.2 * t + 0.5, 0, 1),) * 2,
    "HardSigmoid, scaled after": (lambda t: torch.clip(t / 4 + 0.25, 0, 1), lambda t: (t + 1).clamp(0, 4) / 4),
    "HardSigmoid": (F.hardsigmoid, F.hardsigmoid),
}


class Net(torch.nn.Module):
    def __init__(self, formula: Formula) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 6, 3), torch.nn.Conv2d(6, 6, 3)
        self.head, self.formula = torch.nn.Linear(6, 4), formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.formula(self.second(2 * self.formula(2 * self.first(x)))).mean((2, 3)))


def masked(formula: Formula, policy: str) -> Formula:
    """The formula, its gradient masked as a policy wants."""

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return formula(x)

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                again = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(formula(again).sum(), again)
            return dy * (dy > 0) if policy == "deconvnet" else dy * slope * (x > 0) * (dy > 0)

    return Masked.apply


def exported(formula: Formula) -> onnx.ModelProto:
    made = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Net(formula), torch.zeros(2, 3, 8, 8), made, input_names=["x"], dynamo=False)
    return onnx.load_from_string(made.getvalue())


X = 3 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gradient(formula: Formula) -> np.ndarray:
    x = X.double().requires_grad_()
    (found,) = torch.autograd.grad(Net(formula).double()(x)[:, 1].sum(), x)
    return found.numpy()


def assert_maps(written: Formula, references: dict[str, Formula], rectifiers: str) -> None:
    explained = graphgbp.convert(exported(written), list(references), rectifiers=rectifiers)
    maps = run(explained, {"x": X.numpy(), "target": np.array([1])})
    for method, reference in references.items():
        wanted = gradient(reference)
        np.testing.assert_allclose(maps[method], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max(), err_msg=method)


@pytest.mark.parametrize("rectifiers", ["relu", "all"])
@pytest.mark.parametrize("writing", RELU)
def test_a_relu_is_masked_however_it_is_written(writing, rectifiers):
    references = {method: masked(torch.relu, method) for method in METHODS[1:]}
    assert_maps(RELU[writing], {"saliency": torch.relu, **references}, rectifiers)


@pytest.mark.parametrize("rectifiers", ["relu", "all"])
@pytest.mark.parametrize("writing", OTHER)
def test_another_activation_is_masked_only_where_that_is_asked_for(writing, rectifiers):
    operator, written = OTHER[writing]
    guided = masked(operator, "guided") if rectifiers == "all" else operator
    assert_maps(written, {"saliency": operator, "guided_backprop": guided, "deconvnet": operator}, rectifiers)


@pytest.mark.parametrize("rectifiers", ["relu", "all"])
@pytest.mark.parametrize("writing", GATES)
def test_a_gate_is_never_masked(writing, rectifiers):
    operator, written = GATES[writing]
    assert_maps(written, {"saliency": operator, "guided_backprop": operator, "deconvnet": operator}, rectifiers)


@pytest.mark.parametrize("writing", [*RELU, *OTHER, *GATES])
def test_every_activation_is_listed_once(writing):
    written = RELU[writing] if writing in RELU else {**OTHER, **GATES}[writing][1]
    told = graphgbp.inspect(exported(written))
    wanted = (2, 0) if writing in RELU else (0, 2 if writing in OTHER else 0)
    assert (len(told.rectifiers), len(told.passed_through)) == wanted
    assert all(entry["reason"] for entry in told.not_rectifiers)


@pytest.mark.parametrize("writing", ["(x + |x|) / 2", "-min(-x, 0)", "x * (sign(x) + 1) / 2"])
def test_verify_finds_the_masks_of_a_relu_that_is_written_out(writing):
    source = exported(RELU[writing])
    report = graphgbp.verify(graphgbp.convert(source, METHODS), source)
    assert report.passed, str(report)
