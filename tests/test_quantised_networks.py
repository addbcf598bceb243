"""Files of onnxruntime.quantization, explained as they are deployed, against torch networks fake-quantised alike."""

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import graphgbp
from graphgbp.contract import Manifest
from graphgbp.model_file import read_manifest
from graphgbp.recipe import ImageInput, Recipe
from tests.build import drawn, model
from tests.fake_quantised import FakeQuantised, exposed
from tests.oracles import GuidedRectifier, cam_of, distance, with_rectifiers
from tests.rules.harness import run

METHODS = ["saliency", "guided_backprop", "gradcam", "guided_gradcam"]
TARGETS = np.array([1, 4, 7, 2])
U8, S8, S16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QInt16
KINDS: dict[str, dict[str, Any]] = {
    "u8 s8": {"activation_type": U8, "weight_type": S8},
    "u8 s8 by channel": {"activation_type": U8, "weight_type": S8, "per_channel": True},
    "u8 s8 reduced range": {"activation_type": U8, "weight_type": S8, "reduce_range": True},
    "u8 u8": {"activation_type": U8, "weight_type": QuantType.QUInt8},
    "s8 s8": {"activation_type": S8, "weight_type": S8, "per_channel": True},
    "s8 s8 symmetric": {"activation_type": S8, "weight_type": S8, "extra_options": {"ActivationSymmetric": True}},
    "s16 s8": {"activation_type": S16, "weight_type": S8},
}
CASES = [
    (style, kind) for style in ("QDQ", "QOperator") for kind in KINDS if not (style == "QOperator" and kind == "s16 s8")
]


@cache
def cnn(rectifier: str) -> onnx.ModelProto:
    """Convolutions, a max pooling, additions with a ReLU behind them and without, two average poolings."""
    relu = {"Relu": "Relu({})", "ReLU6": "Clip({}, low, high)"}[rectifier]
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        f"r1 = {relu.format('a')}",
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)",
        "b = Conv<pads=[1,1,1,1]>(m, w2, b2)",
        f"r2 = {relu.format('b')}",
        "c = Conv<pads=[1,1,1,1]>(r2, w3, b3)",
        "d = Add(c, m)",
        f"r3 = {relu.format('d')}",
        "e = Conv<pads=[1,1,1,1], group=8>(r3, w4, b4)",
        "f = Add(e, r3)",
        "g = Conv<strides=[2,2], pads=[1,1,1,1]>(f, w5, b5)",
        f"r4 = {relu.format('g')}",
        "p = AveragePool<kernel_shape=[2,2], strides=[2,2]>(r4)",
        "h = Conv(p, w6, b6)",
        f"r5 = {relu.format('h')}",
        "q = GlobalAveragePool(r5)",
        "v = Flatten(q)",
        "z = Gemm<transB=1>(v, w7, b7)",
    ]
    shapes = [(8, 3, 3, 3), (8, 8, 3, 3), (8, 8, 3, 3), (8, 1, 3, 3), (12, 8, 3, 3), (16, 12, 1, 1), (10, 16)]
    scale = 0.25 if rectifier == "Relu" else 0.6
    weights = {f"w{i}": drawn(*shape, seed=i, scale=scale) for i, shape in enumerate(shapes, 1)}
    weights |= {f"b{i}": drawn(shape[0], seed=10 + i, scale=0.3) for i, shape in enumerate(shapes, 1)}
    if rectifier == "ReLU6":
        weights |= {"low": np.float32(0), "high": np.float32(6)}
    return named(model(nodes, {"x": ["N", 3, 16, 16]}, ["z"], weights))


def named(made: onnx.ModelProto) -> onnx.ModelProto:
    for node in made.graph.node:
        node.name = node.output[0]
    return made


def images(count: int, seed: int) -> np.ndarray:
    return drawn(count, 3, 16, 16, seed=seed) + 2 * np.kron(
        drawn(count, 3, 4, 4, seed=seed + 1), np.ones((4, 4))
    ).astype(np.float32)


class Calibration(CalibrationDataReader):
    def __init__(self, name: str, samples: np.ndarray) -> None:
        self.samples: Iterator[dict[str, np.ndarray]] = iter([{name: sample[None]} for sample in samples])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


def quantised(
    made: onnx.ModelProto, folder: Path, style: str, samples: np.ndarray | None = None, **kind: Any
) -> onnx.ModelProto:
    samples = images(16, 100) if samples is None else samples
    path, source = folder / "quantised.onnx", folder / "float.onnx"
    onnx.save(made, source)
    reader = Calibration(made.graph.input[0].name, samples)
    quantize_static(source, path, reader, quant_format=QuantFormat[style], **kind)
    return onnx.load(path)


def scores(network: torch.nn.Module, x: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
    return network(x)[torch.arange(len(x)), torch.from_numpy(targets)].sum()


def reference(network: FakeQuantised, layer: str, x: np.ndarray, targets: np.ndarray) -> dict[str, torch.Tensor]:
    """Torch's maps in float64, Grad-CAM at a tensor of the float model."""
    tensor = torch.from_numpy(x).double().requires_grad_()
    guided = torch.autograd.grad(scores(with_rectifiers(network, GuidedRectifier), tensor, targets), tensor)[0]
    network.layer = layer
    score = scores(network, tensor, targets)
    saliency, gradients = torch.autograd.grad(score, [tensor, network.at_layer])
    cam = F.interpolate(cam_of(network.at_layer.detach(), gradients).relu(), x.shape[2:], mode="bilinear")
    return {"saliency": saliency, "guided_backprop": guided, "gradcam": cam, "guided_gradcam": guided * cam}


def follow(network: FakeQuantised, file: onnx.ModelProto, x: np.ndarray) -> None:
    """Let a network go on from what the deployed file computes, which is off by some steps from what it would.

    Of activations in int8 a QDQ file's nodes as written: taken out of the runtime, they change what it fuses.
    """
    names = list(network.quantisers)
    signed = any(network.quantisers[name][1].dtype == np.int8 for name in names)
    as_written = signed and any(node.op_type == "QuantizeLinear" for node in file.graph.node[1:])
    found = run(exposed(file, network, names), {network.graph.input[0].name: x}, as_written)
    network.deployed = {name: found[network.stored[name]] for name in names}


def explained_alike(
    float_model: onnx.ModelProto,
    file: onnx.ModelProto,
    layer: str,
    x: np.ndarray,
    targets: np.ndarray,
    tolerance: float = 2e-6,
) -> tuple[Manifest, Mapping[str, np.ndarray]]:
    network = FakeQuantised(float_model, file).double()
    follow(network, file, x)
    made = graphgbp.convert(file, methods=METHODS)
    found = run(made, {float_model.graph.input[0].name: x, "target": targets})
    for name, expected in reference(network, layer, x, targets).items():
        assert distance(torch.from_numpy(found[name]), expected) < tolerance, name
    return read_manifest(made), found


@pytest.mark.parametrize("rectifier", ["Relu", "ReLU6"])
@pytest.mark.parametrize(("style", "kind"), CASES)
def test_maps_are_those_of_the_fake_quantised_network(style, kind, rectifier, tmp_path):
    float_model = cnn(rectifier)
    file = quantised(float_model, tmp_path, style, **KINDS[kind])
    x = images(4, 7)
    manifest, found = explained_alike(float_model, file, "r5", x, TARGETS)
    assert len(manifest.rectifiers) == 5
    kept = sum(node.op_type in ("Relu", "Clip") for node in file.graph.node)
    assert sum("swallowed" in r["clothing"] for r in manifest.rectifiers) == 5 - kept
    assert np.array_equal(found["z"], run(file, {"x": x})["z"])


@pytest.mark.parametrize("pooling", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("kind", ["u8 s8", "u8 s8 by channel"])
def test_relus_behind_poolings(kind, pooling, tmp_path):
    """As PyTorch's MNIST example has them: relu(max_pool2d(conv(x)))."""
    nodes = [
        "a = Conv(x, w1, b1)",
        f"p = {pooling}<kernel_shape=[2,2], strides=[2,2]>(a)",
        "r = Relu(p)",
        "b = Conv(r, w2, b2)",
        f"q = {pooling}<kernel_shape=[2,2], strides=[2,2]>(b)",
        "s = Relu(q)",
        "v = Flatten(s)",
        "z = Gemm<transB=1>(v, w3, b3)",
    ]
    shapes = [(6, 3, 3, 3), (8, 6, 3, 3), (10, 32)]
    weights = {f"w{i}": drawn(*shape, seed=i, scale=0.3) for i, shape in enumerate(shapes, 1)}
    weights |= {f"b{i}": drawn(shape[0], seed=10 + i, scale=0.3) for i, shape in enumerate(shapes, 1)}
    float_model = named(model(nodes, {"x": ["N", 3, 16, 16]}, ["z"], weights))
    file = quantised(float_model, tmp_path, "QDQ", **KINDS[kind])
    assert not any(node.op_type == "Relu" for node in file.graph.node)
    x = images(4, 7)
    middling = run(file, {"x": x})["z"].argsort()[:, 5]  # no score that saturates
    manifest, _ = explained_alike(float_model, file, "s", x, middling)
    assert len(manifest.rectifiers) == 2


MODELS = Path(__file__).parent.parent / "models"


@pytest.mark.parametrize("style", ["QDQ", "QOperator"])
def test_efficientnet_lite0(style, tmp_path):
    """Its 33 ReLU6 are all swallowed, and masked."""
    float_model = onnx.load(MODELS / "efficientnet_lite0.onnx")
    recipe = Recipe.load(MODELS / "efficientnet_lite0.recipe.json")
    spec = ImageInput.from_shape("image", [None, 3, 224, 224])
    photo = np.stack([recipe.prepare(MODELS / "chelsea.png", spec)[0]])
    file = quantised(float_model, tmp_path, style, photo, **KINDS["u8 s8 by channel"])
    layer = [node.output[0] for node in float_model.graph.node if node.op_type == "Clip"][-1]
    manifest, found = explained_alike(float_model, file, layer, photo, np.array([560]))
    assert len(manifest.rectifiers) == 33
    assert all("swallowed" in rectifier["clothing"] for rectifier in manifest.rectifiers)
    assert np.array_equal(found["logits"], run(file, {"image": photo})["logits"])


NO_RELU = {
    "an addition": ["a = Conv<pads=[1,1,1,1]>(x, w)", "b = Add(a, x)"],
    "a sigmoid": ["a = Conv<pads=[1,1,1,1]>(x, w)", "b = Sigmoid(a)"],
    "a HardSwish": ["a = Conv<pads=[1,1,1,1]>(x, w)", "b = HardSwish(a)"],
    "a leaky ReLU": ["a = Conv<pads=[1,1,1,1]>(x, w)", "b = LeakyRelu<alpha=0.1>(a)"],
    "a Softmax": ["a = Conv<pads=[1,1,1,1]>(x, w)", "b = Softmax<axis=1>(a)"],
    "an image pooled": ["b = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x)"],
}


@pytest.mark.parametrize("style", ["QDQ", "QOperator"])
@pytest.mark.parametrize("kind", ["u8 s8", "s8 s8"])
@pytest.mark.parametrize("case", NO_RELU)
def test_what_swallowed_no_relu_masks_nothing(case, kind, style, tmp_path):
    nodes = [*NO_RELU[case], "v = GlobalAveragePool(b)", "f = Flatten(v)", "z = Gemm(f, w2, b2)"]
    weights = {"w": drawn(3, 3, 3, 3, seed=1), "w2": drawn(3, 5, seed=2), "b2": drawn(5, seed=3)}
    made = named(model(nodes, {"x": ["N", 3, 16, 16]}, ["z"], weights))
    found = graphgbp.convert(quantised(made, tmp_path, style, **KINDS[kind]), methods=["guided_backprop"])
    assert not read_manifest(found).rectifiers


def test_a_quantised_tensor_that_is_read_in_both_ways():
    """By a DequantizeLinear and by an integer operator behind it: both gradients arrive."""
    nodes = [
        "q = QuantizeLinear(x, s, z)",
        "d = DequantizeLinear(q, s, z)",
        "sum = com.microsoft.QLinearAdd(q, s, z, q, s, z, t, z)",
        "e = DequantizeLinear(sum, t, z)",
        "both = Add(d, e)",
        "scores = Flatten(both)",
    ]
    constants = {"s": np.float32(0.05), "t": np.float32(0.06), "z": np.uint8(128)}
    made = model(nodes, {"x": ["N", 2, 3, 3]}, ["scores"], constants)
    x, targets = drawn(3, 2, 3, 3, scale=4.0), np.array([3, 0, 17])
    x.reshape(3, -1)[range(3), targets] = 1, 5, 9
    tensor = torch.from_numpy(x).requires_grad_()
    d = torch.fake_quantize_per_tensor_affine(tensor, 0.05, 128, 0, 255)
    e = torch.fake_quantize_per_tensor_affine(d + d, 0.06, 128, 0, 255)
    (expected,) = torch.autograd.grad(scores(lambda x: (d + e).flatten(1), tensor, targets), tensor)
    found = run(graphgbp.convert(made, "saliency"), {"x": x, "target": targets})["saliency"]
    torch.testing.assert_close(torch.from_numpy(found), expected)
    assert set(expected.unique().tolist()) == {0, 1, 3}, "one saturates in the first quantiser, one in the second"
