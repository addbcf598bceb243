"""Files whose weights are of a few bits, and files quantised dynamically, as tools write them, against torch."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

import graphgbp
from tests.build import drawn, model
from tests.fake_quantised import FakeQuantised
from tests.oracles import distance
from tests.rules.harness import run
from tests.test_quantised_networks import METHODS, TARGETS, images, named, reference

Weights = Mapping[str, np.ndarray]
Nodes = list[onnx.NodeProto]


def cnn(opset: int = 21) -> onnx.ModelProto:
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        "r1 = Relu(a)",
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)",
        "b = Conv<pads=[1,1,1,1]>(m, w2, b2)",
        "c = Add(b, m)",
        "r2 = Relu(c)",
        "p = GlobalAveragePool(r2)",
        "v = Flatten(p)",
        "h = MatMul(v, w3)",
        "i = Add(h, b3)",
        "r3 = Relu(i)",
        "k = MatMul(r3, w4)",
        "z = Add(k, b4)",
    ]
    shapes = [(8, 3, 3, 3), (8, 8, 3, 3), (8, 32), (32, 10)]
    weights = {f"w{i}": drawn(*shape, seed=i, scale=0.4) for i, shape in enumerate(shapes, 1)}
    weights |= {f"b{i}": drawn(size, seed=10 + i, scale=0.3) for i, size in enumerate((8, 8, 32, 10), 1)}
    return named(model(nodes, {"x": ["N", 3, 16, 16]}, ["z"], weights, opset=opset, ir_version=10))


def alike(network: torch.nn.Module, file: onnx.ModelProto, tolerance: float = 2e-6) -> None:
    x = images(4, 7)
    found = run(graphgbp.convert(file, METHODS, target_layer="r2"), {"x": x, "target": TARGETS})
    np.testing.assert_array_equal(found["z"], run(file, {"x": x})["z"])
    for name, expected in reference(network, "r2", x, TARGETS).items():
        assert distance(torch.from_numpy(found[name]), expected) < tolerance, name


# -- constants alone are quantised --------------------------------------------------------------------------------


def _steps(w: np.ndarray, axes: tuple[int, ...] | None, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """(q, scale): float32 integers, one scale for what `axes` span."""
    scale = np.abs(w).max(axes, keepdims=axes is not None) / (2 ** (bits - 1) - 1)
    return np.rint(w / scale), np.asarray(scale, np.float32)


def _dequantised(made: onnx.ModelProto, name: str, q: np.ndarray, scale: np.ndarray, **attributes: int) -> Nodes:
    made.graph.initializer.extend(
        [numpy_helper.from_array(q, f"{name}_q"), numpy_helper.from_array(scale, f"{name}_s")]
    )
    return [helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s"], [name], **attributes)]


def cast_and_scaled(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    q, scale = _steps(w, tuple(range(1, w.ndim)))
    made.graph.initializer.extend(
        [numpy_helper.from_array(q.astype(np.int8), f"{name}_q"), numpy_helper.from_array(scale, f"{name}_s")]
    )
    cast = helper.make_node("Cast", [f"{name}_q"], [f"{name}_real"], to=TensorProto.FLOAT)
    return [cast, helper.make_node("Mul", [f"{name}_real", f"{name}_s"], [name])], q * scale


def shifted_by_a_zero_point(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    q, scale = _steps(w, None)
    nodes = [
        helper.make_node("Cast", [f"{name}_q"], [f"{name}_real"], to=TensorProto.FLOAT),
        helper.make_node("Sub", [f"{name}_real", f"{name}_z"], [f"{name}_centred"]),
        helper.make_node("Mul", [f"{name}_centred", f"{name}_s"], [name]),
    ]
    values = {"q": (q + 128).astype(np.uint8), "z": np.float32(128), "s": scale}
    made.graph.initializer.extend(numpy_helper.from_array(v, f"{name}_{key}") for key, v in values.items())
    return nodes, q * scale


def dequantized_by_tensor(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    q, scale = _steps(w, None)
    return _dequantised(made, name, q.astype(np.int8), scale), q * scale


def dequantized_by_axis(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    q, scale = _steps(w, tuple(range(1, w.ndim)))
    return _dequantised(made, name, q.astype(np.int8), scale.reshape(-1), axis=0), q * scale


def four_bits_by_axis(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    q, scale = _steps(w, tuple(range(1, w.ndim)), bits=4)
    return _dequantised(made, name, q.astype(ml_dtypes.int4), scale.reshape(-1), axis=0), q * scale


def dequantized_by_block(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    """Blocks of 4 along the first axis."""
    blocks = w.reshape(-1, 4, *w.shape[1:])
    q, scale = _steps(blocks, (1,))
    nodes = _dequantised(made, name, q.reshape(w.shape).astype(np.int8), scale[:, 0], axis=0, block_size=4)
    return nodes, (q * scale).reshape(w.shape)


def four_bits_by_block(made: onnx.ModelProto, name: str, w: np.ndarray) -> tuple[Nodes, np.ndarray]:
    blocks = w.reshape(-1, 4, *w.shape[1:])
    q, scale = _steps(blocks, (1,), bits=4)
    nodes = _dequantised(made, name, q.reshape(w.shape).astype(ml_dtypes.int4), scale[:, 0], axis=0, block_size=4)
    return nodes, (q * scale).reshape(w.shape)


STORED = (
    cast_and_scaled, shifted_by_a_zero_point, dequantized_by_tensor, dequantized_by_axis, four_bits_by_axis,
    dequantized_by_block, four_bits_by_block,
)  # fmt: skip


@pytest.mark.parametrize("store", STORED, ids=lambda store: store.__name__)
def test_weights_of_few_bits(store: Callable[..., tuple[Nodes, np.ndarray]]):
    """Torch's network has the weights that the integers stand for.

    By tensor those of convolutions alone: a product ONNX Runtime quantises further there, as MatMulNBits, or not,
    depending on what stands around it.
    """
    real, file = cnn(), cnn()
    nodes: Nodes = []
    names = ("w1", "w2") if store is dequantized_by_tensor else ("w1", "w2", "w3", "w4")
    for tensor in [t for t in real.graph.initializer if t.name in names]:
        made, value = store(file, tensor.name, numpy_helper.to_array(tensor))
        nodes += made
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
        file.graph.initializer.remove(next(t for t in file.graph.initializer if t.name == tensor.name))
    nodes += [onnx.NodeProto.FromString(node.SerializeToString()) for node in file.graph.node]
    del file.graph.node[:]
    file.graph.node.extend(nodes)
    alike(FakeQuantised(real, real).double(), file)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_matmul_nbits_of_the_quantiser(bits, symmetric):
    """Torch's products have the weights that ONNX Runtime's node gives of an identity matrix."""
    real = cnn()
    quantiser = MatMulNBitsQuantizer(cnn(), bits=bits, block_size=16, is_symmetric=symmetric)
    quantiser.process()
    file = quantiser.model.model
    products = [node for node in file.graph.node if node.op_type == "MatMulNBits"]
    assert len(products) == 2
    for node, name in zip(products, ("w3", "w4"), strict=True):
        tensor = next(t for t in real.graph.initializer if t.name == name)
        alone = onnx.ModelProto.FromString(file.SerializeToString())
        del alone.graph.node[:], alone.graph.input[:], alone.graph.output[:]
        alone.graph.node.append(node)
        alone.graph.input.append(
            helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, [None, tensor.dims[0]])
        )
        alone.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None))
        (weight,) = run(alone, {node.input[0]: np.eye(tensor.dims[0], dtype=np.float32)}).values()
        assert not np.array_equal(weight, numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(weight, name))
    alike(FakeQuantised(real, real).double(), file)


# -- dynamic ------------------------------------------------------------------------------------------------------


class Dynamic(FakeQuantised):
    """Each node of the kinds in `products` reads its input quantised, to the range that this input has."""

    products: Collection[str] = ("Conv", "MatMul")

    def _read(self, node: onnx.NodeProto, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor | None]:
        x, *others = super()._read(node, values)
        if node.op_type in self.products:
            low, high = float(x.detach().min().clamp(max=0)), float(x.detach().max().clamp(min=0))
            scale = np.float32(np.float32(high - low) / np.float32(255))
            zero = int(np.rint(-np.float32(low) / scale))
            x = torch.fake_quantize_per_tensor_affine(x.float(), float(scale), zero, 0, 255).to(x.dtype)
        return [x, *others]


@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("weights", [QuantType.QUInt8, QuantType.QInt8])
def test_dynamic_quantisation(by_channel, weights, tmp_path: Path):
    path = tmp_path / "dynamic.onnx"
    only = ["MatMul"] if weights == QuantType.QInt8 else ["Conv", "MatMul"]  # ConvInteger has no kernel for int8
    quantize_dynamic(cnn(), path, weight_type=weights, per_channel=by_channel, op_types_to_quantize=only)
    file = onnx.load(path)
    kinds = {node.op_type for node in file.graph.node}
    assert "MatMulInteger" in kinds and ("ConvInteger" in kinds) == ("Conv" in only)
    network = Dynamic(cnn(), file).double()
    network.products = only
    alike(network, file)
