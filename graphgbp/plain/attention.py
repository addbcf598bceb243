"""ONNX Runtime's own attention as the products and the Softmax between them.

Past keys and values, causal masks and packed inputs are not covered: networks for images have none.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain
from graphgbp.plain import sums
from graphgbp.plain.sums import Quantised

_NO_CACHE = "export the model without a cache of keys and values"
_ROTATED = "it rotates queries and keys by their positions (do_rotary); save it without that fusion"


@plain("Attention", domain=MICROSOFT)
def attention(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    weights: gs.Tensor,
    bias: gs.Tensor | None = None,
    mask: gs.Tensor | None = None,
    past: gs.Tensor | None = None,
    scores: gs.Tensor | None = None,
    *others: gs.Tensor | None,
) -> gs.Tensor:
    """Self-attention of x weights + bias, which holds queries, keys and values side by side"""
    _refuse_cached(past, *others)
    if node.attrs.get("do_rotary"):
        raise NotPlainError(_ROTATED)
    return _of_itself(g, node, g.matmul(x, weights), weights, bias, mask, scores)


@plain("QAttention", domain=MICROSOFT, surrogate=True)
def quantised_attention(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    weights: gs.Tensor,
    bias: gs.Tensor,
    x_scale: gs.Tensor,
    weight_scale: gs.Tensor,
    mask: gs.Tensor | None = None,
    x_zero_point: gs.Tensor | None = None,
    weight_zero_point: gs.Tensor | None = None,
    past: gs.Tensor | None = None,
) -> gs.Tensor:
    """Attention, of quantised x and weights"""
    _refuse_cached(past)
    if node.attrs.get("do_rotary"):
        raise NotPlainError(_ROTATED)
    a, b = Quantised(x, x_scale, x_zero_point), Quantised(weights, weight_scale, weight_zero_point)
    return _of_itself(g, node, sums.matmul(g, a, b), weights, bias, mask)


def _of_itself(
    g: Emitter,
    node: gs.Node,
    together: gs.Tensor,
    weights: gs.Tensor,
    bias: gs.Tensor | None,
    mask: gs.Tensor | None,
    scores: gs.Tensor | None = None,
) -> gs.Tensor:
    sizes = node.attrs.get("qkv_hidden_sizes") or _thirds(weights)
    together = together if bias is None else g.add(together, bias)
    q, k, v = g.ops("Split", together, g.ints(sizes), outputs=3, axis=-1)
    return _attend(g, node, q, k, v, mask, scores)[0]


def _thirds(weights: gs.Tensor) -> list[int]:
    size = weights.shape[-1] if weights.shape else None
    if not isinstance(size, int):
        raise NotPlainError("the size of its queries, keys and values is not known before running")
    return [size // 3] * 3


@plain("MultiHeadAttention", domain=MICROSOFT)
def multi_head_attention(
    g: Emitter,
    node: gs.Node,
    q: gs.Tensor,
    k: gs.Tensor | None = None,
    v: gs.Tensor | None = None,
    bias: gs.Tensor | None = None,
    mask: gs.Tensor | None = None,
    scores: gs.Tensor | None = None,
    *others: gs.Tensor | None,
) -> Sequence[gs.Tensor]:
    """Attention of queries, keys and values, `bias` added to the three; gives out keys and values by heads as well"""
    _refuse_cached(*others)
    if k is None or v is None or any(x.shape is None or len(x.shape) > 4 for x in (q, k, v)):
        raise NotPlainError("its queries, keys and values are packed into one tensor; save it without packing them")
    if bias is not None:
        q, k, v = _biased(g, (q, k, v), bias)
    return _attend(g, node, q, k, v, mask, scores)


def _biased(g: Emitter, inputs: Sequence[gs.Tensor], bias: gs.Tensor) -> list[gs.Tensor]:
    sizes = [x.shape[-1] for x in inputs]
    if not all(isinstance(size, int) for size in sizes):
        raise NotPlainError("it adds a bias, and the size of its queries, keys and values is not known before running")
    ends = list(accumulate(sizes))
    return [g.add(x, g.slice(bias, [end - size], [end], [0])) for x, size, end in zip(inputs, sizes, ends, strict=True)]


def _refuse_cached(*past: gs.Tensor | None) -> None:
    if any(x is not None for x in past):
        raise NotPlainError(f"it reads past keys and values or the lengths of a cache; {_NO_CACHE}")


def _attend(
    g: Emitter,
    node: gs.Node,
    q: gs.Tensor,
    k: gs.Tensor,
    v: gs.Tensor,
    mask: gs.Tensor | None,
    scores: gs.Tensor | None,
) -> list[gs.Tensor]:
    """softmax(scale q k^T + mask + scores) v by heads, then the keys and the values"""
    if node.attrs.get("unidirectional"):
        raise NotPlainError("it masks the tokens that come later (unidirectional), as networks for text do")
    heads = node.attrs["num_heads"]
    queries, keys, values = (_by_heads(g, x, heads) for x in (q, k, v))
    size = queries.shape[-1]
    scale = node.attrs.get("scale") or (1 / math.sqrt(size) if isinstance(size, int) else None)
    if scale is None:
        raise NotPlainError("the size of its heads is not known before running, and no scale is given")
    logits = g.scale(g.matmul(queries, g.transpose(keys, [0, 1, 3, 2])), scale)
    if mask is not None:
        logits = g.add(logits, _penalty(g, node, mask, logits))
    if scores is not None:
        logits = g.add(logits, scores)
    y = g.matmul(g.op("Softmax", logits, axis=-1), values)
    return [g.reshape(g.transpose(y, [0, 2, 1, 3]), [0, 0, _product(heads, y.shape[-1])]), keys, values]


def _product(heads: int, size: int | str) -> int:
    return heads * size if isinstance(size, int) else -1


def _by_heads(g: Emitter, x: gs.Tensor, heads: int) -> gs.Tensor:
    """[N, S, heads d] -> [N, heads, S, d]; four axes are so already."""
    if x.shape is None:
        raise NotPlainError(f"the rank of '{x.name}' cannot be inferred")
    if len(x.shape) == 4:
        return x
    size = x.shape[-1]
    return g.transpose(g.reshape(x, [0, 0, heads, size // heads if isinstance(size, int) else -1]), [0, 2, 1, 3])


def _penalty(g: Emitter, node: gs.Node, mask: gs.Tensor, logits: gs.Tensor) -> gs.Tensor:
    """What is added where a mask [N, T] or [N, S, T] is 0."""
    if mask.shape is None or len(mask.shape) not in (2, 3):
        raise NotPlainError(
            f"its mask '{mask.name}' is not one number for each key (or query and key) of each image; save it without "
            "the fusion of attention"
        )
    kept = g.greater(g.cast(mask, np.int32), g.constant(np.int32(0)))
    penalty = g.where(kept, g.like(logits, 0), g.like(logits, node.attrs.get("mask_filter_value", -10000.0)))
    return g.unsqueeze(penalty, [1, 2] if len(mask.shape) == 2 else [1])
