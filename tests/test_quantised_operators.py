"""An operator between two quantised convolutions: each that onnxruntime.quantization puts quantisers around."""

from typing import Any

import numpy as np
import onnx
import pytest
import torch

import graphgbp
from tests.build import drawn, model
from tests.fake_quantised import FakeQuantised
from tests.oracles import GuidedRectifier, distance, with_rectifiers
from tests.rules.harness import run
from tests.test_quantised_networks import KINDS, TARGETS, follow, images, named, quantised, scores

CHANNELS = 6

# what stands between a [N, 6, 8, 8] and b, with its constants
OPERATORS: dict[str, tuple[list[str], dict[str, np.ndarray]]] = {
    "Add a constant": (["b = Add(a, k)"], {"k": drawn(1, CHANNELS, 1, 1, seed=30)}),
    "Mul by a gate": (["s = Sigmoid(a)", "b = Mul(a, s)"], {}),
    "AveragePool": (["b = AveragePool<kernel_shape=[2,2], strides=[2,2]>(a)"], {}),
    "Clip": (["b = Clip(a, low, high)"], {"low": np.float32(-0.7), "high": np.float32(0.9)}),
    "Concat": (["m = MaxPool<kernel_shape=[3,3], strides=[1,1], pads=[1,1,1,1]>(a)", "b = Concat<axis=2>(a, m)"], {}),
    "ConvTranspose": (
        ["b = ConvTranspose<strides=[2,2]>(a, k, c)"],
        {"k": drawn(CHANNELS, CHANNELS, 2, 2, seed=31, scale=0.4), "c": drawn(CHANNELS, seed=32)},
    ),
    "DepthToSpace": (["c = Concat<axis=1>(a, a)", "d = Concat<axis=1>(c, c)", "b = DepthToSpace<blocksize=2>(d)"], {}),
    "Gather": (["b = Gather<axis=1>(a, i)"], {"i": np.array([5, 4, 3, 2, 1, 0])}),
    "HardSigmoid": (["b = HardSigmoid<alpha=0.3, beta=0.4>(a)"], {}),
    "InstanceNormalization": (
        ["b = InstanceNormalization(a, k, c)"],
        {"k": drawn(CHANNELS, seed=33), "c": drawn(CHANNELS, seed=34)},
    ),
    "LayerNormalization": (["b = LayerNormalization(a, k, c)"], {"k": drawn(8, seed=35), "c": drawn(8, seed=36)}),
    "LeakyRelu": (["b = LeakyRelu<alpha=0.2>(a)"], {}),
    "MatMul of two": (["t = Transpose<perm=[0,1,3,2]>(a)", "b = MatMul(a, t)"], {}),
    "MatMul of a weight": (["b = MatMul(a, k)"], {"k": drawn(8, 8, seed=37, scale=0.4)}),
    "MaxPool": (["b = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"], {}),
    "Pad": (["b = Pad(a, p)"], {"p": np.array([0, 0, 1, 1, 0, 0, 1, 2])}),
    "Pad by reflection": (['b = Pad<mode="reflect">(a, p)'], {"p": np.array([0, 0, 1, 1, 0, 0, 1, 2])}),
    "ReduceMean": (["m = ReduceMean<keepdims=1>(a, i)", "b = Add(a, m)"], {"i": np.array([2, 3])}),
    "Relu": (["b = Relu(a)"], {}),
    "Reshape and Transpose": (
        ["r = Reshape(a, s)", "t = Transpose<perm=[0,2,1,3]>(r)", "b = Reshape(t, u)"],
        {"s": np.array([0, 2, 3, 64]), "u": np.array([0, 6, 8, 8])},
    ),
    "Resize": (
        ['b = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(a, , s)'],
        {"s": np.float32([1, 1, 2, 2])},
    ),
    "Slice": (["b = Slice(a, i, j, k)"], {"i": np.array([1, 2]), "j": np.array([7, 8]), "k": np.array([2, 3])}),
    "Softmax": (["b = Softmax<axis=1>(a)"], {}),
    "Split": (["c, d = Split<axis=2>(a, s)", "b = Add(c, d)"], {"s": np.array([4, 4])}),
    "Squeeze": (["c = Unsqueeze(a, i)", "b = Squeeze(c, i)"], {"i": np.array([1])}),
    "Tanh": (["b = Tanh(a)"], {}),
    "Where": (
        ["b = Where(mask, a, k)"],
        {"mask": np.arange(64).reshape(8, 8) % 3 > 0, "k": drawn(CHANNELS, 8, 8, seed=38)},
    ),
}


def network(case: str, opset: int = 18, last: str = "Relu") -> onnx.ModelProto:
    between, constants = OPERATORS[case]
    nodes = [
        "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1, b1)",
        *between,
        "e = Conv<pads=[1,1,1,1]>(b, w2, b2)",
        f"f = {last}(e)",
        "v = GlobalAveragePool(f)",
        "h = Flatten(v)",
        "z = Gemm(h, w3, b3)",
    ]
    weights = {"w1": drawn(CHANNELS, 3, 3, 3, seed=21, scale=0.25), "b1": drawn(CHANNELS, seed=22, scale=0.3)}
    weights |= {"w2": drawn(8, CHANNELS, 3, 3, seed=23, scale=0.3), "b2": drawn(8, seed=24, scale=0.3)}
    weights |= {"w3": drawn(8, 10, seed=25), "b3": drawn(10, seed=26)}
    return named(model(nodes, {"x": ["N", 3, 16, 16]}, ["z"], weights | constants, opset=opset))


def agree(
    float_model: onnx.ModelProto, file: onnx.ModelProto, tolerance: float = 2e-6, dtype: Any = np.float32
) -> None:
    """Forward bit for bit, saliency and Guided Backpropagation as torch's fake quantisation gives them."""
    x, name = images(4, 7).astype(dtype), float_model.graph.output[0].name
    torch_network = FakeQuantised(float_model, file).double()
    follow(torch_network, file, x)
    tensor = torch.from_numpy(x).double().requires_grad_()
    masked = with_rectifiers(torch_network, GuidedRectifier) if torch_network.rectifiers else torch_network
    (guided,) = torch.autograd.grad(scores(masked, tensor, TARGETS), tensor)
    (saliency,) = torch.autograd.grad(scores(torch_network, tensor, TARGETS), tensor)
    found = run(graphgbp.convert(file, ["saliency", "guided_backprop"]), {"x": x, "target": TARGETS})
    np.testing.assert_array_equal(found[name], run(file, {"x": x})[name])
    assert distance(torch.from_numpy(found["saliency"]), saliency) < tolerance
    assert distance(torch.from_numpy(found["guided_backprop"]), guided) < tolerance


@pytest.mark.parametrize(("style", "kind"), [("QDQ", "u8 s8"), ("QDQ", "s8 s8"), ("QOperator", "u8 s8")])
@pytest.mark.parametrize("case", OPERATORS)
def test_an_operator_between_quantisers(case, style, kind, tmp_path):
    if style == "QOperator" and case in ("Clip", "Where"):
        pytest.skip("the quantiser drops this Clip, and makes an invalid model of this Where")
    made, more = network(case), {"QDQKeepRemovableActivations": case == "Clip"}
    agree(made, quantised(made, tmp_path, style, **KINDS[kind], extra_options=more))


@pytest.mark.parametrize("excluded", [["e"], ["a", "b"], ["z"]])
@pytest.mark.parametrize("style", ["QDQ", "QOperator"])
def test_a_network_quantised_in_part(style, excluded, tmp_path):
    made = network("Relu")
    file = quantised(made, tmp_path, style, **KINDS["u8 s8"], nodes_to_exclude=excluded)
    agree(made, file)


@pytest.mark.parametrize("kind", ["u8 s8", "s8 s8"])
def test_the_class_alone_behind_quantised_scores(kind, tmp_path):
    """ArgMax reads integers there."""
    made = network("Relu")
    made.graph.node.append(onnx.helper.make_node("ArgMax", ["z"], ["class"], "class", axis=1, keepdims=0))
    whole = quantised(made, tmp_path, "QDQ", **KINDS[kind])
    del made.graph.output[:]
    made.graph.output.append(onnx.helper.make_tensor_value_info("class", onnx.TensorProto.INT64, ["N"]))
    file, x = quantised(made, tmp_path, "QDQ", **KINDS[kind]), images(4, 7)
    found = run(graphgbp.convert(file, "saliency"), {"x": x, "target": TARGETS})
    np.testing.assert_array_equal(found["class"], run(file, {"x": x})["class"])
    expected = run(graphgbp.convert(whole, "saliency"), {"x": x, "target": TARGETS})
    np.testing.assert_allclose(found["saliency"], expected["saliency"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("opset", [19, 21])
def test_scales_in_float16(opset, tmp_path):
    """Values between quantisers are halves, which the reference does not round; so no ReLU has its kink there."""
    made = network("Tanh", opset, last="Tanh")
    halves = onnx.ModelProto.FromString(made.SerializeToString())
    for tensor in halves.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array(value.astype(np.float16), tensor.name))
    for value in (*halves.graph.input, *halves.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del halves.graph.value_info[:]
    samples = images(16, 100).astype(np.float16)
    file = quantised(halves, tmp_path, "QDQ", samples, **KINDS["u8 s8"])
    assert any(t.data_type == onnx.TensorProto.FLOAT16 and t.name == "x_scale" for t in file.graph.initializer)
    agree(made, file, tolerance=2e-3, dtype=np.float16)
