"""The networks of docs/networks.md: how each is built, its input, and weights that leave nothing untested.

Weights are random. A library's own initialisation can hide a wrong rule: a head of zeros, a layer scale of 1e-6, a
normalization that does nothing. `draw` therefore draws every parameter that the initialisation left constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import small_networks
import timm
import torch
import torchvision
from torch import nn


@dataclass(frozen=True)
class Network:
    """`build` makes it with random weights; `size` is the side of its square input; `task` what its output is.

    `channels_last`: its layers give [N, h, w, C]; `layer`: where pytorch-grad-cam's README takes Grad-CAM.
    """

    library: str
    name: str
    build: Callable[[], nn.Module]
    size: int = 224
    task: str = "classification"
    channels_last: bool = False
    outputs: tuple[str, ...] = ("scores",)
    explained: str = "scores"
    layer: str | None = None

    @property
    def key(self) -> str:
        return f"{self.library}/{self.name}"


class Scores(nn.Module):
    """A torchvision segmentation network whose output is the tensor of scores, not the dictionary around it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image)["out"]

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        return self.network.load_state_dict(*arguments, **options)


def from_torchvision(name: str, **options: Any) -> nn.Module:
    """A torchvision classifier or segmentation network, weights random, without heads that exist for training only."""
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True, **options}
    if name not in torchvision.models.list_models(module=torchvision.models.segmentation):
        return torchvision.models.get_model(name, weights=None, **options)
    return Scores(torchvision.models.get_model(name, weights=None, weights_backbone=None, **options))


def from_timm(name: str, **options: Any) -> nn.Module:
    """A timm network, weights random."""
    return timm.create_model(name, pretrained=False, **options)


def _torchvision(name: str, size: int = 224, **about: Any) -> Network:
    return Network("torchvision", name, lambda: from_torchvision(name), size, **about)


def _timm(name: str, size: int = 224, **about: Any) -> Network:
    return Network("timm", name, lambda: from_timm(name), size, **about)


def _segmentation(name: str) -> Network:
    return Network("torchvision", name, lambda: from_torchvision(name, num_classes=5), 96, "segmentation")


def _own(name: str, build: Callable[[], nn.Module], task: str, **about: Any) -> Network:
    return Network("scripts", name, build, 96, task, **about)


NETWORKS = {
    network.key: network
    for network in (
        _torchvision("resnet18", layer="layer4.1"),
        _torchvision("resnet50", layer="layer4.2"),
        _torchvision("vgg16", layer="features.30"),
        _torchvision("alexnet"),
        _torchvision("googlenet", 128),
        _torchvision("inception_v3", 160),
        _torchvision("squeezenet1_1", 128),
        _torchvision("shufflenet_v2_x1_0", 128),
        _torchvision("densenet121", 128, layer="features.norm5"),
        _torchvision("mnasnet1_0", 128),
        _torchvision("mobilenet_v2", 128, layer="features.18"),
        _torchvision("mobilenet_v3_large", 128, layer="features.16"),
        _torchvision("efficientnet_b0", 128),
        _torchvision("efficientnet_v2_s", 128),
        _torchvision("regnet_x_400mf", 128),
        _torchvision("regnet_y_400mf", 128),
        _torchvision("convnext_tiny", 128),
        _torchvision("vit_b_16", layer="encoder.layers.encoder_layer_11.ln_1"),
        _torchvision("swin_t", channels_last=True, layer="features.7.1.norm1"),
        _torchvision("swin_v2_t", 128, channels_last=True),
        _torchvision("maxvit_t"),
        _timm("resnet50d", 128, layer="layer4.2"),
        _timm("vit_small_patch16_224", layer="blocks.11.norm1"),
        _timm("deit_tiny_patch16_224", layer="blocks.11.norm1"),
        _timm("swin_tiny_patch4_window7_224", channels_last=True, layer="layers.3.blocks.1.norm1"),
        _timm("convnext_tiny", 128),
        _timm("efficientnet_b0", 128),
        _timm("mobilenetv3_large_100", 128),
        _own("unet_transposed", lambda: small_networks.UNet(transposed=True), "segmentation"),
        _own("unet_resize", lambda: small_networks.UNet(transposed=False), "segmentation"),
        _segmentation("deeplabv3_mobilenet_v3_large"),
        _segmentation("fcn_resnet50"),
        _own("yolo_like", small_networks.Yolo, "detection"),
        _own("rtdetr_like", small_networks.RTDETR, "detection", outputs=("scores", "boxes")),
        _own("rtdetr_like_boxes", small_networks.RTDETR, "detection", outputs=("scores", "boxes"), explained="boxes"),
    )
}


def example(network: Network, images: int = 2, seed: int = 0) -> torch.Tensor:
    """Standard normal images."""
    return torch.randn(images, 3, network.size, network.size, generator=torch.Generator().manual_seed(seed))


def make(network: Network, seed: int = 0) -> nn.Module:
    """The network with every parameter drawn and its BatchNorms calibrated, in evaluation mode, float32."""
    torch.manual_seed(seed)
    module = network.build()
    draw(module)
    calibrate(module, example(network, 4, seed=seed + 1))
    return module.eval().requires_grad_(False)


@torch.no_grad()
def draw(module: nn.Module) -> None:
    """Draw anew each parameter whose elements are all equal, and a layer scale whatever it is."""
    for path, parameter in module.named_parameters():
        name = path.rpartition(".")[2]
        if "layer_scale" in path or name == "gamma":
            parameter.uniform_(0.5, 1.5)
        elif bool((parameter == parameter.flatten()[0]).all()):
            if name == "weight" and parameter.dim() == 1:  # a normalization
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() <= 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.02)


@torch.no_grad()
def calibrate(module: nn.Module, images: torch.Tensor) -> None:
    """Set the running statistics of every BatchNorm to those of a batch."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average
    module.train()
    module(images)
    module.eval()
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
