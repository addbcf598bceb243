"""The operator table: which operators have a derivative rule, a zero derivative, or none that was reviewed.

Keyed by (domain, operator, since_version). A node finds its entry through the model's opset and ONNX's own
schemas, so a newer version of an operator is unknown until somebody has read it: it fails closed.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import onnx
import onnx_graphsurgeon as gs


@dataclass(frozen=True)
class Repeated:
    """A cotangent that is the same along axes: it has size 1 there, and is repeated where that must be."""

    tensor: gs.Tensor


Arrived: TypeAlias = gs.Tensor | Repeated
Cotangent: TypeAlias = Arrived | Callable[[], Arrived] | None
VJP: TypeAlias = Callable[..., Iterable[Cotangent]]
Refusal: TypeAlias = Callable[[gs.Node], str | None]
Key: TypeAlias = tuple[str, str, int]


@dataclass(frozen=True)
class Rule:
    """How cotangents pass an operator.

    vjp(g, node, dy...) gives one cotangent for each input in `wrt`, or a function that makes it when wanted; None where
    nothing passes to that input by this node.
    One dy comes for each of the first `outputs` outputs (None: for every output).
    `wrt` holds input positions; None means every input (variadic operators).
    `to` holds the tensors that the cotangents are for, where these are not those inputs: the output of an earlier node
    may stand for several of them, and hands on to them in its turn.
    `broadcast` says the inputs broadcast against each other: the engine sums the cotangents back.
    `refuse(node)` names what about this node is not covered, if anything.
    `surrogate` says that the gradient stands in for a derivative that is zero (straight-through).
    """

    vjp: VJP
    wrt: tuple[int, ...] | None = (0,)
    outputs: int | None = 1
    broadcast: bool = False
    refuse: Refusal | None = None
    surrogate: bool = False
    to: tuple[gs.Tensor, ...] | None = None

    def receivers(self, node: gs.Node) -> list[gs.Tensor | None]:
        """The tensors that the cotangents are for, in order; None for an optional input that is left out."""
        if self.to is not None:
            return list(self.to)
        positions = range(len(node.inputs)) if self.wrt is None else self.wrt
        return [node.inputs[index] if index < len(node.inputs) else None for index in positions]


class Nondifferentiable:
    """The derivative is zero almost everywhere, or the output is no real number."""


@dataclass(frozen=True)
class Unsupported:
    """No rule can be written; `reason(node)` says why and what to do."""

    reason: Callable[[gs.Node], str]


NONDIFFERENTIABLE = Nondifferentiable()
Entry: TypeAlias = Rule | Nondifferentiable | Unsupported
_TABLE: dict[Key, Entry] = {}


def vjp(
    op: str,
    versions: Iterable[int],
    *,
    wrt: Iterable[int] | None = (0,),
    outputs: int | None = 1,
    broadcast: bool = False,
    refuse: Refusal | None = None,
    surrogate: bool = False,
    domain: str = "",
) -> Callable[[VJP], VJP]:
    """Register a rule for the listed since_versions of an operator; the rule itself is returned unchanged."""

    def register(function: VJP) -> VJP:
        positions = None if wrt is None else tuple(wrt)
        rule = Rule(function, positions, outputs, broadcast, refuse, surrogate)
        for version in versions:
            _add((domain, op, version), rule)
        return function

    return register


def nondifferentiable(op: str, versions: Iterable[int], domain: str = "") -> None:
    """Declare that no cotangent passes the listed since_versions of an operator."""
    for version in versions:
        _add((domain, op, version), NONDIFFERENTIABLE)


def unsupported(op: str, versions: Iterable[int], reason: Callable[[gs.Node], str], domain: str = "") -> None:
    """Say why the listed since_versions of an operator cannot have a rule; without this it is said that none exists."""
    for version in versions:
        _add((domain, op, version), Unsupported(reason))


def _add(key: Key, entry: Entry) -> None:
    if key in _TABLE:
        raise ValueError(f"{key[0] or 'ai.onnx'} {key[1]}-{key[2]} is registered twice")
    _TABLE[key] = entry


def since_version(node: gs.Node, opsets: Mapping[str, int]) -> int | None:
    """The version of the node's operator that the model's opsets mean; None where ONNX defines no such operator."""
    domain = node.domain or ""
    return _since_version(node.op, opsets.get(domain, 0), domain)


@cache
def _since_version(op: str, opset: int, domain: str) -> int | None:
    try:
        return onnx.defs.get_schema(op, opset, domain).since_version
    except onnx.defs.SchemaError:
        return None


def lookup(node: gs.Node, opsets: Mapping[str, int]) -> Entry | None:
    version = since_version(node, opsets)
    return None if version is None else _TABLE.get((node.domain or "", node.op, version))


def table() -> dict[Key, Entry]:
    """A copy of the whole table."""
    return dict(_TABLE)
