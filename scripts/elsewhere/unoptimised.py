"""unoptimised.py MODEL IMAGE [CLASS]: ONNX Runtime's Python package with its graph optimiser off."""

import sys

import numpy as np
import onnxruntime as ort


def main(model: str, image: str, target: str | None = None) -> None:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    first = session.get_inputs()[0]
    feeds = {first.name: np.fromfile(image, np.float32).reshape(1, *first.shape[1:])}
    if target is not None:
        feeds["target"] = np.array([int(target)])
    names = [output.name for output in session.get_outputs()]
    for name, array in zip(names, session.run(names, feeds), strict=True):
        array.tofile(f"{name}.bin")


if __name__ == "__main__":
    main(*sys.argv[1:])
