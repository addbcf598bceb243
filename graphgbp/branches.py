"""An If whose condition is known is seen through: its taken branch stands in the reading view in its place.

The main graph cannot read tensors inside a branch, so what a gradient needs of them is computed again. What the If
gives out it can read: a node of the branch that makes an output makes it under the name it has outside.
"""

from collections.abc import Collection

import onnx
import onnx_graphsurgeon as gs

from graphgbp.contract import RECOMPUTED, SCOPE
from graphgbp.model_file import tensor_names
from graphgbp.nodes import free_path, label


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


def inline(node: gs.Node, branch: gs.Graph, outer: Collection[str], path: str) -> list[gs.Node]:
    """A branch's nodes as the If has them: a node is named `path/node`, a tensor `graphgbp/recomputed/path/tensor`."""
    tensors = [tensor for child in branch.nodes for tensor in [*child.inputs, *child.outputs]]
    for tensor in {id(tensor): tensor for tensor in [*tensors, *branch.outputs]}.values():
        if tensor.name and tensor.name not in outer:
            tensor.name = f"{RECOMPUTED}/{path}/{tensor.name.removeprefix(f'{RECOMPUTED}/')}"
    taken: set[str] = set()
    for child in branch.nodes:
        child.name = free_path(f"{path}/{label(child).removeprefix(f'{RECOMPUTED}/{path}/')}", taken)
        taken.add(child.name)
    results = list(node.outputs)
    node.outputs.clear()
    identities = [
        gs.Node("Identity", f"{path}/output_{index}", inputs=[made], outputs=[result])
        for index, (made, result) in enumerate(zip(branch.outputs, results, strict=True))
        if not _make_directly(made, result, branch)
    ]
    return [*branch.nodes, *identities]


def _make_directly(made: gs.Tensor, result: gs.Tensor, branch: gs.Graph) -> bool:
    """Let the node that makes `made` make the If's output instead; False where that takes an Identity.

    It does for a constant, for a tensor that the branch gives out twice, and for one that a node makes beside others.
    """
    maker = made.inputs[0] if made.inputs else None
    if maker is None or sum(bool(output.name) for output in maker.outputs) != 1:
        return False
    if sum(tensor is made for tensor in branch.outputs) != 1:
        return False
    for reader in list(made.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is made:
                reader.inputs[index] = result
    maker.outputs[next(index for index, tensor in enumerate(maker.outputs) if tensor is made)] = result
    return True
