"""Values that are known before running: a node that depends on constants alone becomes one."""

from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphgbp.emit import elem_type
from graphgbp.errors import ModelFileError
from graphgbp.nodes import label, node_proto
from graphgbp.shapes import is_static
from graphgbp.sizes import Sizes

FOLD_LIMIT = 1024
"""The elements of the largest tensor that is folded or looked into."""

_EVALUATED_AT = {"QuantizeLinear": 21, "DequantizeLinear": 21}  # the oldest opset that onnx.reference has them of
_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


def read_constants(nodes: Iterable[gs.Node]) -> None:
    for node in nodes:
        if node.op == "Constant" and node.domain in (None, "", "ai.onnx"):
            value = _constant_value(node)
            if value is not None:
                _fix(node.outputs[0], value)


def _constant_value(node: gs.Node) -> np.ndarray | LazyValues | None:
    if "value" in node.attrs:
        value = node.attrs["value"]
        return value._values if isinstance(value, gs.Constant) else np.asarray(value)
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in node.attrs:
            return np.asarray(node.attrs[key], dtype)
    return None


def _fix(tensor: gs.Tensor, value: np.ndarray | np.generic | LazyValues) -> None:
    """Make a tensor known: every consumer sees a Constant."""
    tensor.inputs.clear()
    tensor.to_constant(value if isinstance(value, LazyValues) else np.asarray(value))


def fold(node: gs.Node, opsets: dict[str, int], sizes: Sizes) -> None:
    """Replace the outputs of a small node whose value is known before running by that value."""
    if node.domain not in (None, "", "ai.onnx") or node.op in _RANDOM or len(node.outputs) != 1:
        return
    (output,) = node.outputs
    if not is_static(output.shape) or int(np.prod(output.shape)) > FOLD_LIMIT:
        return
    sizes.follow(node)
    if (value := sizes.known(output)) is not None:
        _fix(output, value)
    elif node.inputs and all(tensor.is_empty() or is_small(tensor) for tensor in node.inputs) and not has_graph(node):
        _fix(output, _evaluate(node, opsets))


def is_small(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape)) <= FOLD_LIMIT


def has_graph(node: gs.Node) -> bool:
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def _evaluate(node: gs.Node, opsets: dict[str, int]) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import RuntimeTypeError

    feeds = {tensor.name: tensor.values for tensor in node.inputs if not tensor.is_empty()}
    graph = helper.make_graph(
        [node_proto(node)],
        "constant",
        [helper.make_tensor_value_info(name, elem_type(value.dtype), value.shape) for name, value in feeds.items()],
        [helper.make_tensor_value_info(node.outputs[0].name, elem_type(node.outputs[0].dtype), None)],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", max(opsets[""], _EVALUATED_AT.get(node.op, 0)))]
    )
    try:
        return np.asarray(next(iter(ReferenceEvaluator(model).run(None, feeds))))
    except RuntimeTypeError as error:
        raise ModelFileError(
            f"node '{label(node)}' ({node.op}) does not fit its inputs: {error}; repair the file or its export"
        ) from None
