"""An ONNX model evaluated node by node in float64 by torch: an oracle that shares nothing with graphgbp.

It reads the model as it was given; tests.float64_operators says which operators it knows.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import torch
from onnx import helper

from tests.float64_operators import CLEARED, OPERATORS, SIDES, Attributes, to_torch
from tests.oracles import GuidedRectifier

CLEARANCE = 1e-6  # relative to the largest value of a tensor: a few float32 rounding errors


class Float64Model:
    """`model(x)` is the first output, or the tensor named; `model.sides` tells on which side of every kink it fell.

    The rectifiers in `guided`, named by what they make, each with its upper bound, go backward by the guided rule.
    `model.values` keeps the tensors named in `keep`, of the last evaluation.

    float32 takes a deep network to a point where a few of its millions of ReLUs have switched, and the derivative
    there is another one. `anchor` adds the rounding errors of such a run as constants: every operator stays the same
    function, and its derivative is taken where float32 stood.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        output: str | None = None,
        *,
        guided: Mapping[str, float] | None = None,
        keep: Sequence[str] = (),
    ) -> None:
        self._output = output or model.graph.output[0].name
        self._nodes = _needed(model.graph, {self._output, *keep})
        self._guided = dict(guided or {})
        self._weights = {tensor.name: to_torch(tensor) for tensor in model.graph.initializer}
        (self._input,) = (value.name for value in model.graph.input if value.name not in self._weights)
        self._uses = Counter(name for node in self._nodes for name in node.input)
        self._uses.update([self._output, *keep])
        self._keep = keep
        self.values: dict[str, torch.Tensor] = {}
        self._kinks: dict[str, list[tuple[str, Attributes]]] = {}
        for node in self._nodes:
            if node.op_type in CLEARED:
                self._kinks.setdefault(node.input[0], []).append((node.op_type, _attributes(node)))
        self._rounding: dict[str, torch.Tensor] = {}
        self.sides: list[torch.Tensor] = []

    @property
    def kinked(self) -> list[str]:
        """The tensors that meet a kink: inputs of ReLUs and of max poolings."""
        return list(self._kinks)

    def anchor(self, x: torch.Tensor, reached: Mapping[str, np.ndarray]) -> float:
        """Make `model(x)` pass through the values a float32 run reached at the kinked tensors.

        What float32 cannot tell from a kink is put CLEARANCE away from it, on the side where float32 saw it. Returns
        the largest constant, relative to the largest value of its tensor. Each makes up for the nodes since the last
        kinks alone, so where all are small these nodes compute what the float32 run's computed.
        """
        self._rounding = {}
        largest = 0.0

        def meet(name: str, value: torch.Tensor) -> torch.Tensor:
            nonlocal largest
            if name not in reached:
                return value
            wanted = torch.from_numpy(reached[name]).double()
            scale = float(wanted.abs().max())
            for op, attributes in self._kinks[name]:
                wanted = CLEARED[op](wanted, attributes, CLEARANCE * scale)
            self._rounding[name] = wanted - value
            largest = max(largest, float(self._rounding[name].abs().max()) / scale)
            return wanted

        with torch.no_grad():
            self._evaluate(x, meet)
        return largest

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._evaluate(x, lambda name, value: value + self._rounding[name] if name in self._rounding else value)

    def _evaluate(self, x: torch.Tensor, meet: Callable[[str, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        self.sides = []
        values, uses = {**self._weights, self._input: x}, self._uses.copy()
        for node in self._nodes:
            inputs = [values[name] for name in node.input if name]
            attributes = _attributes(node)
            if node.op_type in SIDES:
                self.sides.append(SIDES[node.op_type]([value.detach() for value in inputs], attributes))
            output = node.output[0]
            if output in self._guided:
                value = GuidedRectifier.apply(inputs[0], self._guided[output])
            else:
                value = OPERATORS[node.op_type](inputs, attributes)
            values[output] = meet(output, value)
            uses.subtract(node.input)
            for name in node.input:
                if not uses[name]:
                    values.pop(name, None)
        self.values = {name: values[name] for name in self._keep}
        return values[self._output]


def _needed(graph: onnx.GraphProto, wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that some tensors depend on, in the graph's order."""
    found = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            found.append(node)
            wanted.update(node.input)
    return found[::-1]


def crossings(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> int:
    """How many kinks lie between two evaluations: ReLUs that switched, windows whose maximum moved."""
    return sum(int((one != other).sum()) for one, other in zip(a, b, strict=True))


def _attributes(node: onnx.NodeProto) -> Attributes:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}
