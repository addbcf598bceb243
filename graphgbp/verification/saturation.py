"""Does each quantiser's gradient stop where the quantiser saturates? Its mask is fed values around both bounds.

At the point where differences are taken few values lie at a bound, so a mask that is a step off would not show there.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from graphgbp import contract
from graphgbp.equivalence import Feeds, RunError
from graphgbp.errors import GraphgbpError
from graphgbp.nodes import label
from graphgbp.verification.double import DoubleError
from graphgbp.verification.parts import part_for
from graphgbp.verification.pins import limits
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject

_AROUND = np.asarray([-1, -0.6, -0.4, 0, 0.4, 1])  # in steps from a bound, clear of where rounding ties


@dataclass(frozen=True)
class _Gate:
    """The condition on which a quantiser's cotangent passes, and the tensor that it reads the quantiser's input by."""

    quantiser: gs.Node
    condition: str
    reads: str


def check_saturation(subject: Subject) -> Check | None:
    """At every bound of every quantiser; None where the file passes through none."""
    name = "saturation"
    try:
        gates = list(_gates(subject))
        if subject.obstacle or not gates:
            return unchecked(name, subject.obstacle) if gates and subject.obstacle else None
        wrong = [gate.quantiser.outputs[0].name for gate in gates if not _is_right(subject, gate)]
    except (GraphgbpError, DoubleError) as error:
        return unchecked(name, f"the masks of quantisers cannot be evaluated: {error}")
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run the masks of quantisers: {error}")
    if wrong:
        return failed(name, f"{len(wrong)} of {len(gates)} masks of quantisers are wrong around their bounds: {wrong}")
    return passed(
        name, f"{len(gates)} masks of quantisers are open inside their bounds and shut beyond", masks=len(gates)
    )


def _gates(subject: Subject) -> Iterator[_Gate]:
    quantisers = {label(node): node for node in subject.view.graph.nodes if node.op == "QuantizeLinear"}
    makers = {output: node for node in subject.appended for output in node.output}
    found = set()
    for node in subject.appended:
        scope = node.name.rpartition("/")[0].split("/", 2)[-1]  # behind graphgbp/<pass>/
        if node.op_type != "Where" or scope not in quantisers:
            continue
        quantiser, behind = quantisers[scope], [node.input[0]]
        names = _read_as(subject, quantiser.inputs[0].name)
        while behind and behind[0] not in names:
            maker = makers.get(behind.pop(0))
            behind += [x for x in maker.input if x in makers or x in names] if maker else []
        if behind and (node.input[0], behind[0]) not in found:
            found.add((node.input[0], behind[0]))
            yield _Gate(quantiser, node.input[0], behind[0])


def _read_as(subject: Subject, x: str) -> set[str]:
    """The names under which an appended node may read a tensor as float32."""
    shown = f"{contract.SCOPE}/float32/{x}"
    return {shown} if x in subject.view.stored else {subject.view.twins.get(x, x), shown}


def _is_right(subject: Subject, gate: _Gate) -> bool:
    x, *parameters = gate.quantiser.inputs
    scale, zero_point = (_value(subject, tensor) for tensor in [*parameters, None][:2])
    kind = limits(subject.view.stored[gate.quantiser.outputs[0].name])
    steps = np.concatenate([int(bound) + _AROUND for bound in (kind.min, kind.max)])
    if scale.size > 1:
        sizes = [1] * len(x.shape)
        axis = gate.quantiser.attrs["axis"] % len(sizes)
        sizes[axis], other = -1, (axis + 1) % len(sizes)
        if other == axis:
            steps = np.resize(steps, scale.size)
        else:
            steps = steps.reshape([-1 if index == other else 1 for index in range(len(sizes))])
        scale, zero_point = scale.reshape(sizes), zero_point.reshape(sizes if zero_point.size > 1 else ())
    values = (scale * (steps - zero_point)).astype(np.float32)
    fits = np.broadcast_to((np.rint(steps) >= int(kind.min)) & (np.rint(steps) <= int(kind.max)), values.shape)
    given: Feeds = {name: subject.pins.exact[name] for name in subject.pins.given}
    cut = {gate.reads: TensorProto.FLOAT, **subject.pins.types(given)}
    part = part_for(subject.file, [gate.condition], cut)
    found = subject.run(part, {gate.reads: values, **subject.pins.in_types(given)})[gate.condition]
    return bool(np.array_equal(np.asarray(found), fits))


def _value(subject: Subject, tensor: Any) -> np.ndarray:
    """A scale or a zero point, in double."""
    if tensor is None or tensor.is_empty():
        return np.zeros(())
    if isinstance(tensor, gs.Constant):
        value = tensor.values
    else:
        known = subject.pins.exact
        value = known[tensor.name] if tensor.name in known else subject.primal([tensor.name])[0]
    return value.astype(np.float64).reshape(() if value.size == 1 else value.shape)
