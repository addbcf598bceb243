"""The order of the nodes in the file, from which ONNX Runtime makes their order in time.

It walks from the outputs towards the inputs; of what a node reads, it computes first what stands later in the file. A
mask or a slope that a backward pass makes of the forward pass's tensors therefore stands before all that a cotangent
reaches: it is computed just before it is used, and still in the cache then. Elsewhere the masks of all layers would be
computed before the first step of the backward pass, and kept.
"""

from collections.abc import Iterable

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter


def just_in_time(g: Emitter, cotangents: Iterable[gs.Tensor]) -> None:
    """Move the nodes that do not depend on the cotangents with which the backward passes begin before those that do."""
    reached = {cotangent.name for cotangent in cotangents}
    with_it: list[gs.Node] = []
    without: list[gs.Node] = []
    for node in g.nodes:
        if reached.isdisjoint(x.name for x in node.inputs):
            without.append(node)
        else:
            with_it.append(node)
            reached.update(y.name for y in node.outputs)
    g.nodes[:] = without + with_it
