"""One check for every form: the node as ONNX Runtime runs it, the nodes it is seen as, and torch are one function."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch

from graphgbp.forms import MICROSOFT
from graphgbp.prepare import flatten
from tests.rules.harness import Dynamic, TorchFunction, assert_close, check_model, run, single_op


def plain(model: onnx.ModelProto) -> onnx.ModelProto:
    """The reading view as a model: it holds no node that a form replaces."""
    view = flatten(model)
    imports = [onnx.helper.make_opsetid(*entry) for entry in view.opsets.items() if entry[0] != MICROSOFT]
    view.graph.import_domains = imports
    view.graph.nodes[:] = [node for node in view.graph.nodes if node.outputs]  # of a known value nothing is left
    return gs.export_onnx(view.graph, do_type_check=False, ir_version=model.ir_version)


def in_place_of(model: onnx.ModelProto, seen: onnx.ModelProto) -> onnx.ModelProto:
    """A converted model of one fused node with what the node is seen as in its place."""
    made = {name for node in seen.graph.node for name in node.output}
    there = {tensor.name for tensor in model.graph.initializer}
    behind = [node for node in model.graph.node[1:] if made.isdisjoint(node.output)]
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend([*seen.graph.node, *behind])
    result.graph.initializer.extend(tensor for tensor in seen.graph.initializer if tensor.name not in there)
    return result


def fused_op(
    op: str,
    inputs: Sequence[np.ndarray | None],
    *,
    opset: int = 18,
    outputs: int = 1,
    constants: Sequence[int] = (),
    dynamic: Dynamic = False,
    domain: str = MICROSOFT,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node that ONNX has no schema for, with float outputs."""
    model = single_op(
        op,
        inputs,
        opset=opset,
        outputs=outputs,
        constants=constants,
        dynamic=dynamic,
        **{**attributes, **({"domain": domain} if domain else {})},
    )
    for output in model.graph.output:
        output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return model


def check_form(
    op: str,
    inputs: Sequence[np.ndarray | None],
    reference: TorchFunction,
    *,
    wrt: Sequence[int] = (0,),
    constants: Sequence[int] | None = None,
    kernel: bool = True,
    tolerance: float = 1e-5,
    **options: Any,
) -> None:
    """Assert that a node is `reference` in ONNX Runtime (if it has a CPU kernel) and as plain nodes, and so its vjp.

    Inputs outside `wrt` are constants unless `constants` says which are.
    """
    if constants is None:
        constants = [index for index in range(len(inputs)) if index not in wrt]
    model = fused_op(op, inputs, constants=constants, **options)
    given = {value.name for value in model.graph.input}
    feeds = {f"x{index}": value for index, value in enumerate(inputs) if f"x{index}" in given}
    expected = reference(*(None if x is None else _to_torch(x) for x in inputs))
    expected = expected if isinstance(expected, tuple) else (expected,)
    seen = plain(model)
    assert not any(node.domain == MICROSOFT or node.op_type == op == "LayerNormalization" for node in seen.graph.node)
    for what, found in (("ONNX Runtime's node", model), ("its form", seen)):
        if found is seen or kernel:
            got = run(found, feeds)
            for index, y in enumerate(expected):
                assert_close(got[f"y{index}"], y.numpy(), tolerance, f"{op} output {index} of {what}")
    evaluate = run if kernel else lambda explained, feeds: run(in_place_of(explained, seen), feeds)
    check_model(model, inputs, reference, wrt=wrt, tolerance=tolerance, evaluate=evaluate)


def _to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x)
