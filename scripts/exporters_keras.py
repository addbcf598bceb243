"""Networks of keras.applications through tf2onnx, held against TensorFlow and xplique.

Rectifiers count as xplique counts them, except in three places. xplique lets gradient through a ReLU6 above 6, where
its derivative is 0; it takes the ReLU6 inside a hard sigmoid for a rectifier; and tf2onnx makes one of the ReLUs that
read the same tensor, which xplique has apart. The float64 maps close the first, leave the second alone and merge the
third; how far xplique's own maps are from its own rule in float64 is the float32 distance, and what the differences
amount to is said in a remark.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import export_keras
import keras
import numpy as np
import onnx
import tensorflow as tf
from exporters_table import IMAGES, Case, Maps, Reference, distance, own_distances, ranked
from keras_networks import CLASSES, SIZES, build, draw, drawn_images, without_softmax
from xplique.attributions import GradCAM, GuidedBackprop

GATED = {"MobileNetV3Small"}  # every ReLU6 of it is the inside of a hard sigmoid
ABOVE_6 = "it lets gradient through a ReLU6 above 6, where the derivative is 0"
WHY = {
    "MobileNet": ABOVE_6,
    "MobileNetV2": ABOVE_6,
    "NASNetMobile": "tf2onnx makes one of the ReLUs that read the same tensor, and the rule masks the sum of what "
    "arrives there; xplique's ReLUs stay apart",
    "MobileNetV3Small": "it takes the ReLU6 inside each hard sigmoid for a rectifier",
}

Open = Callable[[tf.Tensor, float], tf.Tensor]


def case(name: str) -> Case:
    keras.utils.set_random_seed(0)
    network = build(name, SIZES[name], CLASSES)
    rng = np.random.default_rng(1)
    draw(network, rng)
    model = export_keras.export(network)
    images = drawn_images(network, IMAGES, rng)
    targets = ranked(network(images).numpy())
    return Case(model, "tf2onnx", images, targets, partial(reference, name, network.get_weights(), images, targets))


def reference(
    name: str, weights: list[np.ndarray], images: np.ndarray, targets: np.ndarray, features: np.ndarray | None
) -> Reference:
    assert features is not None
    single, exact = (without_softmax(name, weights, dtype) for dtype in ("float32", "float64"))
    place = _place(single, images, features)
    as_xplique = gradient(guided(exact, lambda x, bound: x > 0), images, targets)
    published = guided(exact, lambda x, bound: (x > 0) & (x < bound), but_gates=name in GATED, merged=True)
    maps = {
        "saliency": gradient(exact, images, targets),
        "guided_backprop": gradient(published, images, targets),
        "gradcam": gradcam(exact, place, images, targets),
    }
    named = single.operations[place] in single.layers
    labels = np.eye(CLASSES, dtype=np.float32)[targets]
    xplique = GuidedBackprop(single, reducer=None)

    def in_float32(x: np.ndarray) -> Maps:
        cam = xplique_gradcam(single, place, x, labels) if named else gradcam(single, place, x, targets)
        guided_map = np.asarray(xplique(x, labels))
        return {"saliency": gradient(single, x, targets), "guided_backprop": guided_map, "gradcam": cam}

    float32 = own_distances(in_float32, images, {**maps, "guided_backprop": as_xplique})
    remarks = [] if named else ["xplique knows no layer there (a sum), so TensorFlow's own Grad-CAM stands in for it"]
    if rules := distance(as_xplique, maps["guided_backprop"]):
        remarks.append(f"xplique's guided map is {rules:.0e} from the published rule's, both in float64: {WHY[name]}")
    return Reference(maps, float32, remarks)


def _place(network: keras.Model, images: np.ndarray, features: np.ndarray) -> int:
    """The number of the first layer whose output is the target layer's, in either layout."""
    wanted = [features, features.transpose(0, 2, 3, 1)]
    shapes = {value.shape[1:] for value in wanted}
    made = {
        index: layer.output
        for index, layer in enumerate(network.operations)
        if isinstance(layer.output, keras.KerasTensor) and tuple(layer.output.shape[1:]) in shapes
    }
    values = keras.tree.flatten(keras.Model(network.inputs, list(made.values()))(images))
    for index, value in zip(made, values, strict=True):
        for one in wanted:
            if one.shape == value.shape and np.abs(value - one).max() < 1e-3 * np.abs(one).max():
                return index
    raise AssertionError(f"no layer of {network.name} makes the target layer's {features.shape}")


def gradient(network: keras.Model, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    x = tf.constant(images, network.compute_dtype)
    with tf.GradientTape() as tape:
        tape.watch(x)
        score = tf.reduce_sum(tf.gather(network(x), targets, axis=1, batch_dims=1))
    return tape.gradient(score, x).numpy()


def gradcam(network: keras.Model, place: int, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
    x = tf.constant(images, network.compute_dtype)
    both = keras.Model(network.inputs, [network.operations[place].output, network.output])
    with tf.GradientTape() as tape:
        tape.watch(x)
        features, scores = both(x)
        score = tf.reduce_sum(tf.gather(scores, targets, axis=1, batch_dims=1))
    weights = tf.reduce_mean(tape.gradient(score, features), (1, 2), keepdims=True)
    return _resized(tf.nn.relu(tf.reduce_sum(weights * features, -1)), images)


def xplique_gradcam(network: keras.Model, place: int, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """xplique's Grad-CAM before its bicubic resize, resized as graphgbp resizes."""
    cam = GradCAM(network, conv_layer=network.layers.index(network.operations[place]))
    features, gradients = cam._gradient(tf.constant(images), tf.constant(labels))
    return _resized(cam._apply_weights(cam._compute_weights(gradients, features), features), images)


def _resized(cam: tf.Tensor, images: np.ndarray) -> np.ndarray:
    """[N, h, w] to [N, H, W, 1], bilinear; in float32, the only type tf.image.resize gives."""
    return tf.image.resize(cam[..., None], images.shape[1:3]).numpy()


def guided(network: keras.Model, is_open: Open, *, but_gates: bool = False, merged: bool = False) -> keras.Model:
    """A copy whose rectifiers let positive gradients through where they are open.

    The inside of gates is left alone where asked for; `merged` makes one of the rectifiers that read the same tensor.
    """
    copy = keras.models.clone_model(network)
    copy.set_weights(network.get_weights())
    made: dict[Any, tf.Tensor] | None = {} if merged else None
    for layer in copy.layers:
        if isinstance(layer, keras.layers.ReLU):
            if not (but_gates and layer.max_value == 6):
                layer.call = _rectifier(layer.max_value or np.inf, is_open, made)
        elif getattr(layer, "activation", None) is keras.activations.relu:
            layer.activation = _rectifier(np.inf, is_open, made)
    return copy


def _rectifier(bound: float, is_open: Open, made: dict[Any, tf.Tensor] | None) -> Callable[[tf.Tensor], tf.Tensor]:
    @tf.custom_gradient
    def rectified(x: tf.Tensor) -> Any:
        zero = tf.zeros_like(x)
        return tf.clip_by_value(x, 0.0, bound), lambda dy: tf.where(is_open(x, bound), tf.maximum(dy, zero), zero)

    def once(x: tf.Tensor) -> tf.Tensor:
        if made is None:
            return rectified(x)
        key = (x.ref(), bound)
        if key not in made:
            made[key] = rectified(x)
        return made[key]

    return once


def small_residual() -> onnx.ModelProto:
    """ResNetV2's parts: padding of its own, max pooling, BatchNormalization before the ReLU, a strided shortcut."""
    x = image = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(12, 5, 2, "same")(x)
    x = keras.layers.MaxPooling2D(3, 2)(keras.layers.ZeroPadding2D(1)(x))
    before = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    y = keras.layers.Conv2D(12, 3, 2, "same", use_bias=False)(before)
    y = keras.layers.ReLU()(keras.layers.BatchNormalization()(y))
    y = keras.layers.Conv2D(24, 3, 1, "same")(y)
    x = y + keras.layers.Conv2D(24, 1, 2)(before)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.Dense(10, activation="softmax")(keras.layers.GlobalAveragePooling2D()(x))
    return _small(keras.Model(image, x))


def small_mobile() -> onnx.ModelProto:
    """MobileNet's parts: scaling inside, hard swish, depthwise convolution, ReLU6, a gate of a ReLU6."""
    x = image = keras.Input((32, 32, 3))
    x = keras.layers.Rescaling(1 / 127.5, -1)(x)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(12, 3, 2, "same", use_bias=False)(x))
    x = keras.layers.Activation("hard_swish")(x)
    x = keras.layers.DepthwiseConv2D(5, 1, "same", use_bias=False)(x)
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(x))
    gate = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = keras.layers.Conv2D(12, 1)(keras.layers.Conv2D(4, 1, activation="relu")(gate))
    x = x * (keras.layers.ReLU(6.0)(gate + 3.0) * (1 / 6))
    x = keras.layers.ReLU(6.0)(keras.layers.BatchNormalization()(keras.layers.Conv2D(24, 3, 2, "same")(x)))
    x = keras.layers.Conv2D(10, 1)(keras.layers.GlobalAveragePooling2D(keepdims=True)(x))
    return _small(keras.Model(image, keras.layers.Softmax()(keras.layers.Flatten()(x))))


def _small(network: keras.Model) -> onnx.ModelProto:
    draw(network, np.random.default_rng(0))
    return export_keras.export(network, opset=13)


CASES = {name: partial(case, name) for name in SIZES}
SMALL = {"keras_residual.onnx": small_residual, "keras_mobile.onnx": small_mobile}
