"""Small ONNX models written as text, one node a line: `model(["y = Relu(x)"], {"x": (2, 3)}, ["y"])`."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

Shape = Sequence[int | str]


def model(
    nodes: Sequence[str],
    inputs: Mapping[str, Shape],
    outputs: Sequence[str],
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    output_types: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """A checked model with float inputs and, unless told, outputs; output shapes come from ONNX's inference."""
    parsed = [parser.parse_node(node) for node in nodes]
    graph = helper.make_graph(
        parsed,
        "small",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, (output_types or {}).get(name, dtype), None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights or {}).items()],
    )
    others = sorted({node.domain for node in parsed if node.domain})
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in others)]
    made = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    return onnx.shape_inference.infer_shapes(made, strict_mode=True)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal random numbers, float32."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def small_cnn(
    tail: Sequence[str] = ("y = Identity(z)",),
    *,
    batch: int | str = "N",
    size: int | str = 8,
    classes: int = 5,
    opset: int = 18,
    ir_version: int = 8,
) -> onnx.ModelProto:
    """Two convolutions with ReLUs, global pooling and a head `z` [N, classes], then `tail`, which makes `y`."""
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        "r1 = Relu(a)",
        "b = Conv<strides=[2,2], pads=[1,1,1,1]>(r1, w2, b2)",
        "r2 = Relu(b)",
        "p = GlobalAveragePool(r2)",
        "f = Flatten(p)",
        "z = Gemm<transB=1>(f, w3, b3)",
        *tail,
    ]
    weights = {
        "w1": drawn(6, 3, 3, 3, seed=1, scale=0.4),
        "b1": drawn(6, seed=2, scale=0.1),
        "w2": drawn(8, 6, 3, 3, seed=3, scale=0.3),
        "b2": drawn(8, seed=4, scale=0.1),
        "w3": drawn(classes, 8, seed=5),
        "b3": drawn(classes, seed=6),
    }
    return model(nodes, {"x": [batch, 3, size, size]}, ["y"], weights, opset=opset, ir_version=ir_version)
