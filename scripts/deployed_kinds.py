"""Models as they are deployed, each made by the tool that people make it with.

A maker takes the float32 file and a folder, and gives the path of what it wrote.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader
from torch import nn

Maker = Callable[["Source", Path], None]


@dataclass(frozen=True)
class Source:
    """A float32 file, images that it is fed with, float32 [n, ...], and the torch network that it was exported from."""

    path: Path
    input: str
    images: np.ndarray
    network: Any = None


@dataclass(frozen=True)
class Kind:
    """A kind of file and the package that made it; `runs`: by ONNX Runtime's CPU provider, else by ONNX's evaluator."""

    name: str
    package: str
    make: Maker
    runs: bool = True

    @property
    def tool(self) -> str:
        return f"{self.package} {version('onnxruntime-gpu' if self.package == 'onnxruntime' else self.package)}"


class VisionTransformer(nn.Module):
    """Two blocks of 64 channels and 4 heads over 14 x 14 patches and a class token, every parameter drawn."""

    width, heads, patch, patches = 64, 4, 16, 196

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, self.width, self.patch, self.patch)
        self.token = nn.Parameter(torch.randn(1, 1, self.width))
        self.position = nn.Parameter(torch.randn(1, 1 + self.patches, self.width))
        self.blocks = nn.ModuleList(Block(self.width, self.heads) for _ in range(2))
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Block(nn.Module):
    """Attention and a dense layer, each behind a normalization, each added to what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.dense = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self._attention(self.norm1(x))
        return x + self.dense(self.norm2(x))

    def _attention(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        q, k, v = (
            layer(x).view(n, t, self.heads, c // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        weights = (q @ k.transpose(-2, -1) / (c // self.heads) ** 0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, t, c))


# -- optimised ----------------------------------------------------------------------------------------------------


def unchanged(source: Source, path: Path) -> None:
    path.write_bytes(source.path.read_bytes())


def optimised(level: str) -> Maker:
    """As ONNX Runtime saves a model behind its graph optimisations."""

    def make(source: Source, path: Path) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, f"ORT_ENABLE_{level.upper()}")
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(str(source.path), options, providers=["CPUExecutionProvider"])

    return make


def transformer_optimised(half: bool = False) -> Maker:
    """By onnxruntime.transformers, which fuses attention."""

    def make(source: Source, path: Path) -> None:
        from onnxruntime.transformers import optimizer

        heads, width = source.network.heads, source.network.width
        made = optimizer.optimize_model(str(source.path), "vit", num_heads=heads, hidden_size=width)
        if half:
            made.convert_float_to_float16(keep_io_types=True)
        made.save_model_to_file(str(path))

    return make


def simplified(source: Source, path: Path) -> None:
    import onnxsim

    made, same = onnxsim.simplify(str(source.path))
    assert same
    onnx.save(made, path)


def slimmed(source: Source, path: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(str(source.path)), path)


# -- half precision -----------------------------------------------------------------------------------------------


def float16(**options: Any) -> Maker:
    """Converted, whole or but for some operators."""

    def make(source: Source, path: Path) -> None:
        from onnxconverter_common import float16

        onnx.save(float16.convert_float_to_float16(_without_shapes(source.path), **options), path)

    return make


def export(network: nn.Module, example: torch.Tensor, path: Path, **options: Any) -> None:
    """`image` to `logits`, in one file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example,),
            str(path),
            input_names=["image"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
            **options,
        )


def exported(kind: str, dynamo: bool) -> Maker:
    """By torch, of the network in another precision."""

    def make(source: Source, path: Path) -> None:
        dtype = getattr(torch, kind)
        network = copy.deepcopy(source.network).to(dtype).eval()
        export(network, torch.from_numpy(source.images[:1]).to(dtype), path, dynamo=dynamo)

    return make


def _without_shapes(path: Path) -> onnx.ModelProto:
    """The model without the shapes of inner tensors, of which exporters write wrong ones."""
    model = onnx.load(path)
    del model.graph.value_info[:]
    return model


# -- quantised ----------------------------------------------------------------------------------------------------


class Calibration(CalibrationDataReader):
    """The images, one by one, as onnxruntime.quantization reads them."""

    def __init__(self, source: Source) -> None:
        self._feeds: Iterator[dict[str, np.ndarray]] = iter({source.input: image[None]} for image in source.images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


def quantised(layout: str, activations: str, weights: str, **options: Any) -> Maker:
    """Static: the ranges of the activations are those of the images."""

    def make(source: Source, path: Path) -> None:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        types = {"activation_type": getattr(QuantType, activations), "weight_type": getattr(QuantType, weights)}
        form = getattr(QuantFormat, layout)
        quantize_static(_without_shapes(source.path), path, Calibration(source), form, **types, **options)

    return make


def dynamic(source: Source, path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(_without_shapes(source.path), path, weight_type=QuantType.QUInt8, per_channel=True)


def four_bits(source: Source, path: Path) -> None:
    """MatMulNBits: weights of 4 bits in blocks."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    made = MatMulNBitsQuantizer(_without_shapes(source.path), block_size=16, is_symmetric=False)
    made.process()
    made.model.save_model_to_file(str(path))


def weights_only(source: Source, path: Path) -> None:
    """Convolution weights in int8 by output channel, dequantised before they are used."""
    onnx.save(_with_int8_weights(source.path, lambda w, q, s: [_node("DequantizeLinear", [q, s], w, axis=0)]), path)


def cast_and_scaled(source: Source, path: Path) -> None:
    """The same with a Cast and a Mul."""

    def nodes(weight: str, q: str, scale: str) -> list[onnx.NodeProto]:
        real, axes, column = f"{weight}/real", f"{weight}/axes", f"{weight}/column"
        return [
            _node("Cast", [q], real, to=onnx.TensorProto.FLOAT),
            _node("Constant", [], axes, value_ints=[1, 2, 3]),
            _node("Unsqueeze", [scale, axes], column),
            _node("Mul", [real, column], weight),
        ]

    onnx.save(_with_int8_weights(source.path, nodes), path)


def _node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], output, **attributes)


def _with_int8_weights(path: Path, nodes: Callable[[str, str, str], list[onnx.NodeProto]]) -> onnx.ModelProto:
    model = _without_shapes(path)
    weights = {x.name: x for x in model.graph.initializer if len(x.dims) == len("OIHW")}
    before: list[onnx.NodeProto] = []
    for name, tensor in weights.items():
        value = numpy_helper.to_array(tensor)
        scale = np.abs(value).max((1, 2, 3)) / 127
        q = np.rint(value / scale[:, None, None, None]).astype(np.int8)
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(
            numpy_helper.from_array(*pair) for pair in ((q, f"{name}/q"), (scale, f"{name}/scale"))
        )
        before += nodes(name, f"{name}/q", f"{name}/scale")
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([*before, *kept])
    return model


def external(source: Source, path: Path) -> None:
    """Weights in a file beside the model's."""
    onnx.save(onnx.load(source.path), path, save_as_external_data=True, location=f"{path.stem}.weights")


def then(first: Maker, second: Maker) -> Maker:
    """One tool after another."""

    def make(source: Source, path: Path) -> None:
        between = path.with_suffix(".between.onnx")
        first(source, between)
        second(Source(between, source.input, source.images, source.network), path)

    return make


QDQ = quantised("QDQ", "QUInt8", "QInt8", per_channel=True)
CNN = (
    Kind("float32 as exported", "torch", unchanged),
    Kind("optimised, basic", "onnxruntime", optimised("basic")),
    Kind("optimised, extended", "onnxruntime", optimised("extended")),
    Kind("optimised, all (blocked layout)", "onnxruntime", optimised("all")),
    Kind("onnxsim", "onnxsim", simplified),
    Kind("onnxslim", "onnxslim", slimmed),
    Kind("float16", "onnxconverter-common", float16()),
    Kind("float16, float32 inputs and outputs", "onnxconverter-common", float16(keep_io_types=True)),
    Kind("float16 but for Clip and Gemm", "onnxconverter-common", float16(op_block_list=["Clip", "Gemm"])),
    Kind("float16 as exported", "torch", exported("float16", True)),
    Kind("float16 as exported, TorchScript", "torch", exported("float16", False)),
    Kind("float16, then optimised, extended", "onnxruntime", then(float16(), optimised("extended"))),
    Kind("int8 QDQ, uint8 activations, per channel", "onnxruntime", QDQ),
    Kind("int8 QDQ, per tensor", "onnxruntime", quantised("QDQ", "QUInt8", "QInt8")),
    Kind("int8 QDQ, int8 activations", "onnxruntime", quantised("QDQ", "QInt8", "QInt8", per_channel=True)),
    Kind("int16 activations, int8 weights, QDQ", "onnxruntime", quantised("QDQ", "QUInt16", "QInt8", per_channel=True)),
    Kind("int8 QDQ, then optimised, extended", "onnxruntime", then(QDQ, optimised("extended"))),
    Kind("int8 QOperator", "onnxruntime", quantised("QOperator", "QUInt8", "QInt8", per_channel=True)),
    Kind("int8, dynamic", "onnxruntime", dynamic),
    Kind("int8 weights, DequantizeLinear", "onnx", weights_only),
    Kind("int8 weights, Cast and Mul", "onnx", cast_and_scaled),
    Kind("external weights", "onnx", external),
)
VIT = (
    Kind("float32 as exported", "torch", unchanged),
    Kind("optimised, extended", "onnxruntime", optimised("extended")),
    Kind("onnxruntime.transformers", "onnxruntime", transformer_optimised()),
    Kind("onnxruntime.transformers, float16", "onnxruntime", transformer_optimised(half=True)),
    Kind("float16", "onnxconverter-common", float16()),
    Kind("bfloat16 as exported", "torch", exported("bfloat16", True), runs=False),
    Kind("int8 QDQ", "onnxruntime", QDQ),
    Kind("int8 QOperator", "onnxruntime", quantised("QOperator", "QUInt8", "QInt8")),
    Kind("int8, dynamic", "onnxruntime", dynamic),
    Kind("int8, dynamic, then optimised, extended", "onnxruntime", then(dynamic, optimised("extended"))),
    Kind("4-bit weights (MatMulNBits)", "onnxruntime", four_bits),
)
