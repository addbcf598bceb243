"""Cotangents that are zero outside a part of one axis, computed with only there.

A classifier that reads one token, or a slice, sends back a cotangent of zeros with one part between them. What works on
each place along that axis by itself needs to see the part alone: a dense layer over the one token costs nothing beside
the same layer over all 197 of a ViT. The zeros are put back where an operator needs the whole; where the parts of a sum
fill the axis, as those of queries, keys and values do, they are joined and no zero is made at all.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Operand, Size

_OF_ONE = ("Neg", "Relu", "Cast", "Identity")  # 0 where x is 0
_SUMS = ("Add", "Sub", "Sum")
_REDUCTIONS = ("ReduceSum", "ReduceMean")


class Part(NamedTuple):
    """`tensor` lies on an axis behind `begin` zeros and before `end` zeros."""

    tensor: gs.Tensor
    axis: int
    begin: int
    end: Size

    @property
    def size(self) -> int:
        return int(self.tensor.shape[self.axis])

    @property
    def place(self) -> tuple[int, int, int, int | str]:
        return self.axis, self.begin, self.size, self.end if isinstance(self.end, int) else self.end.name


class PartwiseEmitter(Emitter):
    """An Emitter that leaves out of products, sums and dense layers what is zero by an earlier `pad`.

    The result has the shape, type and values that Emitter's has, but where a zero meets infinity: it stays zero.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._parts: dict[str, Part] = {}

    def pad(self, x: gs.Tensor, pads: Sequence[Size] | gs.Tensor) -> gs.Tensor:
        padded = super().pad(x, pads)
        if padded is not x and (part := _between_zeros(x, pads)) is not None:
            self._parts[padded.name] = part
        return padded

    def op(self, op_type: str, *inputs: Operand | None, name: str | None = None, **attributes: Any) -> gs.Tensor:
        operands = [self._operand(value) for value in inputs]
        if name is None and any(operand.name in self._parts for operand in operands):
            found = self._joined(operands) if op_type in ("Add", "Sum") else None
            found = found or self._apart(op_type, operands, attributes)
            if found is not None:
                return found
        return super().op(op_type, *operands, name=name, **attributes)

    def _joined(self, terms: Sequence[gs.Tensor]) -> gs.Tensor | None:
        """The sum of parts that fill their axis, each where no other is."""
        parts = sorted((self._parts[x.name] for x in terms if x.name in self._parts), key=lambda part: part.begin)
        begins, ends = [part.begin for part in parts], [0, *(part.begin + part.size for part in parts)]
        fill = len(parts) == len(terms) and begins == ends[:-1] and _is_none(parts[-1].end)
        alike = fill and len({tuple(x.shape) for x in terms}) == len({part.axis for part in parts}) == 1
        if not alike:
            return None
        return self.with_shape(self.concat([part.tensor for part in parts], parts[0].axis), terms[0])

    def _apart(self, op_type: str, operands: list[gs.Tensor], attributes: dict[str, Any]) -> gs.Tensor | None:
        """The same operator on the part, between zeros again; None where it needs the whole, or that is small."""
        given = next(x for x in operands if x.name in self._parts)
        part = self._parts[given.name]
        whole = given.shape[part.axis]
        if isinstance(whole, int) and 2 * part.size > whole:
            return None
        shared = self._shared(op_type, operands, attributes, given)
        made = super().op(op_type, *shared, **attributes) if shared else None
        if made is None or made.shape is None or len(made.shape) != len(given.shape):
            return None
        begins: list[Size] = [0] * len(made.shape)
        ends = list(begins)
        begins[part.axis], ends[part.axis] = part.begin, part.end
        padded = self.pad(made, [*begins, *ends])
        padded.shape = (*made.shape[: part.axis], whole, *made.shape[part.axis + 1 :])
        return padded

    def _shared(
        self, op_type: str, operands: Sequence[gs.Tensor], attributes: Mapping[str, Any], given: gs.Tensor
    ) -> list[gs.Tensor] | None:
        """What of each operand makes the part of the result; None where more is needed."""
        (first, *others), part = operands, self._parts[given.name]
        if op_type in _SUMS:
            together = all(self._is_beside(x, part) for x in operands)
            return [self._parts[x.name].tensor for x in operands] if together else None
        if op_type == "Mul" or (op_type == "Div" and first is given and others[0].name not in self._parts):
            cut = [self._cut(x, part, given) for x in operands]
            here = [x for x in cut if x is not None]
            return here if len(here) == len(cut) else None
        if first is not given:
            return None
        alone = (
            op_type in _OF_ONE
            or (op_type in _REDUCTIONS and _reduces_others(first, others, attributes, part.axis))
            or (op_type == "MatMul" and _multiplies_rows(first, others[0], part.axis))
        )
        return [part.tensor, *others] if alone else None

    def _is_beside(self, x: gs.Tensor, part: Part) -> bool:
        """Whether x lies between the same zeros."""
        return x.name in self._parts and self._parts[x.name].place == part.place

    def _cut(self, x: gs.Tensor, part: Part, given: gs.Tensor) -> gs.Tensor | None:
        """What a factor has at the part, where it has that axis."""
        if self._is_beside(x, part):
            return self._parts[x.name].tensor
        if x.shape is None or len(x.shape) > len(given.shape):
            return None
        axis = part.axis - (len(given.shape) - len(x.shape))
        if axis < 0 or x.shape[axis] == 1:
            return x
        if x.shape[axis] != given.shape[part.axis]:
            return None
        cut = self.slice(x, [part.begin], [part.begin + part.size], [axis])
        cut.shape = (*x.shape[:axis], part.size, *x.shape[axis + 1 :])
        return cut


def _reduces_others(x: gs.Tensor, others: Sequence[gs.Tensor], attributes: Mapping[str, Any], axis: int) -> bool:
    """Whether a reduction keeps every axis and leaves this one alone."""
    axes = others[0].values.tolist() if others and isinstance(others[0], gs.Constant) else attributes.get("axes") or []
    return bool(axes and attributes.get("keepdims")) and axis not in [other % len(x.shape) for other in axes]


def _multiplies_rows(a: gs.Tensor, b: gs.Tensor, axis: int) -> bool:
    """Whether a product of matrices takes what lies along this axis of the left one row by row."""
    if b.shape is None or len(b.shape) < 2 or len(b.shape) > len(a.shape):
        return False
    return axis == len(a.shape) - 2 or (axis < len(a.shape) - 1 and len(b.shape) == 2)


def _between_zeros(x: gs.Tensor, pads: Sequence[Size] | gs.Tensor) -> Part | None:
    """What `pad` puts x between, where that is zeros along one axis, a known number in front."""
    if isinstance(pads, gs.Tensor):
        if not isinstance(pads, gs.Constant):
            return None
        pads = pads.values.tolist()
    sizes = [int(size.values.item()) if isinstance(size, gs.Constant) else size for size in pads]
    rank = len(sizes) // 2
    padded = [axis for axis in range(rank) if not (_is_none(sizes[axis]) and _is_none(sizes[axis + rank]))]
    if len(padded) != 1 or x.shape is None or not isinstance(x.shape[padded[0]], int):
        return None
    begin, end = sizes[padded[0]], sizes[padded[0] + rank]
    known = isinstance(begin, int) and begin >= 0 and (not isinstance(end, int) or end >= 0)
    return Part(x, padded[0], int(begin), end) if known and isinstance(begin, int) else None


def _is_none(size: Size) -> bool:
    return isinstance(size, int) and size == 0
