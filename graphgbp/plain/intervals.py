"""The least and the greatest value that a tensor can have, told by interval arithmetic over the nodes that make it.

A quantised tensor is taken as the real numbers that it stands for: a quantiser saturates and does not round.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.patterns import is_standard, source

_LIMIT = 1 << 16
"""The elements of the largest constant that is looked into."""


class Interval(NamedTuple):
    """All values from low to high."""

    low: float
    high: float


_REAL, _NOT_NEGATIVE, _UNIT = Interval(-math.inf, math.inf), Interval(0, math.inf), Interval(0, 1)

Rule: TypeAlias = Callable[[gs.Node, Sequence[Interval]], Interval]


class Intervals:
    """The interval of every tensor asked for and of those before it; each is worked out once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[gs.Tensor, Interval]] = {}  # the tensor keeps its id from being given again

    def of(self, tensor: gs.Tensor) -> Interval:
        """Where the values of a tensor lie; everything where that is not known."""
        waiting = [tensor]
        while waiting:
            x = waiting[-1]
            unknown = [] if id(x) in self._known else [y for y in _read(x) if id(y) not in self._known]
            if unknown:
                waiting += unknown
                continue
            waiting.pop()
            if id(x) not in self._known:
                self._known[id(x)] = x, self._work_out(x)
        return self._known[id(tensor)][1]

    def _work_out(self, x: gs.Tensor) -> Interval:
        if isinstance(x, gs.Constant):
            return _of_constant(x)
        if not (read := _read(x)):
            return _within_type(_REAL, x)
        node = x.inputs[0]
        with np.errstate(all="ignore"):
            return _within_type(_RULES[node.op](node, [self._known[id(y)][1] for y in read]), x)


def _read(x: gs.Tensor) -> list[gs.Tensor]:
    """What the rule of the node that makes x reads; nothing where there is none."""
    node = x.inputs[0] if isinstance(x, gs.Variable) and x.inputs else None
    if node is None or not is_standard(node) or node.op not in _RULES:
        return []
    return list(node.inputs) if x is node.outputs[0] or node.op in ("DynamicQuantizeLinear", "Split") else []


def _of_constant(x: gs.Constant) -> Interval:
    if not 0 < int(np.prod(x.shape)) <= _LIMIT or x.values.dtype.kind in "OSUc":
        return _REAL
    values = x.values.astype(np.float64)
    return _ordered(float(values.min()), float(values.max()))


def _ordered(low: float, high: float) -> Interval:
    """inf - inf may be anything."""
    return Interval(-math.inf if math.isnan(low) else float(low), math.inf if math.isnan(high) else float(high))


def _within_type(x: Interval, tensor: gs.Tensor) -> Interval:
    x = _ordered(*x)
    if tensor.dtype is None or isinstance(tensor.dtype, int) or np.dtype(tensor.dtype).kind not in "iub":
        return x
    kind = np.dtype(tensor.dtype)
    least, most = (0, 1) if kind.kind == "b" else (np.iinfo(kind).min, np.iinfo(kind).max)
    return Interval(*(float(min(max(end, least), most)) for end in x))


# -- arithmetic -----------------------------------------------------------------------------------------------


def _hull(*parts: Interval) -> Interval:
    return Interval(min(x.low for x in parts), max(x.high for x in parts))


def _sum(*terms: Interval) -> Interval:
    return _ordered(sum(x.low for x in terms), sum(x.high for x in terms))


def _negative(x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def _product(a: Interval, b: Interval) -> Interval:
    ends = [0.0 if 0 in (p, q) else p * q for p in a for q in b]
    return Interval(min(ends), max(ends))


def _inverse(x: Interval) -> Interval:
    if x.low < 0 < x.high:
        return _REAL
    return Interval(1 / x.high if x.high else -math.inf, 1 / x.low if x.low else math.inf)


def _absolute(x: Interval) -> Interval:
    ends = abs(x.low), abs(x.high)
    return Interval(0 if x.low < 0 < x.high else min(ends), max(ends))


def _quotient(a: Interval, b: Interval) -> Interval:
    return _product(a, _inverse(b))


def _difference(a: Interval, b: Interval) -> Interval:
    return _sum(a, _negative(b))


def _power(x: Interval, exponent: Interval) -> Interval:
    p = exponent.low
    if p != exponent.high or p <= 0:
        return _NOT_NEGATIVE if x.low >= 0 or (p == exponent.high and p % 2 == 0) else _REAL
    if p % 2 == 0:
        x = _absolute(x)
    if x.low < 0 and p % 2 != 1:
        return _REAL
    return Interval(*(np.power(end, p) for end in x))


def _real(x: gs.Tensor) -> gs.Tensor:
    """The tensor whose numbers these are, but for a quantiser."""
    x = source(x)
    while x.inputs and x.inputs[0].op == "DequantizeLinear":
        q = x.inputs[0].inputs[0]
        if not q.inputs or q.inputs[0].op != "QuantizeLinear":
            break
        x = source(q.inputs[0].inputs[0])
    return x


def _times(node: gs.Node, read: Sequence[Interval]) -> Interval:
    a, b = map(_real, node.inputs)
    return _power(read[0], Interval(2, 2)) if a is b else _product(*read)


def _larger(node: gs.Node, read: Sequence[Interval]) -> Interval:
    """Of x and -x, |x|."""
    found = Interval(max(x.low for x in read), max(x.high for x in read))
    values = [_real(x) for x in node.inputs]
    opposite = {id(_real(x.inputs[0].inputs[0])) for x in values if x.inputs and x.inputs[0].op == "Neg"}
    return Interval(max(found.low, 0), found.high) if any(id(x) in opposite for x in values) else found


def _clipped(node: gs.Node, read: Sequence[Interval]) -> Interval:
    x = read[0]
    given = [index < len(node.inputs) and not node.inputs[index].is_empty() for index in (1, 2)]
    if given[0]:
        x = Interval(max(x.low, read[1].low), max(x.high, read[1].high))
    if given[1]:
        x = Interval(min(x.low, read[2].low), min(x.high, read[2].high))
    return x


# -- quantisers -----------------------------------------------------------------------------------------------


def _zero_point(node: gs.Node, read: Sequence[Interval]) -> Interval:
    return read[2] if len(read) > 2 and not node.inputs[2].is_empty() else Interval(0, 0)


def _quantised(node: gs.Node, read: Sequence[Interval]) -> Interval:
    return _sum(_quotient(read[0], read[1]), _zero_point(node, read))


def _dequantised(node: gs.Node, read: Sequence[Interval]) -> Interval:
    return _product(_difference(read[0], _zero_point(node, read)), read[1])


# -- sums, pools, interpolation -------------------------------------------------------------------------------


def _sign_kept(node: gs.Node, read: Sequence[Interval]) -> Interval:
    return Interval(0 if read[0].low >= 0 else -math.inf, 0 if read[0].high <= 0 else math.inf)


def _summed_products(node: gs.Node, read: Sequence[Interval]) -> Interval:
    factors = [node.attrs.get(name, 1) for name in ("alpha", "beta")]
    present = [x for x, tensor in zip(read, node.inputs, strict=True) if not tensor.is_empty()]
    return _NOT_NEGATIVE if min(factors) >= 0 and all(x.low >= 0 for x in present) else _REAL


def _padded(node: gs.Node, read: Sequence[Interval]) -> Interval:
    filled = len(read) > 2 and not node.inputs[2].is_empty()
    return _hull(read[0], read[2] if filled else Interval(0, 0))


def _interpolated(node: gs.Node, read: Sequence[Interval]) -> Interval:
    """A cubic interpolation overshoots a little; no network has a ReLU for that."""
    outside = node.attrs.get("extrapolation_value", 0.0)
    return _hull(read[0], Interval(outside, outside))


def _as_first(node: gs.Node, read: Sequence[Interval]) -> Interval:
    return read[0]


def _averaged(node: gs.Node, read: Sequence[Interval]) -> Interval:
    return _hull(read[0], Interval(0, 0)) if node.attrs.get("count_include_pad", 0) else read[0]


# -- the table ------------------------------------------------------------------------------------------------

KEPT = {
    "Cast", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "GlobalAveragePool",
    "GlobalMaxPool", "Identity", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "Reshape", "Slice", "SpaceToDepth",
    "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze",
}  # fmt: skip
"""Operators that move, choose or average values of their first input."""

_SIGN_KEPT = {
    "Celu", "CumSum", "Elu", "Gelu", "HardSwish", "LRN", "LeakyRelu", "LpNormalization", "Mish", "ReduceSum", "Selu",
    "Swish",
}  # fmt: skip
_GIVEN = {
    "ArgMax": _NOT_NEGATIVE,
    "ArgMin": _NOT_NEGATIVE,
    "Cos": Interval(-1, 1),
    "DynamicQuantizeLinear": _NOT_NEGATIVE,
    "GlobalLpPool": _NOT_NEGATIVE,
    "HardSigmoid": _UNIT,
    "Hardmax": _UNIT,
    "LogSoftmax": Interval(-math.inf, 0),
    "LpPool": _NOT_NEGATIVE,
    "ReduceL1": _NOT_NEGATIVE,
    "ReduceL2": _NOT_NEGATIVE,
    "ReduceSumSquare": _NOT_NEGATIVE,
    "Sin": Interval(-1, 1),
    "Softmax": _UNIT,
}
_INCREASING: dict[str, Callable[[float], float]] = {
    "Atan": np.arctan,
    "Ceil": np.ceil,
    "Erf": math.erf,
    "Exp": np.exp,
    "Floor": np.floor,
    "Relu": lambda x: max(x, 0),
    "Round": np.rint,
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Sign": np.sign,
    "Softplus": lambda x: np.logaddexp(0, x),
    "Sqrt": lambda x: np.sqrt(max(x, 0)),
    "Tanh": np.tanh,
}


def _increasing(f: Callable[[float], float]) -> Rule:
    return lambda node, read: Interval(f(read[0].low), f(read[0].high))


def _given(found: Interval) -> Rule:
    return lambda node, read: found


_RULES: dict[str, Rule] = {
    **dict.fromkeys(KEPT, _as_first),
    **dict.fromkeys(_SIGN_KEPT, _sign_kept),
    **dict.fromkeys(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"), _summed_products),
    **dict.fromkeys(("Concat", "Mean"), lambda node, read: _hull(*read)),
    **dict.fromkeys(("GridSample", "Resize"), _interpolated),
    **{op: _given(found) for op, found in _GIVEN.items()},
    **{op: _increasing(f) for op, f in _INCREASING.items()},
    "Abs": lambda node, read: _absolute(*read),
    "Add": lambda node, read: _sum(*read),
    "AveragePool": _averaged,
    "Clip": _clipped,
    "DequantizeLinear": _dequantised,
    "Div": lambda node, read: _quotient(*read),
    "Max": _larger,
    "Min": lambda node, read: Interval(min(x.low for x in read), min(x.high for x in read)),
    "Mul": _times,
    "Neg": lambda node, read: _negative(*read),
    "Pad": _padded,
    "Pow": lambda node, read: _power(*read),
    "PRelu": _sign_kept,
    "QuantizeLinear": _quantised,
    "Reciprocal": lambda node, read: _inverse(*read),
    "Sub": lambda node, read: _difference(*read),
    "Sum": lambda node, read: _sum(*read),
    "ThresholdedRelu": lambda node, read: _NOT_NEGATIVE if node.attrs.get("alpha", 1.0) >= 0 else _REAL,
    "Where": lambda node, read: _hull(*read[1:]),
}
