"""ONNX Runtime's own attention against torch's."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import graphgbp
from tests.build import model
from tests.plain.harness import check_form, fused_op
from tests.rules.harness import normal, run

HEADS = 2
MASKS = {
    "none": None,
    "by key": np.array([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]], np.int32),
    "by query and key": (normal(3, 4, 4, seed=9) > -0.5).astype(np.int32),
}


def by_heads(x):
    return x.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2)


def attend(q, k, v, mask=None, scores=None, scale=None):
    added = torch.zeros(()) if scores is None else scores
    if mask is not None:
        keys = mask[:, None, None] if mask.dim() == 2 else mask[:, None]
        added = added + torch.where(keys > 0, 0.0, -10000.0)
    shape = q.shape[0], HEADS, q.shape[2], k.shape[2]
    y = functional.scaled_dot_product_attention(q, k, v, added.expand(shape).to(q.dtype), scale=scale)
    return y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scores", [None, (1, 1, 4, 4), (3, 2, 4, 4)])
def test_attention(mask, scores):
    def reference(x, w, b, mask, _, scores):
        return attend(*(by_heads(part) for part in (x @ w + b).chunk(3, -1)), mask, scores)

    added = None if scores is None else normal(*scores, seed=4)
    inputs = [normal(3, 4, 6), normal(6, 24, seed=1), normal(24, seed=2), MASKS[mask], None, added]
    wrt = (0, 1, 2) if scores is None else (0, 1, 2, 5)
    check_form("Attention", inputs, reference, wrt=wrt, num_heads=HEADS)


def test_attention_with_values_of_another_size():
    def reference(x, w, b):
        return attend(*(by_heads(part) for part in (x @ w + b).split([8, 8, 12], -1)), scale=0.3)

    inputs = [normal(3, 4, 6), normal(6, 28, seed=1), normal(28, seed=2)]
    check_form("Attention", inputs, reference, wrt=(0, 1, 2), num_heads=HEADS, qkv_hidden_sizes=[8, 8, 12], scale=0.3)


@pytest.mark.parametrize("mask", ["none", "by key"])
@pytest.mark.parametrize("bias", [True, False])
def test_multi_head_attention(bias, mask):
    def reference(q, k, v, b, mask):
        parts = [0, 0, 0] if b is None else b.split([8, 8, 12])
        return attend(*(by_heads(x + part) for x, part in zip((q, k, v), parts, strict=True)), mask)

    inputs = [normal(3, 5, 8), normal(3, 4, 8, seed=1), normal(3, 4, 12, seed=2)]
    inputs += [normal(28, seed=3) if bias else None, MASKS[mask]]
    check_form("MultiHeadAttention", inputs, reference, wrt=(0, 1, 2, 3) if bias else (0, 1, 2), num_heads=HEADS)


def test_keys_and_values_by_heads():
    reference = lambda q, k, v: attend(by_heads(q), k, v)  # noqa: E731
    inputs = [normal(3, 5, 8), normal(3, HEADS, 4, 4, seed=1), normal(3, HEADS, 4, 4, seed=2)]
    check_form("MultiHeadAttention", inputs, reference, wrt=(0, 1, 2), num_heads=HEADS)


def test_added_scores_and_keys_and_values_given_out():
    def reference(q, k, v, *others):
        return attend(*(by_heads(x) for x in (q, k, v)), scores=others[2]), by_heads(k), by_heads(v)

    inputs = [normal(3, 5, 8), normal(3, 4, 8, seed=1), normal(3, 4, 8, seed=2), None, None, normal(1, 2, 5, 4, seed=3)]
    check_form("MultiHeadAttention", inputs, reference, wrt=(0, 1, 2, 5), outputs=3, num_heads=HEADS)


def test_open_sizes():
    reference = lambda q, k, v: attend(*(by_heads(x) for x in (q, k, v)), scale=0.3)  # noqa: E731
    inputs = [normal(3, 5, 8), normal(3, 4, 8, seed=1), normal(3, 4, 8, seed=2)]
    check_form("MultiHeadAttention", inputs, reference, wrt=(0, 1, 2), dynamic=True, num_heads=HEADS, scale=0.3)


@pytest.mark.parametrize("mask", ["none", "by key"])
@pytest.mark.parametrize("by_column", [False, True])
def test_quantised_attention(by_column, mask):
    """The input as a quantiser stores it; what the gradient meets of the node is its float network."""
    generator, size = np.random.default_rng(5), 24
    scale = generator.uniform(0.01, 0.02, size).astype(np.float32) if by_column else np.float32([0.015])
    weights = generator.integers(-100, 100, (6, size)).astype(np.int8)
    x, bias, unit, zero = normal(3, 4, 6), normal(size, seed=2), np.float32([0.04]), np.uint8([120])
    constants = {"u": unit.reshape(()), "n": zero.reshape(()), "w": weights, "b": bias, "us": unit, "ws": scale}
    constants |= {"nz": zero, "wz": np.zeros(scale.shape, np.int8)}
    if mask != "none":
        constants["m"] = MASKS[mask]
    masked = "" if mask == "none" else "m"
    nodes = [
        "q = QuantizeLinear(x, u, n)",
        f"y = com.microsoft.QAttention<num_heads={HEADS}>(q, w, b, us, ws, {masked}, nz, wz)",
    ]
    made, dy = model(nodes, {"x": ["N", 4, 6]}, ["y"], constants), normal(3, 4, 8, seed=7)
    found = run(graphgbp.vjp(made), {"x": x, "y_grad": dy})
    tensor = torch.from_numpy(x).requires_grad_()
    stored = torch.fake_quantize_per_tensor_affine(tensor, float(unit[0]), int(zero[0]), 0, 255)
    together = stored @ torch.from_numpy(weights * scale) + torch.from_numpy(bias)
    y = attend(
        *(by_heads(part) for part in together.chunk(3, -1)), None if not masked else torch.from_numpy(MASKS[mask])
    )
    y.backward(torch.from_numpy(dy))
    np.testing.assert_array_equal(found["y"], run(made, {"x": x})["y"])
    np.testing.assert_allclose(found["y"], y.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(found["x_grad"], tensor.grad.numpy(), rtol=1e-4, atol=1e-5)


def test_a_table_of_few_bits_is_refused_with_what_to_do():
    table = {"t": np.zeros((4, 16), np.uint8), "i": np.array([1, 2])}
    nodes = ["y = com.microsoft.GatherBlockQuantized<bits=8, block_size=16>(t, i, s)"]
    made = model(nodes, {"s": (4, 1)}, ["y"], table, output_types={"y": 1})
    with pytest.raises(graphgbp.UnsupportedOperatorError, match="quantise without the operator Gather"):
        graphgbp.vjp(made)


REFUSED = {
    "unidirectional": ({"unidirectional": 1}, {}, "tokens that come later"),
    "a cache": ({}, {6: normal(3, 2, 2, 4), 7: normal(3, 2, 2, 4)}, "without a cache"),
    "lengths of the keys": ({}, {4: np.array([4, 3, 2], np.int32)}, "its mask 'x4' is not one number for each key"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what):
    attributes, more, reason = REFUSED[what]
    inputs = [normal(3, 4, 8, seed=index) for index in range(3)]
    inputs += [more.get(index) for index in range(3, max(more, default=2) + 1)]
    made = fused_op("MultiHeadAttention", inputs, num_heads=HEADS, **attributes)
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=rf"MultiHeadAttention \(com.microsoft 1.*{reason}"):
        graphgbp.vjp(made, inputs=["x0"])
