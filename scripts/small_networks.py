"""Networks that no library ships in a form that is quick to export: U-Net, a YOLO-like and an RT-DETR-like detector.

They are small, with random weights, and have the operators of the real ones.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015): scores [N, classes, H, W]; the way up is a ConvTranspose or a Resize."""

    def __init__(self, transposed: bool, classes: int = 5, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.first = DoubleConv(3, width)
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(widths))
        self.up = nn.ModuleList(self._upward(b, a, transposed) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(DoubleConv(2 * a, a) for a in widths[:-1])
        self.scores = nn.Conv2d(width, classes, 1)

    @staticmethod
    def _upward(inputs: int, outputs: int, transposed: bool) -> nn.Module:
        if transposed:
            return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(inputs, outputs, 1))

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.first(image)]
        for down in self.down:
            levels.append(down(F.max_pool2d(levels[-1], 2)))
        x = levels.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([levels.pop(), up(x)], 1))
        return self.scores(x)


class ConvSiLU(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(inplace=True),
        )


class C2f(nn.Module):
    """Two branches; one goes through bottlenecks whose every stage is concatenated."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool) -> None:
        super().__init__()
        self.hidden, self.shortcut = outputs // 2, shortcut
        self.split = ConvSiLU(inputs, outputs)
        self.bottleneck = nn.Sequential(ConvSiLU(self.hidden, self.hidden, 3), ConvSiLU(self.hidden, self.hidden, 3))
        self.join = ConvSiLU(3 * self.hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.split(x).chunk(2, 1)
        c = self.bottleneck(b)
        return self.join(torch.cat([a, b, b + c if self.shortcut else c], 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling, three max pools in a row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.join = ConvSiLU(width, width // 2), ConvSiLU(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        pools = [self.reduce(x)]
        for _ in range(3):
            pools.append(F.max_pool2d(pools[-1], 5, 1, 2))
        return self.join(torch.cat(pools, 1))


class Yolo(nn.Module):
    """A YOLOv8-like detector: [N, 4 + classes, anchors], boxes (centre, size) in pixels and sigmoid class scores."""

    strides, bins = (8, 16, 32), 16

    def __init__(self, classes: int = 6, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(ConvSiLU(3, w, 3, 2), ConvSiLU(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, True))
        self.p3 = nn.Sequential(ConvSiLU(2 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, True))
        self.p4 = nn.Sequential(ConvSiLU(4 * w, 8 * w, 3, 2), C2f(8 * w, 8 * w, True))
        self.p5 = nn.Sequential(ConvSiLU(8 * w, 16 * w, 3, 2), C2f(16 * w, 16 * w, True), SPPF(16 * w))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up4, self.up3 = C2f(24 * w, 8 * w, False), C2f(12 * w, 4 * w, False)
        self.down4, self.down5 = ConvSiLU(4 * w, 4 * w, 3, 2), ConvSiLU(8 * w, 8 * w, 3, 2)
        self.out4, self.out5 = C2f(12 * w, 8 * w, False), C2f(24 * w, 16 * w, False)
        scales = (4 * w, 8 * w, 16 * w)
        self.box = nn.ModuleList(self._branch(c, w, 4 * self.bins) for c in scales)
        self.cls = nn.ModuleList(self._branch(c, w, classes) for c in scales)
        self.projection: Tensor
        self.register_buffer("projection", torch.arange(self.bins, dtype=torch.float32))

    @staticmethod
    def _branch(inputs: int, width: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(ConvSiLU(inputs, width, 3), ConvSiLU(width, width, 3), nn.Conv2d(width, outputs, 1))

    def forward(self, image: Tensor) -> Tensor:
        p3 = self.p3(self.stem(image))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat([self.up(p5), p4], 1))
        n3 = self.up3(torch.cat([self.up(n4), p3], 1))
        o4 = self.out4(torch.cat([self.down4(n3), n4], 1))
        o5 = self.out5(torch.cat([self.down5(o4), p5], 1))
        return self._decode([n3, o4, o5])

    def _decode(self, scales: list[Tensor]) -> Tensor:
        boxes = torch.cat([branch(x).flatten(2) for branch, x in zip(self.box, scales, strict=True)], 2)
        scores = torch.cat([branch(x).flatten(2) for branch, x in zip(self.cls, scales, strict=True)], 2)
        centres, strides = self._anchors(scales)
        bins = boxes.unflatten(1, (4, self.bins)).softmax(2)  # distribution focal loss: a distance is an expectation
        distances = (bins * self.projection[None, None, :, None]).sum(2)
        low, high = distances.chunk(2, 1)
        centre, size = centres + (high - low) / 2, low + high
        return torch.cat([torch.cat([centre, size], 1) * strides, scores.sigmoid()], 1)

    def _anchors(self, scales: list[Tensor]) -> tuple[Tensor, Tensor]:
        centres, strides = [], []
        for x, stride in zip(scales, self.strides, strict=True):
            height, width = x.shape[-2:]
            grid = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
            centres.append(torch.stack(grid[::-1]).flatten(1).to(x))
            strides.append(torch.full((1, height * width), float(stride), dtype=x.dtype))
        return torch.cat(centres, 1)[None], torch.cat(strides, 1)[None]


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2021) by GridSample, one GridSample per scale."""

    def __init__(self, width: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(width, heads * levels * points * 2)
        self.weights = nn.Linear(width, heads * levels * points)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, queries: Tensor, boxes: Tensor, maps: list[Tensor]) -> Tensor:
        n, q, width = queries.shape
        offsets = self.offsets(queries).view(n, q, self.heads, self.levels, self.points, 2)
        places = boxes[:, :, None, None, None, :2] + offsets / self.points * boxes[:, :, None, None, None, 2:] / 2
        grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # [n * heads, q, levels, points, 2]
        weights = self.weights(queries).view(n, q, self.heads, self.levels * self.points).softmax(-1)
        weights = weights.transpose(1, 2).reshape(n * self.heads, 1, q, self.levels * self.points)
        sampled = [
            F.grid_sample(self._values(x), grids[:, :, level], "bilinear", "zeros", align_corners=False)
            for level, x in enumerate(maps)
        ]
        mixed = (torch.cat(sampled, -1) * weights).sum(-1)  # [n * heads, width / heads, q]
        return self.out(mixed.view(n, width, q).transpose(1, 2))

    def _values(self, x: Tensor) -> Tensor:
        n, width, h, w = x.shape
        values = self.value(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        return values.reshape(n * self.heads, width // self.heads, h, w)


class DecoderLayer(nn.Module):
    def __init__(self, width: int, heads: int, levels: int) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attention = DeformableAttention(width, heads, levels, points=4)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries: Tensor, boxes: Tensor, maps: list[Tensor]) -> Tensor:
        queries = self.norms[0](queries + self.self_attention(queries, queries, queries, need_weights=False)[0])
        queries = self.norms[1](queries + self.cross_attention(queries, boxes, maps))
        return self.norms[2](queries + self.feed_forward(queries))


class RTDETR(nn.Module):
    """An RT-DETR-like detector: class scores [N, queries, classes] before the sigmoid, and boxes [N, queries, 4].

    Three scales, attention within the coarsest, TopK of the encoder's own scores as queries, two decoder layers of
    deformable attention that refine the boxes.
    """

    def __init__(self, classes: int = 6, width: int = 32, queries: int = 10, heads: int = 4) -> None:
        super().__init__()
        self.queries, w = queries, width
        self.stem = nn.Sequential(self._step(3, w), self._step(w, w), self._step(w, w))
        self.p4, self.p5 = self._step(w, w), self._step(w, w)
        self.encoder = nn.TransformerEncoderLayer(w, heads, 2 * w, 0.0, "gelu", batch_first=True)
        self.fuse4, self.fuse3 = nn.Conv2d(2 * w, w, 1), nn.Conv2d(2 * w, w, 1)
        self.memory = nn.Sequential(nn.Linear(w, w), nn.LayerNorm(w))
        self.memory_scores, self.memory_boxes = nn.Linear(w, classes), nn.Linear(w, 4)
        self.layers = nn.ModuleList(DecoderLayer(w, heads, 3) for _ in range(2))
        self.refine = nn.ModuleList(nn.Linear(w, 4) for _ in range(2))
        self.scores = nn.Linear(w, classes)

    @staticmethod
    def _step(inputs: int, outputs: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        p3 = self.stem(image)
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n, width, h, w = p5.shape
        p5 = self.encoder(p5.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(n, width, h, w)
        n4 = self.fuse4(torch.cat([F.interpolate(p5, scale_factor=2.0), p4], 1))
        n3 = self.fuse3(torch.cat([F.interpolate(n4, scale_factor=2.0), p3], 1))
        maps = [n3, n4, p5]
        memory = self.memory(torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1))
        _, best = self.memory_scores(memory).max(-1).values.topk(self.queries, 1)
        queries = memory.gather(1, best[..., None].expand(-1, -1, width))
        unrefined = self.memory_boxes(queries)
        for layer, refine in zip(self.layers, self.refine, strict=True):
            queries = layer(queries, unrefined.sigmoid(), maps)
            unrefined = unrefined + refine(queries)
        return self.scores(queries), unrefined.sigmoid()
