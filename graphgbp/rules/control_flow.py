"""Nodes that choose or repeat while the network runs. An If whose condition is known is seen through and never met."""

import onnx_graphsurgeon as gs

from graphgbp.registry import unsupported

_VERSIONS = (16, 19, 21, 23, 24, 25)


def _chosen_at_run_time(node: gs.Node) -> str:
    condition = node.inputs[0]
    if isinstance(condition, gs.Constant):
        why = f"its condition '{condition.name}' is an input with a default, which a caller can replace"
    else:
        why = f"its condition '{condition.name}' is known only at run time"
    return f"{why}; make it a constant, or export the branch that is taken"


def _repeated(node: gs.Node) -> str:
    return "how often its body runs is known only at run time; export the network with the loop unrolled"


unsupported("If", _VERSIONS, _chosen_at_run_time)
unsupported("Loop", _VERSIONS, _repeated)
unsupported("Scan", _VERSIONS, _repeated)
