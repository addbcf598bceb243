"""Models in half precision, and their evaluation."""

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.build import drawn, model
from tests.rules import harness

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
METHODS = ("saliency", "guided_backprop", "deconvnet", "gradcam", "guided_gradcam")
IMAGES, TARGETS = drawn(2, 3, 8, 8, seed=9), np.array([1, 3])
half_types = pytest.mark.parametrize("elem_type", HALVES, ids=["float16", "bfloat16"])


def numpy_type(elem_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


def run_by_reference(whole: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX's evaluator rounds behind every node; numpy says of a steep HardSigmoid that it overflows, as it may."""
    with np.errstate(over="ignore"):
        return harness.run_by_reference(whole, feeds)


def stored_as(whole: onnx.ModelProto, elem_type: int) -> onnx.ModelProto:
    """A float32 model whose weights, inputs and outputs are of another type."""
    made = onnx.ModelProto()
    made.CopyFrom(whole)
    del made.graph.value_info[:]
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(numpy_type(elem_type)), tensor.name)
            )
    for value in [*made.graph.input, *made.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = elem_type
    return made


def relu6_cnn(opset: int = 18) -> onnx.ModelProto:
    """Convolutions with a ReLU6 and a Max between them: ONNX Runtime's CPU provider has float16 kernels for both."""
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        "r = Clip(a, zero, six)",
        "b = Conv<pads=[1,1,1,1]>(r, w2, b2)",
        "s = Max(b, zero)",
        "t = Add(r, s)",
        "c = Conv<strides=[2,2], pads=[1,1,1,1]>(t, w3, b1)",
        "u = Clip(c, zero, six)",
        "p = GlobalAveragePool(u)",
        "f = Flatten(p)",
        "y = Gemm<transB=1>(f, w4, b4)",
    ]
    weights = {
        "w1": drawn(6, 3, 3, 3, seed=1, scale=2),
        "b1": drawn(6, seed=2),
        "w2": drawn(6, 6, 3, 3, seed=3, scale=0.4),
        "b2": drawn(6, seed=4),
        "w3": drawn(6, 6, 3, 3, seed=5, scale=0.3),
        "w4": np.abs(drawn(5, 6, seed=6)),
        "b4": drawn(5, seed=8),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    return model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights, opset=opset)
