"""What torch says: maps of a network by autograd and hooks in float64, sharing nothing with graphgbp.

The guided rule is laid over the *functions* a network calls, so that a ReLU counts however it is written: as a
module, as `F.relu`, as ReLU6. Captum's GuidedBackprop sees `nn.ReLU` modules only.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from captum.attr import GuidedBackprop
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

ScoreOf = Callable[[Any], Tensor]  # from what a network returns to S [N], the scores that are differentiated
SAME = 1e-3  # a tensor this near to another is the same one, computed in another precision
_RELU = {nn.functional.relu, nn.functional.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}
_HARDTANH = {nn.functional.hardtanh, nn.functional.hardtanh_}
_CLAMP = {torch.clamp, torch.clamp_, torch.clip, Tensor.clamp, Tensor.clamp_, Tensor.clip}


class _GuidedRectifier(torch.autograd.Function):
    """min(max(x, 0), high); dx = dy * f'(x) * 1(x > 0) * 1(dy > 0)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, high: float) -> Tensor:
        ctx.save_for_backward((x > 0) & (x < high))
        return x.clamp(0, high)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (open_,) = ctx.saved_tensors
        return dy * open_ * (dy > 0), None


class GuidedMode(TorchFunctionMode):
    """Every rectifier of what depends on the images follows the guided rule; `rectifiers` counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.rectifiers = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        high = _upper_bound(func, args, kwargs or {})
        if high is None or not args[0].requires_grad:
            return func(*args, **kwargs or {})
        self.rectifiers += 1
        return _GuidedRectifier.apply(args[0], high)


def _upper_bound(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> float | None:
    """The bound above of a rectifier (infinite for ReLU), None for any other function."""
    if func in _RELU:
        return float("inf")
    if func is nn.functional.relu6:
        return 6.0
    named = ("min_val", "max_val") if func in _HARDTANH else ("min", "max") if func in _CLAMP else ()
    if not named:
        return None
    low, high = (args[i + 1] if len(args) > i + 1 else kwargs.get(name) for i, name in enumerate(named))
    return (float("inf") if high is None else float(high)) if low == 0 else None


class OutOfPlace(TorchFunctionMode):
    """No functional activation overwrites its input: what a hook kept stays what it was."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("inplace"):
            kwargs["inplace"] = False
        return func(*args, **kwargs)


class Recorder(TorchFunctionMode):
    """Every tensor of one size that a network makes, with the module it comes from, or the function where none does."""

    def __init__(self, module: nn.Module, elements: int) -> None:
        super().__init__()
        self.made: list[tuple[str, Tensor]] = []
        self._elements = elements
        self._inside: list[str] = []
        self._modules = dict(module.named_modules())
        self._hooks: list[Any] = []

    def __enter__(self) -> Recorder:
        for name, part in self._modules.items():
            self._hooks.append(part.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
            self._hooks.append(part.register_forward_hook(lambda _, __, output: self._leave(output)))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    def _leave(self, output: Any) -> None:
        self._keep(self._inside.pop(), output)

    def _keep(self, place: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.numel() == self._elements and output.requires_grad:
            self.made.append((place, output))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        place = self._inside[-1] if self._inside else ""
        self._keep(f"{place} {getattr(func, '__name__', func)}()".strip(), result)
        return result


@dataclass
class LayerMaps:
    """A and dS/dA at a layer, and where in the network it is."""

    place: str
    features: np.ndarray
    gradients: np.ndarray


@dataclass
class Maps:
    """What one backward pass gives: dS/dx [N, C, H, W], and A and dS/dA at layers."""

    gradient: np.ndarray
    layers: list[LayerMaps]


def maps(
    module: nn.Module, images: Tensor, score_of: ScoreOf, *, guided: bool = False, features: Sequence[np.ndarray] = ()
) -> Maps:
    """dS/dx, by the guided rule or plain, and dS/dA at the layers whose output equals `features`."""
    x = images.to(next(module.parameters()).dtype).requires_grad_()
    mode = GuidedMode() if guided else contextlib.nullcontext()
    recorders = [Recorder(module, array.size) for array in features]
    with contextlib.ExitStack() as stack:
        for each in (OutOfPlace(), mode, *recorders):
            stack.enter_context(each)
        scores = score_of(module(x))
    found = [place(recorder.made, array) for recorder, array in zip(recorders, features, strict=True)]
    dx, *gradients = torch.autograd.grad(scores.sum(), [x, *(layer for _, layer in found)])
    layers = [
        LayerMaps(name, layer.detach().numpy(), gradient.numpy())
        for (name, layer), gradient in zip(found, gradients, strict=True)
    ]
    return Maps(dx.numpy(), layers)


def place(made: Sequence[tuple[str, Tensor]], features: np.ndarray) -> tuple[str, Tensor]:
    """The first tensor that equals `features`, by the name of the outermost module that returns it."""
    for _, tensor in made:
        if tensor.shape == features.shape and relative(features, tensor.detach().numpy()) < SAME:
            names = [name for name, other in made if other is tensor]
            modules = [name for name in names if not name.endswith("()")]
            return min(modules or names, key=len), tensor
    raise LookupError(f"no tensor of the network equals the target layer's features {features.shape}")


def captum_guided(module: nn.Module, images: Tensor, score_of: ScoreOf) -> np.ndarray:
    """Captum's GuidedBackprop of S, in the module's type."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its hooks, on every call
        found = GuidedBackprop(Scored(module, score_of)).attribute(images.to(next(module.parameters()).dtype))
    return found.detach().numpy()


def rectifier_calls(module: nn.Module, images: Tensor) -> tuple[int, int]:
    """How many rectifiers the images go through, and how many are nn.ReLU, the only ones that Captum hooks."""
    hooked: list[nn.Module] = []

    def keep(part: nn.Module, inputs: tuple[Tensor], _: Any) -> None:
        if inputs[0].requires_grad:
            hooked.append(part)

    hooks = [part.register_forward_hook(keep) for part in module.modules() if isinstance(part, nn.ReLU)]
    with GuidedMode() as mode:
        module(images.clone().requires_grad_())
    for hook in hooks:
        hook.remove()
    return mode.rectifiers, len(hooked)


class Scored(nn.Module):
    """A network with the score behind it."""

    def __init__(self, module: nn.Module, score_of: ScoreOf) -> None:
        super().__init__()
        self.module, self.score_of = module, score_of

    def forward(self, images: Tensor) -> Tensor:
        return self.score_of(self.module(images))


def out_of_place(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in another type in which no activation overwrites its input."""
    copied = copy.deepcopy(module).to(dtype)
    for part in copied.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010  no attribute that Module declares
    return copied


def in_float32(module: nn.Module, images: Tensor, moved: int) -> Iterator[tuple[nn.Module, Tensor]]:
    """The same network and images in float32, several times: each rounds differently, and all are right.

    With and without oneDNN's kernels; with BatchNorm folded into the convolution before it, as exporters do; `moved`
    times with each pixel moved by at most one unit in its last place. Where the signs of ReLUs flip near zero, one
    computation alone says little about how far float32 can be off.
    """
    plain = out_of_place(module, torch.float32)
    folded = with_folded_norms(plain, images)
    networks = [plain] if folded is None else [plain, folded]
    for network in networks:
        for onednn, layout in ((True, torch.contiguous_format), (False, torch.channels_last)):
            with torch.backends.mkldnn.flags(enabled=onednn):
                yield nn.Module.to(network, memory_format=layout), images  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(0)
    for number in range(moved):
        towards = torch.randint(-1, 2, images.shape, generator=generator) * float("inf")
        nudged = torch.where(towards.isnan(), images, torch.nextafter(images, towards))
        yield networks[number % len(networks)], nudged


class Uses(TorchFunctionMode):
    """How often each tensor is computed with."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[int] = Counter()
        self._kept: list[Tensor] = []  # so that no other tensor gets the id of one that is gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if isinstance(result, Tensor):
            used = [argument for argument in args if isinstance(argument, Tensor)]
            self.count.update(map(id, used))
            self._kept += [result, *used]
        return result


def with_folded_norms(module: nn.Module, images: Tensor) -> nn.Module | None:
    """A copy in which a BatchNorm that alone reads a convolution's result is folded into its weights; None without."""
    if not any(isinstance(part, nn.BatchNorm2d) for part in module.modules()):
        return None
    copied = copy.deepcopy(module)
    made: dict[int, nn.Conv2d] = {}
    read: list[tuple[int, nn.BatchNorm2d]] = []

    def keep(part: nn.Conv2d, _: Any, output: Tensor) -> None:
        made[id(output)] = part

    def pair(part: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        read.append((id(inputs[0]), part))

    parts = list(copied.modules())
    hooks = [part.register_forward_hook(keep) for part in parts if type(part) is nn.Conv2d]
    hooks += [part.register_forward_pre_hook(pair) for part in parts if isinstance(part, nn.BatchNorm2d)]
    with torch.no_grad(), Uses() as uses:
        wanted = copied(images)
    for hook in hooks:
        hook.remove()
    for tensor, norm in read:
        if tensor in made and uses.count[tensor] == 1:
            _fold(made[tensor], norm)
    with torch.no_grad():
        for one, other in zip(_tensors(copied(images)), _tensors(wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))
    return copied.requires_grad_(False)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """The normalization into the convolution's weights, itself the identity from then on."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
    )
    mean.zero_()
    variance.fill_(1 - norm.eps)
    norm.weight.data.fill_(1)
    norm.bias.data.zero_()


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def grad_cam(layer: LayerMaps, channels_last: bool, size: Sequence[int]) -> np.ndarray:
    """relu(sum_k alpha_k A_k) [N, 1, H, W], alpha_k the spatial mean of dS/dA_k, bilinear."""
    features, gradients = (as_grid(torch.from_numpy(a), channels_last) for a in (layer.features, layer.gradients))
    cam = (gradients.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    return nn.functional.interpolate(cam, tuple(size), mode="bilinear", align_corners=False).numpy()


def as_grid(x: Tensor, channels_last: bool) -> Tensor:
    """[N, C, h, w] from [N, h, w, C] or from tokens [N, T, C], a square grid behind class tokens."""
    if x.dim() == 4:
        return x.movedim(-1, 1) if channels_last else x
    side = math.isqrt(x.shape[1])
    return x[:, x.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """The relative L2 distance of the worst image; 0 where both are zero."""
    distances = []
    for one, wanted in zip(ours.astype(np.float64), reference.astype(np.float64), strict=True):
        norm, distance = np.linalg.norm(wanted), np.linalg.norm(one - wanted)
        distances.append(distance / norm if norm else (0.0 if distance == 0 else np.inf))
    return float(max(distances))
