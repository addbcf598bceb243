"""Fused and quantised nodes, seen as the plain nodes they stand for, so that rules and policies meet only those.

A *form* is one function: `(g, node, inputs...) -> outputs`. It emits standard nodes that compute what the node
computes; the last of them make the node's own outputs. What the file does not hold of them is computed again where a
gradient reads it. Half-precision inputs come to a form as float32: a fused kernel keeps its inner values there too.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import since_version

MICROSOFT = "com.microsoft"
REFUSED = "Refused"
"""The words of a form that only says why there is none."""

HALVES = ("float16", "bfloat16")

Form: TypeAlias = Callable[..., gs.Tensor | Sequence[gs.Tensor | None] | None]


class NotPlainError(Exception):
    """A form does not cover this node; the text says why and what to do."""


@dataclass(frozen=True)
class Entry:
    """A form; `keeps` says that the node stays and makes the outputs that the form does not, `surrogate` that what it
    stands for holds a quantiser, through which the gradient goes straight.
    """

    form: Form
    keeps: bool = False
    surrogate: bool = False


_TABLE: dict[tuple[str, str, int], Entry] = {}


def plain(
    op: str, versions: Iterable[int] = (1,), *, domain: str = "", keeps: bool = False, surrogate: bool = False
) -> Callable[[Form], Form]:
    """Register a form for the listed since_versions of an operator; the form itself is returned unchanged.

    A form returns its one output or a sequence of the first outputs (None for one that it does not make), and None
    alone where the node is plain already.
    """

    def register(form: Form) -> Form:
        for version in versions:
            if (domain, op, version) in _TABLE:
                raise ValueError(f"{domain or 'ai.onnx'} {op}-{version} is registered twice")
            _TABLE[domain, op, version] = Entry(form, keeps, surrogate)
        return form

    return register


def lookup(node: gs.Node, opsets: Mapping[str, int]) -> Entry | None:
    """The form of a node; ONNX Runtime's own operators have version 1 and no schema in ONNX."""
    domain = "" if node.domain in (None, "ai.onnx") else node.domain
    return _TABLE.get((domain, node.op, since_version(node, opsets) or 1))


def table() -> dict[tuple[str, str, int], Entry]:
    """A copy of the whole table."""
    return dict(_TABLE)


def attributes(node: gs.Node, *names: str) -> dict[str, Any]:
    """Those of the named attributes that a node has, to hand on."""
    return {name: node.attrs[name] for name in names if node.attrs.get(name) is not None}


def expand(g: Emitter, node: gs.Node, entry: Entry) -> list[gs.Node] | None:
    """The nodes that a node stands for, making its outputs; None where it is plain already.

    Raises NotPlainError where the form does not cover the node.
    """
    untyped = [x.name for x in node.inputs if not x.is_empty() and x.dtype is None]
    if untyped:
        raise NotPlainError(f"the type of its input '{untyped[0]}' cannot be inferred")
    start = len(g.nodes)
    try:
        made = entry.form(g, node, *(None if x.is_empty() else _in_float32(g, x) for x in node.inputs))
    except NotPlainError:
        g.discard(start)
        raise
    if made is None:
        g.discard(start)
        return None
    made = [made] if isinstance(made, gs.Tensor) else made
    results = {index: y for index, y in enumerate(made) if y is not None and index < len(node.outputs)}
    if not entry.keeps:
        _refuse_others(g, node, results, start)
    for index, result in results.items():
        if node.outputs[index].name:
            _make(g, node, index, result, start)
            if entry.keeps:  # where it runs again, ONNX wants all its outputs
                node.outputs[index] = gs.Variable(f"{result.name}/kept")
    if entry.keeps:
        return [node, *g.nodes[start:]]
    node.inputs.clear()
    node.outputs.clear()
    return g.nodes[start:]


def _in_float32(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    return g.cast(x, np.float32) if is_half(x) else x


def is_half(x: gs.Tensor) -> bool:
    """Whether a tensor is stored as float16 or bfloat16."""
    return x.dtype is not None and not isinstance(x.dtype, int) and np.dtype(x.dtype).name in HALVES


def _refuse_others(g: Emitter, node: gs.Node, made: Collection[int], start: int) -> None:
    """Raise for an output that the form does not make and somebody reads."""
    for index, y in enumerate(node.outputs):
        if index not in made and y.name and (y.outputs or any(y is output for output in g.graph.outputs)):
            g.discard(start)
            raise NotPlainError(f"its output {index} ('{y.name}') is read, and no gradient passes it")


def _make(g: Emitter, node: gs.Node, index: int, result: gs.Tensor, start: int) -> None:
    """Let a result be the node's output, in the type that the file has."""
    output = node.outputs[index]
    half = next((x.dtype for x in node.inputs if is_half(x)), None)
    if half is not None and result.dtype == np.float32:
        result = g.cast(result, half)
    made = {id(y) for new in g.nodes[start:] for y in new.outputs}
    if id(result) not in made or any(result is other for other in node.outputs):
        result = g.op("Identity", result)
    node.outputs[index] = gs.Variable.empty()
    g.substitute(result, output)
