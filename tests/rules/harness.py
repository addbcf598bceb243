"""One check for every rule: the gradient graphgbp appends against torch's autograd in float64.

The torch function is held to the ONNX operator first (equal outputs), so it is a reference for the same function.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import graphgbp
from graphgbp.kernels import missing_kernels

CUDA = "CUDAExecutionProvider"
Dynamic = bool | Mapping[int, Sequence[int]]  # every size of every input symbolic, or these axes of these inputs
Evaluate = Callable[[onnx.ModelProto, Mapping[str, np.ndarray]], dict[str, np.ndarray]]
TorchFunction = Callable[..., torch.Tensor | tuple[torch.Tensor, ...]]
NOT_INFERRED = (
    "GroupNormalization",
    "MeanVarianceNormalization",
    "Scaler",
)  # y has x's type, which ONNX's inference cannot tell


def single_op(
    op: str,
    inputs: Sequence[np.ndarray | None],
    *,
    opset: int,
    outputs: int = 1,
    constants: Sequence[int] = (),
    dynamic: Dynamic = False,
    ir_version: int = 8,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node. Inputs whose position is in `constants` are initializers; the others are graph inputs."""
    names = ["" if value is None else f"x{index}" for index, value in enumerate(inputs)]
    node = helper.make_node(op, names, [f"y{index}" for index in range(outputs)], name="node", **attributes)
    infos, initializers = [], []
    for index, value in enumerate(inputs):
        if value is None:
            continue
        if index in constants:
            initializers.append(numpy_helper.from_array(value, names[index]))
        else:
            axes = range(value.ndim) if dynamic is True else dict(dynamic or {}).get(index, ())
            shape = [f"x{index}_{axis}" if axis in axes else size for axis, size in enumerate(value.shape)]
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            infos.append(helper.make_tensor_value_info(names[index], kind, shape))
    results = [onnx.ValueInfoProto(name=f"y{index}") for index in range(outputs)]
    if op in NOT_INFERRED:
        results[0].type.CopyFrom(infos[0].type)
    graph = helper.make_graph([node], "single", infos, results, initializers)
    imports = [helper.make_opsetid("", opset)]
    if attributes.get("domain"):
        imports.append(helper.make_opsetid(attributes["domain"], 1))
    model = helper.make_model(graph, opset_imports=imports, ir_version=ir_version)
    return model if op in NOT_INFERRED else onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], as_written: bool = False) -> dict[str, np.ndarray]:
    """All outputs by name, as ONNX Runtime's CPU provider computes them; `as_written` without any optimisation."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if as_written:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))


def run_by_reference(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As `run`, by ONNX's own slow evaluator."""
    evaluator = ReferenceEvaluator(model)
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feeds)), strict=True))


def check_rule(
    op: str,
    inputs: Sequence[np.ndarray | None],
    reference: TorchFunction,
    *,
    wrt: Sequence[int] = (0,),
    opset: int = 18,
    dynamic: Dynamic = False,
    constants: Sequence[int] | None = None,
    outputs: int = 1,
    tolerance: float = 1e-5,
    evaluate: Evaluate | None = None,
    **attributes: Any,
) -> None:
    """Assert that the vjp of one node equals torch's, for a random cotangent of every output.

    `reference` takes the node's inputs as float64 (or integer) tensors, None for an absent one.
    Inputs outside `wrt` are constants unless `constants` says which are. The tolerance is relative to the largest
    entry of the gradient. `evaluate` runs the model where ONNX Runtime has no kernel for the operator.
    """
    if constants is None:
        constants = [index for index in range(len(inputs)) if index not in wrt]
    model = single_op(op, inputs, opset=opset, outputs=outputs, constants=constants, dynamic=dynamic, **attributes)
    check_model(model, inputs, reference, wrt=wrt, tolerance=tolerance, evaluate=evaluate)


def check_model(
    model: onnx.ModelProto,
    inputs: Sequence[np.ndarray | None],
    reference: TorchFunction,
    *,
    wrt: Sequence[int],
    tolerance: float,
    evaluate: Evaluate | None = None,
) -> None:
    """As `check_rule`, of a model of one node whose inputs are named x0, x1, ... and its outputs y0, y1, ..."""
    rng = np.random.default_rng(0)
    op = model.graph.node[0].op_type
    tensors = [None if value is None else _to_torch(value, index in wrt) for index, value in enumerate(inputs)]
    results = reference(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    kinds = [output.type.tensor_type.elem_type for output in model.graph.output[: len(results)]]
    cotangents = [
        rng.standard_normal(tuple(result.shape)).astype(helper.tensor_dtype_to_np_dtype(kind))
        for kind, result in zip(kinds, results, strict=True)
    ]
    seeds = [torch.from_numpy(dy).to(result.dtype) for dy, result in zip(cotangents, results, strict=True)]
    torch.autograd.backward(results, seeds)

    names = [f"y{index}" for index in range(len(results))]
    explained = graphgbp.vjp(model, inputs=[f"x{index}" for index in wrt], outputs=names)
    if _is_valid(model):
        onnx.checker.check_model(explained)
    if not missing_kernels(CUDA, model, model.graph.node):
        assert not missing_kernels(CUDA, explained, explained.graph.node)
    given = {value.name for value in model.graph.input}
    feeds = {f"x{i}": value for i, value in enumerate(inputs) if f"x{i}" in given}
    feeds |= {f"{name}_grad": dy for name, dy in zip(names, cotangents, strict=True)}
    got = (evaluate or run)(explained, feeds)
    for name, result in zip(names, results, strict=True):
        assert_close(
            got[name], result.detach().numpy(), tolerance, f"{op} forward {name}: the reference is another function"
        )
    for index in wrt:
        assert_close(got[f"x{index}_grad"], tensors[index].grad.numpy(), tolerance, f"{op} gradient to input {index}")


def _is_valid(model: onnx.ModelProto) -> bool:
    """Whether the checker passes it: an output whose rank depends on values does not, before or after."""
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError:
        return False
    return True


def assert_close(got: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape {got.shape}, expected {expected.shape}"
    scale = max(np.abs(expected).max(initial=0), 1e-6)
    error = np.abs(got - expected).max(initial=0) / scale
    assert error <= tolerance, f"{what}: off by {error:.2e} of its maximum"


def _to_torch(value: np.ndarray, wanted: bool) -> torch.Tensor:
    if not np.issubdtype(value.dtype, np.floating):
        return torch.from_numpy(value)
    return torch.from_numpy(value.astype(np.float64)).requires_grad_(wanted)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
