"""The networks of docs/bench.md: exported once with drawn weights, and kept in a folder."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

import graphgbp

if TYPE_CHECKING:
    from torch import nn

TITLES = {
    "resnet50": "ResNet-50",
    "vgg16": "VGG-16",
    "mobilenet_v2": "MobileNetV2",
    "densenet121": "DenseNet-121",
    "efficientnet_b0": "EfficientNet-B0",
    "convnext_tiny": "ConvNeXt-T",
    "vit_b_16": "ViT-B/16",
}
"""torchvision's name, and the paper's."""
CACHE = Path(__file__).resolve().parent.parent / "build" / "bench"
SIZE = 224


def measured_version() -> str:
    """graphgbp's version and, in a checkout, its commit."""
    command = ["git", "-C", str(Path(graphgbp.__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{graphgbp.__version__} ({done.stdout.strip()})" if done.returncode == 0 else graphgbp.__version__


def module(name: str) -> nn.Module:
    """The network in torch, in evaluation mode: every parameter drawn by a fixed seed, BatchNorms calibrated."""
    import torch
    from vision_networks import calibrate, draw, from_torchvision

    torch.manual_seed(0)
    network = from_torchvision(name)
    draw(network)
    calibrate(network, torch.randn(4, 3, SIZE, SIZE))
    return network.eval().requires_grad_(False)


def exported(name: str, cache: Path, size: int = SIZE, *, static: bool = False) -> Path:
    """The network's file, by torch's default exporter: a batch of any size, or of one image where `static`."""
    path = cache / f"{name}.{size}{'.static' if static else ''}.onnx"
    if not path.exists():
        import torch
        from torch_export import export

        images = torch.zeros(1 if static else 2, 3, size, size)
        model = export(module(name), images, ["scores"], "dynamo", dynamic_batch=not static)
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        onnx.save(model, partial)
        partial.rename(path)
    return path


def weights_path(name: str, cache: Path) -> Path:
    return cache / f"{name}.pt"


def weights(name: str, cache: Path) -> Path:
    """The network's weights as torch saves them."""
    path = weights_path(name, cache)
    if not path.exists():
        import torch

        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(module(name).state_dict(), partial)
        partial.rename(path)
    return path


def loaded(name: str, cache: Path) -> nn.Module:
    """The network in torch as torchvision gives it to who asks for weights: made, then filled with those of a file.

    No activation overwrites its input, as Captum asks; parameters are left as they are, not frozen.
    """
    import torch
    import torchvision

    network: nn.Module = torchvision.models.get_model(name, weights=None).eval()
    network.load_state_dict(torch.load(weights(name, cache)))
    for part in network.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010  no attribute that Module declares
    return network
