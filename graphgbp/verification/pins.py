"""Tensors that a model stores in few bits, pinned to the values that ONNX Runtime gives them.

Rounding has no derivative. What has one is the straight-through network around a point: there a rounded tensor moves
as the unrounded one does, and where its quantiser saturates it does not move. It is made here, in double precision, of
the nodes that the model is seen as, and shares nothing with the rules. Central differences are taken at quantised
values that are displaced by less than a step, because those themselves lie on kinks: at 0 before a ReLU, as equals
under a max pooling. Half precision is not rounded at all there.

Where a file computes a quantised tensor again and reads the copy, the copy's values count: the maps are those of that
pass.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper
from onnx.reference.op_run import OpRun

from graphgbp.contract import SCOPE
from graphgbp.equivalence import Feeds, outputs_of
from graphgbp.stored import Stored, is_quantised
from graphgbp.verification.double import DoubleModel
from graphgbp.verification.parts import part_for

_DYNAMIC = "DynamicQuantizeLinear"  # the scale and the zero point that it finds count as given
_ROOM = 0.4  # how far a quantised value is displaced, in steps
_HALF_A_STEP = 0.51
_ROUNDED_ELSEWHERE = 3  # times as far as rounding what a tensor is made of moves it
_SLACK = 1e-5  # of the largest value, for what float32 rounds


class Pins:
    """The tensors of few bits that a model makes, and the network that goes straight through their rounding.

    `graph` is the model as plain nodes, `runs` what ONNX Runtime runs, `file` what computes the tensors in `twins`
    again under the names there. `exact` holds their values, `displaced` those of quantised ones at which differences
    are taken, in double; `given` count as constants. Raises RunError, and DoubleError where something cannot be
    evaluated.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        stored: Stored,
        runs: onnx.ModelProto,
        feeds: Feeds,
        file: onnx.ModelProto,
        twins: Mapping[str, str],
    ) -> None:
        self._graph, self._stored, self._feeds = graph, stored, feeds
        made = [name for node in graph.graph.node for name in node.output if name]
        self.given = [x for node in graph.graph.node if node.op_type == _DYNAMIC for x in node.output[1:]]
        self.names = [*(name for name in made if name in stored), *self.given]
        self.copied = [name for name in self.names if twins.get(name) in _made_in(file)]
        exact = _values(part_for(file, [twins[name] for name in self.copied]), feeds)
        exact = {name: exact[twins[name]] for name in self.copied}
        there = _made_in(runs) - twins.keys()
        exact |= _values(part_for(runs, [name for name in self.names if name in there]), feeds)
        hidden = [name for name in self.names if name not in exact]
        if hidden:
            exact |= _values(part_for(graph, hidden, self.types(exact)), {**feeds, **self.in_types(exact)})
        self.exact = exact

    def __bool__(self) -> bool:
        return bool(self.names)

    @cached_property
    def halves(self) -> list[str]:
        return [name for name in self.exact if name not in self.given and not is_quantised(self._stored[name])]

    @cached_property
    def displaced(self) -> Feeds:
        rng = np.random.default_rng(3)
        room = {name: 0.0 if name in self.given else _ROOM for name in self.names if name not in self.halves}
        return {name: self.exact[name] + rng.uniform(0, most, self.exact[name].shape) for name, most in room.items()}

    def types(self, names: Collection[str]) -> dict[str, int]:
        """Their ONNX types in the file; what is given keeps those of a DynamicQuantizeLinear."""
        found = {name: (TensorProto.FLOAT, TensorProto.UINT8)[n % 2] for n, name in enumerate(self.given)}
        given: dict[str, int] = {name: kind for name, kind in found.items() if name in names}
        return given | {
            name: helper.np_dtype_to_tensor_dtype(self._stored[name]) for name in names if name in self._stored
        }

    def cut_off(
        self, model: onnx.ModelProto, names: Sequence[str], values: Feeds, twins: Mapping[str, str]
    ) -> tuple[onnx.ModelProto, Feeds]:
        """The part of a file that makes tensors of pinned ones, and what it takes; a copy in the file is pinned too."""
        kinds = self.types(values)
        copies = {twins[name]: name for name in values if name in twins}
        part = part_for(model, names, kinds | {copy: kinds[name] for copy, name in copies.items()})
        return part, values | {copy: values[name] for copy, name in copies.items()}

    def in_types(self, values: Feeds) -> Feeds:
        kinds = {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in self.types(values).items()}
        return {name: x.astype(kinds[name]) for name, x in values.items()}

    # -- the straight-through network -----------------------------------------------------------------------------

    def _opened(self, names: Collection[str]) -> onnx.ModelProto:
        """The graph in which nobody makes the named tensors: a maker makes the unrounded one, under another name."""
        opened = onnx.ModelProto()
        opened.CopyFrom(self._graph)
        for node in opened.graph.node:
            if node.op_type == _DYNAMIC:
                continue
            if node.op_type == "Cast" and node.output[0] in self._stored:
                next(a for a in node.attribute if a.name == "to").i = TensorProto.DOUBLE
            node.output[:] = [_unrounded(name) if name in names else name for name in node.output]
        return opened

    def unrounded(self, values: Feeds) -> Feeds:
        """What each of these tensors is before it is rounded, where all others are as given; quantised: x / s + z."""
        names = [name for name in values if name not in self.given]
        part = part_for(self._opened(values), [_unrounded(name) for name in names], values.keys())
        found = evaluated(part, [_unrounded(name) for name in names], {**self._feeds, **values})
        return dict(zip(names, found, strict=True))

    @cached_property
    def _moves(self) -> Feeds:
        """Of each quantiser, 1 where it does not saturate and 0 where it does."""
        quantisers = [node.output[0] for node in self._graph.graph.node if node.op_type == "QuantizeLinear"]
        return {name: _fits(self._here[name], self._stored[name]) for name in quantisers if name in self._here}

    @cached_property
    def _here(self) -> Feeds:
        return self.unrounded(self.displaced)

    @cached_property
    def straight_through(self) -> onnx.ModelProto:
        """The graph, with pinned + moves (unrounded - unrounded at this point) for each; it also takes `constants`."""
        model = onnx.ModelProto()
        model.CopyFrom(self._opened(self.displaced))
        nodes = [node for node in model.graph.node if node.op_type != _DYNAMIC]
        del model.graph.node[:]
        real = {_unrounded(name): name for name in self._here}
        for node in nodes:
            model.graph.node.append(node)
            for made in [name for name in node.output if name in real]:
                name = real[made]
                if name in self._moves:
                    model.graph.node.add(op_type="Mul", input=[made, _of("moves", name)], output=[_of("moved", name)])
                    made = _of("moved", name)
                model.graph.node.add(op_type="Add", input=[made, _of("offset", name)], output=[name])
        model.graph.input.extend(helper.make_tensor_value_info(x, TensorProto.DOUBLE, None) for x in self.constants)
        return model

    @cached_property
    def constants(self) -> Feeds:
        """What `straight_through` takes beside the model's inputs."""
        found = {name: self.exact[name] for name in self.given} | {_of("moves", x): y for x, y in self._moves.items()}
        for name, here in self._here.items():
            found[_of("offset", name)] = self.displaced[name] - self._moves.get(name, 1.0) * here
        return found

    # -- is the graph the model? ----------------------------------------------------------------------------------

    @cached_property
    def _before(self) -> Feeds:
        return self.unrounded(self.exact)

    @cached_property
    def fault(self) -> str | None:
        """Which pinned tensor is not what its maker makes of the pinned ones before it; None where all are."""
        for name, real in self._before.items():
            expected, kind = self.exact[name], self._stored[name]
            if real.shape != expected.shape:
                return f"'{name}' has shape {list(expected.shape)}, and its plain nodes give {list(real.shape)}"
            room = self._room(name) + _SLACK * np.abs(expected).max(initial=0)
            found = _limited(real, kind) if name in self._rounded_again else self._as_stored(name, real)
            if not (np.abs(found - expected) <= room).all():
                return f"'{name}' is off by up to {np.abs(found - expected).max():.3g}, more than a rounding step"
        return None

    def _room(self, name: str) -> np.ndarray:
        """How far a pinned tensor may lie from what its maker makes."""
        kind = self._stored[name]
        if is_quantised(kind):
            return np.asarray(_HALF_A_STEP if name in self._rounded_again else 1.0)
        moved = np.abs(self._shaken[name] - self._before[name]).max(initial=0)
        return _eps(kind) * np.abs(self.exact[name]) + _ROUNDED_ELSEWHERE * moved

    @cached_property
    def _shaken(self) -> Feeds:
        """`_before`, all tensors of half precision off by up to a rounding step: the runtime does not round each."""
        rng = np.random.default_rng(4)
        off = {name: 1 + _eps(self._stored[name]) * rng.uniform(-1, 1, self.exact[name].shape) for name in self.halves}
        return self.unrounded(self.exact | {name: self.exact[name] * by for name, by in off.items()})

    @cached_property
    def _rounded_again(self) -> set[str]:
        """What a file quantises again, in plain nodes: no integer kernel rounds it elsewhere."""
        made = {x for node in self._graph.graph.node if node.op_type == "QuantizeLinear" for x in node.output}
        return made.intersection(self.copied)

    def _as_stored(self, name: str, real: np.ndarray) -> np.ndarray:
        """In steps where it is quantised; half precision stays as it is."""
        return _rounded(real, self._stored[name]) if is_quantised(self._stored[name]) else real

    @cached_property
    def equal_share(self) -> float:
        """The share of quantised values that come out of the plain nodes as they are; the others are a step off."""
        found = self._before
        quantised = [name for name in found if is_quantised(self._stored[name])]
        equal = sum(int((_rounded(found[name], self._stored[name]) == self.exact[name]).sum()) for name in quantised)
        return equal / max(1, sum(self.exact[name].size for name in quantised))


def evaluated(model: onnx.ModelProto, names: list[str], feeds: Feeds) -> list[np.ndarray]:
    return DoubleModel(model, REAL).run(names, feeds)


def _made_in(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in node.output if name}


def _eps(kind: np.dtype[Any]) -> float:
    return float(ml_dtypes.finfo(kind).eps)


def limits(kind: np.dtype[Any]) -> Any:
    """The least and the largest number of a quantised type."""
    return np.iinfo(kind) if kind.kind in "iu" else ml_dtypes.iinfo(kind)


def _limited(real: np.ndarray, kind: np.dtype[Any]) -> np.ndarray:
    return np.clip(real, int(limits(kind).min), int(limits(kind).max))


def _rounded(real: np.ndarray, kind: np.dtype[Any]) -> np.ndarray:
    return _limited(np.rint(real), kind)


def _fits(real: np.ndarray, kind: np.dtype[Any]) -> np.ndarray:
    """1 where a quantiser does not saturate"""
    return (np.rint(real) == _rounded(real, kind)).astype(np.float64)


def _of(what: str, name: str) -> str:
    return f"{SCOPE}/{what}/{name}"


def _unrounded(name: str) -> str:
    return _of("unrounded", name)


def _values(model: onnx.ModelProto, feeds: Feeds) -> Feeds:
    """All outputs of a model by ONNX Runtime, in double."""
    names = [output.name for output in model.graph.output]
    del model.graph.output[:]
    for name in names:
        wide = f"{SCOPE}/double/{name}"
        model.graph.node.append(helper.make_node("Cast", [name], [wide], to=TensorProto.DOUBLE))
        model.graph.output.append(onnx.ValueInfoProto(name=wide))
    found = outputs_of(model, feeds) if names else {}
    return {name: np.asarray(found[f"{SCOPE}/double/{name}"]) for name in names}


class QuantizeLinear(OpRun):
    op_domain = ""

    def _run(self, x: np.ndarray, scale: np.ndarray, zero_point: Any = None, **attributes: Any) -> tuple[np.ndarray]:
        """x / s + z, neither rounded nor limited"""
        real = x / _along(scale, x, attributes)
        return (real if zero_point is None else real + _along(zero_point, x, attributes),)


class DequantizeLinear(OpRun):
    op_domain = ""

    def _run(self, q: np.ndarray, scale: np.ndarray, zero_point: Any = None, **attributes: Any) -> tuple[np.ndarray]:
        real = q.astype(np.float64)
        real = real if zero_point is None else real - _along(zero_point, q, attributes)
        return (real * _along(scale, q, attributes),)


def _along(values: np.ndarray, x: np.ndarray, attributes: Mapping[str, Any]) -> np.ndarray:
    """One number for all of x, or one for each index of an axis, or one for each block along it."""
    values, axis = values.astype(np.float64), 1 if attributes.get("axis") is None else attributes["axis"]
    if values.size == 1:
        return values.reshape(())
    if block := attributes.get("block_size"):
        return np.repeat(values, block, axis)[tuple(map(slice, x.shape))]
    return values.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])


REAL = [QuantizeLinear, DequantizeLinear]
"""The quantisers in real numbers, for ONNX's reference evaluator."""
