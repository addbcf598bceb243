"""The oracle of the light models, on functions whose slope and kinks are known."""

import numpy as np
import onnx
import pytest
import torch

from tests.build import drawn, model
from tests.finite_differences import random_direction, sweep
from tests.float64 import CLEARANCE, Float64Model
from tests.rules.harness import run

X = np.array([[1.0, -2.0, 0.5]])
ONES = np.ones_like(X)


def score_of(reference: Float64Model):
    def score(x: np.ndarray) -> tuple[float, list[torch.Tensor]]:
        return float(reference(torch.from_numpy(x)).sum()), reference.sides

    return score


def rectified() -> onnx.ModelProto:
    return model(["y = Relu(x)"], {"x": X.shape}, ["y"], opset=9)


def test_a_smooth_step_is_taken_and_kinks_are_counted():
    found = sweep(score_of(Float64Model(rectified())), X, ONES, steps=(3, 0.75, 0.25, 0.125))
    assert [difference.crossings for difference in found.differences] == [3, 1, 0, 0]
    assert [difference.slope for difference in found.differences] == [8.5 / 6, 2.75 / 1.5, 2, 2]
    assert found.slope == 2 and found.uncertainty == 0


def test_where_every_step_crosses_a_kink_there_is_no_slope():
    with pytest.raises(AssertionError, match="every step crosses a kink"):
        sweep(score_of(Float64Model(rectified())), np.zeros_like(X), ONES)


def test_an_anchored_model_stays_on_the_side_float32_saw():
    """Zero counts as shut, as in torch; a positive value below rounding as open."""
    nodes, nothing = ["z = Add(x, zero)", "y = Relu(z)"], {"zero": np.zeros(1, np.float32)}
    reference = Float64Model(model(nodes, {"x": X.shape}, ["y"], nothing, opset=9))
    reached = np.array([[1e-9, 0.0, 1.0]], np.float32)
    x = torch.from_numpy(reached).double()
    assert reference.anchor(x, {"z": reached}) == pytest.approx(CLEARANCE, rel=1e-2)
    assert reference.sides[0].tolist() == [[True, False, True]]
    assert sweep(score_of(reference), reached.astype(float), ONES, steps=(1e-7, 1e-8)).slope == pytest.approx(2)


def test_equal_values_in_a_window_are_told_apart_as_the_first_wins():
    nodes = ["z = Add(x, zero)", "y = MaxPool<kernel_shape=[1, 2], strides=[1, 2]>(z)"]
    nothing = {"zero": np.zeros(1, np.float32)}
    reference = Float64Model(model(nodes, {"x": (1, 1, 1, 4)}, ["y"], nothing, opset=9))
    reached = np.array([[[[2, 2, 1, 0]]]], np.float32)
    reference.anchor(torch.from_numpy(reached).double(), {"z": reached})
    first = np.array([[[[1.0, 0, 0, 0]]]])
    assert sweep(score_of(reference), reached.astype(float), first, steps=(1e-7, 1e-8)).slope == pytest.approx(1)


def test_a_direction_is_as_long_as_the_image():
    assert np.linalg.norm(random_direction(X, 0)) == pytest.approx(np.linalg.norm(X))
    assert not np.allclose(random_direction(X, 0), random_direction(X, 1))


@pytest.mark.parametrize(
    "node",
    [
        "y = Conv<pads=[0,1,2,1], strides=[2,1], group=2>(x, w)",
        "y = MaxPool<kernel_shape=[3,2], pads=[1,0,1,1], strides=[2,2]>(x)",
        "y = AveragePool<kernel_shape=[3,3], pads=[1,0,1,2], strides=[2,1]>(x)",
        "y = LRN<size=3, alpha=0.3, beta=0.6, bias=1.5>(x)",
        "y = BatchNormalization<epsilon=0.01>(x, s, b, m, v)",
        "y = Softmax<axis=1>(x)",
        "y = GlobalAveragePool(x)",
        "y = Transpose<perm=[0,2,3,1]>(x)",
    ],
)
def test_operators_compute_what_onnx_runtime_computes(node):
    weights = {"w": drawn(4, 2, 3, 3), "s": drawn(4, seed=1), "b": drawn(4, seed=2), "m": drawn(4, seed=3)}
    weights |= {"v": drawn(4, seed=4) ** 2}
    used = {name: value for name, value in weights.items() if f" {name}" in node}
    single = model([node], {"x": (1, 4, 6, 7)}, ["y"], used, opset=9)
    x = drawn(1, 4, 6, 7, seed=5)
    expected = Float64Model(single)(torch.from_numpy(x).double())
    np.testing.assert_allclose(run(single, {"x": x})["y"], expected.numpy(), rtol=1e-5, atol=1e-6)
