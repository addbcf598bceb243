"""Models as ONNX Runtime saves them once it has optimised them."""

import tempfile
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort

LEVELS = {
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def optimised(model: onnx.ModelProto, level: str) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimised.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level, options.optimized_model_filepath = LEVELS[level], str(path)
        options.log_severity_level = 3
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(path)


def operators(model: onnx.ModelProto) -> Counter[str]:
    """How often each operator is there, ONNX's by name alone."""
    return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node)
