"""reference.py MODEL IMAGE [CLASS]: the program of docs/running.md for onnx's ReferenceEvaluator."""

import sys
import time

import numpy as np
from onnx.reference import ReferenceEvaluator


def main(model: str, image: str, target: str | None = None) -> None:
    evaluator = ReferenceEvaluator(model)
    first = evaluator.proto_.graph.input[0]
    shape = [1, *(size.dim_value for size in list(first.type.tensor_type.shape.dim)[1:])]
    feeds = {first.name: np.fromfile(image, np.float32).reshape(shape)}
    if target is not None:
        feeds["target"] = np.array([int(target)])
    start = time.perf_counter()
    with np.errstate(over="ignore"):  # a steep mask overflows to infinity before it is clipped to 1
        outputs = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
    took = 1000 * (time.perf_counter() - start)
    for name, array in outputs.items():
        array.tofile(f"{name}.bin")
    print(f"class {outputs['target_class'][0]}, {took} ms")


if __name__ == "__main__":
    main(*sys.argv[1:])
