"""Grad-CAM at the layer `auto` chooses, against pytorch-grad-cam at the layer its README names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_reference as reference
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from vision_networks import Network

TOLERANCE, SLACK = 1e-4, 3.0
"""How far scaled maps may be from pytorch-grad-cam's in float64, or so many times as far as its own in float32 is."""
ReshapeTransform = Callable[[Tensor], Tensor]


def cam_row(
    network: Network,
    layer: str,
    module: nn.Module,
    images: Tensor,
    classes: Sequence[int],
    ours: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The largest absolute difference of the scaled maps, and whether `auto` is the layer of the README."""
    features = output_of(layer, module, images)
    same_layer = (
        features.shape == ours["gradcam_features"].shape
        and reference.relative(ours["gradcam_features"], features) < reference.SAME
    )
    tokens = None if features.ndim == 4 and not network.channels_last else _grid(network.channels_last)
    wanted, rounded = (
        pytorch_grad_cam(layer, module, images.to(dtype), classes, tokens) for dtype in (torch.float64, torch.float32)
    )
    difference = float(np.abs(scaled(ours["gradcam"][:, 0]) - wanted).max())
    own = float(np.abs(rounded - wanted).max())
    blank = int((wanted.max((1, 2)) == 0).sum())
    right = same_layer and difference <= max(TOLERANCE, SLACK * own) and blank < len(wanted)
    return {
        "layer": layer,
        "auto": same_layer,
        "difference": difference,
        "float32": own,
        "blank": blank,
        "verdict": "right" if right else "wrong",
    }


def _grid(channels_last: bool) -> ReshapeTransform:
    return lambda x: reference.as_grid(x, channels_last)


def scaled(cam: np.ndarray) -> np.ndarray:
    """Each map [N, H, W] over its own range, as pytorch-grad-cam does; a blank one stays blank."""
    low = cam - cam.min((1, 2), keepdims=True)
    high = low.max((1, 2), keepdims=True)
    return np.divide(low, high, out=np.zeros_like(low), where=high > 0)


def pytorch_grad_cam(
    layer: str, module: nn.Module, images: Tensor, classes: Sequence[int], reshape_transform: ReshapeTransform | None
) -> np.ndarray:
    """pytorch-grad-cam's maps [N, H, W], in the images' type."""
    copied = reference.out_of_place(module, images.dtype).requires_grad_()
    layers = [copied.get_submodule(layer)]
    targets = [ClassifierOutputTarget(index) for index in classes]
    with reference.OutOfPlace(), GradCAM(copied, layers, reshape_transform=reshape_transform) as cam:
        return cam(images, targets)


def output_of(layer: str, module: nn.Module, images: Tensor) -> np.ndarray:
    """What a layer gives, in float32."""
    kept: list[np.ndarray] = []
    copied = reference.out_of_place(module, torch.float32)
    copied.get_submodule(layer).register_forward_hook(lambda _, __, output: kept.append(output.numpy()))
    with torch.no_grad(), reference.OutOfPlace():
        copied(images)
    return kept[-1]
