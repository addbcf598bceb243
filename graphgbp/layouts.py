"""What the axes of a tensor hold: the batch, the channels, and positions, each on an axis of its own or as tokens.

A layout is read from what makes a tensor and, where that does not tell, from what reads it; it is never guessed.
Convolutions and poolings set it, what moves axes carries it along, and what mixes them, such as attention, ends it.
On the way an axis is a product of parts, so that a reshape can merge and split it.
"""

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.axes import (
    BATCH,
    CHANNELS,
    DIRECTIONS,
    TOKENS,
    Axes,
    Axis,
    Part,
    maps,
    positions_of,
    reshaped,
    settled,
    with_single,
)
from graphgbp.image import Image
from graphgbp.nodes import axes_of, permutation, slices
from graphgbp.view import View

_CHANNELS_FIRST = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool",
    "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_NORMS_OF_CHANNELS_FIRST = {"BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN"}
_ENDS = {
    "Col2Im", "Compress", "Einsum", "Expand", "GRU", "Gather", "GatherElements", "GatherND", "Gemm", "If", "LSTM",
    "Loop", "MatMulInteger", "MaxRoiPool", "OneHot", "QLinearMatMul", "RNN", "ReverseSequence", "RoiAlign", "Scan",
    "ScatterElements", "ScatterND", "Tile", "TopK",
}  # fmt: skip
_OF_FIRST_INPUT = {"Attention", "GridSample", "LayerNormalization", "RMSNormalization", "Resize", "Pad"}
_TOKENS_RANK = 3


@dataclass(frozen=True)
class Layout:
    """Where a tensor has its batch, its channels and its positions.

    `positions` are in the order of the image. `others` is the axis of tokens of which some, in front, stand for no
    position.
    """

    batch_axis: int
    channel_axis: int
    position_axes: tuple[int, ...]
    positions: tuple[Part, ...]
    others: int | None

    @property
    def sizes(self) -> list[int | str]:
        """How many positions there are along each direction."""
        return [part.size for part in self.positions]

    @property
    def folded(self) -> bool:
        """Whether an axis holds the positions of several directions, or tokens that stand for none."""
        return self.others is not None or len(self.positions) != len(self.position_axes)

    def prefix(self, tensor: gs.Tensor) -> int | None:
        """How many tokens of a tensor of this layout stand for no position; None where that is open."""
        if self.others is None:
            return 0
        sizes = [size for size in [tensor.shape[self.others], *self.sizes] if isinstance(size, int)]
        return sizes[0] - math.prod(sizes[1:]) if len(sizes) == len(self.positions) + 1 else None


Layouts = dict[str, Layout]


def find_layouts(view: View, images: Sequence[Image]) -> Layouts:
    """The layout of every tensor that has one, by name."""
    known = {x.tensor.name: maps(x.tensor, x.layout.index("C")) for x in images if x.layout is not None}
    for node in view.graph.nodes:
        known.update((y.name, axes) for y, axes in _made_by(node, known) if y.name)
    for node in reversed(view.graph.nodes):
        for x, axes in _told_by_reader(node, known):
            known.setdefault(x.name, axes)
    directions = max((len(x.position_axes) for x in images if x.layout is not None), default=0)
    layouts = ((name, _layout(axes, directions)) for name, axes in known.items())
    return {name: layout for name, layout in layouts if layout is not None}


def _layout(axes: Axes, directions: int) -> Layout | None:
    """The layout of a tensor with an axis of images, an axis of channels, and every position on the others.

    Of a direction of one position that has no axis, and that the images do not have either, nothing is told.
    """
    counts = ["".join(part.counts for part in axis) for axis in axes]
    if counts.count(BATCH) != 1 or counts.count(CHANNELS) != 1:
        return None
    batch, channels = counts.index(BATCH), counts.index(CHANNELS)
    places = tuple(index for index in range(len(axes)) if index not in (batch, channels))
    others = next((index for index in places if counts[index] == TOKENS), None)
    positions = tuple(part for index in places for part in positions_of(axes[index]))
    if max(directions, len(places)) < len(positions):
        positions = tuple(part for part in positions if part.size != 1)
    along = [part.counts for part in positions]
    straight = set(along) <= {*DIRECTIONS} and all(a < b for a, b in pairwise(along))
    return Layout(batch, channels, places, positions, others) if positions and straight else None


# -- from what makes a tensor -------------------------------------------------------------------------------


def _made_by(node: gs.Node, known: Mapping[str, Axes]) -> Iterator[tuple[gs.Tensor, Axes]]:
    for y in node.outputs:
        if _is_read(node, y):
            axes = _axes_of_output(node, y, known)
            if axes is not None and len(axes) == len(y.shape):
                yield y, settled(axes, y)


def _is_read(node: gs.Node, tensor: gs.Tensor) -> bool:
    return tensor.shape is not None and node.domain in (None, "", "ai.onnx")


def _axes_of_output(node: gs.Node, y: gs.Tensor, known: Mapping[str, Axes]) -> Axes | None:
    if node.op in _CHANNELS_FIRST | _NORMS_OF_CHANNELS_FIRST:
        source = known.get(node.inputs[0].name)
        kept = source and node.op in _NORMS_OF_CHANNELS_FIRST and _counts_at(source, 1) == [CHANNELS]
        return source if kept else maps(y, 1, source) if len(y.shape) > 2 else None
    if node.op == "Concat":
        return _concatenated(node, y, known)
    if node.op in _MOVES:
        return _MOVES[node.op](node, y, known[node.inputs[0].name]) if node.inputs[0].name in known else None
    return None if node.op in _ENDS else _kept(node, y, known)


def _kept(node: gs.Node, y: gs.Tensor, known: Mapping[str, Axes]) -> Axes | None:
    """Those of the inputs of the output's rank, which agree."""
    inputs = node.inputs[:1] if node.op in _OF_FIRST_INPUT else node.inputs
    found = [known[x.name] for x in inputs if x.name in known and _alike(x, y, known[x.name])]
    agree = all(_counts(axes) == _counts(found[0]) for axes in found)
    return found[0] if found and agree else None


def _alike(x: gs.Tensor, y: gs.Tensor, axes: Axes) -> bool:
    """Whether tensors have one rank and, on axes of several parts or of tokens, as far as is known one size."""
    if x.shape is None or len(x.shape) != len(y.shape):
        return False
    folded = [index for index, axis in enumerate(axes) if len(axis) > 1 or any(part.of for part in axis)]
    return not any(_differ(x.shape[index], y.shape[index]) for index in folded)


def _differ(a: int | str, b: int | str) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _counts(axes: Axes) -> list[list[str]]:
    return [[part.counts for part in axis] for axis in axes]


def _transposed(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes:
    return tuple(axes[axis] for axis in permutation(node))


def _squeezed(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes:
    gone = axes_of(node, len(axes)) or [index for index, size in enumerate(node.inputs[0].shape) if size == 1]
    left = [index for index in range(len(axes)) if index not in gone]
    dropped = [(bisect(left, index), part) for index in sorted(gone) for part in axes[index]]
    return with_single([axes[index] for index in left], dropped)


def _unsqueezed(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes:
    new, old = axes_of(node, len(y.shape)), iter(axes)
    return tuple(() if index in new else next(old) for index in range(len(y.shape)))


def _multiplied(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """A dense layer over channels that stand last."""
    weight = node.inputs[1]
    dense = _counts_at(axes, -1) == [CHANNELS] and weight.shape is not None and len(weight.shape) == 2
    return axes if dense else None


def _sliced(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """Channels or images in part, every n-th position of a direction; of tokens only those in front may go."""
    if not all(isinstance(x, gs.Constant) for x in node.inputs[1:] if not x.is_empty()):
        return None
    left = list(axes)
    for index, start, end, step in slices(node):
        size, counts = node.inputs[0].shape[index], _counts_at(axes, index)
        to_the_end = end >= size if isinstance(size, int) else end == np.inf
        if counts == [TOKENS] and step == 1 and to_the_end and (rest := _without_front(axes[index][0], start)):
            left[index] = rest
        elif counts not in ([BATCH], [CHANNELS]) and not (
            to_the_end and 0 <= start < step and (step == 1 or (len(counts) == 1 and counts != [TOKENS]))
        ):
            return None
    return tuple(left)


def _counts_at(axes: Axes, index: int) -> list[str]:
    return [part.counts for part in axes[index]]


def _without_front(tokens: Part, count: int) -> Axis | None:
    """What is left of tokens without the first ones; None where positions may go with them."""
    sizes = [part.size for part in tokens.of if isinstance(part.size, int)]
    others = tokens.size - math.prod(sizes) if isinstance(tokens.size, int) and len(sizes) == len(tokens.of) else 0
    if not 0 <= count <= others:
        return None
    return tokens.of if count == others and others else (tokens,)


def _split(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """The pieces of the channels; of tokens the last piece, where only others stand before it."""
    index = node.attrs.get("axis", 0) % len(axes)
    if _counts_at(axes, index) == [CHANNELS]:
        return axes
    before = [piece.shape and piece.shape[index] for piece in node.outputs[:-1]]
    known = [size for size in before if isinstance(size, int)]
    if _counts_at(axes, index) != [TOKENS] or y is not node.outputs[-1] or len(known) < len(before):
        return None
    cut = _without_front(axes[index][0], sum(known))
    return None if cut is None else (*axes[:index], cut, *axes[index + 1 :])


def _concatenated(node: gs.Node, y: gs.Tensor, known: Mapping[str, Axes]) -> Axes | None:
    """Channels side by side, or tokens behind others, which stand for no position."""
    found = [known[x.name] for x in node.inputs if x.name in known and _rank(x) == _rank(y)]
    index = node.attrs["axis"] % len(y.shape)
    if not found or any(_counts(axes) != _counts(found[0]) for axes in found):
        return None
    axes, joined = found[0], _counts_at(found[0], index)
    if joined == [CHANNELS]:
        return axes
    behind = len(found) == 1 and node.inputs[-1].name in known and len(axes) == _TOKENS_RANK
    if not behind or not joined or not set(joined) <= {TOKENS, *DIRECTIONS}:
        return None
    tokens = Part(TOKENS, y, index, positions_of(axes[index]))
    return (*axes[:index], (tokens,), *axes[index + 1 :])


def _rank(x: gs.Tensor) -> int:
    return -1 if x.shape is None else len(x.shape)


_MOVES: dict[str, Callable[[gs.Node, gs.Tensor, Axes], Axes | None]] = {
    "Transpose": _transposed,
    "Reshape": lambda node, y, axes: reshaped(node.inputs[0], y, axes),
    "Flatten": lambda node, y, axes: reshaped(node.inputs[0], y, axes),
    "Squeeze": _squeezed,
    "Unsqueeze": _unsqueezed,
    "Slice": _sliced,
    "Split": _split,
    "MatMul": _multiplied,
}


# -- from what reads a tensor -------------------------------------------------------------------------------


def _told_by_reader(node: gs.Node, known: Mapping[str, Axes]) -> Iterator[tuple[gs.Tensor, Axes]]:
    """The inputs whose axes follow from the node that reads them."""
    x = node.inputs[0] if node.inputs else None
    if not isinstance(x, gs.Variable) or not node.outputs or not _is_read(node, x):
        return
    y = node.outputs[0]
    if node.op in _CHANNELS_FIRST | _NORMS_OF_CHANNELS_FIRST:
        yield x, maps(x, 1)
    elif node.op == "ReduceMean" and (axis := _spared_by_mean(node)) is not None:
        yield x, maps(x, axis)
    elif y.name in known and node.op == "Transpose":
        perm = permutation(node)
        yield x, settled(tuple(known[y.name][perm.index(axis)] for axis in range(len(perm))), x)
    elif y.name in known and node.op not in _ENDS | _MOVES.keys() | _OF_FIRST_INPUT | {"Concat"}:
        axes = known[y.name]
        same = [x for x in node.inputs if isinstance(x, gs.Variable) and x.shape is not None and _alike(y, x, axes)]
        yield from ((x, settled(axes, x)) for x in same)


def _spared_by_mean(node: gs.Node) -> int | None:
    """The channel axis of a map of which nothing is read but the mean over all positions."""
    rank = len(node.inputs[0].shape) if len(node.inputs[0].outputs) == 1 else 0
    if not rank:
        return None
    axes = axes_of(node, rank)
    spared = sorted(set(range(1, rank)) - set(axes))
    return spared[0] if rank > 3 and len(spared) == 1 and 0 not in axes else None
