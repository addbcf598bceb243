"""Half precision: maps in float32 of the values the half forward pass has, and no less range than float32."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import graphgbp
from tests.build import drawn, model, small_cnn
from tests.half_models import (
    HALVES,
    IMAGES,
    METHODS,
    TARGETS,
    half_types,
    numpy_type,
    relu6_cnn,
    run_by_reference,
    stored_as,
)
from tests.maps import assert_maps_equal
from tests.rules.harness import run

# -- the reference: torch, in float32, on given values of the forward pass -------------------------------------------


class Rectified(torch.autograd.Function):
    """A rectifier with the values and the rule of its cotangent given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule = rule
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return ctx.rule(x, dy), None, None


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "saliency": lambda x, dy: dy * (x > 0),
    "guided_backprop": lambda x, dy: dy * (x > 0) * (dy > 0),
    "deconvnet": lambda x, dy: dy * (dy > 0),
}


def torch_maps(stored: onnx.ModelProto, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """small_cnn's maps: each layer's value is the given one, its derivative torch's, in float32."""
    known = {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
    w = {x.name: torch.from_numpy(numpy_helper.to_array(x).astype(np.float32)) for x in stored.graph.initializer}

    def given(y: Tensor, name: str) -> Tensor:
        return y + (known[name] - y).detach()

    def features(x: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        a = given(F.conv2d(x, w["w1"], w["b1"], padding=1), "a")
        r1 = Rectified.apply(a, known["r1"], rule)
        b = given(F.conv2d(r1, w["w2"], w["b2"], stride=2, padding=1), "b")
        return Rectified.apply(b, known["r2"], rule)

    def score(r2: Tensor) -> Tensor:
        f = given(r2.mean((2, 3)), "f")
        return given(F.linear(f, w["w3"], w["b3"]), "z")[range(2), TARGETS].sum()

    maps: dict[str, Tensor] = {}
    for method, rule in RULES.items():
        x = known["x"].clone().requires_grad_()
        (maps[method],) = torch.autograd.grad(score(features(x, rule)), x)
    layer = known["r2"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(layer), layer)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * layer).sum(1, keepdim=True)).detach()
    maps["gradcam"] = F.interpolate(cam, (8, 8), mode="bilinear", align_corners=False)
    maps["guided_gradcam"] = maps["guided_backprop"] * maps["gradcam"]
    return {name: value.numpy() for name, value in maps.items()}


def with_outputs(whole: onnx.ModelProto, names: Sequence[str], elem_type: int) -> onnx.ModelProto:
    shown = onnx.ModelProto()
    shown.CopyFrom(whole)
    shown.graph.output.extend(helper.make_tensor_value_info(name, elem_type, None) for name in names)
    return shown


@half_types
def test_maps_are_float32_backward_on_the_values_of_a_forward_pass_that_rounds(elem_type):
    """As in a runtime with half kernels for every node."""
    stored = stored_as(small_cnn(), elem_type)
    x = IMAGES.astype(numpy_type(elem_type))
    values = run_by_reference(with_outputs(stored, ["a", "r1", "b", "r2", "f", "z"], elem_type), {"x": x})
    got = run_by_reference(graphgbp.convert(stored, METHODS), {"x": x, "target": TARGETS})
    assert got["y"].dtype == numpy_type(elem_type) and np.array_equal(got["y"], values["y"])
    assert_maps_equal(got, torch_maps(stored, values | {"x": x}), "half", tolerance=1e-5)


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def run_at(level: str, whole: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("network", [small_cnn, relu6_cnn])
def test_the_cpu_rounds_nothing_that_it_did_not_round_before(network, level):
    """Its forward pass stays bit-equal, and the maps are those of float32 arithmetic with half weights."""
    stored = stored_as(network(), TensorProto.FLOAT16)
    x = IMAGES.astype(np.float16)
    before = run_at(level, stored, {"x": x})
    got = run_at(level, graphgbp.convert(stored, METHODS), {"x": x, "target": TARGETS})
    assert np.array_equal(got["y"], before["y"])
    wide = stored_back(stored)
    expected = run_at(level, graphgbp.convert(wide, METHODS), {"x": x.astype(np.float32), "target": TARGETS})
    assert_maps_equal(got, {method: expected[method] for method in METHODS}, level, tolerance=1e-6)


def stored_back(stored: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 model with exactly the weights of a half one."""
    made = onnx.ModelProto()
    made.CopyFrom(stored)
    for tensor in made.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype.name in ("float16", "bfloat16"):
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    for value in [*made.graph.input, *made.graph.output]:
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return made


# -- masks -----------------------------------------------------------------------------------------------------------


def every(elem_type: int) -> np.ndarray:
    """Every number of a half type but NaN."""
    values = np.arange(2**16, dtype=np.uint16).view(numpy_type(elem_type))
    return values[~np.isnan(values.astype(np.float32))]


def mask_of(x: np.ndarray, bound: float | None) -> np.ndarray:
    """What a cotangent of ones passes on at every x of a half model."""
    clipped = "y = Relu(x)" if bound is None else "y = Clip(x, zero, bound)"
    weights = {} if bound is None else {"zero": np.array(0, x.dtype), "bound": np.array(bound, x.dtype)}
    elem_type = helper.np_dtype_to_tensor_dtype(x.dtype)
    made = model([clipped], {"x": [len(x)]}, ["y"], weights, opset=18, dtype=elem_type)
    return run_by_reference(graphgbp.vjp(made), {"x": x, "y_grad": np.ones_like(x)})["x_grad"]


@half_types
def test_mask_of_a_relu_at_every_half(elem_type):
    """Exact, but for bfloat16's subnormals, which are float32's too: there a part passes, or nothing."""
    x = every(elem_type)
    mask, positive = mask_of(x, None).astype(np.float32), x > 0
    normal = np.abs(x.astype(np.float32)) >= np.finfo(np.float32).tiny
    exact = normal | (x <= 0)
    assert np.array_equal(mask[exact], positive[exact].astype(np.float32))
    assert ((mask >= 0) & (mask <= 1)).all() and (~exact).sum() == (127 if elem_type == TensorProto.BFLOAT16 else 0)


@half_types
@pytest.mark.parametrize("bound", [6, 1, 20, 1.5])
def test_mask_of_a_clip_at_every_half(elem_type, bound):
    x = every(elem_type)
    mask = mask_of(x, bound).astype(np.float32)
    wide = x.astype(np.float32)
    exact = (np.abs(wide) >= np.finfo(np.float32).tiny) | (wide <= 0)
    assert np.array_equal(mask[exact], ((wide > 0) & (wide < bound))[exact].astype(np.float32))


# -- range -----------------------------------------------------------------------------------------------------------


@half_types
@pytest.mark.parametrize("factor", [64.0, 1 / 512])
def test_gradients_beyond_the_range_of_half(elem_type, factor):
    """Three factors: the forward pass stays in range, dS/dx = factor^3 v is above 65504, or below the least float16."""
    dtype = numpy_type(elem_type)
    nodes = [
        "a = Mul(x, k)",
        "b = Relu(a)",
        "c = Mul(b, k)",
        "d = Mul(c, k)",
        "y = MatMul(d, w)",
    ]
    k, w = np.array(factor, dtype), drawn(4, 3, seed=2).astype(dtype)
    made = model(nodes, {"x": ["N", 4]}, ["y"], {"k": k, "w": w}, dtype=elem_type)
    x = np.minimum(np.abs(drawn(2, 4, seed=3)) / factor**2, 3e4).astype(dtype)
    got = run_by_reference(
        graphgbp.convert(made, ["saliency", "guided_backprop"]), {"x": x, "target": np.array([0, 2])}
    )
    exact = float(k) ** 3 * w.astype(np.float64).T[[0, 2]]
    assert np.abs(exact).max() > 65504 or np.abs(exact).max() < 2**-25
    np.testing.assert_allclose(got["saliency"], exact, rtol=1e-6)
    np.testing.assert_allclose(got["guided_backprop"], np.maximum(exact, 0), rtol=1e-6)


def test_a_mean_over_more_than_float16_can_count():
    """300 x 300 positions: 1/90000 is one subnormal float16, 90000 none at all."""
    made = model(["p = ReduceMean<keepdims=0>(x, axes)", "y = MatMul(p, w)"], {"x": ["N", 2, "h", "w"]}, ["y"],
        {"axes": np.array([2, 3]), "w": np.eye(2, dtype=np.float16)}, dtype=TensorProto.FLOAT16)  # fmt: skip
    x = drawn(1, 2, 300, 300).astype(np.float16)
    got = run(graphgbp.convert(made, ["saliency"]), {"x": x, "target": np.array([1])})["saliency"]
    np.testing.assert_allclose(
        got, np.stack([np.zeros((1, 300, 300)), np.full((1, 300, 300), 1 / 90000)], 1), rtol=1e-6
    )
    back = run(graphgbp.vjp(made), {"x": x, "y_grad": np.array([[1000, 2000]], np.float16)})["x_grad"]
    assert back.dtype == np.float16
    np.testing.assert_allclose(back[0, :, 0, 0].astype(np.float64), [1000 / 90000, 2000 / 90000], rtol=1e-3)


def test_vjp_leaves_half_behind_between_its_ends():
    """A cotangent of 1 times 300 twice is 90000, times 1/512 is 176: only float32 gets there."""
    nodes = ["a = Mul(x, small)", "b = Mul(a, k)", "y = Mul(b, k)"]
    weights = {"small": np.float16(1 / 512), "k": np.float16(300)}
    made = model(nodes, {"x": [3]}, ["y"], weights, dtype=TensorProto.FLOAT16)
    got = run(graphgbp.vjp(made), {"x": np.ones(3, np.float16), "y_grad": np.ones(3, np.float16)})["x_grad"]
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, np.full(3, 90000 / 512, np.float16))
