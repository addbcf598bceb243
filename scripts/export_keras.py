"""Export a network of keras.applications to ONNX through tf2onnx, and write its explanation into it.

    pip install -r scripts/requirements-keras.txt -e .
    python scripts/export_keras.py MobileNetV2 -o mobilenet_v2.onnx

writes mobilenet_v2.onnx and mobilenet_v2.explained.onnx. Without --weights imagenet (a download), every parameter is
drawn from the seed: kernels, biases, and BatchNormalization's scale, shift and statistics, the last around those that
random images give, so that no layer dies or blows up.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnx
import tensorflow as tf
import tf2onnx
from keras_networks import build, draw

import graphgbp

INPUT = "image"
OPSET = 17


def export(network: keras.Model, opset: int = OPSET) -> onnx.ModelProto:
    """The network as tf2onnx writes it: input `image` [N, H, W, 3]."""
    signature = (tf.TensorSpec(network.input_shape, tf.float32, name=INPUT),)
    with tempfile.TemporaryDirectory() as folder, _without_xla():
        path = Path(folder) / "network.onnx"
        tf2onnx.convert.from_keras(
            network, signature, opset=opset, output_path=str(path), custom_op_handlers={"Erfc": (_erfc, [])}
        )
        return onnx.load(path)


@contextlib.contextmanager
def _without_xla() -> Iterator[None]:
    """Keras has XLA compile grouped convolutions, which tf2onnx then cannot see into."""
    function = tf.function

    def plain(*args: Any, jit_compile: bool | None = None, **options: Any) -> Any:
        return (lambda inner: inner) if jit_compile else function(*args, jit_compile=jit_compile, **options)

    with mock.patch.object(tf, "function", plain):
        yield


def _erfc(context: Any, node: Any, name: str, args: Any) -> None:
    """1 - Erf(x), which tf2onnx does not write by itself."""
    (x,), (output,), (shape,), (dtype,) = node.input, node.output, node.output_shapes, node.output_dtypes
    context.remove_node(node.name)
    one = context.make_const(f"{name}/one", np.float32(1)).output[0]
    erf = context.make_node("Erf", [x], name=f"{name}/erf", shapes=[shape], dtypes=[dtype])
    context.make_node("Sub", [one, erf.output[0]], name=name, outputs=[output], shapes=[shape], dtypes=[dtype])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a network of keras.applications, e.g. MobileNetV2")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the ONNX file; OUT.explained.onnx comes with it")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images (default: 224)")
    parser.add_argument("--opset", type=int, default=OPSET, help=f"default: {OPSET}")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn weights (default: 0)")
    parser.add_argument("--weights", choices=["imagenet"], help="trained weights instead of drawn ones")
    arguments = parser.parse_args()

    network = build(arguments.name, arguments.size, weights=arguments.weights)
    if arguments.weights is None:
        draw(network, np.random.default_rng(arguments.seed))
    model = export(network, arguments.opset)
    explained = graphgbp.convert(model)
    for path, made in ((arguments.out, model), (arguments.out.with_suffix(".explained.onnx"), explained)):
        graphgbp.save(made, path)
        print(f"wrote {path} ({len(made.graph.node)} nodes)")


if __name__ == "__main__":
    main()
