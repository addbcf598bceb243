"""Torch's maps: Captum's, and those of hooks and autograd functions written here. Nothing here knows of graphgbp."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import captum.attr
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Maps = dict[str, Tensor]
MapsOf = Callable[[nn.Module, Tensor, Tensor], Maps]
Score = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of a network, images and targets: one number per image


def scores_of(network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return network(images)[torch.arange(len(images)), targets]


def gradient(network: nn.Module, images: Tensor, targets: Tensor, score: Score = scores_of) -> Tensor:
    images = images.clone().requires_grad_()
    return torch.autograd.grad(score(network, images, targets).sum(), images)[0]


def layer_values(network: nn.Module, layer: str, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The output of a module, the last time it runs, and the score's gradient with respect to it."""
    seen: list[Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        score = scores_of(network, images.clone().requires_grad_(), targets).sum()
    finally:
        hook.remove()
    return seen[-1].detach(), torch.autograd.grad(score, seen[-1])[0]


def runs(network: nn.Module, kinds: tuple[type[nn.Module], ...], images: Tensor) -> list[tuple[nn.Module, Tensor]]:
    """The modules of some kinds in the order they run, each with its input."""
    ran: list[tuple[nn.Module, Tensor]] = []
    modules = [module for module in network.modules() if isinstance(module, kinds)]
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: ran.append((module, inputs[0].clone())))
        for module in modules
    ]
    try:
        with torch.no_grad():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def cam_of(features: Tensor, gradients: Tensor) -> Tensor:
    return cams_of(features, gradients)["gradcam"]


def cams_of(features: Tensor, gradients: Tensor) -> Maps:
    """The CAM family as its papers write it, [N, 1, *positions], without ReLU; channels on axis 1, for double."""
    axes = tuple(range(2, features.ndim))
    total = features.sum(axes, keepdim=True)
    alpha = gradients**2 / (2 * gradients**2 + total * gradients**3)
    weights = {
        "gradcam": gradients.mean(axes, keepdim=True),
        "hirescam": gradients,
        "layercam": gradients.relu(),
        "gradcam_plusplus": torch.where(gradients != 0, alpha * gradients.relu(), 0).sum(axes, keepdim=True),
        "xgradcam": torch.where(total != 0, gradients * features / total, 0).sum(axes, keepdim=True),
    }
    return {method: (weight * features).sum(1, keepdim=True) for method, weight in weights.items()}


def captum_maps(layer: str) -> MapsOf:
    """Captum's maps for nn.ReLU networks, Grad-CAM at `layer`; features and gradients by torch hooks."""

    def maps(network: nn.Module, images: Tensor, targets: Tensor) -> Maps:
        at = network.get_submodule(layer)
        features, gradients = layer_values(network, layer, images, targets)
        images = images.clone().requires_grad_()
        found = {
            "saliency": captum.attr.Saliency(network).attribute(images, targets, abs=False),
            "input_x_gradient": captum.attr.InputXGradient(network).attribute(images, targets),
            "guided_backprop": captum.attr.GuidedBackprop(network).attribute(images, targets),
            "deconvnet": captum.attr.Deconvolution(network).attribute(images, targets),
            "cam": captum.attr.LayerGradCam(network, at).attribute(images, targets),
            "guided_gradcam": captum.attr.GuidedGradCam(network, at).attribute(images, targets),
            "gradcam_features": features,
            "gradcam_gradients": gradients,
        }
        return {name: value.detach() for name, value in found.items()}

    return maps


def hook_maps(layer: str) -> MapsOf:
    """The same maps without Captum, for networks whose rectifiers are nn.ReLU or nn.ReLU6."""

    def maps(network: nn.Module, images: Tensor, targets: Tensor) -> Maps:
        features, gradients = layer_values(network, layer, images, targets)
        cam = cam_of(features, gradients)
        guided = gradient(with_rectifiers(network, GuidedRectifier), images, targets)
        return {
            "saliency": gradient(network, images, targets),
            "input_x_gradient": images * gradient(network, images, targets),
            "guided_backprop": guided,
            "deconvnet": gradient(with_rectifiers(network, DeconvRectifier), images, targets),
            "cam": cam,
            "guided_gradcam": guided * F.interpolate(cam.relu(), images.shape[2:], mode="nearest"),
            "gradcam_features": features,
            "gradcam_gradients": gradients,
        }

    return maps


class GuidedRectifier(torch.autograd.Function):
    """dx = dy f'(x) 1(x > 0) 1(dy > 0), f = min(max(x, 0), bound)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < bound))
        return x.clamp(0, bound)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (open_,) = ctx.saved_tensors
        return dy * open_ * (dy > 0), None


class DeconvRectifier(torch.autograd.Function):
    """dx = dy 1(dy > 0)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        return x.clamp(0, bound)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy * (dy > 0), None


class Rectified(nn.Module):
    def __init__(self, function: type[torch.autograd.Function], bound: float) -> None:
        super().__init__()
        self.function, self.bound = function, bound

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x, self.bound)


def with_rectifiers(network: nn.Module, function: type[torch.autograd.Function]) -> nn.Module:
    """A copy of the network in which every nn.ReLU and nn.ReLU6 goes backward by `function`."""
    network = copy.deepcopy(network)
    replaced = 0
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(parent, name, Rectified(function, 6.0 if isinstance(child, nn.ReLU6) else float("inf")))
                replaced += 1
    assert replaced, "the network has no nn.ReLU or nn.ReLU6"
    return network


class Sided(torch.autograd.Function):
    """dx = dy open, and 1(dy > 0) where it is guided: the unit's side of its kinks is told, not found."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, open_: Tensor, bound: float, guided: bool) -> Tensor:
        ctx.save_for_backward(open_)
        ctx.guided = guided
        return x.clamp(0, bound)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (open_,) = ctx.saved_tensors
        return dy * open_ * ((dy > 0) if ctx.guided else 1), None, None, None


class SidedReLU6(nn.Module):
    def __init__(self, sides: Iterator[Tensor], guided: bool) -> None:
        super().__init__()
        self.sides, self.guided = sides, guided

    def forward(self, x: Tensor) -> Tensor:
        open_ = next(self.sides)
        told_otherwise = open_ != ((x > 0) & (x < 6))
        assert told_otherwise.sum() <= 5 and (torch.minimum(x.abs(), (x - 6).abs())[told_otherwise] < 1e-4).all()
        return Sided.apply(x, open_, 6.0, self.guided)


def with_sides(network: nn.Module, sides: Sequence[Tensor], guided: bool) -> nn.Module:
    """A copy of the network whose nn.ReLU6, in the order they run, go backward through the units in `sides` alone.

    Another runtime's float32 rounding settles on which side of 0 or 6 a unit falls that lies at rounding distance
    from it. Its word is taken for a handful of such units, and for no other: then its maps can be held to float64.
    """
    network, order = copy.deepcopy(network), iter(sides)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.ReLU6):
                setattr(parent, name, SidedReLU6(order, guided))
    return network


@dataclass(frozen=True)
class Samples:
    """float32 images [n, 3, H, W], a class for each, different if there are enough, and torch's float64 maps."""

    images: np.ndarray
    targets: np.ndarray
    maps: dict[str, np.ndarray]


def settled_samples(
    network: nn.Module,
    maps_of: MapsOf,
    size: Sequence[int],
    *,
    count: int = 3,
    classes: int = 10,
    candidates: int = 5,
    draws: int = 20,
    seed: int = 0,
) -> Samples:
    """Random images whose float64 maps torch itself settles: judged by torch alone, whatever is tested.

    Its float32 maps agree with them to 1e-5 (relative L2), and every ReLU and max pooling lies further from its kink
    than the float32 errors there reach: elsewhere the order of a sum decides which way a unit falls. No map of a sample
    is all zero. Raises AssertionError where `draws` batches do not hold `count` such samples.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = copy.deepcopy(network).double()
    kept: list[tuple[Tensor, int, Maps]] = []
    for draw in range(draws):
        images = drawn_images(candidates, size, generator)
        targets = (torch.arange(candidates) + draw * candidates) % classes
        maps, single = maps_of(exact, images.double(), targets), maps_of(network, images, targets)
        decided = far_from_kinks(network, exact, images)
        for index, target in enumerate(targets.tolist()):
            sample = {name: value[index] for name, value in maps.items()}
            taken = classes >= count and target in (known for _, known, _ in kept)
            agrees = all(distance(single[name][index], value) <= 1e-5 for name, value in sample.items())
            if not taken and decided[index] and agrees and alive(sample):
                kept.append((images[index], target, sample))
            if len(kept) == count:
                return _batch(kept)
    raise AssertionError(f"torch settles only {len(kept)} of {draws * candidates} samples of size {tuple(size)}")


def drawn_images(count: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
    """Noise on coarse patches, so that one place differs from another."""
    patches = torch.randn(count, 3, 4, 4, generator=generator)
    return torch.randn(count, 3, *size, generator=generator) + 2 * F.interpolate(patches, tuple(size))


def distance(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|"""
    return float((got.double() - expected).norm() / expected.norm())


def alive(sample: Maps) -> bool:
    """Whether no map vanishes, nor what Grad-CAM's ReLU leaves of its map."""
    cam = sample.get("cam", torch.ones(1))
    return all(value.abs().max() > 1e-8 for value in sample.values()) and bool(cam.max() > 1e-2 * cam.abs().max())


def far_from_kinks(network: nn.Module, exact: nn.Module, images: Tensor, safety: float = 3.0) -> Tensor:
    """For each image, whether no unit's distance to its kink is within `safety` times its layer's float32 error."""
    kinds = (nn.ReLU, nn.ReLU6, nn.MaxPool2d)
    decided = torch.ones(len(images), dtype=torch.bool)
    pairs = zip(runs(network, kinds, images), runs(exact, kinds, images.double()), strict=True)
    for (_, single), (module, x) in pairs:
        error = (single.double() - x).abs().flatten(1).amax(1)
        decided &= _kink_distance(module, x).flatten(1).amin(1) > safety * error
    return decided


def _kink_distance(module: nn.Module, x: Tensor) -> Tensor:
    """How far each unit's input is from where its derivative jumps; equals in a window are its rectifiers' matter."""
    if isinstance(module, nn.ReLU):
        return x.abs()
    if isinstance(module, nn.ReLU6):
        return torch.minimum(x.abs(), (x - 6).abs())
    kernel, stride, padding = (getattr(module, size) for size in ("kernel_size", "stride", "padding"))
    padded = F.pad(x, (padding, padding + stride, padding, padding + stride), value=-torch.inf)
    windows = padded.unfold(2, kernel, stride).unfold(3, kernel, stride).flatten(4)
    first, second = windows.topk(2).values.unbind(-1)
    return torch.where(first > second, first - second, torch.inf)


def _batch(kept: Sequence[tuple[Tensor, int, Maps]]) -> Samples:
    images, targets, samples = zip(*kept, strict=True)
    maps = {name: torch.stack([sample[name] for sample in samples]).numpy() for name in samples[0]}
    return Samples(torch.stack(images).numpy(), np.asarray(targets, np.int64), maps)
