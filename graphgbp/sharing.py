"""One product with a weight for all backward passes: the weight of a dense layer is read once, not once for each.

A head of dense layers (AlexNet, VGG) weighs hundreds of megabytes, and a product of it with a few rows takes as long as
reading it does. Where several maps' passes go through such a layer, with cotangents that a rectifier parted, their rows
are joined, multiplied together, and split again.
"""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphgbp.contract import SCOPE
from graphgbp.emit import Emitter
from graphgbp.nodes import topological_order


def share_products(g: Emitter, outputs: Sequence[gs.Tensor]) -> None:
    """Join the products of one weight by several passes, among the nodes that the outputs need."""
    products = _by_layer(g, outputs)
    for layer, of_passes in products:
        _join(g, layer, of_passes)
    if products:
        g.nodes[:] = topological_order(g)


def _by_layer(g: Emitter, outputs: Sequence[gs.Tensor]) -> list[tuple[str, list[gs.Node]]]:
    """Each layer, and the products that pass its cotangent on, one of each pass: none can depend on another."""
    needed = {output.name for output in outputs}
    found: dict[tuple[str, ...], list[gs.Node]] = {}
    for node in reversed(g.nodes):
        if not any(y.name in needed for y in node.outputs):
            continue
        needed.update(x.name for x in node.inputs)
        if node.op == "Gemm" and isinstance(node.inputs[1], gs.Constant) and _rows(node):
            _, _, layer = node.name.removeprefix(f"{SCOPE}/").partition("/")  # behind the name of the pass
            rows = str(node.inputs[0].shape)  # equally many in each pass: where one carries a slice, another may not
            found.setdefault((layer, node.inputs[1].name, str(node.attrs), rows), []).append(node)
    return [(layer, nodes[::-1]) for (layer, *_), nodes in found.items() if len(nodes) > 1]


def _rows(node: gs.Node) -> bool:
    """Whether the other operand's rows are those of the result, and their number is known or has a name."""
    return len(node.inputs) == 2 and not node.attrs.get("transA") and node.inputs[0].shape is not None


def _join(g: Emitter, layer: str, products: Sequence[gs.Node]) -> None:
    results = [node.outputs[0] for node in products]
    with g.scope(f"shared/{layer.rpartition('/')[0]}"):
        rows = g.concat([node.inputs[0] for node in products], 0)
        product = g.op("Gemm", rows, products[0].inputs[1], **products[0].attrs)
        count = len(products)
        parts = g.ops("Split", product, outputs=count, axis=0, num_outputs=count if g.opset >= 18 else None)
    for result, part in zip(results, parts, strict=True):
        g.with_shape(part, result)
        for reader in list(result.outputs):
            for index, x in enumerate(reader.inputs):
                if x is result:
                    reader.inputs[index] = part
