"""What is known before running of a vector of sizes: entry by entry, an int, a symbol, or None.

Exporters compute the sizes that a Reshape or an Expand is to make; with an open batch ONNX's inference gives up on the
whole vector where one entry is open, or passes through float arithmetic.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.shapes import Dim, Shape

Entry = int | str | None
_SAME = {"Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"}
_LONGEST = 16


def made_sizes(node: gs.Node, shape: Shape) -> Shape:
    """The shape of a Reshape's or an Expand's output, with the open sizes that the vector tells filled in."""
    told = entries(node.inputs[1]) if node.op in ("Reshape", "Expand") else None
    x = node.inputs[0].shape
    if told is None or x is None or len(told) != len(shape):
        return shape
    found = _reshaped(node, told, x) if node.op == "Reshape" else _expanded(told, x)
    return tuple(size if isinstance(size, int) or new is None else new for size, new in zip(shape, found, strict=True))


def _reshaped(node: gs.Node, told: Sequence[Entry], x: Shape) -> list[Dim | None]:
    copies = not node.attrs.get("allowzero")
    sizes: list[Entry] = [x[i] if entry == 0 and copies and i < len(x) else entry for i, entry in enumerate(told)]
    if sizes.count(-1) != 1:
        return [None if size == -1 else size for size in sizes]
    rest = [size for size in sizes if size != -1]
    return [_quotient(x, rest) if size == -1 else size for size in sizes]


def _quotient(sizes: Shape, others: Sequence[Entry]) -> Dim | None:
    """The one size that is left of a product where the others divide it."""
    if None in others:
        return None
    symbols = [Counter(size for size in part if isinstance(size, str)) for part in (sizes, others)]
    known, taken = (math.prod(size for size in part if isinstance(size, int)) for part in (sizes, others))
    left = list((symbols[0] - symbols[1]).elements())
    if symbols[1] - symbols[0] or not taken or known % taken:
        return None
    return known // taken if not left else left[0] if len(left) == 1 and known == taken else None


def _expanded(told: Sequence[Entry], x: Shape) -> list[Dim | None]:
    padded = (*([1] * (len(told) - len(x))), *x)[-len(told) :]
    return [size if entry == 1 else entry if size == 1 else None for entry, size in zip(told, padded, strict=True)]


def entries(tensor: gs.Tensor) -> list[Entry] | None:
    """The entries of an integer scalar or vector, None where not even their number is known."""
    if isinstance(tensor, gs.Constant):
        values = np.asarray(tensor.values)
        integers = values.ndim < 2 and values.size <= _LONGEST and values.dtype.kind in "iu"
        return [int(value) for value in values.reshape(-1)] if integers else None
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or node.op not in _READ or node.domain not in (None, "", "ai.onnx"):
        return None
    return _READ[node.op](node)


def _shape(node: gs.Node) -> list[Entry] | None:
    sizes = node.inputs[0].shape
    return None if sizes is None else list(sizes)[node.attrs.get("start", 0) : node.attrs.get("end")]


def _same(node: gs.Node) -> list[Entry] | None:
    return entries(node.inputs[0])


def _concat(node: gs.Node) -> list[Entry] | None:
    parts = [entries(x) for x in node.inputs]
    return None if any(part is None for part in parts) else [entry for part in parts for entry in part or ()]


def _gather(node: gs.Node) -> list[Entry] | None:
    source, indices = entries(node.inputs[0]), entries(node.inputs[1])
    if (
        source is None
        or indices is None
        or not all(isinstance(i, int) and -len(source) <= i < len(source) for i in indices)
    ):
        return None
    return [source[int(index or 0)] for index in indices]


def _slice(node: gs.Node) -> list[Entry] | None:
    source, bounds = entries(node.inputs[0]), [entries(x) for x in node.inputs[1:]]
    known = [bound[0] for bound in bounds if bound is not None and len(bound) == 1 and isinstance(bound[0], int)]
    if source is None or len(known) < len(bounds):
        return None
    return source[known[0] : known[1] : known[3] if len(known) > 3 else 1]


def _equal(node: gs.Node) -> list[Entry] | None:
    """1 where entries are equal, 0 where they differ: no size is negative."""

    def same(a: Entry, b: Entry) -> Entry:
        if isinstance(a, int) and isinstance(b, int):
            return int(a == b)
        negative = any(isinstance(value, int) and value < 0 for value in (a, b))
        return 0 if negative and any(isinstance(value, str) for value in (a, b)) else None

    return _each(node, same)


def _where(node: gs.Node) -> list[Entry] | None:
    return _each(node, lambda condition, a, b: None if condition is None else a if condition else b)


def _each(node: gs.Node, combine: Callable[..., Entry]) -> list[Entry] | None:
    operands = [entries(x) for x in node.inputs]
    if any(operand is None for operand in operands):
        return None
    count = max(len(operand or ()) for operand in operands)
    spread = [(operand or []) * (count if len(operand or ()) == 1 else 1) for operand in operands]
    return [combine(*values) for values in zip(*spread, strict=True)]


_READ: dict[str, Callable[[gs.Node], list[Entry] | None]] = {
    "Shape": _shape,
    "Concat": _concat,
    "Gather": _gather,
    "Slice": _slice,
    "Equal": _equal,
    "Where": _where,
    **dict.fromkeys(_SAME, _same),
}
