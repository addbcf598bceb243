"""Attention, and the rotary embedding of its queries and keys."""

import math

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphgbp.emit import Emitter, Size
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.refusals import unknown_rank


def _refuse(node: gs.Node) -> str | None:
    q, k, v = node.inputs[:3]
    if any(not x.is_empty() for x in node.inputs[4:]):
        return "it reads past keys and values or the lengths of a cache; export the model without a cache"
    if None in (q.shape, k.shape, v.shape):
        return unknown_rank(0, 1, 2)(node)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        return "its queries, keys and values have different types"
    if _heads(node) is None:
        return "how many heads its queries and keys have is not known before running"
    if "scale" not in node.attrs and not isinstance(_head_size(node), int):
        return "the size of its heads is not known before running, and no scale is given"
    mask = _mask(node)
    if mask is not None and not _may_cover(mask, k):
        return f"its mask '{mask.name}' does not cover every key; pad it with minus infinity"
    return None


@vjp("Attention", versions=(23, 24, 25), wrt=(0, 1, 2, 3), broadcast=True, refuse=_refuse)
def attention(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """Y = P V with P = softmax(Z) by rows, Z = cap(scale Q K^T) + mask and cap(s) = c tanh(s / c)

    dV = P^T dY;  dZ = P (dP - sum(P dP)) with dP = dY V^T, to the mask as it is;
    dS = dZ cap'(scale Q K^T);  dQ = scale dS K;  dK = scale dS^T Q. Heads that share keys and values add theirs up.
    """
    q, k, v = node.inputs[:3]
    heads, key_heads = _heads(node) or (1, 1)
    queries = _by_heads(g, q, heads)
    keys, values = (_repeated(g, _by_heads(g, x, key_heads), heads // key_heads) for x in (k, v))
    dy = _by_heads(g, dy, heads)
    scale = node.attrs.get("scale") or 1 / math.sqrt(float(_head_size(node)))
    scores = g.scale(g.matmul(queries, g.transpose(keys, [0, 1, 3, 2])), scale)
    cap = node.attrs["softcap"]
    slope = g.op("Tanh", g.scale(scores, 1 / cap)) if cap else None
    p = _probabilities(g, node, g.scale(slope, cap) if slope else scores)

    def to_logits() -> gs.Tensor:
        pull = g.mul(p, g.matmul(dy, g.transpose(values, [0, 1, 3, 2])))
        return g.sub(pull, g.mul(p, g.reduce_sum(pull, [3])))

    def to_scores() -> gs.Tensor:
        if slope is None:
            return g.scale(to_logits(), scale)
        return g.scale(g.mul(to_logits(), g.sub(g.like(slope, 1), g.mul(slope, slope))), scale)

    def back(dx: gs.Tensor, x: gs.Tensor, groups: int) -> gs.Tensor:
        return g.with_shape(_joined(g, _summed(g, dx, groups), x), x)

    return [
        lambda: back(g.matmul(to_scores(), keys), q, 1),
        lambda: back(g.matmul(g.transpose(to_scores(), [0, 1, 3, 2]), queries), k, heads // key_heads),
        lambda: back(g.matmul(g.transpose(p, [0, 1, 3, 2]), dy), v, heads // key_heads),
        to_logits,
    ]


# -- probabilities ---------------------------------------------------------------------------------------------------


def _probabilities(g: Emitter, node: gs.Node, logits: gs.Tensor) -> gs.Tensor:
    """softmax of the masked logits; 0 in a row where every key is masked, as ONNX Runtime has it

    A softmax_precision of half is met in float32, whose range a gradient keeps.
    """
    mask, in_double = _mask(node), node.attrs.get("softmax_precision") == TensorProto.DOUBLE
    bounds = _bounds(node)
    masked = logits
    if mask is not None:
        boolean = mask.dtype == np.bool_
        masked = (
            g.where(mask, logits, g.like(logits, -np.inf)) if boolean else g.add(logits, g.cast(mask, logits.dtype))
        )
    if bounds != (None, None):
        masked = _within(g, masked, *bounds)
    p = g.op("Softmax", g.cast(masked, np.float64) if in_double else masked, axis=-1)
    p = g.cast(p, logits.dtype)
    if masked is logits:
        return p
    attends = g.greater(g.reduce_max(masked, [3]), g.like(masked, np.finfo(masked.dtype).min))
    return g.where(attends, p, g.like(p, 0))


def _bounds(node: gs.Node) -> tuple[int | None, int | None]:
    """How far to the left and to the right of its own place a query sees; None without bound."""
    left, right = (node.attrs.get(f"{side}_window_size", -1) for side in ("left", "right"))
    if node.attrs["is_causal"]:
        right = 0
    return left if left >= 0 else None, right if right >= 0 else None


def _within(g: Emitter, logits: gs.Tensor, left: int | None, right: int | None) -> gs.Tensor:
    """The logits with minus infinity at every key out of a query's bounds."""
    query, key = (_range(g, g.size(logits, axis)) for axis in (2, 3))
    distance = g.sub(key, g.unsqueeze(query, [1]))
    for beyond in (
        None if right is None else g.greater(distance, g.ints([right])),
        None if left is None else g.less(distance, g.ints([-left])),
    ):
        if beyond is not None:
            logits = g.where(beyond, g.like(logits, -np.inf), logits)
    return logits


def _range(g: Emitter, size: Size) -> gs.Tensor:
    return g.op("Range", g.constant(np.int64(0)), g.squeeze(g.as_int_vector(size), [0]), g.constant(np.int64(1)))


def _mask(node: gs.Node) -> gs.Tensor | None:
    return node.inputs[3] if len(node.inputs) > 3 and not node.inputs[3].is_empty() else None


def _may_cover(mask: gs.Tensor, k: gs.Tensor) -> bool:
    """Whether a mask is as long as the keys, as far as is known before running."""
    if mask.shape is None or not mask.shape:
        return False
    sizes = mask.shape[-1], k.shape[-2]
    return not all(isinstance(size, int) for size in sizes) or sizes[0] == sizes[1]


# -- heads -----------------------------------------------------------------------------------------------------------


def _heads(node: gs.Node) -> tuple[int, int] | None:
    """How many heads the queries have, and the keys; (1, 1) where both have the same unknown number."""
    q, k = node.inputs[:2]
    counts = node.attrs.get("q_num_heads"), node.attrs.get("kv_num_heads")
    if len(q.shape) == 4:
        counts = q.shape[1], k.shape[1]
    if counts[0] == counts[1] and isinstance(counts[0], str):
        return 1, 1
    return counts if all(isinstance(count, int) and count for count in counts) else None


def _head_size(node: gs.Node) -> int | str:
    size, heads = node.inputs[0].shape[-1], _heads(node)
    if len(node.inputs[0].shape) == 4 or not isinstance(size, int) or heads is None:
        return size
    return size // heads[0]


def _by_heads(g: Emitter, x: gs.Tensor, heads: int) -> gs.Tensor:
    """[N, S, heads d] -> [N, heads, S, d]; four axes are so already."""
    return x if len(x.shape) == 4 else g.transpose(g.reshape(x, [0, 0, heads, -1]), [0, 2, 1, 3])


def _joined(g: Emitter, dx: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """The other way."""
    return dx if len(x.shape) == 4 else g.reshape(g.transpose(dx, [0, 2, 1, 3]), [0, 0, -1])


def _repeated(g: Emitter, x: gs.Tensor, times: int) -> gs.Tensor:
    """[N, H, T, d] -> [N, H times, T, d], each head several times in a row."""
    if times == 1:
        return x
    sizes = [g.size(x, axis) for axis in range(4)]
    copies = g.op("Expand", g.unsqueeze(x, [2]), g.ints([1, 1, times, 1, 1]))
    return g.reshape(copies, [sizes[0], x.shape[1] * times, *sizes[2:]])


def _summed(g: Emitter, dx: gs.Tensor, times: int) -> gs.Tensor:
    """The transpose of that."""
    if times == 1:
        return dx
    sizes = [g.size(dx, axis) for axis in range(4)]
    apart = g.reshape(dx, [sizes[0], dx.shape[1] // times, times, *sizes[2:]])
    return g.reduce_sum(apart, [2], keepdims=False)


# -- positions -------------------------------------------------------------------------------------------------------


@vjp("RotaryEmbedding", versions=(23,))
def rotary_embedding(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = x rotated by angles of given cosine and sine; dx = dy rotated back"""
    _, cosine, sine, *position = node.inputs
    return [g.op("RotaryEmbedding", dy, cosine, g.neg(sine), *position, **node.attrs)]
