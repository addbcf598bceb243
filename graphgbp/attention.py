"""Where a network attends, and the normalizations that feed it.

A normalization is a LayerNormalization or RMSNormalization, or what stands for one in older files: the root of a mean
of squares over the channels and the elementwise operators around it. Attention is the operator of that name, or a
product of two activations, a Softmax behind it and a product behind that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.nodes import input_names

_OPERATORS = {"LayerNormalization", "RMSNormalization"}
_BESIDE_THE_ROOT = {"Add", "Cast", "Div", "Identity", "Mul", "Neg", "Reciprocal", "Sub"}
_PRODUCTS = {"MatMul", "Einsum"}
_DENSE = {*_PRODUCTS, "Gemm"}
_CONVOLUTIONS = {"Conv", "ConvTranspose"}


@dataclass(frozen=True)
class Normalization:
    """What a normalization puts out, and the names of all that it makes on the way."""

    output: gs.Tensor
    made: frozenset[str]


def normalizations(nodes: Sequence[gs.Node]) -> list[Normalization]:
    """Those among the nodes, in order."""
    found = []
    for index, node in enumerate(nodes):
        if node.op in _OPERATORS:
            found.append(Normalization(node.outputs[0], frozenset({node.outputs[0].name})))
        elif _is_root(node) and (normalization := _spelled_out(node, nodes[index + 1 :])):
            found.append(normalization)
    return found


def _is_root(node: gs.Node) -> bool:
    if node.op == "Sqrt":
        return True
    exponent = node.inputs[1] if node.op == "Pow" else None
    return isinstance(exponent, gs.Constant) and bool(np.all(exponent.values == -0.5))


def _spelled_out(root: gs.Node, behind: Sequence[gs.Node]) -> Normalization | None:
    """(x - mean) / root or x (1 / root) - mean (1 / root), then scale and shift, where root is that of a variance."""
    variance = _variance(root)
    square = variance and _maker(variance.inputs[0], "Pow", "Mul")
    if variance is None or square is None:
        return None
    centred = square.inputs[0]
    difference = _maker(centred, "Sub")
    x, *others = difference.inputs if difference else [centred]
    inside = {tensor.name for tensor in (root.inputs[0], variance.outputs[0], square.outputs[0], *others)}
    inside |= {centred.name} if difference else set()
    made = {root.outputs[0].name}
    output = None
    for node in behind:
        names = {tensor.name for tensor in node.inputs if isinstance(tensor, gs.Variable)}
        scales = node.op in ("Mul", "Div") and not names.isdisjoint(made) and names <= made | inside | {x.name}
        if scales or (node.op in _BESIDE_THE_ROOT and names and names <= made):
            made.add(node.outputs[0].name)
            output = node.outputs[0] if _sizes(node.outputs[0]) == _sizes(centred) else output
    return None if output is None else Normalization(output, frozenset(made | inside))


def _variance(root: gs.Node) -> gs.Node | None:
    """The mean of squares of which a root is taken, behind its epsilon."""
    shifted = _maker(root.inputs[0], "Add")
    made = (_maker(x, "ReduceMean") for x in (shifted.inputs if shifted else root.inputs[:1]))
    return next((node for node in made if node is not None), None)


def _maker(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs and tensor.inputs[0].op in ops else None


def _sizes(tensor: gs.Tensor) -> list[int | None] | None:
    """A tensor's sizes, the open ones alike."""
    return None if tensor.shape is None else [size if isinstance(size, int) else None for size in tensor.shape]


def attentions(nodes: Sequence[gs.Node]) -> list[gs.Node]:
    """The nodes that put attention's weights to use: products with the values, and Attention operators."""
    made = {y.name for node in nodes for y in node.outputs}
    product: set[str] = set()  # made of a product of activations, by nothing but arithmetic and movement
    weights: set[str] = set()  # made of its Softmax
    found = []
    for node in nodes:
        names, outputs = input_names(node), {y.name for y in node.outputs}
        if node.op in _PRODUCTS:
            of_activations = len(names & made) > 1
            product |= outputs if of_activations else set()
            found += [node] if of_activations and names & weights else []
        elif node.op == "Softmax":
            weights |= outputs if names & product else set()
        elif node.op == "Attention":
            found.append(node)
        elif node.op not in _CONVOLUTIONS | _OPERATORS:
            product |= outputs if names & product else set()
            weights |= outputs if names & weights else set()
    return found


def attending(nodes: Sequence[gs.Node], found: Sequence[Normalization]) -> list[Normalization]:
    """The normalizations of blocks that feed attention: on some way to it stands a dense layer and no other of them.

    Those of queries and keys, behind that layer, are left out.
    """
    made = {y.name for node in nodes for y in node.outputs}
    inside = {name for normalization in found for name in normalization.made}
    heads = {id(node) for node in attentions(nodes)}
    beside: set[str] = set()  # read by attention, by no dense layer
    feeding: set[str] = set()
    for node in reversed(nodes):
        names, outputs = input_names(node), {y.name for y in node.outputs}
        dense = node.op in _DENSE and len(names & made) < 2
        if id(node) in heads or (outputs & beside and not dense):
            beside |= names
        if (outputs & beside and dense) or (outputs & feeding and not outputs & inside):
            feeding |= names
    return [normalization for normalization in found if normalization.output.name in feeding]


def convolves_after_attention(nodes: Sequence[gs.Node]) -> bool:
    """Whether a convolution reads what attention has made: such a network ends in feature maps, not in tokens."""
    after = {y.name for node in attentions(nodes) for y in node.outputs}
    for node in nodes:
        if not after.isdisjoint(input_names(node)):
            if node.op in _CONVOLUTIONS:
                return True
            after.update(y.name for y in node.outputs)
    return False
