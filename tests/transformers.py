"""Small vision transformers in torch, written as the well-known ones are, every parameter drawn."""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles import cams_of

CLASSES = 5


class Attention(nn.Module):
    """Self-attention over [N, T, C], queries, keys and values by one dense layer (timm) or by three (transformers)."""

    def __init__(self, width: int, heads: int = 2, fused: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width) if fused else None
        self.query, self.key, self.value = (nn.Identity() if fused else nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        n, t, c = x.shape
        if self.qkv is not None:
            q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (
                dense(x).view(n, t, self.heads, c // self.heads).transpose(1, 2)
                for dense in (self.query, self.key, self.value)
            )
        weights = (q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)
        if mask is not None:
            weights = weights.view(n // len(mask), len(mask), self.heads, t, t) + mask[None, :, None]
            weights = weights.view(n, self.heads, t, t)
        return self.proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(n, t, c))


class TorchAttention(nn.Module):
    """torch's own (torchvision's ViT), which puts the tokens before the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches as tokens behind `others` (a class token, a distillation token, registers).

    The score is read from each of the first `scored` tokens, or from the mean of the patches where that is 0.
    """

    def __init__(
        self,
        attention: Callable[[int], nn.Module],
        others: int = 1,
        scored: int = 1,
        positions: bool = True,
        patches: int = 12,
    ) -> None:
        super().__init__()
        width = 24
        self.embed = nn.Conv2d(3, width, 8, 8)
        self.others = nn.Parameter(torch.zeros(1, others, width)) if others else None
        self.position = nn.Parameter(torch.zeros(1, others + patches, width)) if positions else None
        self.blocks = nn.Sequential(*(Block(width, attention(width)) for _ in range(2)))
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, CLASSES) for _ in range(max(scored, 1)))
        self.count, self.scored = others, scored

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        if self.others is not None:
            x = torch.cat([self.others.expand(x.shape[0], -1, -1), x], 1)
        if self.position is not None:
            x = x + self.position
        x = self.norm(self.blocks(x))
        if not self.scored:
            return self.heads[0](x[:, self.count :].mean(1))
        return sum(head(x[:, index]) for index, head in enumerate(self.heads)) / self.scored


def windows(x: Tensor, size: int) -> Tensor:
    n, h, w, c = x.shape
    x = x.view(n, h // size, size, w // size, size, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, size * size, c)


def unwindowed(x: Tensor, size: int, h: int, w: int) -> Tensor:
    x = x.view(-1, h // size, w // size, size, size, x.shape[-1]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, h, w, x.shape[-1])


class WindowAttention(nn.Module):
    """Attention within windows of a map [N, H, W, C], which is rolled by `shift` before and after."""

    def __init__(self, width: int, size: int, shift: int) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.size, self.shift = size, shift

    def forward(self, x: Tensor) -> Tensor:
        _, h, w, _ = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = unwindowed(self.attention(windows(x, self.size), self._mask(h, w)), self.size, h, w)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x

    def _mask(self, h: int, w: int) -> Tensor | None:
        if not self.shift:
            return None
        regions = torch.zeros(1, h, w, 1)
        cuts = (slice(0, -self.size), slice(-self.size, -self.shift), slice(-self.shift, None))
        for index, (rows, columns) in enumerate((rows, columns) for rows in cuts for columns in cuts):
            regions[:, rows, columns] = index
        region = windows(regions, self.size).squeeze(-1)
        return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)


class MergeBySlices(nn.Module):
    """Four neighbours become one position (torchvision)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduce(self.norm(torch.cat(parts, -1)))


class MergeByReshape(MergeBySlices):
    """The same by a reshape (timm)."""

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduce(self.norm(x))


class FlatBlock(Block):
    """A block that lays its map out as tokens for the dense layers (timm)."""

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        x = (x + self.attention(self.norm1(x))).reshape(n, -1, c)
        return (x + self.mlp(self.norm2(x))).reshape(n, h, w, c)


class Swin(nn.Module):
    """Two stages of maps [N, H, W, C], a block with shifted windows and one without."""

    def __init__(self, block: type[Block] = Block, merge: type[MergeBySlices] = MergeBySlices) -> None:
        super().__init__()
        width = 8
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width) if shift else merge(width // 2),
                block(width, WindowAttention(width, 2, shift)),
            )
            for width, shift in ((width, 1), (2 * width, 0))
        )
        self.norm, self.head = nn.LayerNorm(2 * width), nn.Linear(2 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = self.embed(image).permute(0, 2, 3, 1)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.norm(x).mean((1, 2)))


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network in eval mode, its matrices drawn and its norms away from one and zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(name.endswith("weight") + 0.2 * noise)
            else:
                parameter.copy_(noise * (2 / parameter[0].numel()) ** 0.5)
    return network.eval()


def hooked_cams(
    network: nn.Module, layer: nn.Module, images: Tensor, target: int, others: int, grid: Sequence[int]
) -> dict[str, Tensor]:
    """The CAMs [N, 1, *grid] before their ReLU, by torch's hooks, in double: the tokens in front are no positions."""
    network, layer = copy.deepcopy((network, layer))
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    score = network.double()(images.double())[:, target].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, seen[0])
    tokens = (x.detach().reshape(len(images), -1, x.shape[-1])[:, others:] for x in (seen[0], gradient))
    return cams_of(*(x.mT.unflatten(2, tuple(grid)) for x in tokens))


def enlarged(cam: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(cam.relu(), tuple(size), mode="bilinear")
