"""Reasons why a rule does not cover a node, shared by several families; each is a `refuse` of the registry."""

import onnx_graphsurgeon as gs

from graphgbp.registry import Refusal


def unknown_rank(*positions: int) -> Refusal:
    """Refuse a node where an input at one of the positions has no known rank."""

    def refuse(node: gs.Node) -> str | None:
        unknown = [x for x in (node.inputs[index] for index in positions) if x.shape is None]
        return f"the rank of its input '{unknown[0].name}' cannot be inferred" if unknown else None

    return refuse
