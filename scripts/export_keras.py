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

import graphgbp

INPUT = "image"
OPSET = 17


def build(name: str, size: int, classes: int = 1000, **options: Any) -> keras.Model:
    """A network of keras.applications for images [N, size, size, 3], softmax at its end."""
    return getattr(keras.applications, name)(
        **{"weights": None, "input_shape": (size, size, 3), "classes": classes, **options}
    )


def draw(network: keras.Model, rng: np.random.Generator) -> None:
    """Draw every parameter that is trained, then BatchNormalization's statistics."""
    for weight in network.trainable_weights:
        weight.assign(_drawn(weight, rng))
    norms = [layer for layer in network.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    network(drawn_images(network, 8, rng), training=True)
    for norm in norms:
        mean, variance = norm.moving_mean.numpy(), norm.moving_variance.numpy()
        norm.moving_mean.assign(mean + 0.1 * np.sqrt(variance) * rng.standard_normal(mean.shape))
        norm.moving_variance.assign(variance * rng.uniform(0.8, 1.25, variance.shape) + 1e-3)


def _drawn(weight: keras.Variable, rng: np.random.Generator) -> np.ndarray:
    shape = tuple(weight.shape)
    if weight.name.endswith("gamma"):
        return rng.uniform(0.5, 1.5, shape)
    if len(shape) < 2:
        return 0.1 * rng.standard_normal(shape)
    depthwise = len(shape) == 4 and shape[-1] == 1
    fan_in = np.prod(shape[:-2] if depthwise else shape[:-1])
    return rng.standard_normal(shape) * np.sqrt(2 / fan_in)


def drawn_images(network: keras.Model, count: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [count, H, W, 3]: noise on coarse patches; 0 to 255 where the network scales its images itself."""
    size = network.input_shape[1]
    coarse = np.kron(rng.standard_normal((count, 4, 4, 3)), np.ones((1, size // 4, size // 4, 1)))
    images = rng.standard_normal((count, size, size, 3))
    images[:, : coarse.shape[1], : coarse.shape[2]] += 2 * coarse
    scales = any(isinstance(layer, keras.layers.Rescaling | keras.layers.Normalization) for layer in network.layers)
    return (np.clip(128 + 40 * images, 0, 255) if scales else images).astype(np.float32)


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
