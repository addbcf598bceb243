"""An oracle for operators that are affine in their first input: the model itself, run on every unit input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator


def matrix_and_offset(
    model: onnx.ModelProto, inputs: Sequence[np.ndarray | None], constants: Sequence[int], by_reference: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and b, float64, of y0 = A x0 + b, A in the shape [*y0, elements of x0]; `inputs` as for `single_op`."""
    runner: Any = ReferenceEvaluator(model) if by_reference else _session(model)
    x = inputs[0]
    assert x is not None
    feeds = {f"x{i}": value for i, value in enumerate(inputs) if value is not None and i not in constants}

    def output(value: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(runner.run(None, {**feeds, "x0": value})[0].astype(np.float64))

    offset = output(np.zeros_like(x))
    units = np.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape)
    return torch.stack([output(unit) - offset for unit in units], -1), offset


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
