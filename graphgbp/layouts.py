"""What the axes of a tensor hold: the batch, the channels, and positions, each on an axis of its own or as tokens.

A layout is read from what makes a tensor and, where that does not tell, from what reads it; it is never guessed.
Convolutions and poolings set it, what moves axes carries it along, and what mixes them, such as attention, ends it.
On the way an axis is a product of parts, so that a reshape can merge and split it.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.image import Image
from graphgbp.nodes import axes_of, permutation
from graphgbp.prepare import View

_CHANNELS_FIRST = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool",
    "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN", "DepthToSpace", "SpaceToDepth",
}  # fmt: skip
_ENDS = {
    "Col2Im", "Compress", "Einsum", "Expand", "GRU", "Gather", "GatherElements", "GatherND", "Gemm", "If", "LSTM",
    "Loop", "MaxRoiPool", "OneHot", "RNN", "ReverseSequence", "RoiAlign", "Scan", "ScatterElements", "ScatterND",
    "Tile", "TopK",
}  # fmt: skip
_OF_FIRST_INPUT = {"Attention", "GridSample", "LayerNormalization", "RMSNormalization", "Resize", "Pad"}
_BATCH, _CHANNELS, _TOKENS, _DIRECTIONS = "N", "C", "T", ("0", "1", "2")
_TOKENS_RANK = 3


class Part(NamedTuple):
    """A factor of an axis, with the tensor and the axis whose size is its own.

    It counts images ("N"), channels ("C"), or positions: along the first direction "0", the second "1", the third "2".
    Of a split direction, "0" counts the coarser steps and "0'" those within one. "T" counts tokens: the last ones
    stand for the positions `of`, those in front (class, distillation, register tokens) for none.
    """

    counts: str
    tensor: gs.Tensor
    axis: int
    of: tuple["Part", ...] = ()

    @property
    def size(self) -> int | str:
        size: int | str = self.tensor.shape[self.axis]
        return size


Axis = tuple[Part, ...]
Axes = tuple[Axis, ...]


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


def find_layouts(view: View, images: Iterable[Image]) -> Layouts:
    """The layout of every tensor that has one, by name."""
    known = {x.tensor.name: _maps(x.tensor, x.layout.index("C")) for x in images if x.layout is not None}
    for node in view.graph.nodes:
        known.update((y.name, axes) for y, axes in _made_by(node, known) if y.name)
    for node in reversed(view.graph.nodes):
        for x, axes in _told_by_reader(node, known):
            known.setdefault(x.name, axes)
    layouts = ((name, _layout(axes)) for name, axes in known.items())
    return {name: layout for name, layout in layouts if layout is not None}


def _layout(axes: Axes) -> Layout | None:
    """The layout of a tensor with an axis of images, an axis of channels, and every position on the others."""
    counts = ["".join(part.counts for part in axis) for axis in axes]
    if counts.count(_BATCH) != 1 or counts.count(_CHANNELS) != 1:
        return None
    batch, channels = counts.index(_BATCH), counts.index(_CHANNELS)
    places = tuple(index for index in range(len(axes)) if index not in (batch, channels))
    others = next((index for index in places if counts[index] == _TOKENS), None)
    positions = tuple(part for index in places for part in _positions(axes[index]))
    straight = all(a.counts < b.counts for a, b in pairwise(positions)) and {p.counts for p in positions} <= {
        *_DIRECTIONS
    }
    return Layout(batch, channels, places, positions, others) if positions and straight else None


def _positions(axis: Axis) -> Axis:
    return tuple(position for part in axis for position in (part.of if part.counts == _TOKENS else (part,)))


def _maps(y: gs.Tensor, channel_axis: int, source: Axes | None = None) -> Axes:
    """Images, as many as the source has, channels, and a direction of positions on each further axis."""
    counts = [_BATCH, *map(str, range(len(y.shape) - 2))]
    counts.insert(channel_axis, _CHANNELS)
    images = next((part for axis in source or () for part in axis if part.counts == _BATCH), Part(_BATCH, y, 0))
    return ((images,), *((Part(count, y, axis),) for axis, count in enumerate(counts) if axis))


# -- from what makes a tensor -------------------------------------------------------------------------------


def _made_by(node: gs.Node, known: Mapping[str, Axes]) -> Iterator[tuple[gs.Tensor, Axes]]:
    for y in node.outputs:
        if y.shape is not None and node.domain in (None, "", "ai.onnx"):
            axes = _axes_of_output(node, y, known)
            if axes is not None and len(axes) == len(y.shape):
                yield y, _settled(axes, y)


def _axes_of_output(node: gs.Node, y: gs.Tensor, known: Mapping[str, Axes]) -> Axes | None:
    if node.op in _CHANNELS_FIRST:
        return _maps(y, 1, known.get(node.inputs[0].name)) if len(y.shape) > 2 else None
    if node.op == "Concat":
        return _concatenated(node, y, known)
    if node.op in _MOVES:
        return _MOVES[node.op](node, y, known[node.inputs[0].name]) if node.inputs[0].name in known else None
    return None if node.op in _ENDS else _kept(node, y, known)


def _settled(axes: Axes, y: gs.Tensor) -> Axes:
    """The axes of y, each with as few parts as can be, and what is only one part measured by y itself."""
    settled = tuple(_settled_axis(axis, y, index) for index, axis in enumerate(axes))
    if any(part.counts.endswith("'") for axis in settled for part in axis):
        return settled
    return tuple(tuple(p._replace(of=()) if p.counts in _DIRECTIONS else p for p in axis) for axis in settled)


def _settled_axis(axis: Axis, y: gs.Tensor, index: int) -> Axis:
    parts: list[Part] = []
    for part in axis:
        coarse = parts[-1] if parts else None
        if coarse and part.counts == f"{coarse.counts}'" and part.of == coarse.of:
            parts[-1:] = part.of
        else:
            parts.append(part)
    counts = {part.counts for part in parts}
    if _CHANNELS in counts and not counts & {_BATCH, _TOKENS, *_DIRECTIONS}:
        return (Part(_CHANNELS, y, index),)
    measured = len(parts) == 1 and parts[0].counts != _BATCH  # every tensor holds as many images
    return (parts[0]._replace(tensor=y, axis=index),) if measured else tuple(parts)


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
    gone = axes_of(node, len(axes))
    return tuple(axis for index, axis in enumerate(axes) if index not in gone)


def _unsqueezed(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes:
    new, old = axes_of(node, len(y.shape)), iter(axes)
    return tuple(() if index in new else next(old) for index in range(len(y.shape)))


def _multiplied(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """A dense layer over channels that stand last."""
    weight = node.inputs[1]
    dense = [part.counts for part in axes[-1]] == [_CHANNELS] and weight.shape is not None and len(weight.shape) == 2
    return axes if dense else None


def _sliced(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """A part of the positions in order; of tokens only those in front may go."""
    if not all(isinstance(x, gs.Constant) for x in node.inputs[1:] if not x.is_empty()):
        return None
    left = list(axes)
    for index, start, end, step in slices(node):
        if step < 1 or (len(axes[index]) > 1 and y.shape[index] != node.inputs[0].shape[index]):
            return None
        if _holds_tokens(axes[index]):
            cut = _without_front(axes[index][0], start) if step == 1 and end >= _size(axes[index][0]) else None
            if cut is None:
                return None
            left[index] = cut
    return tuple(left)


def _holds_tokens(axis: Axis) -> bool:
    return [part.counts for part in axis] == [_TOKENS]


def _size(part: Part) -> float:
    return part.size if isinstance(part.size, int) else np.inf


def _without_front(tokens: Part, count: int) -> Axis | None:
    """What is left of tokens without the first ones; None where positions may go with them."""
    sizes = [part.size for part in tokens.of if isinstance(part.size, int)]
    others = tokens.size - math.prod(sizes) if isinstance(tokens.size, int) and len(sizes) == len(tokens.of) else 0
    if not 0 <= count <= others:
        return None
    return tokens.of if count == others and others else (tokens,)


def slices(node: gs.Node) -> Iterator[tuple[int, int, float, int]]:
    """(axis, start, end, step) of a Slice whose inputs are known; an end beyond any size is infinite."""
    x = node.inputs[0]
    starts, ends, *rest = ([] if t.is_empty() else t.values.reshape(-1).tolist() for t in node.inputs[1:])
    axes, steps = (*rest, [], [])[:2]
    count = len(starts)
    for axis, start, end, step in zip(axes or range(count), starts, ends, steps or [1] * count, strict=True):
        size = x.shape[axis]
        if isinstance(size, int):
            start, end = (bound + size if bound < 0 else min(bound, size) for bound in (start, end))
        yield axis % len(x.shape), start, end if end < np.iinfo(np.int32).max else np.inf, step


def _split(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """The pieces of the channels; of tokens the last piece, where only others stand before it."""
    index = node.attrs.get("axis", 0) % len(axes)
    if [part.counts for part in axes[index]] == [_CHANNELS]:
        return axes
    before = [piece.shape and piece.shape[index] for piece in node.outputs[:-1]]
    known = [size for size in before if isinstance(size, int)]
    if not _holds_tokens(axes[index]) or y is not node.outputs[-1] or len(known) < len(before):
        return None
    cut = _without_front(axes[index][0], sum(known))
    return None if cut is None else (*axes[:index], cut, *axes[index + 1 :])


def _concatenated(node: gs.Node, y: gs.Tensor, known: Mapping[str, Axes]) -> Axes | None:
    """Channels side by side, or tokens behind others, which stand for no position."""
    found = [known[x.name] for x in node.inputs if x.name in known and _rank(x) == _rank(y)]
    index = node.attrs["axis"] % len(y.shape)
    if not found or any(_counts(axes) != _counts(found[0]) for axes in found):
        return None
    axes, joined = found[0], [part.counts for part in found[0][index]]
    if joined == [_CHANNELS]:
        return axes
    behind = len(found) == 1 and node.inputs[-1].name in known and len(axes) == _TOKENS_RANK
    if not behind or not joined or not set(joined) <= {_TOKENS, *_DIRECTIONS}:
        return None
    tokens = Part(_TOKENS, y, index, _positions(axes[index]))
    return (*axes[:index], (tokens,), *axes[index + 1 :])


def _rank(x: gs.Tensor) -> int:
    return -1 if x.shape is None else len(x.shape)


# -- reshapes: products cut at other places -----------------------------------------------------------------


def _reshaped(node: gs.Node, y: gs.Tensor, axes: Axes) -> Axes | None:
    """The same elements in the same order: where the sizes before a cut multiply to the same, or those behind it."""
    parts = [part for axis in axes for part in axis]
    images = _names_of_images(node.inputs[0], axes)
    before, after = (_by_name(sizes, images) for sizes in (node.inputs[0].shape, y.shape))
    if len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) <= 1:
        return axes
    before = _by_name([part.size for part in parts], images)
    made: list[Axis] = []
    done = 0
    while len(made) < len(after) or done < len(parts):
        steps = _steps(len(parts) - done, len(after) - len(made))
        took, gave = next((s for s in steps if _cut(before, after, done + s[0], len(made) + s[1])), (0, 0))
        taken = tuple(parts[done : done + took])
        pieces = _pieces(taken[0], y, len(made), gave) if took == 1 and gave > 1 else [taken] * gave
        if took + gave == 0 or pieces is None:
            return None
        made += pieces
        done += took
    return tuple(made)


def _names_of_images(x: gs.Tensor, axes: Axes) -> set[int | str]:
    """The symbols by which the number of images goes."""
    own = {x.shape[index] for index, axis in enumerate(axes) if [part.counts for part in axis] == [_BATCH]}
    return {
        size
        for size in {part.size for axis in axes for part in axis if part.counts == _BATCH} | own
        if isinstance(size, str)
    }


def _by_name(sizes: Iterable[int | str], images: set[int | str]) -> list[int | str]:
    return [_BATCH if size in images else size for size in sizes]


def _steps(parts: int, axes: int) -> Iterator[tuple[int, int]]:
    """How many parts may make how many axes: one of one, none of one, one of several, several of one."""
    pairs = [(1, 1), (0, 1), (1, 0), *((1, n) for n in range(2, axes + 1)), *((n, 1) for n in range(2, parts + 1))]
    return ((p, a) for p, a in pairs if p <= parts and a <= axes)


def _cut(before: Sequence[int | str], after: Sequence[int | str], i: int, j: int) -> bool:
    """Whether a reshape's cut behind the i-th size stands behind the j-th of its output."""
    return _product(before[:i]) == _product(after[:j]) or _product(before[i:]) == _product(after[j:])


def _product(sizes: Sequence[int | str]) -> tuple[int, Counter[str]]:
    """What sizes multiply to, open ones by name."""
    known = math.prod(size for size in sizes if isinstance(size, int))
    return known, Counter(size for size in sizes if isinstance(size, str))


def _pieces(part: Part, y: gs.Tensor, first: int, count: int) -> list[Axis] | None:
    """A part split over axes of y: channels stay channels, a direction becomes coarse steps and steps within."""
    if part.counts == _CHANNELS:
        return [(Part(_CHANNELS, y, first + index),) for index in range(count)]
    if count > 2 or not part.counts.isdigit() or part.of:
        return None
    return [(Part(part.counts, y, first, (part,)),), (Part(f"{part.counts}'", y, first + 1, (part,)),)]


_MOVES: dict[str, Callable[[gs.Node, gs.Tensor, Axes], Axes | None]] = {
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Flatten": _reshaped,
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
    if (
        not isinstance(x, gs.Variable)
        or not node.outputs
        or x.shape is None
        or node.domain not in (None, "", "ai.onnx")
    ):
        return
    y = node.outputs[0]
    if node.op in _CHANNELS_FIRST:
        yield x, _maps(x, 1)
    elif node.op == "ReduceMean" and (axis := _spared_by_mean(node)) is not None:
        yield x, _maps(x, axis)
    elif y.name in known and node.op == "Transpose":
        perm = permutation(node)
        yield x, _settled(tuple(known[y.name][perm.index(axis)] for axis in range(len(perm))), x)
    elif y.name in known and node.op not in _ENDS | _MOVES.keys() | _OF_FIRST_INPUT | {"Concat"}:
        axes = known[y.name]
        same = [x for x in node.inputs if isinstance(x, gs.Variable) and x.shape is not None and _alike(y, x, axes)]
        yield from ((x, _settled(axes, x)) for x in same)


def _spared_by_mean(node: gs.Node) -> int | None:
    """The channel axis of a map whose mean over all positions is taken."""
    rank = len(node.inputs[0].shape)
    axes = axes_of(node, rank)
    spared = sorted(set(range(1, rank)) - set(axes))
    return spared[0] if rank > 3 and len(spared) == 1 and 0 not in axes else None
