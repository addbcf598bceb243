"""Quantisers against torch's own fake quantisation: straight through, and zero where the value saturates."""

import numpy as np
import onnx
import pytest
import torch

import graphgbp
from tests.build import model
from tests.rules.harness import normal, run

BETWEEN = {
    "nothing": (["d = DequantizeLinear(q, s, z)"], lambda x: x),
    "a transposition": (
        ["t = Transpose<perm=[0, 2, 3, 1]>(q)", "d = DequantizeLinear(t, s, z)"],
        lambda x: x.permute(0, 2, 3, 1),
    ),
    "a pooling": (
        ["t = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(q)", "d = DequantizeLinear(t, s, z)"],
        lambda x: torch.nn.functional.max_pool2d(x, 2),
    ),
}


def torch_gradient(x, quantise, behind):
    tensor = torch.from_numpy(x.astype(np.float32)).requires_grad_()
    y = behind(quantise(tensor))
    dy = np.random.default_rng(0).standard_normal(tuple(y.shape)).astype(np.float32)
    y.backward(torch.from_numpy(dy))
    return y.detach().numpy(), dy, tensor.grad.numpy()


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.int16])
def test_by_tensor(kind, between):
    nodes, behind = BETWEEN[between]
    if kind is np.int16 and between == "a pooling":
        pytest.skip("ONNX pools integers of 8 bits alone")
    limits, scale, zero = np.iinfo(kind), 2 / np.iinfo(kind).max, int(np.iinfo(kind).min) // 3 + 30
    x = normal(2, 3, 6, 6)
    quantise = lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero, int(limits.min), int(limits.max))  # noqa: E731
    y, dy, dx = torch_gradient(x, quantise, behind)
    assert np.mean(dx == 0) > 0
    constants = {"s": np.float32(scale), "z": kind(zero)}
    opset = 21 if kind is np.int16 else 18
    made = model(["q = QuantizeLinear(x, s, z)", *nodes], {"x": x.shape}, ["d"], constants, opset=opset)
    found = run(graphgbp.vjp(made), {"x": x, "d_grad": dy})
    np.testing.assert_allclose(found["d"], y, atol=1e-6)
    np.testing.assert_allclose(found["x_grad"], dx, atol=1e-5)


def test_by_axis():
    x, scale, zero = normal(2, 3, 6, 6), np.array([0.01, 0.02, 0.005], np.float32), np.array([10, -20, 0], np.int8)
    quantise = lambda x: torch.fake_quantize_per_channel_affine(  # noqa: E731
        x, torch.from_numpy(scale), torch.from_numpy(zero.astype(np.int32)), 1, -128, 127
    )
    y, dy, dx = torch_gradient(x, quantise, lambda x: x)
    nodes = ["q = QuantizeLinear<axis=1>(x, s, z)", "d = DequantizeLinear<axis=1>(q, s, z)"]
    found = run(graphgbp.vjp(model(nodes, {"x": x.shape}, ["d"], {"s": scale, "z": zero})), {"x": x, "d_grad": dy})
    np.testing.assert_allclose(found["d"], y, atol=1e-6)
    np.testing.assert_allclose(found["x_grad"], dx, atol=1e-5)


def test_a_quantiser_to_float8_is_refused():
    nodes = ["q = QuantizeLinear<output_dtype=17>(x, s)", "d = DequantizeLinear(q, s)"]
    made = model(nodes, {"x": [1, 4]}, ["d"], {"s": np.float32(0.1)}, opset=21)
    with pytest.raises(graphgbp.UnsupportedOperatorError, match="float of 8 bits"):
        graphgbp.vjp(made)
    assert onnx.TensorProto.FLOAT8E4M3FN == 17


def test_a_score_that_its_own_quantiser_cuts_off_still_has_a_gradient():
    nodes = ["f = Flatten(x)", "r = MatMul(f, w)", "q = QuantizeLinear(r, s, z)", "y = DequantizeLinear(q, s, z)"]
    w = normal(12, 3)
    made = model(nodes, {"x": ["n", 3, 2, 2]}, ["y"], {"w": w, "s": np.float32(0.001), "z": np.uint8(100)})
    x = normal(4, 3, 2, 2)
    found = run(graphgbp.convert(made, ["saliency"]), {"x": x, "target": np.array([2])})
    assert (np.abs(x.reshape(4, -1) @ w)[:, 2] > 0.16).any(), "else nothing is cut off"
    np.testing.assert_allclose(found["saliency"], np.broadcast_to(w[:, 2].reshape(3, 2, 2), x.shape), rtol=1e-6)
    np.testing.assert_allclose(found["target_score"], (x.reshape(4, -1) @ w)[:, 2], rtol=1e-5)
