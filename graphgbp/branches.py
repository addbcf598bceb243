"""An If whose condition is known is seen through: its taken branch stands in the reading view in its place.

The main graph cannot read tensors inside a branch, so what a gradient needs of them is computed again.
"""

import onnx
import onnx_graphsurgeon as gs

from graphgbp.contract import SCOPE
from graphgbp.model_file import tensor_names
from graphgbp.nodes import label


def fixed_names(model: onnx.ModelProto) -> set[str]:
    """The tensors whose value no caller can replace: an initializer that is an input as well can be."""
    return tensor_names(model) - {value.name for value in model.graph.input}


def taken_branch(node: gs.Node, fixed: set[str]) -> gs.Graph | None:
    """The branch of an If whose condition is known."""
    if node.op != "If" or node.domain not in (None, "", "ai.onnx") or not isinstance(node.inputs[0], gs.Constant):
        return None
    if node.inputs[0].name not in fixed and not node.inputs[0].name.startswith(SCOPE):
        return None
    return node.attrs["then_branch" if node.inputs[0].values.reshape(()) else "else_branch"]


def inline(node: gs.Node, branch: gs.Graph, outer: set[str]) -> list[gs.Node]:
    """A branch's nodes under names of their own, and an Identity to each output of the If."""
    scope = f"{SCOPE}/recomputed/{label(node)}"
    tensors = [tensor for child in branch.nodes for tensor in [*child.inputs, *child.outputs]]
    for tensor in {id(tensor): tensor for tensor in [*tensors, *branch.outputs]}.values():
        if tensor.name and tensor.name not in outer:
            tensor.name = f"{scope}/{tensor.name}"
    for child in branch.nodes:
        child.name = f"{scope}/{child.name or child.op}"
    results = list(node.outputs)
    node.outputs.clear()
    identities = [
        gs.Node("Identity", f"{scope}/{index}", inputs=[made], outputs=[result])
        for index, (made, result) in enumerate(zip(branch.outputs, results, strict=True))
    ]
    return [*branch.nodes, *identities]
