"""Half precision as tools write it, and as Explainer feeds it."""

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper, parser
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

import graphgbp
from graphgbp.errors import ModelFileError
from tests.build import drawn, model, small_cnn
from tests.half_models import IMAGES, METHODS, TARGETS, half_types, numpy_type, run_by_reference, stored_as
from tests.maps import assert_maps_equal, relative_l2
from tests.networks import export
from tests.rules.harness import run

# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_io_types", [False, True])
@pytest.mark.parametrize("block", [[], ["Conv"], ["GlobalAveragePool", "Gemm"]], ids=["all", "no Conv", "no head"])
def test_files_of_the_runtimes_own_converter(keep_io_types, block):
    """Wholly half, or mixed, Casts between: maps close to the float32 model's, the forward pass as it was."""
    made = convert_float_to_float16(small_cnn(), keep_io_types=keep_io_types, op_block_list=block)
    x = IMAGES.astype(np.float32 if keep_io_types else np.float16)
    got = run(graphgbp.convert(made, METHODS), {"x": x, "target": TARGETS})
    assert np.array_equal(got["y"], run(made, {"x": x})["y"])
    expected = run(graphgbp.convert(small_cnn(), METHODS), {"x": IMAGES, "target": TARGETS})
    assert_maps_equal(got, {method: expected[method] for method in METHODS}, "mixed", tolerance=1e-2)


class Small(torch.nn.Module):
    """A convolution, a ReLU6, a normalization, attention over positions, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 2, 1)
        self.norm = torch.nn.LayerNorm(8)
        self.query, self.key, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 5)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data.normal_(0, 0.4, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        tokens = F.relu6(self.conv(x)).flatten(2).transpose(1, 2)
        n = self.norm(tokens)
        attended = torch.softmax(self.query(n) @ self.key(n).transpose(1, 2), -1) @ n
        return self.head((tokens + attended).mean(1))


@half_types
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_files_of_torch(exporter, elem_type):
    dtype = torch.float16 if elem_type == TensorProto.FLOAT16 else torch.bfloat16
    made = export(Small().eval().to(dtype), torch.from_numpy(IMAGES).to(dtype), exporter, dynamic=())
    network, exact = Small().eval().to(dtype).float(), torch.from_numpy(IMAGES).to(dtype).float().requires_grad_()
    (expected,) = torch.autograd.grad(network(exact)[range(2), TARGETS].sum(), exact)
    feeds = {"image": IMAGES.astype(numpy_type(elem_type)), "target": TARGETS}
    got = run_by_reference(graphgbp.convert(made, ["saliency"]), feeds)["saliency"]
    error = relative_l2(got, expected.numpy())
    assert got.dtype == np.float32 and error < 8 * float(ml_dtypes.finfo(numpy_type(elem_type)).eps), error


def test_a_constant_that_does_not_fit_is_named():
    """onnxconverter-common leaves such a node in what torch's older exporter writes for attention."""
    graph = helper.make_graph(
        [
            helper.make_node("Div", ["one", "two"], ["k"], "scale"),
            helper.make_node("Mul", ["x", "k"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 2])],
        [numpy_helper.from_array(np.float16([1]), "one"), numpy_helper.from_array(np.float32([2]), "two")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(ModelFileError, match=r"node 'scale' .Div. does not fit its inputs"):
        graphgbp.convert(made, ["saliency"])


@pytest.mark.parametrize("opset", [9, 11, 13])
def test_an_older_half_model_is_raised(opset):
    stored = stored_as(small_cnn(opset=opset), TensorProto.FLOAT16)
    feeds = {"x": IMAGES.astype(np.float16), "target": TARGETS}
    got = run(graphgbp.convert(stored, METHODS), feeds)
    expected = run(graphgbp.convert(stored_as(small_cnn(), TensorProto.FLOAT16), METHODS), feeds)
    assert_maps_equal(got, {method: expected[method] for method in METHODS}, f"opset {opset}", tolerance=1e-6)


FUNCTION = """
<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
half (float16[N,4] x, float16[4,3] w) => (float16[N,3] y) {
    r = local.block (x)
    y = MatMul (r, w)
}
<opset_import: ["" : 18], domain: "local">
block (x) => (y) {
    k = Constant <value = float16 {21056}> ()
    a = Mul (x, k)
    b = Relu (a)
    c = Mul (b, k)
    y = Mul (c, k)
}
"""
BRANCH = """
<ir_version: 9, opset_import: ["" : 18]>
half (float16[N,4] x, float16[4,3] w) => (float16[N,3] y) {
    yes = Constant <value = bool {1}> ()
    k = Constant <value = float16 {21056}> ()
    r = If (yes) <
        then_branch = t () => (float16[N,4] o) { a = Mul (x, k)  b = Relu (a)  c = Mul (b, k)  o = Mul (c, k) },
        else_branch = e () => (float16[N,4] o) { o = Neg (x) }>
    y = MatMul (r, w)
}
"""


@pytest.mark.parametrize("text", [FUNCTION, BRANCH], ids=["function", "branch"])
def test_what_a_function_or_a_branch_holds(text):
    """Its nodes are computed again in float16, its gradient (125000 w) in float32. 21056 are the bits of 50."""
    made = parser.parse_model(text)
    w = drawn(4, 3, seed=2).astype(np.float16)
    made.graph.initializer.append(numpy_helper.from_array(w, "w"))
    del made.graph.input[1:]
    x = (drawn(2, 4, seed=3) / 2500).astype(np.float16)
    got = run(graphgbp.convert(made, ["guided_backprop", "saliency"]), {"x": x, "target": np.array([0, 2])})
    assert np.array_equal(got["y"], run(made, {"x": x})["y"])
    exact = 50.0**3 * w.astype(np.float64).T[[0, 2]] * (x > 0)
    np.testing.assert_allclose(got["saliency"], exact, rtol=1e-6)
    np.testing.assert_allclose(got["guided_backprop"], np.maximum(exact, 0), rtol=1e-6)


def test_double_stays_double_and_its_maps_are_float32():
    nodes = ["a = MatMul(x, w1)", "r = Relu(a)", "y = MatMul(r, w2)"]
    w1, w2 = (drawn(*shape, seed=seed).astype(np.float64) for shape, seed in (((4, 6), 1), ((6, 3), 2)))
    made = model(nodes, {"x": ["N", 4]}, ["y"], {"w1": w1, "w2": w2}, dtype=TensorProto.DOUBLE)
    x = drawn(2, 4, seed=3).astype(np.float64)
    converted = graphgbp.convert(made, ["saliency", "guided_backprop"])
    assert not any(node.op_type in ("Sum", "HardSigmoid") for node in converted.graph.node)
    got = run(converted, {"x": x, "target": np.array([0, 2])})
    passed = w2.T[[0, 2]] * (x @ w1 > 0)
    expected = {"saliency": passed @ w1.T, "guided_backprop": np.maximum(passed, 0) @ w1.T}
    assert_maps_equal(got, expected, "double", tolerance=1e-6)
    grad = run(graphgbp.vjp(made), {"x": x, "y_grad": np.eye(3)[[0, 2]]})["x_grad"]
    assert grad.dtype == np.float64
    np.testing.assert_allclose(grad, passed @ w1.T, rtol=1e-12)


# -- running ---------------------------------------------------------------------------------------------------------


def cast_cnn(elem_type: int) -> onnx.ModelProto:
    """Half outside, float32 inside: what the CPU runs of bfloat16."""
    nodes = [
        "a = Cast<to=1>(x)",
        "b = Conv(a, w)",
        "r = Relu(b)",
        "p = GlobalAveragePool(r)",
        "z = Flatten(p)",
        f"y = Cast<to={elem_type}>(z)",
    ]
    return model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], {"w": drawn(5, 3, 4, 4, seed=1)}, dtype=elem_type)


@half_types
@pytest.mark.parametrize(
    "labels", [None, [1, 3], np.array([[0, 2.5, 0, 0, -1]] * 2)], ids=["predicted", "class", "weights"]
)
def test_explainer_feeds_half(elem_type, labels):
    dtype = numpy_type(elem_type)
    options = {"target": "weights"} if isinstance(labels, np.ndarray) else {}
    explainer = graphgbp.Explainer(graphgbp.convert(cast_cnn(elem_type), METHODS, **options), device="cpu")
    assert explainer.input["dtype"] == dtype.name
    result = explainer.explain(IMAGES, labels)
    again = explainer.explain(IMAGES.astype(dtype), labels)
    assert result.outputs["y"].dtype == dtype and result.outputs["y"].shape == (2, 5)
    wide = graphgbp.Explainer(graphgbp.convert(cast_cnn(TensorProto.FLOAT), METHODS, **options), device="cpu")
    expected = wide.explain(IMAGES.astype(dtype).astype(np.float32), labels)
    np.testing.assert_array_equal(result.outputs["y"], expected.outputs["y"].astype(dtype))
    assert_maps_equal(result.maps, {method: expected.maps[method] for method in METHODS}, "fed", tolerance=1e-5)
    assert all(np.array_equal(again.maps[name], value) for name, value in result.maps.items())


@half_types
def test_what_half_cannot_hold_is_refused(elem_type):
    explainer = graphgbp.Explainer(cast_cnn(elem_type), device="cpu")
    for wrong in (3e39, np.nan):
        images = IMAGES.astype(np.float64)
        images[0, 0, 0, 0] = wrong
        with pytest.raises(graphgbp.ImageError, match="NaN or infinity"):
            explainer.explain(images)
    with pytest.raises(graphgbp.TargetError, match="whole numbers"):
        explainer.explain(IMAGES, np.array([0.5, 1], ml_dtypes.bfloat16))
