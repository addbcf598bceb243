"""The gradient of nine ImageNet architectures, against their own central differences and torch's autograd."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper

import graphgbp
from tests.finite_differences import random_direction, sweep
from tests.float64 import Float64Model, crossings
from tests.light_models import LIGHT_MODELS, input_name, light_input, light_model

ROUNDING = 5e-5  # of float32 between one kink and the next, relative to the largest value
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A light model in float64, and the gradient of S = sum(cotangent * output) that the converted one gave at x.

    `switched` counts the kinks so near to x that float32 rounding put it on their other side.
    """

    name: str
    reference: Float64Model
    x: np.ndarray
    cotangent: np.ndarray
    gradient: np.ndarray
    switched: int

    def score(self, x: np.ndarray) -> tuple[float, list[torch.Tensor]]:
        with torch.no_grad():
            y = self.reference(torch.from_numpy(x))
        return float((y * torch.from_numpy(self.cotangent)).sum()), self.reference.sides


@pytest.fixture(scope="module", params=LIGHT_MODELS)
def case(request: pytest.FixtureRequest) -> Case:
    model = light_model(request.param)
    reference, x = Float64Model(model), light_input(1)
    (output,) = (value.name for value in model.graph.output)
    converted = graphgbp.vjp(model)
    point = torch.from_numpy(x).double()
    with torch.no_grad():
        shape = reference(point).shape
    sides = reference.sides
    cotangent = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    feeds = {input_name(model): x, f"{output}_grad": cotangent}
    gradient, *reached = _run(converted, feeds, [f"{input_name(model)}_grad", *reference.kinked])
    rounding = reference.anchor(point, dict(zip(reference.kinked, reached, strict=True)))
    assert rounding < ROUNDING, f"torch and ONNX Runtime do not compute the same: {rounding:.1e}"
    switched = crossings(sides, reference.sides)
    return Case(request.param, reference, x.astype(np.float64), cotangent.astype(np.float64), gradient, switched)


def _run(model: onnx.ModelProto, feeds: dict[str, np.ndarray], names: list[str]) -> list[np.ndarray]:
    """The named tensors of a model, outputs or not."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    inner = [name for name in names if name not in outputs]
    shown.graph.output.extend(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in inner)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))


@pytest.mark.parametrize("seed", [11, 12])
def test_vjp_equals_central_differences(case: Case, seed: int) -> None:
    direction = random_direction(case.x, seed)
    differences = sweep(case.score, case.x, direction)
    slope = float((case.gradient * direction).sum())
    error = abs(slope / differences.slope - 1)
    print(
        f"{case.name}: vjp {slope:.8e}, off by {error:.1e}; {case.switched} kinks switched by rounding\n{differences}"
    )
    assert differences.uncertainty < 1e-4, f"no step can be trusted:\n{differences}"
    assert error < 1e-3, f"vjp says {slope:.8e}, off by {error:.1e}:\n{differences}"


def test_vjp_equals_autograd(case: Case) -> None:
    x = torch.from_numpy(case.x).requires_grad_()
    (case.reference(x) * torch.from_numpy(case.cotangent)).sum().backward()
    expected = x.grad.numpy()
    error = np.linalg.norm(case.gradient - expected) / np.linalg.norm(expected)
    print(f"{case.name}: relative L2 distance from autograd {error:.1e}")
    assert error < 1e-4
