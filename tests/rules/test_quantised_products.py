"""ONNX Runtime's own products of quantised matrices, run by its kernels, against torch's fake quantisation."""

import numpy as np
import pytest
import torch

import graphgbp
from tests.build import model
from tests.rules.harness import normal, run
from tests.rules.test_quantised_layers import IN, MS, OUT, Quantiser, check

ROWS, INNER, COLUMNS = 5, 12, 7
GENERATOR = np.random.default_rng(3)
WEIGHT = GENERATOR.integers(-90, 90, (INNER, COLUMNS)).astype(np.int8)
SCALES = {"by tensor": np.float32(0.01), "by column": GENERATOR.uniform(0.005, 0.02, COLUMNS).astype(np.float32)}
ZERO = {"by tensor": np.int8(3), "by column": GENERATOR.integers(-5, 5, COLUMNS).astype(np.int8)}
A = normal(ROWS, INNER)


def real_weight(by: str) -> torch.Tensor:
    return torch.from_numpy((WEIGHT.astype(np.float32) - ZERO[by]) * SCALES[by])


@pytest.mark.parametrize("by", SCALES)
@pytest.mark.parametrize("result", [OUT, Quantiser(0.02, 0), None], ids=["quantised", "swallowed ReLU", "real"])
@pytest.mark.parametrize(("turned_a", "turned_b"), [(0, 0), (0, 1), (1, 0)])
def test_gemm(by, result, turned_a, turned_b):
    alpha, bias = 0.5, GENERATOR.integers(-4000, 4000, COLUMNS).astype(np.int32)
    constants = {"w": WEIGHT.T.copy() if turned_b else WEIGHT, "sw": SCALES[by], "zw": ZERO[by], "c": bias}
    node = f"QGemm<alpha=0.5, transA={turned_a}, transB={turned_b}>(q0, s0, z0, w, sw, zw, c"
    node = f"q = {MS}.{node}, s, z)" if result else f"y = {MS}.{node})"
    offset = torch.from_numpy((bias * alpha * IN.scale * SCALES[by]).astype(np.float32))

    def gemm(a):
        y = alpha * (a.T if turned_a else a) @ real_weight(by) + offset
        return y.relu() if result and result.zero == 0 else y

    check(node, [A.T.copy() if turned_a else A], gemm, result=result, constants=constants)


@pytest.mark.parametrize("by", SCALES)
@pytest.mark.parametrize("biased", [False, True])
def test_matmul_integer_to_float(by, biased):
    bias = normal(COLUMNS, seed=4)
    constants = {"w": WEIGHT, "sw": SCALES[by], "zw": ZERO[by], "b": bias}
    node = f"y = {MS}.MatMulIntegerToFloat(q0, w, s0, sw, z0, zw{', b' if biased else ''})"
    check(node, [A], lambda a: a @ real_weight(by) + biased * torch.from_numpy(bias), result=None, constants=constants)


@pytest.mark.parametrize("by", SCALES)
@pytest.mark.parametrize("biased", [False, True])
def test_dynamic_quantize_matmul(by, biased):
    """The quantiser's range is that of a, so its gradient goes straight through everywhere."""
    bias = normal(COLUMNS, seed=4)
    node = f"y = {MS}.DynamicQuantizeMatMul(a, w, sw, zw{', b' if biased else ''})"
    constants = {"w": WEIGHT, "sw": SCALES[by], "zw": ZERO[by], "b": bias}
    made = model([node], {"a": ["N", INNER]}, ["y"], constants)
    dy = normal(ROWS, COLUMNS, seed=5)
    found = run(graphgbp.vjp(made), {"a": A, "y_grad": dy})
    np.testing.assert_array_equal(found["y"], run(made, {"a": A})["y"])
    low, high = min(A.min(), 0), max(A.max(), 0)
    scale = (high - low) / 255
    tensor = torch.from_numpy(A).requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(tensor, float(scale), round(-low / scale), 0, 255) @ real_weight(by)
    y = y + biased * torch.from_numpy(bias)
    y.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(found["y"], y.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(found["a_grad"], tensor.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero_points", [None, "packed", "real"])
@pytest.mark.parametrize("columns", [64, 40])
def test_matmul_nbits(bits, zero_points, columns):
    """The weight is that of the operator's documentation: blocks along K, the lowest bits of a byte first."""
    if bits == 8 and zero_points == "real":
        pytest.skip("no kernel of ONNX Runtime's CPU provider runs it")
    rows, size = 6, 16
    blocks, generator = -(-columns // size), np.random.default_rng(bits)
    q = generator.integers(0, 2**bits, (rows, blocks, size))
    zero = generator.integers(0, 2**bits, (rows, blocks)) if zero_points else np.full((rows, blocks), 2 ** (bits - 1))
    scales = generator.uniform(0.05, 0.2, (rows, blocks)).astype(np.float32)
    weight = ((q - zero[:, :, None]) * scales[:, :, None]).reshape(rows, -1)[:, :columns]
    constants = {"b": packed(q, bits), "s": scales.reshape(-1), "bias": normal(rows, seed=6)}
    if zero_points:
        constants["z"] = packed(zero, bits).reshape(-1) if zero_points == "packed" else zero.astype(np.float32)
    given = "z" if zero_points else ""
    node = f"y = {MS}.MatMulNBits<K={columns}, N={rows}, bits={bits}, block_size={size}>(a, b, s, {given}, , bias)"
    made = model([node], {"a": ["N", 3, columns]}, ["y"], constants)
    a, dy = normal(2, 3, columns), normal(2, 3, rows, seed=7)
    found = run(graphgbp.vjp(made), {"a": a, "y_grad": dy})
    np.testing.assert_allclose(found["y"], a @ weight.T + constants["bias"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found["a_grad"], dy @ weight, rtol=1e-4, atol=1e-4)


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [..., n bits / 8, rounded up]"""
    each = 8 // bits
    filled = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, -numbers.shape[-1] % each)])
    groups = filled.reshape(*filled.shape[:-1], -1, each)
    return (groups << (bits * np.arange(each))).sum(-1).astype(np.uint8)


def refused(node: str, constants: dict[str, np.ndarray], because: str, shape: tuple[int, ...] = (2, 32)) -> None:
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=because):
        graphgbp.vjp(model([node], {"a": shape}, ["y"], constants))


@pytest.mark.parametrize(
    ("attributes", "more", "because"),
    [
        ("bits=4", ", , g", "order of their own"),
        ("bits=3", "", "straddle bytes"),
        ("bits=4, weight_prepacked=1", "", "packed for one GPU"),
    ],
)
def test_weights_that_are_refused(attributes, more, because):
    constants = {"b": np.zeros((4, 2, 8), np.uint8), "s": np.ones(8, np.float32), "g": np.zeros(32, np.int32)}
    refused(f"y = {MS}.MatMulNBits<K=32, N=4, block_size=16, {attributes}>(a, b, s{more})", constants, because)


def test_a_recurrent_layer_is_refused_with_the_reason():
    hidden, size = 4, 3
    constants = {
        "w": np.ones((1, size, 4 * hidden), np.int8),
        "r": np.ones((1, hidden, 4 * hidden), np.int8),
        "s": np.float32([0.1]),
        "z": np.int8([0]),
    }
    node = f"y = {MS}.DynamicQuantizeLSTM<hidden_size={hidden}>(a, w, r, , , , , , s, z, s, z)"
    refused(node, constants, "repeats a step", (5, 2, size))
