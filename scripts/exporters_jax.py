"""Flax networks through jax2onnx, held against jax.grad in float64; the guided rule is a jax.custom_vjp.

jax2onnx declares wrong shapes for tensors around the Transposes it has moved, and ONNX Runtime refuses such a file: the
declarations of inner tensors are taken out, as its user has to.

Every parameter is drawn. A network is `scores(features(x))`; Grad-CAM is taken between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from exporters_table import IMAGES, Case, Reference, distance, own_distances, ranked
from flax import nnx
from jax import Array
from jax2onnx import to_onnx

jax.config.update("jax_enable_x64", True)

CLASSES = 10
Rectifier = Callable[[Array], Array]


class Unit(nnx.Module):
    """Convolution and BatchNormalization."""

    def __init__(
        self, channels: int, filters: int, kernel: int, stride: int = 1, groups: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        self.conv = nnx.Conv(
            channels, filters, (kernel, kernel), stride, feature_group_count=groups, use_bias=False, rngs=rngs
        )
        self.norm = nnx.BatchNorm(filters, use_running_average=True, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))


class ResNet(nnx.Module):
    """A stem with max pooling, a plain and a strided residual block."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = Unit(3, 12, 5, 2, rngs=rngs)
        self.a, self.b = Unit(12, 12, 3, rngs=rngs), Unit(12, 12, 3, rngs=rngs)
        self.c, self.d = Unit(12, 24, 3, 2, rngs=rngs), Unit(24, 24, 3, rngs=rngs)
        self.shortcut = Unit(12, 24, 1, 2, rngs=rngs)
        self.head = nnx.Linear(24, CLASSES, rngs=rngs)

    def features(self, x: Array, relu: Rectifier, relu6: Rectifier) -> Array:
        x = nnx.max_pool(relu(self.stem(x)), window_shape=(3, 3), strides=(2, 2), padding="SAME")
        x = relu(self.b(relu(self.a(x))) + x)
        return relu(self.d(relu(self.c(x))) + self.shortcut(x))

    def scores(self, x: Array) -> Array:
        return self.head(jnp.mean(x, (1, 2)))


class MobileNet(nnx.Module):
    """Inverted residuals with ReLU6, a squeeze-and-excitation gate, a hard swish."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = Unit(3, 8, 3, 2, rngs=rngs)
        self.expand, self.depthwise = Unit(8, 24, 1, rngs=rngs), Unit(24, 24, 3, groups=24, rngs=rngs)
        self.squeeze, self.excite = nnx.Linear(24, 6, rngs=rngs), nnx.Linear(6, 24, rngs=rngs)
        self.project, self.last = Unit(24, 8, 1, rngs=rngs), Unit(8, 32, 1, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def features(self, x: Array, relu: Rectifier, relu6: Rectifier) -> Array:
        x = relu6(self.stem(x))
        y = relu6(self.depthwise(relu6(self.expand(x))))
        gate = jax.nn.hard_sigmoid(self.excite(relu(self.squeeze(jnp.mean(y, (1, 2))))))
        x = x + self.project(y * gate[:, None, None, :])
        return jax.nn.hard_swish(self.last(x))

    def scores(self, x: Array) -> Array:
        return self.head(jnp.mean(x, (1, 2)))


class ConvNeXt(nnx.Module):
    """Depthwise 7x7, LayerNorm over the channels, GELU: no rectifier at all."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(3, 16, (4, 4), 4, rngs=rngs)
        self.depthwise = nnx.Conv(16, 16, (7, 7), feature_group_count=16, rngs=rngs)
        self.norm, self.last = nnx.LayerNorm(16, rngs=rngs), nnx.LayerNorm(16, rngs=rngs)
        self.wide, self.narrow = nnx.Linear(16, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)
        self.head = nnx.Linear(16, CLASSES, rngs=rngs)

    def features(self, x: Array, relu: Rectifier, relu6: Rectifier) -> Array:
        x = self.stem(x)
        return x + self.narrow(jax.nn.gelu(self.wide(self.norm(self.depthwise(x))), approximate=False))

    def scores(self, x: Array) -> Array:
        return self.head(self.last(jnp.mean(x, (1, 2))))


class Network(nnx.Module):
    """A network as it is exported: probabilities."""

    def __init__(self, body: nnx.Module) -> None:
        self.body = body

    def __call__(self, x: Array) -> Array:
        return jax.nn.softmax(self.body.scores(self.body.features(x, jax.nn.relu, jax.nn.relu6)))


def case(kind: type[nnx.Module]) -> Case:
    rng = np.random.default_rng(0)
    body = kind(nnx.Rngs(0))
    graph, state = nnx.split(body)
    drawn = jax.tree_util.tree_map_with_path(partial(_drawn, rng), state)
    network = Network(nnx.merge(graph, drawn))
    model = to_onnx(network, [("batch", 32, 32, 3)])
    del model.graph.value_info[:]
    coarse = np.kron(rng.standard_normal((IMAGES, 4, 4, 3)), np.ones((1, 8, 8, 1)))
    images = (rng.standard_normal((IMAGES, 32, 32, 3)) + 2 * coarse).astype(np.float32)
    targets = ranked(np.asarray(network(jnp.asarray(images))))
    return Case(model, "jax2onnx", images, targets, partial(reference, graph, drawn, images, targets))


def reference(
    graph: Any, state: Any, images: np.ndarray, targets: np.ndarray, features: np.ndarray | None
) -> Reference:
    exact = _maps(graph, state, jnp.asarray(images, jnp.float64), targets)
    here = exact.pop("features")
    assert features is not None
    for wanted in (features, features.transpose(0, 2, 3, 1)):
        if wanted.shape == here.shape and distance(wanted, here) < 1e-3:
            return Reference(
                exact, own_distances(lambda x: _maps(graph, state, jnp.asarray(x), targets), images, exact)
            )
    raise AssertionError(f"the target layer {features.shape} is not what the network calls its features {here.shape}")


def _maps(graph: Any, state: Any, x: Array, targets: np.ndarray) -> dict[str, np.ndarray]:
    body = nnx.merge(graph, jax.tree.map(lambda value: value.astype(x.dtype), state))

    def score(features: Array) -> Array:
        return body.scores(features)[jnp.arange(len(targets)), targets].sum()

    def gradient(relu: Rectifier, relu6: Rectifier) -> Array:
        return jax.grad(lambda x: score(body.features(x, relu, relu6)))(x)

    features = body.features(x, jax.nn.relu, jax.nn.relu6)
    weights = jax.grad(score)(features).mean((1, 2), keepdims=True)
    cam = jax.nn.relu((weights * features).sum(-1, keepdims=True))
    found = {
        "saliency": gradient(jax.nn.relu, jax.nn.relu6),
        "guided_backprop": gradient(_guided(jnp.inf), _guided(6.0)),
        "gradcam": jax.image.resize(cam, (*x.shape[:3], 1), "linear"),
        "features": features,
    }
    return {name: np.asarray(value) for name, value in found.items()}


def _guided(bound: float) -> Rectifier:
    """min(max(x, 0), bound); dx = dy f'(x) 1(x > 0) 1(dy > 0)"""

    @jax.custom_vjp
    def rectifier(x: Array) -> Array:
        return jnp.clip(x, 0, bound)

    rectifier.defvjp(
        lambda x: (rectifier(x), (x > 0) & (x < bound)),
        lambda is_open, dy: (jnp.where(is_open, jnp.maximum(dy, 0), 0),),
    )
    return rectifier


def _drawn(rng: np.random.Generator, path: Any, value: Array) -> Array:
    name, shape = jax.tree_util.keystr(path), value.shape
    if "scale" in name or "var" in name:
        drawn = rng.uniform(0.5, 1.5, shape)
    elif len(shape) < 2:
        drawn = 0.1 * rng.standard_normal(shape)
    else:
        drawn = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))
    return jnp.asarray(drawn, value.dtype)


CASES = {
    "residual": partial(case, ResNet),
    "inverted residual": partial(case, MobileNet),
    "ConvNeXt block": partial(case, ConvNeXt),
}
SMALL = {"jax_residual.onnx": lambda: case(ResNet).model}
