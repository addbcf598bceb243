"""How the backward pass is spelled for speed: equal to the simple spelling, and kept in the blocked layout."""

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import graphgbp
from graphgbp import blocked, lowerings, masks
from graphgbp.emit import Emitter
from graphgbp.rules import windows
from tests.maps import explain, relative_l2
from tests.networks import draw, export

METHODS = ["saliency", "guided_backprop", "gradcam"]
MAPS = ["saliency", "guided_backprop", "gradcam_gradients"]


class Residual(nn.Module):
    """A bottleneck of MobileNetV2's kind, whose depthwise convolution may be strided, beside a shortcut."""

    def __init__(self, channels: int, filters: int, stride: int, kernel: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 1),
            activation(),
            nn.Conv2d(32, 32, kernel, stride, kernel // 2, groups=32),
            activation(),
            nn.Conv2d(32, filters, 1),
        )
        plain = stride == 1 and channels == filters
        self.shortcut = nn.Identity() if plain else nn.Conv2d(channels, filters, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.shortcut(x)


class SqueezeExcite(nn.Module):
    """x times a gate for each channel."""

    def __init__(self, channels: int, gate: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 16, 1), nn.SiLU(), nn.Conv2d(16, channels, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Dense(nn.Module):
    """x beside what a layer makes of it, normalized first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 16, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1)


def network() -> nn.Module:
    """Every kind of layer that has a spelling of its own, on channels that fill blocks of 16."""
    layers = nn.Sequential(
        nn.Conv2d(3, 32, 7, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        Residual(32, 32, 1, 3, nn.ReLU6),
        Residual(32, 48, 2, 3, nn.SiLU),
        SqueezeExcite(48, nn.Sigmoid),
        Dense(48),
        Residual(64, 64, 2, 5, nn.Hardswish),
        SqueezeExcite(64, nn.Hardsigmoid),
        nn.Conv2d(64, 64, 3, 2, 1),
        nn.BatchNorm2d(64),
        nn.Tanh(),
        nn.AvgPool2d(3, 2, 1),
        nn.Conv2d(64, 32, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    draw(layers, torch.Generator().manual_seed(0))
    return layers


OPEN = {"static": (), "open batch": ("batch",), "open size": ("batch", "height", "width")}


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Strides leave over a row or a column at some layer."""
    return np.random.default_rng(0).standard_normal((2, 3, 180, 150), dtype=np.float32)


@pytest.fixture(scope="module", params=OPEN)
def model(request: pytest.FixtureRequest, images: np.ndarray) -> onnx.ModelProto:
    return export(network(), torch.from_numpy(images), dynamic=OPEN[request.param])


def _by_choice(g: Emitter, dy: gs.Tensor, x: gs.Tensor, bound: float = 0, *, above: bool) -> gs.Tensor:
    return masks.keep(g, dy, g.greater(x, g.like(x, 0)) if above else g.less(x, g.like(x, bound)))


def _by_conv_transpose(
    g: Emitter,
    dy: gs.Tensor,
    kernel: gs.Tensor,
    axes: Sequence[windows.Window],
    group: int,
    pads: Sequence[int],
    beyond: Sequence[int],
) -> gs.Tensor:
    return g.op(
        "ConvTranspose", dy, kernel, strides=[w.stride for w in axes], pads=[*pads, *pads],
        dilations=[w.dilation for w in axes], output_padding=list(beyond), group=group,
    )  # fmt: skip


SIMPLE: dict[str, list[tuple[object, str, Callable[..., object]]]] = {
    "masks by a choice": [
        (masks, "where_positive", partial(_by_choice, above=True)),
        (masks, "where_below", partial(_by_choice, above=False)),
    ],
    "never entering the blocked layout": [(blocked, "enter", lambda g, dx, x: g.with_shape(dx, x))],
    "one minus by a difference": [(blocked, "one_minus", lambda g, x: g.sub(g.like(x, 1), x))],
    "scaling by a scalar": [(blocked, "scale", lambda g, x, factor: g.scale(x, factor))],
    "strides by ConvTranspose": [(windows, "_strided", _by_conv_transpose)],
    "gates by the rules of their nodes": [(lowerings, "_gated", lambda view, wanted: ())],
}
SIMPLE["all of these"] = [change for changes in SIMPLE.values() for change in changes]


@pytest.mark.parametrize("spelling", SIMPLE)
def test_equals_the_simple_spelling(
    model: onnx.ModelProto, images: np.ndarray, spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = np.array([1, 3])
    ours = explain(model, images, targets, METHODS)
    respelled = graphgbp.convert(model, METHODS).graph
    for module, name, simple in SIMPLE[spelling]:
        monkeypatch.setattr(module, name, simple)
    assert respelled != graphgbp.convert(model, METHODS).graph, "nothing was respelled"
    simple = explain(model, images, targets, METHODS)
    for name in MAPS:
        assert relative_l2(ours[name], simple[name]) < 2e-6, f"{name}: {spelling}"


def test_gradient_equals_torch(model: onnx.ModelProto, images: np.ndarray) -> None:
    x = torch.from_numpy(images).double().requires_grad_()
    network().double()(x)[[0, 1], [1, 3]].sum().backward()
    saliency = explain(model, images, np.array([1, 3]), ["saliency"])["saliency"]
    assert relative_l2(saliency, x.grad.numpy()) < 1e-5  # at this seed rounding opens and shuts no ReLU


def optimised(model: onnx.ModelProto, path: Path) -> Counter[str]:
    """How many nodes of each operator ONNX Runtime's CPU provider makes of a model."""
    options = ort.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(path)
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the blocked layout is x86-64's")
@pytest.mark.parametrize("sizes", OPEN)
def test_few_tensors_leave_the_blocked_layout(sizes: str, tmp_path: Path) -> None:
    """A reordering for each place where the layout must be left, and none for each layer."""
    model = export(resnet(blocks=12), torch.zeros(1, 3, 64, 64), dynamic=OPEN[sizes])
    ops = optimised(graphgbp.convert(model, ["guided_gradcam"]), tmp_path / "optimised.onnx")
    assert ops["Conv"] > 60
    assert ops["ReorderInput"] + ops["ReorderOutput"] < 20, ops


def resnet(blocks: int) -> nn.Module:
    """A chain of residual blocks behind a pooled stem, with one stride among them."""
    chain = [Residual(32, 32, 1 + (index == blocks // 2), 3, nn.ReLU) for index in range(blocks)]
    stem = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers = nn.Sequential(*stem, *chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5))
    draw(layers, torch.Generator().manual_seed(0))
    return layers
