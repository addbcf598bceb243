"""Small torch networks built of the blocks of well-known architectures, every parameter drawn, and their export.

They are deep enough for a wrong rule to show and narrow enough to be quick. Rectifiers are nn.ReLU modules, one per
use and not in place, as Captum needs them; other spellings of the same network keep the same weights.
"""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_num_threads(1)  # the tensors are small: threads would wait for each other longer than they compute

CLASSES = 10
Rectifier = Callable[[], nn.Module]


class Function(nn.Module):
    """A function as a module: what it calls stays invisible to whoever looks for nn.ReLU."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def reused(module: nn.Module) -> Rectifier:
    return lambda: module


RECTIFIERS: dict[str, Callable[[], Rectifier]] = {
    "modules": lambda: nn.ReLU,
    "functional": lambda: partial(Function, F.relu),
    "reused": lambda: reused(nn.ReLU()),
    "reused in place": lambda: reused(nn.ReLU(inplace=True)),
    "clamp": lambda: partial(Function, lambda x: torch.clamp(x, min=0)),
    "maximum": lambda: partial(Function, lambda x: torch.maximum(x, torch.zeros_like(x))),
    "where": lambda: partial(Function, lambda x: torch.where(x > 0, x, 0.0)),
    "where, mirrored": lambda: partial(Function, lambda x: torch.where(x <= 0, torch.zeros_like(x), x)),
}


def conv(channels: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, filters, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_norm(channels: int, filters: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(conv(channels, filters, kernel, stride, groups), nn.BatchNorm2d(filters))


class Residual(nn.Module):
    """relu(body(x) + shortcut(x)): ResNet's block, its shortcut a strided 1x1 convolution where the shape changes."""

    def __init__(self, body: nn.Module, channels: int, filters: int, stride: int, relu: Rectifier) -> None:
        super().__init__()
        self.body = body
        plain = stride == 1 and channels == filters
        self.shortcut = nn.Identity() if plain else conv_norm(channels, filters, stride=stride)
        self.relu = relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def basic_block(channels: int, filters: int, stride: int, relu: Rectifier) -> Residual:
    body = nn.Sequential(
        conv_norm(channels, filters, 3, stride),
        relu(),
        conv_norm(filters, filters, 3),
    )
    return Residual(body, channels, filters, stride, relu)


def bottleneck(channels: int, filters: int, stride: int, relu: Rectifier) -> Residual:
    narrow = filters // 4
    body = nn.Sequential(
        conv_norm(channels, narrow),
        relu(),
        conv_norm(narrow, narrow, 3, stride),
        relu(),
        conv_norm(narrow, filters),
    )
    return Residual(body, channels, filters, stride, relu)


class Concatenated(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def dense_layer(channels: int, growth: int, relu: Rectifier) -> Concatenated:
    new = nn.Sequential(
        nn.BatchNorm2d(channels),
        relu(),
        conv(channels, 2 * growth),
        nn.BatchNorm2d(2 * growth),
        relu(),
        conv(2 * growth, growth, 3),
    )
    return Concatenated(nn.Identity(), new)


def transition(channels: int, filters: int, relu: Rectifier) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(channels), relu(), conv(channels, filters), nn.AvgPool2d(2))


def inception(channels: int, widths: Sequence[int], relu: Rectifier) -> Concatenated:
    """GoogLeNet's block; its widths are 1x1, reduce and 3x3, reduce and 5x5, and the pool's projection."""
    one, reduce3, three, reduce5, five, pool = widths

    def unit(channels: int, filters: int, kernel: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(channels, filters, kernel, padding=kernel // 2), relu()]

    return Concatenated(
        nn.Sequential(*unit(channels, one)),
        nn.Sequential(*unit(channels, reduce3), *unit(reduce3, three, 3)),
        nn.Sequential(*unit(channels, reduce5), *unit(reduce5, five, 5)),
        nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), *unit(channels, pool)),
    )


def fire(channels: int, squeeze: int, expand: int, relu: Rectifier) -> nn.Sequential:
    """SqueezeNet's block."""
    return nn.Sequential(
        nn.Conv2d(channels, squeeze, 1),
        relu(),
        Concatenated(
            nn.Sequential(nn.Conv2d(squeeze, expand, 1), relu()),
            nn.Sequential(nn.Conv2d(squeeze, expand, 3, padding=1), relu()),
        ),
    )


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project; the shortcut where the shape stays."""

    def __init__(self, channels: int, filters: int, stride: int, expansion: int, relu: Rectifier) -> None:
        super().__init__()
        wide = channels * expansion
        self.body = nn.Sequential(
            conv_norm(channels, wide),
            relu(),
            conv_norm(wide, wide, 3, stride, groups=wide),
            relu(),
            conv_norm(wide, filters),
        )
        self.residual = stride == 1 and channels == filters

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Classifier(nn.Module):
    """features, then head. `target` names the module whose output Grad-CAM is expected to choose."""

    def __init__(self, features: nn.Module, head: nn.Module, target: nn.Module) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.target = next(name for name, module in self.named_modules() if module is target)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def pooled(features: nn.Sequential, channels: int, *, target: nn.Module | None = None) -> Classifier:
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, CLASSES))
    return Classifier(features, head, target or features[-1])


def resnet_basic(relu: Rectifier) -> Classifier:
    return _resnet(relu, basic_block, (12, 16, 24))


def resnet_bottleneck(relu: Rectifier) -> Classifier:
    return _resnet(relu, bottleneck, (16, 32, 48))


def _resnet(relu: Rectifier, block: Callable[..., Residual], widths: Sequence[int]) -> Classifier:
    layers = [conv_norm(3, 12, 7, 2), relu(), nn.MaxPool2d(3, 2, 1)]
    channels = 12
    for stage, filters in enumerate(widths):
        layers += [block(channels, filters, 2 if stage else 1, relu), block(filters, filters, 1, relu)]
        channels = filters
    features = nn.Sequential(*layers)
    return pooled(features, channels, target=features[-1].relu)


def vgg(relu: Rectifier) -> Classifier:
    """Its classifier reads an adaptive pool of 2x2 through two hidden layers."""
    layers: list[nn.Module] = []
    channels = 3
    for filters, depth in ((12, 2), (16, 2), (24, 3), (32, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, filters, 3, padding=1), relu()]
            channels = filters
        layers.append(nn.MaxPool2d(2))
    hidden = [nn.Linear(4 * channels, 64), relu(), nn.Dropout(), nn.Linear(64, 64), relu(), nn.Dropout()]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), *hidden, nn.Linear(64, CLASSES))
    features = nn.Sequential(*layers)
    return Classifier(features, head, features[-1])


def densenet(relu: Rectifier, growth: int = 8) -> Classifier:
    layers: list[nn.Module] = [conv_norm(3, 16, 7, 2), relu(), nn.MaxPool2d(3, 2, 1)]
    channels = 16
    for block, depth in enumerate((3, 3, 3)):
        if block:
            layers.append(transition(channels, channels // 2, relu))
            channels //= 2
        for _ in range(depth):
            layers.append(dense_layer(channels, growth, relu))
            channels += growth
    features = nn.Sequential(*layers, nn.BatchNorm2d(channels), relu())
    return pooled(features, channels, target=features[-2])


def googlenet(relu: Rectifier) -> Classifier:
    return _googlenet(relu, nn.BatchNorm2d)


def googlenet_lrn(relu: Rectifier) -> Classifier:
    """With local response normalization, as first published."""
    return _googlenet(relu, lambda channels: nn.LocalResponseNorm(5))


def _googlenet(relu: Rectifier, norm: Callable[[int], nn.Module]) -> Classifier:
    features = nn.Sequential(
        nn.Conv2d(3, 12, 7, 2, 3), relu(), nn.MaxPool2d(3, 2, ceil_mode=True), norm(12),
        nn.Conv2d(12, 12, 1), relu(), nn.Conv2d(12, 24, 3, padding=1), relu(),
        norm(24), nn.MaxPool2d(3, 2, ceil_mode=True),
        inception(24, (8, 8, 16, 4, 8, 8), relu), inception(40, (8, 8, 16, 4, 8, 8), relu),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        inception(40, (12, 8, 24, 4, 8, 8), relu),
    )  # fmt: skip
    return pooled(features, 52)


def squeezenet(relu: Rectifier) -> Classifier:
    """Its head is a convolution, a ReLU and a mean: the scores are never negative, its maps are one for each class."""
    features = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), relu(), nn.MaxPool2d(3, 2, ceil_mode=True),
        fire(16, 6, 12, relu), fire(24, 6, 12, relu), nn.MaxPool2d(3, 2, ceil_mode=True),
        fire(24, 8, 16, relu), fire(32, 8, 16, relu),
    )  # fmt: skip
    head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(32, CLASSES, 1), relu(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(features, head, features[-1])


def mobilenet(relu: Rectifier) -> Classifier:
    plan = ((12, 1, 1), (16, 2, 4), (16, 1, 4), (24, 2, 4), (24, 1, 4))
    layers: list[nn.Module] = [conv_norm(3, 12, 3, 2), relu()]
    channels = 12
    for filters, stride, expansion in plan:
        layers.append(InvertedResidual(channels, filters, stride, expansion, relu))
        channels = filters
    return pooled(nn.Sequential(*layers, conv_norm(channels, 48), relu()), 48)


ARCHITECTURES: dict[str, Callable[[Rectifier], Classifier]] = {
    "resnet_basic": resnet_basic,
    "resnet_bottleneck": resnet_bottleneck,
    "vgg": vgg,
    "densenet": densenet,
    "googlenet": googlenet,
    "googlenet_lrn": googlenet_lrn,
    "squeezenet": squeezenet,
    "mobilenet": mobilenet,
}


def build(architecture: str, relu: str | Rectifier = "modules", *, spread: float = 1.0, seed: int = 0) -> Classifier:
    """A network in eval mode, its weights the same however its rectifiers are written.

    `spread` is the standard deviation of what BatchNorm puts out.
    """
    rectifier = RECTIFIERS[relu]() if isinstance(relu, str) else relu
    network = ARCHITECTURES[architecture](rectifier)
    draw(network, torch.Generator().manual_seed(seed), spread)
    return network


def draw(network: nn.Module, generator: torch.Generator, spread: float = 1.0) -> None:
    """Draw every parameter, calibrate every BatchNorm, and leave the network in eval mode.

    Convolutions He-normal, BatchNorm's scale around `spread` and its bias around 0, the last layer N(0, 0.02).
    """
    normal = partial(torch.nn.init.normal_, generator=generator)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                normal(module.weight, std=0.02 if module is layers[-1] else math.sqrt(2 / module.weight[0].numel()))
                if module.bias is not None:
                    normal(module.bias, std=0.02 if module is layers[-1] else 0.1)
            elif isinstance(module, nn.BatchNorm2d):
                normal(module.weight, mean=spread, std=0.1 * spread).clamp_(min=0.5 * spread)
                normal(module.bias, std=0.1 * spread)
        calibrate(network, generator)


def calibrate(network: nn.Module, generator: torch.Generator) -> None:
    """Set the running statistics to those of random images, seen by a network otherwise in eval mode."""
    network.eval()
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = None
    for _ in range(2 if norms else 0):
        network(torch.randn(16, 3, 64, 64, generator=generator))
    network.eval()


def export(
    network: nn.Module,
    x: Tensor,
    exporter: str = "torchscript",
    opset: int = 18,
    dynamic: Sequence[str] = ("batch", "height", "width"),
    outputs: Sequence[str] = ("scores",),
    **options: object,
) -> onnx.ModelProto:
    """`image` to `outputs`, by torch's "dynamo" or "torchscript" exporter, the sizes in `dynamic` left open."""
    axes = {axis: name for axis, name in ((0, "batch"), (2, "height"), (3, "width")) if name in dynamic}
    names = {"input_names": ["image"], "output_names": list(outputs), "opset_version": opset}
    if exporter == "dynamo":
        sizes = {axis: torch.export.Dim.DYNAMIC for axis in axes}
        names |= {"dynamic_shapes": (sizes,), **options}
        program = torch.onnx.export(network, (x,), dynamo=True, verbose=False, **names)
        assert program is not None
        model = program.model_proto
    else:
        buffer = io.BytesIO()
        batch = {axis: name for axis, name in axes.items() if axis == 0}
        open_axes = {"image": axes, **dict.fromkeys(outputs, batch)}
        torch.onnx.export(network, (x,), buffer, dynamo=False, dynamic_axes=open_axes, **names, **options)
        model = onnx.load_from_string(buffer.getvalue())
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert [axis for axis, size in enumerate(sizes) if size.dim_param] == list(axes), "another size is open than asked"
    return model
