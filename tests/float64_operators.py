"""ONNX operators of classifiers in torch, for tests.float64; images, sequences and volumes alike.

An operator takes its inputs and attributes. SIDES tells on which side of its kinks an input lies; CLEARED moves an
input away from them. Where an operator changed, the meaning before opset 13 stands here, unless the inputs tell.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

Attributes = Mapping[str, Any]
Operator = Callable[..., torch.Tensor]
Tensors = Sequence[torch.Tensor]

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_AVERAGE_POOL = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}


def to_torch(tensor: onnx.TensorProto) -> torch.Tensor:
    value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
    return value.double() if value.is_floating_point() else value


def _padded(x: torch.Tensor, attributes: Attributes, kernel: Sequence[int], value: float = 0.0) -> torch.Tensor:
    """Both ends of each spatial axis padded; torch counts from the last axis."""
    pads = _pads(x, attributes, kernel)
    ends = [end for axis in reversed(range(len(kernel))) for end in (pads[axis], pads[axis + len(kernel)])]
    return F.pad(x, ends, value=value) if any(ends) else x


def _pads(x: torch.Tensor, attributes: Attributes, kernel: Sequence[int]) -> list[int]:
    rank, mode = len(kernel), attributes.get("auto_pad", b"NOTSET").decode()
    if mode in ("NOTSET", "VALID"):
        return list(attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    strides, dilations = (attributes.get(name, [1] * rank) for name in ("strides", "dilations"))
    total = [
        max((ceil(size / stride) - 1) * stride + (length - 1) * dilation + 1 - size, 0)
        for size, length, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True)
    ]
    less, more = [t // 2 for t in total], [t - t // 2 for t in total]
    return [*less, *more] if mode == "SAME_UPPER" else [*more, *less]


def _window(attributes: Attributes) -> dict[str, Any]:
    assert not attributes.get("ceil_mode") and set(attributes.get("dilations", [1])) == {1}
    kernel = attributes["kernel_shape"]
    return {"kernel_size": kernel, "stride": attributes.get("strides", [1] * len(kernel))}


def _conv(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x, weight, bias = (*inputs, None)[:3]
    ones = [1] * (x.ndim - 2)
    stride, dilation = attributes.get("strides", ones), attributes.get("dilations", ones)
    x = _padded(x, attributes, weight.shape[2:])
    return _CONV[x.ndim](x, weight, bias, stride=stride, dilation=dilation, groups=attributes.get("group", 1))


def _max_pool(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x = _padded(inputs[0], attributes, attributes["kernel_shape"], -np.inf)
    return _MAX_POOL[x.ndim](x, **_window(attributes))


def _average_pool(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    assert not attributes.get("count_include_pad")
    (x,), window, kernel = inputs, _window(attributes), attributes["kernel_shape"]
    inside = _AVERAGE_POOL[x.ndim](_padded(torch.ones_like(x[:1, :1]), attributes, kernel), **window)
    return _AVERAGE_POOL[x.ndim](_padded(x, attributes, kernel), **window) / inside


def _batch_normalization(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x, scale, bias, mean, variance = inputs
    return F.batch_norm(x, mean, variance, scale, bias, eps=attributes.get("epsilon", 1e-5))


def _lrn(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    assert attributes["size"] % 2 == 1
    alpha, beta = attributes.get("alpha", 1e-4), attributes.get("beta", 0.75)
    return F.local_response_norm(inputs[0], attributes["size"], alpha, beta, attributes.get("bias", 1.0))


def _clip(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    low, high = _bounds(inputs, attributes)
    return inputs[0].clamp(low, high)


def _bounds(inputs: Tensors, attributes: Attributes) -> tuple[float, float]:
    """Of a Clip: attributes before opset 11, inputs since."""
    given = dict(zip(("min", "max"), inputs[1:], strict=False))
    low, high = (given.get(name, attributes.get(name, bound)) for name, bound in (("min", -np.inf), ("max", np.inf)))
    return float(low), float(high)


def _hard_sigmoid(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    return (attributes.get("alpha", 0.2) * inputs[0] + attributes.get("beta", 0.5)).clamp(0, 1)


def _gemm(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    a, b, c = (*inputs, 0.0)[:3]
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    return attributes.get("alpha", 1.0) * (a @ b) + attributes.get("beta", 1.0) * c


def _reshape(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x, shape = inputs
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])


def _axes(inputs: Tensors, attributes: Attributes) -> list[int]:
    """Of a reduction or a squeeze: an attribute at first, an input since opset 13 or 18."""
    return inputs[1].tolist() if len(inputs) > 1 else list(attributes["axes"])


def _mean(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    return inputs[0].mean(_axes(inputs, attributes), keepdim=bool(attributes.get("keepdims", 1)))


def _squeeze(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    return inputs[0].squeeze(_axes(inputs, attributes))


def _unsqueeze(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x = inputs[0]
    for axis in sorted(_axes(inputs, attributes)):
        x = x.unsqueeze(axis)
    return x


def _pad(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    assert attributes.get("mode", b"constant") == b"constant"
    x, pads = inputs[0], inputs[1].tolist() if len(inputs) > 1 else attributes["pads"]
    value = float(inputs[2]) if len(inputs) > 2 else attributes.get("value", 0.0)
    ends = [end for axis in reversed(range(x.ndim)) for end in (pads[axis], pads[axis + x.ndim])]
    return F.pad(x, ends, value=value)


def _slice(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x, starts, ends, axes = inputs
    for start, end, axis in zip(starts.tolist(), ends.tolist(), axes.tolist(), strict=True):
        x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end),)]
    return x


def _gather(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    x, index = inputs
    found = x.index_select(attributes.get("axis", 0), index.reshape(-1))
    return found if index.ndim else found.squeeze(attributes.get("axis", 0))


def _flatten(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    assert attributes.get("axis", 1) == 1
    return inputs[0].flatten(1)


def _softmax(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    """As before opset 13, over all axes from the given one on: the same for the last axis."""
    (x,) = inputs
    axis = attributes.get("axis", 1)
    return x.flatten(axis).softmax(-1).reshape(x.shape)


def _cast(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    """Every float type is float64 here; integers stay as they are."""
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
    return inputs[0].double() if attributes["to"] in floats else inputs[0].long()


def _constant_of_shape(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    return to_torch(attributes["value"]).expand(inputs[0].tolist())


OPERATORS: dict[str, Operator] = {
    "Add": lambda inputs, _: inputs[0] + inputs[1],
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_normalization,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": lambda inputs, attributes: torch.cat(inputs, attributes["axis"]),
    "Constant": lambda inputs, attributes: to_torch(attributes["value"]),
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "Div": lambda inputs, _: inputs[0] / inputs[1] if inputs[0].is_floating_point() else inputs[0] // inputs[1],
    "Dropout": lambda inputs, _: inputs[0],
    "Flatten": _flatten,
    "Gather": _gather,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda inputs, _: inputs[0].mean(tuple(range(2, inputs[0].ndim)), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "Identity": lambda inputs, _: inputs[0],
    "LRN": _lrn,
    "MatMul": lambda inputs, _: inputs[0] @ inputs[1],
    "MaxPool": _max_pool,
    "Mod": lambda inputs, _: inputs[0] % inputs[1],
    "Mul": lambda inputs, _: inputs[0] * inputs[1],
    "Pad": _pad,
    "ReduceMean": _mean,
    "Relu": lambda inputs, _: inputs[0].relu(),
    "Reshape": _reshape,
    "Shape": lambda inputs, _: torch.tensor(inputs[0].shape),
    "Slice": _slice,
    "Softmax": _softmax,
    "Squeeze": _squeeze,
    "Sub": lambda inputs, _: inputs[0] - inputs[1],
    "Sum": lambda inputs, _: sum(inputs[1:], inputs[0]),
    "Transpose": lambda inputs, attributes: inputs[0].permute(attributes["perm"]),
    "Unsqueeze": _unsqueeze,
}


def _side_of_zero(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    return inputs[0] > 0


def _side_of_bounds(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    low, high = _bounds(inputs, attributes)
    return (inputs[0] > low).int() + (inputs[0] > high).int()


def _side_of_slope(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    """Of a HardSigmoid."""
    line = attributes.get("alpha", 0.2) * inputs[0] + attributes.get("beta", 0.5)
    return (line > 0).int() + (line > 1).int()


def _winner(inputs: Tensors, attributes: Attributes) -> torch.Tensor:
    """Where each window has its maximum; behind a ReLU, a window whose maximum is 0 has none."""
    x = _padded(inputs[0], attributes, attributes["kernel_shape"], -np.inf)
    value, index = _MAX_POOL[x.ndim](x, **_window(attributes), return_indices=True)
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


SIDES: dict[str, Operator] = {
    "Clip": _side_of_bounds,
    "HardSigmoid": _side_of_slope,
    "MaxPool": _winner,
    "Relu": _side_of_zero,
}
CLEARED: dict[str, Operator] = {"MaxPool": _clear_winners, "Relu": _clear_of_zero}
