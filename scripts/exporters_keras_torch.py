"""Networks of keras.applications on its torch backend through model.export, held against torch's autograd in float64.

The guided rule is laid over torch's functions (scripts/torch_reference.py).
"""

from __future__ import annotations

import os
import tempfile
from functools import partial
from pathlib import Path

os.environ["KERAS_BACKEND"] = "torch"

import keras
import numpy as np
import onnx
import torch
import torch.nn.functional as F
import torch_reference
from exporters_table import IMAGES, Case, Reference, own_distances, ranked
from keras_networks import CLASSES, SIZES, build, draw, drawn_images, without_softmax
from torch import Tensor

NETWORKS = ("EfficientNetB0", "MobileNetV2", "MobileNetV3Small", "ResNet50V2")
GATED = {"MobileNetV3Small"}


def case(name: str) -> Case:
    keras.utils.set_random_seed(0)
    network = build(name, SIZES[name], CLASSES)
    rng = np.random.default_rng(1)
    draw(network, rng)
    images = drawn_images(network, IMAGES, rng)
    targets = ranked(keras.ops.convert_to_numpy(network(images)))
    methods = ("saliency", "gradcam") if name in GATED else ("saliency", "guided_backprop", "gradcam")
    told = partial(reference, name, network.get_weights(), images, targets)
    return Case(export(network), "Keras on torch", images, targets, told, methods)


def export(network: keras.Model) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        network.export(str(path), format="onnx", verbose=False)
        return onnx.load(path)


def reference(
    name: str, weights: list[np.ndarray], images: np.ndarray, targets: np.ndarray, features: np.ndarray | None
) -> Reference:
    assert features is not None
    exact = _maps(without_softmax(name, weights, "float64"), images.astype(np.float64), targets, features)
    single = without_softmax(name, weights, "float32")
    float32 = own_distances(lambda x: _maps(single, x, targets, features), images, exact)
    unsaid = "no guided reference: its relu6 are the insides of gates, which a mode over torch's functions cannot tell"
    return Reference(exact, float32, [unsaid] if name in GATED else [])


def _maps(network: keras.Model, images: np.ndarray, targets: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    x, wanted = torch.from_numpy(images), torch.from_numpy(targets)

    def score_of(scores: Tensor) -> Tensor:
        return scores[torch.arange(len(wanted)), wanted]

    plain = torch_reference.maps(network, x, score_of, features=[features])
    guided = torch_reference.maps(network, x, score_of, guided=True)
    (layer,) = plain.layers
    places = (1, 2) if features.shape[1] == features.shape[2] else (2, 3)
    (channels,) = {1, 2, 3} - set(places)
    weights = layer.gradients.mean(places, keepdims=True)
    cam = torch.from_numpy((weights * layer.features).sum(channels)).relu()[:, None]
    resized = F.interpolate(cam, images.shape[1:3], mode="bilinear").movedim(1, -1).numpy()
    return {"saliency": plain.gradient, "guided_backprop": guided.gradient, "gradcam": resized}


CASES = {name: partial(case, name) for name in NETWORKS}
