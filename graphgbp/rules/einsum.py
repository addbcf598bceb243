"""Einsum: sums of products of elements that share labels."""

import string
from collections.abc import Sequence
from functools import partial

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp
from graphgbp.shapes import Dim

_ELLIPSIS = "..."


def _refuse(node: gs.Node) -> str | None:
    unknown = [x for x in node.inputs if x.shape is None]
    if unknown:
        return f"the rank of its input '{unknown[0].name}' cannot be inferred"
    terms, _ = _labels(node)
    diagonal = next((term for term in terms if len(set(term)) < len(term)), None)
    if diagonal:
        return f"it takes the diagonal of an operand ('{diagonal}'); write that apart from the Einsum"
    repeated = any(1 in sizes and len(sizes) > 1 for sizes in _sizes(node, terms).values())
    return "it repeats an operand of size 1 along a label; expand that before the Einsum" if repeated else None


@vjp("Einsum", versions=(12,), wrt=None, broadcast=True, refuse=_refuse)
def einsum(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """dy times the other operands, summed over the labels that an operand lacks, repeated along those it alone has"""
    return [partial(_to_operand, g, node, dy, index) for index in range(len(node.inputs))]


def _to_operand(g: Emitter, node: gs.Node, dy: gs.Tensor, index: int) -> gs.Tensor:
    terms, result = _labels(node)
    x, term = node.inputs[index], terms[index]
    others = [(node.inputs[other], terms[other]) for other in range(len(terms)) if other != index]
    shared = set(result).union(*(labels for _, labels in others))
    product = _product(g, dy, result, others, "".join(label for label in term if label in shared))
    product = g.unsqueeze(product, [axis for axis, label in enumerate(term) if label not in shared])
    if any(len(sizes) > 1 for label, sizes in _sizes(node, terms).items() if label in term):
        expanded = g.op("Expand", product, g.sizes(x))
        expanded.shape = None  # an operand may repeat along an open size: the engine finds out at run time
        return expanded
    return g.with_shape(product, x) if shared.issuperset(term) else g.expand_like(product, x)


def _product(g: Emitter, dy: gs.Tensor, result: str, others: Sequence[tuple[gs.Tensor, str]], kept: str) -> gs.Tensor:
    """dy times the others, summed over what is not kept; a dy without labels is a mere factor."""
    factors = [(dy, result), *others] if result or not others else [*others]
    product = factors[0][0]
    if len(factors) > 1 or factors[0][1] != kept:
        equation = ",".join(labels for _, labels in factors) + "->" + kept
        product = g.op("Einsum", *(tensor for tensor, _ in factors), equation=equation)
    return product if len(factors) > len(others) else g.mul(dy, product)


def _sizes(node: gs.Node, terms: Sequence[str]) -> dict[str, set[Dim]]:
    """The sizes that the operands have along each label."""
    sizes: dict[str, set[Dim]] = {}
    for x, term in zip(node.inputs, terms, strict=True):
        for label, size in zip(term, x.shape, strict=True):
            sizes.setdefault(label, set()).add(size)
    return sizes


def _labels(node: gs.Node) -> tuple[list[str], str]:
    """One letter for each axis of each operand, and of the result; every ellipsis stands for the same new letters."""
    equation = node.attrs["equation"].replace(" ", "")
    left, arrow, result = equation.partition("->")
    if not arrow:
        once = sorted(label for label in set(left) - set(".,") if left.count(label) == 1)
        result = _ELLIPSIS + "".join(once)
    letters = [letter for letter in string.ascii_letters if letter not in equation]
    count = 0
    for x, term in zip(node.inputs, left.split(","), strict=True):
        if _ELLIPSIS in term:
            count = len(x.shape) - len(term) + len(_ELLIPSIS)
    hidden = "".join(letters[:count])
    return left.replace(_ELLIPSIS, hidden).split(","), result.replace(_ELLIPSIS, hidden)
