"""An axis as a product of parts, so that a reshape can merge and split it without losing what it counts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import onnx_graphsurgeon as gs

from graphgbp.symbols import product

BATCH, CHANNELS, TOKENS, DIRECTIONS = "N", "C", "T", ("0", "1", "2")


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


def positions_of(axis: Axis) -> Axis:
    """The positions that an axis, or its tokens, stand for."""
    return tuple(position for part in axis for position in (part.of if part.counts == TOKENS else (part,)))


def maps(y: gs.Tensor, channel_axis: int, source: Axes | None = None) -> Axes:
    """Images, as many as the source has, channels, and a direction of positions on each further axis."""
    counts = [BATCH, *map(str, range(len(y.shape) - 2))]
    counts.insert(channel_axis, CHANNELS)
    images = next((part for axis in source or () for part in axis if part.counts == BATCH), Part(BATCH, y, 0))
    return ((images,), *((Part(count, y, axis),) for axis, count in enumerate(counts) if axis))


def settled(axes: Axes, y: gs.Tensor) -> Axes:
    """The axes of y, each with as few parts as can be, and what is only one part measured by y itself."""
    made = tuple(_settled_axis(axis, y, index) for index, axis in enumerate(axes))
    if any(part.counts.endswith("'") for axis in made for part in axis):
        return made
    return tuple(tuple(p._replace(of=()) if p.counts in DIRECTIONS else p for p in axis) for axis in made)


def _settled_axis(axis: Axis, y: gs.Tensor, index: int) -> Axis:
    parts: list[Part] = []
    for part in axis:
        coarse = parts[-1] if parts else None
        if coarse and part.counts == f"{coarse.counts}'" and part.of == coarse.of:
            parts[-1:] = part.of
        else:
            parts.append(part)
    counts = {part.counts for part in parts}
    if CHANNELS in counts and not counts & {BATCH, TOKENS, *DIRECTIONS}:
        return (Part(CHANNELS, y, index),)
    measured = len(parts) == 1 and parts[0].counts != BATCH  # every tensor holds as many images
    return (parts[0]._replace(tensor=y, axis=index),) if measured else tuple(parts)


def reshaped(x: gs.Tensor, y: gs.Tensor, axes: Axes) -> Axes | None:
    """The axes of a reshaped x; None where they cannot be told.

    The elements keep their order, so a cut stays where the sizes before it, or those behind it, multiply to the same.
    """
    parts = [part for axis in axes for part in axis]
    images = _names_of_images(x, axes)
    before, after = (_by_name(sizes, images) for sizes in (x.shape, y.shape))
    if len(before) == len(after) and sum(a != b for a, b in zip(before, after, strict=True)) <= 1:
        return axes
    before = _by_name([part.size for part in parts], images)
    made: list[Axis] = []
    dropped: list[tuple[int, Part]] = []
    done = 0
    while len(made) < len(after) or done < len(parts):
        steps = _steps(len(parts) - done, len(after) - len(made))
        took, gave = next((s for s in steps if _cut(before, after, done + s[0], len(made) + s[1])), (0, 0))
        taken = tuple(parts[done : done + took])
        pieces = _pieces(taken[0], y, len(made), gave) if took == 1 and gave > 1 else [taken] * gave
        if took + gave == 0 or pieces is None:
            return None
        dropped += [(len(made), part) for part in taken] if not gave else []
        made += pieces
        done += took
    return with_single(made, dropped)


def with_single(axes: Sequence[Axis], dropped: Iterable[tuple[int, Part]]) -> Axes:
    """The axes, with the directions of one position that went before their i-th: each on the next axis of positions.

    A grid of one row keeps its row so. Where there is no such axis at either side, nothing is kept.
    """
    made = list(axes)
    for index, part in dropped:
        if part.counts in DIRECTIONS and part.size == 1:
            if index and _holds_positions(made[index - 1]):
                made[index - 1] = (*made[index - 1], part)
            elif index < len(made) and _holds_positions(made[index]):
                made[index] = (part, *made[index])
    return tuple(made)


def _holds_positions(axis: Axis) -> bool:
    return bool(axis) and all(part.counts.rstrip("'") in DIRECTIONS for part in axis)


def _names_of_images(x: gs.Tensor, axes: Axes) -> set[int | str]:
    """The symbols by which the number of images goes."""
    sizes = {part.size for axis in axes for part in axis if part.counts == BATCH}
    sizes |= {x.shape[index] for index, axis in enumerate(axes) if [part.counts for part in axis] == [BATCH]}
    return {size for size in sizes if isinstance(size, str)}


def _by_name(sizes: Iterable[int | str], images: set[int | str]) -> list[int | str]:
    return [BATCH if size in images else size for size in sizes]


def _steps(parts: int, axes: int) -> Iterator[tuple[int, int]]:
    """How many parts may make how many axes: one of one, none of one, one of several, several of one."""
    pairs = [(1, 1), (0, 1), (1, 0), *((1, n) for n in range(2, axes + 1)), *((n, 1) for n in range(2, parts + 1))]
    return ((p, a) for p, a in pairs if p <= parts and a <= axes)


def _cut(before: Sequence[int | str], after: Sequence[int | str], i: int, j: int) -> bool:
    """Whether a reshape's cut behind the i-th size stands behind the j-th of its output."""
    return product(before[:i]) == product(after[:j]) or product(before[i:]) == product(after[j:])


def _pieces(part: Part, y: gs.Tensor, first: int, count: int) -> list[Axis] | None:
    """A part split over axes of y: channels stay channels, a direction becomes coarse steps and steps within."""
    if part.counts == CHANNELS:
        return [(Part(CHANNELS, y, first + index),) for index in range(count)]
    if count > 2 or not part.counts.isdigit() or part.of:
        return None
    return [(Part(part.counts, y, first, (part,)),), (Part(f"{part.counts}'", y, first + 1, (part,)),)]
