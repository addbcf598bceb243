"""ONNX Runtime's own quantised operators, run by its kernels, against torch's fake quantisation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphgbp
from tests.build import model
from tests.rules.harness import normal, run

MS = "com.microsoft"


@dataclass(frozen=True)
class Quantiser:
    scale: Any
    zero: Any
    kind: type = np.uint8

    def __call__(self, x: Tensor) -> Tensor:
        limits = np.iinfo(self.kind)
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero, int(limits.min), int(limits.max))

    def constants(self, suffix: str) -> dict[str, np.ndarray]:
        return {f"s{suffix}": np.float32(self.scale), f"z{suffix}": np.asarray(self.zero, self.kind)}


IN, OUT = Quantiser(0.02, 120), Quantiser(0.013, 100)
SIGNED, SIGNED_OUT = Quantiser(0.02, -7, np.int8), Quantiser(0.013, 3, np.int8)


def check(
    nodes: str | Sequence[str],
    inputs: Sequence[np.ndarray],
    reference: Callable[..., Tensor],
    *,
    quantiser: Quantiser = IN,
    result: Quantiser | None = OUT,
    constants: dict[str, np.ndarray] | None = None,
    steps: float = 1.01,
    opset: int = 18,
) -> None:
    """`nodes` make q of q0, q1, ... (scale s0, zero point z0), with scale s and zero point z; or y, a real tensor."""
    names = [f"x{index}" for index in range(len(inputs))]
    weights = {"s0": np.float32(quantiser.scale), "z0": np.asarray(quantiser.zero, quantiser.kind)}
    weights |= {"s": np.float32(result.scale), "z": np.asarray(result.zero, result.kind)} if result else {}
    made = model(
        [
            *(f"q{name[1:]} = QuantizeLinear({name}, s0, z0)" for name in names),
            *([nodes] if isinstance(nodes, str) else nodes),
            *(["y = DequantizeLinear(q, s, z)"] if result else []),
        ],
        {name: x.shape for name, x in zip(names, inputs, strict=True)},
        ["y"],
        weights | (constants or {}),
        opset=opset,
    )
    tensors = [torch.from_numpy(x).requires_grad_() for x in inputs]
    y = reference(*(quantiser(x) for x in tensors))
    y = result(y) if result else y
    dy = normal(*y.shape, seed=9)
    y.backward(torch.from_numpy(dy))
    found = run(graphgbp.vjp(made), dict(zip(names, inputs, strict=True)) | {"y_grad": dy})
    assert np.array_equal(found["y"], run(made, dict(zip(names, inputs, strict=True)))["y"])
    np.testing.assert_allclose(
        found["y"], y.detach().numpy(), atol=steps * result.scale if result else 1e-4, err_msg="another function"
    )
    for name, x in zip(names, tensors, strict=True):
        assert x.grad is not None and x.grad.abs().max() > 0
        np.testing.assert_allclose(found[f"{name}_grad"], x.grad.numpy(), atol=1e-5 * float(x.grad.abs().max()))


KINDS = {"uint8": (IN, OUT), "int8": (SIGNED, SIGNED_OUT)}
IMAGE = normal(2, 3, 6, 7)
LAST = normal(2, 6, 7, 3)


def last(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_add_and_mul(op, kind):
    quantiser, result = KINDS[kind]
    node = f"q = {MS}.QLinear{op}(q0, s0, z0, q1, s0, z0, s, z)"
    function = torch.add if op == "Add" else torch.mul
    check(node, [IMAGE, normal(1, 3, 1, 1, seed=1)], function, quantiser=quantiser, result=result)


@pytest.mark.parametrize("op", ["Add", "Mul"])
def test_without_a_zero_point_it_is_zero(op):
    node = f"q = {MS}.QLinear{op}(q0, s0, z0, q1, s0, z0, s)"
    function = torch.add if op == "Add" else torch.mul
    plain = Quantiser(0.02, 0, np.int8)
    result = Quantiser(0.015, 0, np.int8)
    check(node, [IMAGE, normal(2, 3, 6, 7, seed=1)], function, quantiser=plain, result=result)


def test_a_relu_swallowed_by_an_addition():
    """x + y below zero is cut off: the derivative there is zero, as through a ReLU."""
    node = f"q = {MS}.QLinearAdd(q0, s0, z0, q1, s0, z0, s, z)"
    check(node, [IMAGE, normal(2, 3, 6, 7, seed=1)], lambda a, b: (a + b).relu(), result=Quantiser(0.02, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_sigmoid(kind):
    quantiser = KINDS[kind][0]
    result = Quantiser(1 / 256, np.iinfo(quantiser.kind).min, quantiser.kind)
    check(f"q = {MS}.QLinearSigmoid(q0, s0, z0, s, z)", [IMAGE], torch.sigmoid, quantiser=quantiser, result=result)


@pytest.mark.parametrize("kind", KINDS)
def test_leaky_relu(kind):
    quantiser, result = KINDS[kind]
    node = f"q = {MS}.QLinearLeakyRelu<alpha=0.2>(q0, s0, z0, s, z)"
    check(node, [IMAGE], lambda x: F.leaky_relu(x, 0.2), quantiser=quantiser, result=result)


def test_leaky_relu_s_own_alpha():
    check(f"q = {MS}.QLinearLeakyRelu(q0, s0, z0, s, z)", [IMAGE], F.leaky_relu)


@pytest.mark.parametrize(
    ("attributes", "function"),
    [
        ("kernel_shape=[2,2], strides=[2,2]", lambda x: F.avg_pool2d(x, 2)),
        ("kernel_shape=[3,3], pads=[1,1,1,1]", lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)),
        ("kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1", lambda x: F.avg_pool2d(x, 3, 1, 1)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_average_pool(attributes, function, channels_last):
    node = f"q = {MS}.QLinearAveragePool<{attributes}, channels_last={int(channels_last)}>(q0, s0, z0, s, z)"
    check(node, [LAST if channels_last else IMAGE], last(function) if channels_last else function)


@pytest.mark.parametrize("channels_last", [False, True])
def test_global_average_pool(channels_last):
    node = f"q = {MS}.QLinearGlobalAveragePool<channels_last={int(channels_last)}>(q0, s0, z0, s, z)"
    pooled = lambda x: x.mean((2, 3), keepdim=True)  # noqa: E731
    check(node, [LAST if channels_last else IMAGE], last(pooled) if channels_last else pooled)


def test_max_pool_with_channels_last():
    nodes = [f"p = {MS}.NhwcMaxPool<kernel_shape=[2,2], strides=[2,2]>(q0)", "q = Identity(p)"]
    pooled = last(lambda x: F.max_pool2d(x, 2))
    check(nodes, [normal(2, 6, 8, 3)], pooled, result=IN, constants={})


def test_concat():
    node = f"q = {MS}.QLinearConcat<axis=1>(s, z, q0, s0, z0, q1, s0, z0)"
    check(node, [IMAGE, normal(2, 2, 6, 7, seed=1)], lambda a, b: torch.cat([a, b], 1))


@pytest.mark.parametrize(
    ("attributes", "function"),
    [
        ("opset=13, axis=1", lambda x: x.softmax(1)),
        ("opset=13", lambda x: x.softmax(-1)),
        ("opset=11, axis=2", lambda x: x.flatten(2).softmax(-1).reshape(x.shape)),
    ],
)
def test_softmax(attributes, function):
    node = f"q = {MS}.QLinearSoftmax<{attributes}>(q0, s0, z0, s, z)"
    check(node, [IMAGE], function, result=Quantiser(1 / 256, 0))


def test_where():
    chosen = normal(2, 3, 6, 7, seed=5) > 0
    node = f"q = {MS}.QLinearWhere(c, q0, s0, z0, q1, s0, z0, s, z)"
    where = lambda a, b: torch.where(torch.from_numpy(chosen), a, b)  # noqa: E731
    check(node, [IMAGE, normal(2, 3, 6, 7, seed=1)], where, constants={"c": chosen})


def test_conv_with_channels_last():
    w = np.random.default_rng(0).integers(-50, 50, (4, 3, 3, 3)).astype(np.int8)
    scale, bias = np.float32([0.01, 0.02, 0.005, 0.01]), np.int32([100, -200, 50, 0])
    real = torch.from_numpy(w * scale[:, None, None, None])
    b = torch.from_numpy((bias * scale * IN.scale).astype(np.float32))
    node = f"q = {MS}.QLinearConv<channels_last=1, pads=[1,1,1,1]>(q0, s0, z0, w, sw, zw, s, z, b)"
    constants = {"w": w, "sw": scale, "zw": np.zeros(4, np.int8), "b": bias}
    check(node, [LAST], last(lambda x: F.conv2d(x, real, b, padding=1)), constants=constants)


@pytest.mark.parametrize("kind", [np.uint16, np.int16])
def test_quantisers_of_16_bits_before_opset_21(kind):
    fine = Quantiser(2 / np.iinfo(kind).max, int(np.iinfo(kind).min) // 3, kind)
    nodes = [f"p = {MS}.QuantizeLinear(x0, sf, zf)", f"y = {MS}.DequantizeLinear(p, sf, zf)"]
    x = IMAGE
    made = model(nodes, {"x0": x.shape}, ["y"], {"sf": np.float32(fine.scale), "zf": np.asarray(fine.zero, kind)})
    tensor = torch.from_numpy(x).requires_grad_()
    dy = normal(*x.shape, seed=9)
    y = fine(tensor)
    y.backward(torch.from_numpy(dy))
    found = run(graphgbp.vjp(made), {"x0": x, "y_grad": dy})
    np.testing.assert_allclose(found["y"], y.detach().numpy(), atol=fine.scale)
    np.testing.assert_allclose(found["x0_grad"], tensor.grad.numpy(), atol=1e-5)
    assert (found["x0_grad"] == 0).any()
