"""Networks of keras.applications with every parameter drawn, on any backend of Keras."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

CLASSES = 100
SIZES = {
    "ConvNeXtTiny": 96,
    "DenseNet121": 96,
    "EfficientNetB0": 96,
    "EfficientNetV2B0": 96,
    "InceptionV3": 139,
    "MobileNet": 96,
    "MobileNetV2": 96,
    "MobileNetV3Small": 96,
    "NASNetMobile": 96,
    "ResNet50": 96,
    "ResNet50V2": 96,
    "VGG16": 96,
    "Xception": 96,
}


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
        mean, variance = (keras.ops.convert_to_numpy(value) for value in (norm.moving_mean, norm.moving_variance))
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


def without_softmax(name: str, weights: list[np.ndarray], dtype: str) -> keras.Model:
    """The network with given weights, up to its scores."""
    keras.config.set_dtype_policy(dtype)
    network = build(name, SIZES[name], CLASSES, classifier_activation=None)
    keras.config.set_dtype_policy("float32")
    network.set_weights(weights)
    return network
