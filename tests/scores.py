"""Scores of the untouched model, and the check that a map is their slope."""

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from tests.build import drawn, model


def with_outputs(proto: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The model with inner tensors as further outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    for name in names:
        info = next((value for value in made.graph.value_info if value.name == name), None)
        made.graph.output.append(info or helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return made


def per_pixel(size: int | str = 8) -> onnx.ModelProto:
    """Scores [N, 2, H, W]."""
    nodes = ["a = Conv<pads=[1,1,1,1]>(x, w1)", "r = Relu(a)", "y = Conv(r, w2)"]
    weights = {"w1": drawn(4, 3, 3, 3, seed=1), "w2": drawn(2, 4, 1, 1, seed=2)}
    return model(nodes, {"x": ["N", 3, size, size]}, ["y"], weights)


def run(proto: onnx.ModelProto, name: str, images: np.ndarray) -> np.ndarray:
    """One tensor of the untouched model."""
    session = onnxruntime.InferenceSession(
        with_outputs(proto, name).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run([name], {"x": images})[0]


def check_saliency(source: onnx.ModelProto, scores: str, images: np.ndarray, saliency: np.ndarray, weights: np.ndarray):
    """saliency . v against central differences of S = sum z w of the untouched model, image by image."""
    v = drawn(*images.shape, seed=77)
    step = 5e-4
    high, low = (run(source, scores, (images + sign * step * v).astype(np.float32)) for sign in (1, -1))
    differences = ((high.astype(np.float64) - low) * weights).reshape(len(images), -1).sum(1) / (2 * step)
    slopes = (saliency.astype(np.float64) * v).reshape(len(images), -1).sum(1)
    np.testing.assert_allclose(slopes, differences, rtol=0.05, atol=5e-3)
    assert np.abs(differences).max() > 0.05, "the check would see nothing"
