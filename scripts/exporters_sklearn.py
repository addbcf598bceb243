"""scikit-learn's multilayer perceptrons through skl2onnx, held against their gradient worked out by hand in numpy.

Trees and other estimators that skl2onnx or onnxmltools write as one operator of ai.onnx.ml are refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import lightgbm
import numpy as np
import onnx
import onnxmltools
from exporters_table import Case, Maps, Reference, own_distances
from onnxmltools.convert.common.data_types import FloatTensorType
from skl2onnx import to_onnx
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

OPSET = 18
METHODS = ("saliency", "guided_backprop")
ROWS = slice(0, 4)

Network: TypeAlias = MLPClassifier | MLPRegressor


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 digits as float32 [N, 64] between 0 and 1, and their classes."""
    pixels, classes = load_digits(return_X_y=True)
    return (pixels / 16).astype(np.float32), classes


def many_classes(**options: Any) -> Case:
    pixels, classes = digits()
    network = MLPClassifier((32, 16), max_iter=80, random_state=0).fit(pixels, classes)
    return _case(network, options, np.array([3, 1, 4, 5]))


def pipeline() -> Case:
    """A StandardScaler before the network: exported as a Scaler of ai.onnx.ml."""
    pixels, classes = digits()
    both = make_pipeline(StandardScaler(), MLPClassifier((32, 16), max_iter=80, random_state=0)).fit(pixels, classes)
    model = to_onnx(both, pixels[:1], options={"zipmap": False}, target_opset=OPSET)
    images, targets = pixels[ROWS], np.array([3, 1, 4, 5])
    scaler, network = both[0], both[1]

    def scaled(features: np.ndarray | None) -> Reference:
        found = reference(network, scaler.transform(images), targets, features)
        return Reference({name: value / scaler.scale_ for name, value in found.maps.items()}, found.float32)

    return Case(model, "skl2onnx", images, targets, scaled, METHODS)


def two_classes() -> Case:
    """skl2onnx puts 1 - p beside p: the probability is explained, not what the sigmoid takes."""
    pixels, classes = digits()
    network = MLPClassifier((32,), max_iter=80, random_state=0).fit(pixels, classes > 4)
    return _case(network, {"zipmap": False}, np.array([1, 0, 1, 0]))


def regressor() -> Case:
    """One number: its sign counts as the class, and class 1 is the number itself."""
    pixels, classes = digits()
    return _case(
        MLPRegressor(hidden_layer_sizes=(32,), max_iter=80, random_state=0).fit(pixels, classes), {}, np.ones(4, int)
    )


def _case(network: Network, options: dict[str, Any], targets: np.ndarray) -> Case:
    pixels = digits()[0]
    model = to_onnx(network, pixels[:1], options={id(network): options} if options else None, target_opset=OPSET)
    images = pixels[ROWS]
    return Case(model, "skl2onnx", images, targets, partial(reference, network, images, targets), METHODS)


def reference(network: Network, images: np.ndarray, targets: np.ndarray, features: np.ndarray | None) -> Reference:
    def maps(x: np.ndarray) -> Maps:
        found = (gradient(network, x, targets, method == "guided_backprop") for method in METHODS)
        return dict(zip(METHODS, found, strict=True))

    exact = maps(images.astype(np.float64))
    return Reference(exact, own_distances(maps, images.astype(np.float32), exact))


def gradient(network: Network, x: np.ndarray, targets: np.ndarray, guided: bool) -> np.ndarray:
    """dS/dx of relu layers by hand, S the score before the softmax, the probability of two classes, or the number."""
    weights = [weight.astype(x.dtype) for weight in network.coefs_]
    biases = [bias.astype(x.dtype) for bias in network.intercepts_]
    values, z = [], x
    for weight, bias in zip(weights, biases, strict=True):
        values.append(z @ weight + bias)
        z = np.maximum(values[-1], 0)
    scores = values[-1]
    if scores.shape[1] > 1:
        dy = np.eye(scores.shape[1], dtype=x.dtype)[targets]
    elif network.out_activation_ == "logistic":
        p = 1 / (1 + np.exp(-scores))
        dy = np.where(targets[:, None] == 1, 1, -1) * p * (1 - p)
    else:
        dy = np.ones_like(scores)
    for weight, value in zip(weights[:0:-1], values[-2::-1], strict=True):
        dy = (dy @ weight.T) * (value > 0) * ((dy @ weight.T > 0) if guided else 1)
    return dy @ weights[0].T


def refused(model: onnx.ModelProto, exporter: str) -> Case:
    return Case(model, exporter, methods=METHODS)


def forest() -> Case:
    pixels, classes = digits()
    return refused(
        to_onnx(RandomForestClassifier(5, random_state=0).fit(pixels, classes), pixels[:1], target_opset=OPSET),
        "skl2onnx",
    )


def logistic() -> Case:
    pixels, classes = digits()
    return refused(
        to_onnx(LogisticRegression(max_iter=500).fit(pixels, classes), pixels[:1], target_opset=OPSET), "skl2onnx"
    )


def boosting() -> Case:
    pixels, classes = digits()
    trees = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(pixels, classes)
    types = [("x", FloatTensorType([None, pixels.shape[1]]))]
    return refused(onnxmltools.convert_lightgbm(trees, initial_types=types, zipmap=False), "onnxmltools")


CASES = {
    "MLPClassifier with ZipMap": many_classes,
    "MLPClassifier, zipmap=False": partial(many_classes, zipmap=False),
    "MLPClassifier behind a StandardScaler": pipeline,
    "MLPClassifier of two classes": two_classes,
    "MLPRegressor": regressor,
    "LogisticRegression": logistic,
    "RandomForestClassifier": forest,
    "LGBMClassifier": boosting,
}
SMALL = {"sklearn_mlp.onnx": lambda: many_classes().model}
