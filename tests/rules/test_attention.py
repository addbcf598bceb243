"""Attention against torch's own, or against its definition where torch has no such option."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, run, run_by_reference, single_op


def inputs(heads=2, key_heads=2, queries=3, keys=5, size=4, value_size=6):
    shapes = [(2, heads, queries, size), (2, key_heads, keys, size), (2, key_heads, keys, value_size)]
    return [normal(*shape, seed=index) for index, shape in enumerate(shapes)]


def by_definition(q, k, v, mask=None, *, scale=None, cap=0.0, allowed=None):
    """With keys and values repeated, and rows of zeros where nothing is seen."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    z = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    z = cap * torch.tanh(z / cap) if cap else z
    if mask is not None and mask.dtype == torch.bool:
        allowed = mask
    elif mask is not None:
        z = z + mask
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    seen = z.detach().amax(-1, keepdim=True) > -torch.inf
    return torch.softmax(z.masked_fill(~seen, 0), -1) * seen @ v


@pytest.mark.parametrize("dynamic", [False, {index: [0, 2] for index in range(3)}])
@pytest.mark.parametrize("opset", [23, 24, 26])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("causal", [0, 1])
def test_as_torch(heads, key_heads, causal, opset, dynamic):
    for wrt in [(0, 1, 2), (0,), (2,)]:
        check_rule(
            "Attention",
            inputs(heads, key_heads),
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=bool(causal), enable_gqa=True),
            wrt=wrt,
            opset=opset,
            dynamic={index: axes for index, axes in dict(dynamic or {}).items() if index in wrt},
            is_causal=causal,
        )


def test_sizes_unknown_before_running():
    options = {"wrt": (0, 1, 2), "opset": 23, "dynamic": {index: [0, 2, 3] for index in range(3)}}
    check_rule("Attention", inputs(), lambda q, k, v: by_definition(q, k, v, scale=0.3), scale=0.3, **options)


@pytest.mark.parametrize("dynamic", [False, {0: [0, 1], 1: [0, 1], 2: [0, 1]}])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 2)])
def test_three_axes(heads, key_heads, dynamic):
    def reference(*tensors):
        q, k, v = (
            x.unflatten(2, (count, -1)).transpose(1, 2)
            for x, count in zip(tensors, (heads, key_heads, key_heads), strict=True)
        )
        return by_definition(q, k, v).transpose(1, 2).flatten(2)

    flat = [np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(2, x.shape[2], -1) for x in inputs(heads, key_heads)]
    attributes = {"q_num_heads": heads, "kv_num_heads": key_heads}
    check_rule("Attention", flat, reference, wrt=(0, 1, 2), opset=24, dynamic=dynamic, **attributes)


@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (4, 3, 5), (2, 1, 3, 5), (1, 4, 3, 5), (2, 4, 1, 5)])
@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize("opset", [23, 24, 26])
def test_masks(opset, cap, shape):
    """A float mask is added after the cap, and has a gradient too. One for all queries only ONNX's evaluator takes."""
    mask = normal(*shape, seed=3)
    for dynamic in (False, {3: range(len(shape))}):
        evaluate = run_by_reference if shape[-2] == 1 else run
        options = {"opset": opset, "dynamic": dynamic, "softcap": cap, "evaluate": evaluate}
        reference = lambda *tensors: by_definition(*tensors, cap=cap)  # noqa: E731
        check_rule("Attention", [*inputs(4, 2), mask], reference, wrt=(0, 1, 2, 3), **options)
        check_rule("Attention", [*inputs(4, 2), mask > 0], reference, wrt=(0, 1, 2), constants=[], **options)


@pytest.mark.parametrize("causal", [0, 1])
def test_rows_without_a_key(causal):
    boolean = normal(3, 5, seed=3) > 0
    boolean[1] = False
    allowed = torch.from_numpy(np.tril(boolean) if causal else boolean)
    for mask in (boolean, np.where(boolean, 0, -np.inf).astype(np.float32)):
        check_rule(
            "Attention",
            [*inputs(), mask],
            lambda q, k, v, mask: by_definition(q, k, v, allowed=allowed),
            wrt=(0, 1, 2),
            opset=24,
            is_causal=causal,
        )


@pytest.mark.parametrize(("left", "right", "causal"), [(1, 1, 0), (0, -1, 0), (-1, 2, 0), (2, 1, 1), (1, -1, 1)])
def test_windows(left, right, causal):
    """Of opset 25; by ONNX's evaluator, as ONNX Runtime does not have them yet."""
    distance = torch.arange(5)[None] - torch.arange(3)[:, None]
    allowed = torch.ones(3, 5, dtype=torch.bool)
    allowed &= (distance >= -left) | (left < 0)
    allowed &= (distance <= right) | (right < 0)
    allowed &= (distance <= 0) | (not causal)
    check_rule(
        "Attention",
        inputs(),
        lambda q, k, v: by_definition(q, k, v, allowed=allowed),
        wrt=(0, 1, 2),
        opset=25,
        evaluate=run_by_reference,
        left_window_size=left,
        right_window_size=right,
        is_causal=causal,
    )


@pytest.mark.parametrize("precision", [None, 1])
def test_half_precision(precision):
    tensors = [x.astype(np.float16) for x in [*inputs(4, 2), normal(3, 5, seed=3)]]
    attributes = {} if precision is None else {"softmax_precision": precision}
    check_rule("Attention", tensors, by_definition, wrt=(0, 1, 2, 3), opset=23, tolerance=5e-3, **attributes)


@pytest.mark.parametrize(
    ("extra", "attributes", "reason"),
    [
        ([None, normal(2, 2, 1, 4), normal(2, 2, 1, 6)], {}, "past keys"),
        ([normal(3, 4)], {}, "does not cover every key"),
    ],
)
def test_refused(extra, attributes, reason):
    outputs = 3 if len(extra) == 3 else 1
    model = single_op("Attention", [*inputs(), *extra], opset=24, outputs=outputs, **attributes)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        graphgbp.vjp(model, inputs=["x0"], outputs=["y0"])


def test_unknown_heads_are_refused():
    for axes, reason in [([1], "how many heads"), ([3], "size of its heads")]:
        model = single_op("Attention", inputs(), opset=23, dynamic={0: axes})
        with pytest.raises(UnsupportedOperatorError, match=reason):
            graphgbp.vjp(model, inputs=["x0"])


# -- positions -------------------------------------------------------------------------------------------------------


def rotated(x, cosine, sine, interleaved):
    """Pairs (a, b) -> (a cos - b sin, a sin + b cos) in the first entries of [N, H, S, d]."""
    pairs = 2 * cosine.shape[-1]
    turned, rest = x[..., :pairs], x[..., pairs:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    cosine, sine = cosine[:, None], sine[:, None]
    parts = a * cosine - b * sine, a * sine + b * cosine
    return torch.cat([torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1), rest], -1)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("partial", [0, 4])
def test_rotary_embedding(interleaved, partial):
    angles = normal(7, (partial or 6) // 2, seed=1)
    positions = np.asarray([[0, 3, 6, 2], [1, 1, 5, 4]], np.int64)
    attributes = {"interleaved": interleaved, "rotary_embedding_dim": partial, "num_heads": 3}
    for flat, by_position, dynamic in itertools.product([False, True], [False, True], [False, {0: [0, 1]}]):
        caches = [f(angles if by_position else angles[positions]) for f in (np.cos, np.sin)]

        def reference(x, cosine, sine, positions=None, flat=flat):
            if positions is not None:
                cosine, sine = cosine[positions], sine[positions]
            if not flat:
                return rotated(x, cosine, sine, interleaved)
            return rotated(x.unflatten(2, (3, 6)).transpose(1, 2), cosine, sine, interleaved).transpose(1, 2).flatten(2)

        values = [normal(2, 4, 18) if flat else normal(2, 3, 4, 6), *caches, *([positions] if by_position else [])]
        check_rule("RotaryEmbedding", values, reference, opset=23, dynamic=dynamic, **attributes)
