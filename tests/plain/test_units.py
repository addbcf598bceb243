"""The deployed integer forward pass stays what it is: the same bits with and without the maps appended."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import graphgbp
from tests.build import drawn, model

NODES = [
    "a = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)",
    "b = Relu(a)",
    "c = MaxPool<kernel_shape=[2, 2], strides=[2, 2]>(b)",
    "d = Conv<pads=[1, 1, 1, 1]>(c, w2, b2)",
    "e = Relu(d)",
    "f = Conv<pads=[1, 1, 1, 1]>(e, w3, b3)",
    "g = Add(f, c)",
    "h = Relu(g)",
    "i = GlobalAveragePool(h)",
    "j = Flatten(i)",
    "y = Gemm(j, w4, b4)",
]
IMAGES = np.random.default_rng(0).standard_normal((8, 3, 16, 16)).astype(np.float32)


class Images(CalibrationDataReader):
    def __init__(self):
        self.feeds = iter([{"x": image[None]} for image in IMAGES])

    def get_next(self):
        return next(self.feeds, None)


def quantised(folder, layout, activations, weights, opset=18):
    values = {
        "w1": drawn(8, 3, 3, 3), "b1": drawn(8), "w2": drawn(8, 8, 3, 3), "b2": drawn(8),
        "w3": drawn(8, 8, 3, 3), "b3": drawn(8), "w4": drawn(8, 5), "b4": drawn(5),
    }  # fmt: skip
    path = folder / "quantised.onnx"
    types = {"activation_type": getattr(QuantType, activations), "weight_type": getattr(QuantType, weights)}
    float32 = model(NODES, {"x": ["n", 3, 16, 16]}, ["y"], values, opset=opset)
    quantize_static(float32, path, Images(), getattr(QuantFormat, layout), per_channel=True, **types)
    return path


def run(path, **feeds):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": IMAGES, **feeds})
    return y, {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


@pytest.mark.parametrize("opset", [18, 21])
@pytest.mark.parametrize("types", [("QUInt8", "QInt8"), ("QInt8", "QInt8"), ("QUInt8", "QUInt8")])
def test_the_forward_pass_keeps_its_bits(types, opset, tmp_path):
    path = quantised(tmp_path, "QDQ", *types, opset=opset)
    explained = tmp_path / "explained.onnx"
    graphgbp.save(graphgbp.convert(path, ["guided_gradcam", "saliency"]), explained)
    expected, fused = run(path)
    found, fused_still = run(explained, target=np.full(len(IMAGES), 3))
    np.testing.assert_array_equal(found, expected)
    assert ("QLinearConv" in fused) == ("QLinearConv" in fused_still)
    assert types[0] == "QInt8" or "QLinearConv" in fused, "else nothing was at stake"


@pytest.mark.parametrize("layout", ["QDQ", "QOperator"])
def test_a_layer_is_taken_in_real_numbers(layout, tmp_path):
    """Never in a quantiser's steps, which count from its zero point: a name of those means what they stand for."""
    path = quantised(tmp_path, layout, "QUInt8", "QInt8")
    proto = onnx.load(path)
    steps = {node.output[0] for node in proto.graph.node if node.op_type in ("QuantizeLinear", "QLinearConv")}
    assert steps.isdisjoint(layer["tensor"] for layer in graphgbp.inspect(path).layers)
    name = next(name for name in steps if name.startswith("f_"))  # behind the last convolution, which has no ReLU
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    (q,) = ort.InferenceSession(proto.SerializeToString()).run([name], {"x": IMAGES})
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    scale, zero_point = constants["f_scale"], constants["f_zero_point"]
    assert zero_point > 0
    converted = graphgbp.convert(path, ["gradcam"], target_layer=name)
    session = ort.InferenceSession(converted.SerializeToString())
    (features,) = session.run(["gradcam_features"], {"x": IMAGES, "target": np.array([3])})
    np.testing.assert_allclose(features, (q.astype(np.float32) - zero_point) * scale, rtol=1e-6)
