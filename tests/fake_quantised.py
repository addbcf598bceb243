"""A network in torch with the numbers of its quantised file: fake quantisation wherever the file quantises.

The float model says which operators there are, its ReLUs included, whatever became of them in the quantised file. That
file says, by the names that onnxruntime.quantization keeps, which tensors are quantised and how, and what is left
of the weights. Nothing here knows of graphgbp.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

_SUFFIXES = ("_QuantizeLinear_Output", "_quantized")
_RECTIFIERS = {"Relu": nn.ReLU, "Clip": nn.ReLU6}
_SCALE_AT = {  # which input of a node is the scale of what it makes; the zero point comes next
    "QuantizeLinear": 1,
    "QLinearConcat": 0,
    "QGemm": 7,
    **dict.fromkeys(("QLinearConv", "QLinearAdd", "QLinearMul", "QLinearMatMul"), 6),
    **dict.fromkeys(("QLinearAveragePool", "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu"), 3),
    "QLinearSoftmax": 3,
    "QLinearWhere": 7,
    "QLinearReduceMean": 3,
}


class FakeQuantised(nn.Module):
    """`quantisers` tells scale and zero point of a float model's tensor, `stored` its name in the quantised file.

    Told what the deployed file computed (`deployed`, by the float model's names), the network goes on from there, and
    `steps` counts how far off it would have been: integer kernels round otherwise than floats do.
    """

    def __init__(self, model: onnx.ModelProto, quantised: onnx.ModelProto) -> None:
        super().__init__()
        self.graph, self.file = model.graph, quantised.graph
        self.given = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.numbers = {t.name: numpy_helper.to_array(t) for t in quantised.graph.initializer}
        self.quantisers: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self.stored: dict[str, str] = {}
        self._find_quantisers()
        self._follow_swallowed()
        self.weights = {name: self._weight(name, value) for name, value in self.given.items()}
        rectifiers = {str(i): _RECTIFIERS[n.op_type]() for i, n in enumerate(self.graph.node) if self._rectifies(n)}
        self.rectifiers = nn.ModuleDict(rectifiers)
        self.deployed: Mapping[str, np.ndarray] = {}
        self.steps: dict[str, float] = {}
        self.layer: str | None = None

    def _find_quantisers(self) -> None:
        for node in self.file.node:
            suffix = next((s for s in _SUFFIXES if node.output[0].endswith(s)), None)
            if suffix is not None and node.op_type in _SCALE_AT:
                name, first = node.output[0].removesuffix(suffix), _SCALE_AT[node.op_type]
                self.quantisers[name] = (self.numbers[node.input[first]], self.numbers[node.input[first + 1]])
                self.stored[name] = node.output[0]

    def _rectifies(self, node: onnx.NodeProto) -> bool:
        return node.op_type == "Relu" or (node.op_type == "Clip" and not self.given[node.input[1]].any())

    def _follow_swallowed(self) -> None:
        """What quantises a convolution whose ReLU the file has not stands behind the ReLU."""
        made = {name for node in self.file.node if node.op_type in _RECTIFIERS for name in node.output}
        for node in self.graph.node:
            before, after = node.input[0], node.output[0]
            if node.op_type in _RECTIFIERS and before in self.quantisers and not made & {after, f"{after}_quantized"}:
                self.quantisers.setdefault(after, self.quantisers.pop(before))
                self.stored.setdefault(after, self.stored.pop(before))

    def _weight(self, name: str, value: np.ndarray) -> Tensor:
        """As the file has it: in integers, or as it was."""
        q = self.numbers.get(f"{name}_quantized")
        if q is None:
            return torch.from_numpy(self.numbers.get(name, value).copy())
        scale = self.numbers.get(f"{name}_scale", self.numbers.get(f"{name}_quantized_scale"))
        if scale is None:  # a bias, in units of what its node multiplies
            reader = next(node for node in self.file.node if f"{name}_quantized" in node.input)
            scale = self.numbers[reader.input[1]] * self.numbers[reader.input[4]]
        zero = self.numbers.get(f"{name}_zero_point", np.zeros((), q.dtype))
        by_axis = [-1 if axis == self._axis(f"{name}_quantized") else 1 for axis in range(q.ndim)]
        scale, zero = (v.reshape(by_axis if v.size > 1 else ()) for v in (scale, zero))
        return torch.from_numpy(np.asarray((q.astype(np.float64) - zero) * scale.astype(np.float64)))

    def _axis(self, q: str) -> int:
        """Along which a weight has its scales: as its DequantizeLinear says, by column or by output channel."""
        reader = next(node for node in self.file.node if q in node.input)
        if reader.op_type == "DequantizeLinear":
            return next((a.i for a in reader.attribute if a.name == "axis"), 1)
        return 1 if "MatMul" in reader.op_type else 0

    def _as_stored(self, name: str, x: Tensor) -> Tensor:
        if name not in self.quantisers:
            return x
        scale, zero = (value.reshape(()) for value in self.quantisers[name])
        limits = np.iinfo(zero.dtype)
        y = torch.fake_quantize_per_tensor_affine(
            x.float(), float(scale), int(zero), int(limits.min), int(limits.max)
        ).to(x.dtype)
        if name in self.deployed:
            told = torch.from_numpy((self.deployed[name].astype(np.float64) - float(zero)) * float(scale)).to(x.dtype)
            self.steps[name] = float((told - y.detach()).abs().max() / float(scale))
            y = y + (told - y).detach()
        return y

    def _read(self, node: onnx.NodeProto, values: Mapping[str, Tensor]) -> list[Tensor | None]:
        return [values[name] if name else None for name in node.input]

    def forward(self, images: Tensor) -> Tensor:
        name = self.graph.input[0].name
        weights = {k: w.to(images.dtype) if w.is_floating_point() else w for k, w in self.weights.items()}
        values = {name: self._as_stored(name, images), **weights}
        for index, node in enumerate(self.graph.node):
            inputs = self._read(node, values)
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            if str(index) in self.rectifiers:
                y = self.rectifiers[str(index)](_settled(inputs[0]))
            else:
                y = OPERATORS[node.op_type](attributes, *inputs)
            for name, made in zip(node.output, y if isinstance(y, tuple) else (y,), strict=True):
                values[name] = self._as_stored(name, made)
                score = made
        self.at_layer = values.get(self.layer or "")
        return score + (values[self.graph.output[0].name] - score).detach()  # it stands before its own quantiser


def _settled(x: Tensor) -> Tensor:
    """x, rounded near the kinks of ReLU6 as the file has it: 0 where integers add up to 0, and by a 6 as float32 is.

    What is left of such a sum in floats is rounding of scales. The integers' next sum is further off than 1e-6.
    """
    rounded = torch.where(x.abs() < 1e-6, 0, torch.where((x - 6).abs() < 1e-6, x.float().to(x.dtype), x))
    return x + (rounded - x).detach()


def _padded(attributes: Mapping[str, Any], x: Tensor, value: float = 0.0) -> Tensor:
    top, left, bottom, right = attributes.get("pads", (0, 0, 0, 0))
    return F.pad(x, (left, right, top, bottom), value=value)


def _conv(attributes: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.conv2d(_padded(attributes, x), w, b, attributes.get("strides", 1), groups=attributes.get("group", 1))


def _max_pool(attributes: Mapping[str, Any], x: Tensor) -> Tensor:
    return F.max_pool2d(_padded(attributes, x, -torch.inf), attributes["kernel_shape"], attributes["strides"])


def _mean(attributes: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.mean(attributes["axes"] if axes is None else axes.tolist(), keepdim=bool(attributes.get("keepdims", 1)))


def _gemm(attributes: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x @ (w.T if attributes.get("transB") else w) + b


def _reshape(attributes: Mapping[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    return x.reshape([x.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())])


OPERATORS: dict[str, Callable[..., Tensor | tuple[Tensor, ...]]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "MaxPool": _max_pool,
    "ReduceMean": _mean,
    "Reshape": _reshape,
    "Add": lambda a, x, y: x + y,
    "Mul": lambda a, x, y: x * y,
    "AveragePool": lambda a, x: F.avg_pool2d(x, a["kernel_shape"], a["strides"]),
    "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
    "Flatten": lambda a, x: x.flatten(1),
    "GlobalAveragePool": lambda a, x: x.mean((2, 3), keepdim=True),
    "HardSwish": lambda a, x: F.hardswish(x),
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a["alpha"]),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Identity": lambda a, x: x,
    "Clip": lambda a, x, low, high: x.clamp(low, high),
    "ConvTranspose": lambda a, x, w, b: F.conv_transpose2d(x, w, b, a["strides"]),
    "DepthToSpace": lambda a, x: x.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3),
    "Gather": lambda a, x, i: x.index_select(a["axis"], i),
    "HardSigmoid": lambda a, x: (a["alpha"] * x + a["beta"]).clamp(0, 1),
    "InstanceNormalization": lambda a, x, w, b: F.instance_norm(x, weight=w, bias=b),
    "LayerNormalization": lambda a, x, w, b: F.layer_norm(x, (x.shape[-1],), w, b),
    "MatMul": lambda a, x, y: x @ y,
    "Pad": lambda a, x, p: F.pad(x, (p[3], p[7], p[2], p[6]), mode=a.get("mode", b"constant").decode()),
    "Resize": lambda a, x, roi, s: F.interpolate(x, scale_factor=tuple(s.tolist()[2:]), mode="nearest"),
    "Slice": lambda a, x, i, j, k: x[:, :, i[0] : j[0], i[1] : j[1]],
    "Softmax": lambda a, x: x.softmax(a["axis"]),
    "Split": lambda a, x, s: x.split(s.tolist(), a["axis"]),
    "Squeeze": lambda a, x, i: x.squeeze(int(i)),
    "Tanh": lambda a, x: x.tanh(),
    "Transpose": lambda a, x: x.permute(*a["perm"]),
    "Unsqueeze": lambda a, x, i: x.unsqueeze(int(i)),
    "Where": lambda a, mask, x, y: torch.where(mask, x, y),
}


def exposed(quantised: onnx.ModelProto, network: FakeQuantised, names: Sequence[str]) -> onnx.ModelProto:
    """The quantised file with its quantised tensors as further outputs."""
    model = onnx.ModelProto.FromString(quantised.SerializeToString())
    for name in names:
        kind = helper.np_dtype_to_tensor_dtype(network.quantisers[name][1].dtype)
        model.graph.output.append(helper.make_tensor_value_info(network.stored[name], kind, None))
    return model
