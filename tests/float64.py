"""An ONNX model evaluated node by node in float64 by torch: an oracle that shares nothing with graphgbp.

It reads the model as it was given and knows the operators of image classifiers as opset 9 defines them.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

Attributes = Mapping[str, Any]
Operator = Callable[..., torch.Tensor]

CLEARANCE = 1e-6  # relative to the largest value of a tensor: a few float32 rounding errors


class Float64Model:
    """`model(x)` is the first output; `model.sides` tells on which side of every kink the last evaluation fell.

    float32 takes a deep network to a point where a few of its millions of ReLUs have switched, and the derivative
    there is another one. `anchor` adds the rounding errors of such a run as constants: every operator stays the same
    function, and its derivative is taken where float32 stood.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._output = model.graph.output[0].name
        self._weights = {tensor.name: _to_torch(tensor) for tensor in model.graph.initializer}
        (self._input,) = (value.name for value in model.graph.input if value.name not in self._weights)
        self._uses = Counter(name for node in self._graph.node for name in node.input)
        self._kinks: dict[str, list[tuple[str, Attributes]]] = {}
        for node in self._graph.node:
            if node.op_type in _SIDES:
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
                wanted = _CLEARED[op](wanted, attributes, CLEARANCE * scale)
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
        for node in self._graph.node:
            inputs = [values[name] for name in node.input]
            attributes = _attributes(node)
            if node.op_type in _SIDES:
                self.sides.append(_SIDES[node.op_type](inputs[0].detach(), attributes))
            (output, *_) = node.output
            values[output] = meet(output, _OPERATORS[node.op_type](inputs, attributes))
            uses.subtract(node.input)
            for name in node.input:
                if not uses[name]:
                    values.pop(name, None)
        return values[self._output]


def crossings(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> int:
    """How many kinks lie between two evaluations: ReLUs that switched, windows whose maximum moved."""
    return sum(int((one != other).sum()) for one, other in zip(a, b, strict=True))


def _attributes(node: onnx.NodeProto) -> Attributes:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _to_torch(tensor: onnx.TensorProto) -> torch.Tensor:
    value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    return value.double() if value.is_floating_point() else value


def _padded(x: torch.Tensor, attributes: Attributes, value: float = 0.0) -> torch.Tensor:
    """Both ends of each spatial axis padded; torch counts from the last axis."""
    assert attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    pads = attributes.get("pads", [0, 0, 0, 0])
    return F.pad(x, (pads[1], pads[3], pads[0], pads[2]), value=value) if any(pads) else x


def _window(attributes: Attributes) -> dict[str, Any]:
    assert not attributes.get("ceil_mode") and set(attributes.get("dilations", [1])) == {1}
    return {"kernel_size": attributes["kernel_shape"], "stride": attributes.get("strides", [1, 1])}


def _conv(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    x, weight, bias = (*inputs, None)[:3]
    stride, dilation = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    groups = attributes.get("group", 1)
    return F.conv2d(_padded(x, attributes), weight, bias, stride=stride, dilation=dilation, groups=groups)


def _max_pool(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    return F.max_pool2d(_padded(inputs[0], attributes, -np.inf), **_window(attributes))


def _average_pool(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    assert not attributes.get("count_include_pad")
    (x,), window = inputs, _window(attributes)
    inside = F.avg_pool2d(_padded(torch.ones_like(x[:1, :1]), attributes), **window)
    return F.avg_pool2d(_padded(x, attributes), **window) / inside


def _batch_normalization(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    x, scale, bias, mean, variance = inputs
    return F.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _lrn(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    assert attributes["size"] % 2 == 1
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return F.local_response_norm(inputs[0], attributes["size"], alpha, beta, attributes.get("bias", 1.0))


def _gemm(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    a, b, c = inputs
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    return attributes.get("alpha", 1.0) * (a @ b) + attributes.get("beta", 1.0) * c


def _reshape(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    x, shape = inputs
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])


def _unsqueeze(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    x = inputs[0]
    for axis in sorted(attributes["axes"]):
        x = x.unsqueeze(axis)
    return x


def _softmax(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    """As before opset 13: over all axes from the given one on."""
    (x,) = inputs
    return x.flatten(attributes.get("axis", 1)).softmax(-1).reshape(x.shape)


def _constant_of_shape(inputs: list[torch.Tensor], attributes: Attributes) -> torch.Tensor:
    return _to_torch(attributes["value"]).expand(inputs[0].tolist())


_OPERATORS: dict[str, Operator] = {
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Concat": lambda inputs, attributes: torch.cat(inputs, attributes["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Dropout": lambda inputs, _: inputs[0],
    "Gemm": _gemm,
    "GlobalAveragePool": lambda inputs, _: inputs[0].mean((2, 3), keepdim=True),
    "LRN": _lrn,
    "MaxPool": _max_pool,
    "Mul": lambda inputs, _: inputs[0] * inputs[1],
    "Relu": lambda inputs, _: inputs[0].relu(),
    "Reshape": _reshape,
    "Softmax": _softmax,
    "Sum": lambda inputs, _: sum(inputs[1:], inputs[0]),
    "Transpose": lambda inputs, attributes: inputs[0].permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}


def _side_of_zero(x: torch.Tensor, attributes: Attributes) -> torch.Tensor:
    return x > 0


def _winner(x: torch.Tensor, attributes: Attributes) -> torch.Tensor:
    """Where each window has its maximum; behind a ReLU, a window whose maximum is 0 has none."""
    value, index = F.max_pool2d(_padded(x, attributes, -np.inf), **_window(attributes), return_indices=True)
    return index.where(value != 0, -1)


def _clear_of_zero(x: torch.Tensor, attributes: Attributes, clearance: float) -> torch.Tensor:
    return x.where(x.abs() > clearance, torch.where(x > 0, clearance, -clearance))


def _clear_winners(x: torch.Tensor, attributes: Attributes, clearance: float) -> torch.Tensor:
    """Every window's first maximum raised above its rivals, except zeros behind a ReLU."""
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        maxima = _max_pool([leaf], attributes)
        (wins,) = torch.autograd.grad(maxima[maxima != 0].sum(), leaf)
    return x + clearance * (wins > 0)


_SIDES: dict[str, Operator] = {"MaxPool": _winner, "Relu": _side_of_zero}
_CLEARED: dict[str, Operator] = {"MaxPool": _clear_winners, "Relu": _clear_of_zero}
