"""Networks of paddle.vision through paddle2onnx, held against Paddle's autograd in float64.

The guided rule is a PyLayer that stands in for F.relu and F.relu6, which nn.ReLU and nn.ReLU6 call too.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import paddle
import paddle.nn.functional as F
from exporters_table import IMAGES, Case, Reference, distance, own_distances, ranked
from paddle import Tensor, nn

CLASSES = 100
OPSET = 11
SIZES = {
    "googlenet": 224,
    "mobilenet_v2": 96,
    "mobilenet_v3_small": 96,
    "resnet18": 96,
    "shufflenet_v2_x0_25": 96,
    "squeezenet1_1": 96,
    "vgg11": 224,
}
Function = Callable[..., Tensor]


def case(name: str) -> Case:
    paddle.seed(0)
    network = getattr(paddle.vision.models, name)(num_classes=CLASSES)
    rng = np.random.default_rng(1)
    images = drawn_images(IMAGES, SIZES[name], rng)
    draw(network, SIZES[name], rng)
    targets = ranked(first(network(paddle.to_tensor(images))).numpy())
    return Case(
        export(network, SIZES[name]), "paddle2onnx", images, targets, partial(reference, network, images, targets)
    )


def draw(network: nn.Layer, size: int, rng: np.random.Generator) -> None:
    """Draw every parameter; BatchNormalization's statistics around those of random images. Leaves it in eval mode."""
    for parameter in network.parameters():
        shape = parameter.shape
        if len(shape) < 2:
            drawn = 0.1 * rng.standard_normal(shape) + (
                1.0 if "_w" in parameter.name or "scale" in parameter.name else 0.0
            )
        else:
            fan_in = np.prod(shape[1:]) if len(shape) == 4 else shape[0]
            drawn = rng.standard_normal(shape) * np.sqrt(2 / fan_in)
        parameter.set_value(drawn.astype(np.float32))
    norms = [layer for layer in network.sublayers() if isinstance(layer, nn.BatchNorm2D)]
    for norm in norms:
        norm._momentum = 0.0
    network.train()
    network(paddle.to_tensor(drawn_images(8, size, rng)))
    network.eval()
    for norm in norms:
        spread = rng.uniform(0.8, 1.25, norm._variance.shape)
        norm._variance.set_value((norm._variance.numpy() * spread + 1e-3).astype(np.float32))


def drawn_images(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    coarse = np.kron(rng.standard_normal((count, 3, 4, 4)), np.ones((1, 1, size // 4, size // 4)))
    return (rng.standard_normal((count, 3, size, size)) + 2 * coarse).astype(np.float32)


def export(network: nn.Layer, size: int) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        spec = [paddle.static.InputSpec([None, 3, size, size], "float32", "image")]
        paddle.onnx.export(network, f"{folder}/network", input_spec=spec, opset_version=OPSET)
        return onnx.load(Path(folder) / "network.onnx")


def first(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """The scores: GoogLeNet gives those of its auxiliary heads too."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def reference(network: nn.Layer, images: np.ndarray, targets: np.ndarray, features: np.ndarray | None) -> Reference:
    assert features is not None
    exact_network = copy.deepcopy(network).to(dtype="float64")
    exact = _maps(exact_network, paddle.to_tensor(images.astype(np.float64)), targets, features)
    single = partial(_maps, network, targets=targets, features=features)
    return Reference(exact, own_distances(lambda x: single(paddle.to_tensor(x)), images, exact))


def _maps(network: nn.Layer, x: Tensor, targets: np.ndarray, features: np.ndarray) -> dict[str, np.ndarray]:
    x.stop_gradient = False
    with _recorded(network) as made:
        score = _score(network, x, targets)
    here = next(
        value for value in made if value.shape == list(features.shape) and distance(features, value.numpy()) < 1e-2
    )
    saliency, gradients = paddle.grad(score, [x, here], retain_graph=True)
    cam = F.relu((gradients.mean((2, 3), keepdim=True) * here).sum(1, keepdim=True))
    with mock.patch.object(F, "relu", _guided(np.inf)), mock.patch.object(F, "relu6", _guided(6.0)):
        (guided,) = paddle.grad(_score(network, x, targets), [x])
    return {
        "saliency": saliency.numpy(),
        "guided_backprop": guided.numpy(),
        "gradcam": F.interpolate(cam, x.shape[2:], mode="bilinear", align_corners=False).numpy(),
    }


def _score(network: nn.Layer, x: Tensor, targets: np.ndarray) -> Tensor:
    scores = first(network(x))
    return sum(scores[index, int(target)] for index, target in enumerate(targets))


@contextlib.contextmanager
def _recorded(network: nn.Layer) -> Iterator[list[Tensor]]:
    """Every tensor that a layer, a ReLU or a concatenation makes."""
    made: list[Tensor] = []

    def kept(function: Function) -> Function:
        def call(*inputs: Any, **options: Any) -> Tensor:
            made.append(function(*inputs, **options))
            return made[-1]

        return call

    hooks = [
        layer.register_forward_post_hook(lambda layer, inputs, output: made.append(first(output)))
        for layer in network.sublayers()
    ]
    with mock.patch.object(F, "relu", kept(F.relu)), mock.patch.object(paddle, "concat", kept(paddle.concat)):
        yield made
    for hook in hooks:
        hook.remove()


def _guided(bound: float) -> Function:
    """min(max(x, 0), bound); dx = dy f'(x) 1(x > 0) 1(dy > 0)"""

    class Rectifier(paddle.autograd.PyLayer):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.clip(0.0, bound)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            (x,) = ctx.saved_tensor()
            return dy * ((x > 0) & (x < bound) & (dy > 0)).astype(dy.dtype)

    return lambda x, name=None: Rectifier.apply(x)


class Gated(nn.Layer):
    """Squeeze and excitation: a ReLU and a hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2D(channels, channels // 4, 1), nn.Conv2D(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


def small() -> onnx.ModelProto:
    """MobileNetV3's parts: hard swish, depthwise convolution, a gate, ReLU6, max pooling, softmax."""
    paddle.seed(0)
    network = nn.Sequential(
        *(nn.Conv2D(3, 12, 3, 2, 1, bias_attr=False), nn.BatchNorm2D(12), nn.Hardswish()),
        *(nn.Conv2D(12, 12, 5, 1, 2, groups=12, bias_attr=False), nn.BatchNorm2D(12), nn.ReLU(), Gated(12)),
        *(nn.Conv2D(12, 24, 3, 2, 1, bias_attr=False), nn.BatchNorm2D(24), nn.ReLU6(), nn.MaxPool2D(2)),
        *(nn.AdaptiveAvgPool2D(1), nn.Flatten(), nn.Linear(24, 10), nn.Softmax()),
    )
    draw(network, 32, np.random.default_rng(0))
    return export(network, 32)


CASES = {name: partial(case, name) for name in SIZES}
SMALL = {"paddle_mobile.onnx": small}
