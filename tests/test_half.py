"""Half precision: maps in float32 of the values the half forward pass has, and no less range than float32."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper, parser
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor

import graphgbp
from graphgbp.errors import ModelFileError
from tests.build import drawn, model, small_cnn
from tests.maps import assert_maps_equal, relative_l2
from tests.networks import export
from tests.rules import harness
from tests.rules.harness import run

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
METHODS = ("saliency", "guided_backprop", "deconvnet", "gradcam", "guided_gradcam")
IMAGES, TARGETS = drawn(2, 3, 8, 8, seed=9), np.array([1, 3])
half_types = pytest.mark.parametrize("elem_type", HALVES, ids=["float16", "bfloat16"])


def numpy_type(elem_type: int) -> np.dtype[Any]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


def run_by_reference(whole: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX's evaluator rounds behind every node; numpy says of a steep HardSigmoid that it overflows, as it may."""
    with np.errstate(over="ignore"):
        return harness.run_by_reference(whole, feeds)


def stored_as(whole: onnx.ModelProto, elem_type: int) -> onnx.ModelProto:
    """A float32 model whose weights, inputs and outputs are of another type."""
    made = onnx.ModelProto()
    made.CopyFrom(whole)
    del made.graph.value_info[:]
    for tensor in made.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor).astype(numpy_type(elem_type)), tensor.name)
            )
    for value in [*made.graph.input, *made.graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = elem_type
    return made


def relu6_cnn(opset: int = 18) -> onnx.ModelProto:
    """Convolutions with a ReLU6 and a Max between them: ONNX Runtime's CPU provider has float16 kernels for both."""
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        "r = Clip(a, zero, six)",
        "b = Conv<pads=[1,1,1,1]>(r, w2, b2)",
        "s = Max(b, zero)",
        "t = Add(r, s)",
        "c = Conv<strides=[2,2], pads=[1,1,1,1]>(t, w3, b1)",
        "u = Clip(c, zero, six)",
        "p = GlobalAveragePool(u)",
        "f = Flatten(p)",
        "y = Gemm<transB=1>(f, w4, b4)",
    ]
    weights = {
        "w1": drawn(6, 3, 3, 3, seed=1, scale=2),
        "b1": drawn(6, seed=2),
        "w2": drawn(6, 6, 3, 3, seed=3, scale=0.4),
        "b2": drawn(6, seed=4),
        "w3": drawn(6, 6, 3, 3, seed=5, scale=0.3),
        "w4": np.abs(drawn(5, 6, seed=6)),
        "b4": drawn(5, seed=8),
        "zero": np.float32(0),
        "six": np.float32(6),
    }
    return model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights, opset=opset)


# -- the reference: torch, in float32, on given values of the forward pass ------------------------------------


class Rectified(torch.autograd.Function):
    """A rectifier with the values and the rule of its cotangent given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rule = rule
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return ctx.rule(x, dy), None, None


RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "saliency": lambda x, dy: dy * (x > 0),
    "guided_backprop": lambda x, dy: dy * (x > 0) * (dy > 0),
    "deconvnet": lambda x, dy: dy * (dy > 0),
}


def torch_maps(stored: onnx.ModelProto, values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """small_cnn's maps: each layer's value is the given one, its derivative torch's, in float32."""
    known = {name: torch.from_numpy(value.astype(np.float32)) for name, value in values.items()}
    w = {x.name: torch.from_numpy(numpy_helper.to_array(x).astype(np.float32)) for x in stored.graph.initializer}

    def given(y: Tensor, name: str) -> Tensor:
        return y + (known[name] - y).detach()

    def features(x: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        a = given(F.conv2d(x, w["w1"], w["b1"], padding=1), "a")
        r1 = Rectified.apply(a, known["r1"], rule)
        b = given(F.conv2d(r1, w["w2"], w["b2"], stride=2, padding=1), "b")
        return Rectified.apply(b, known["r2"], rule)

    def score(r2: Tensor) -> Tensor:
        f = given(r2.mean((2, 3)), "f")
        return given(F.linear(f, w["w3"], w["b3"]), "z")[range(2), TARGETS].sum()

    maps: dict[str, Tensor] = {}
    for method, rule in RULES.items():
        x = known["x"].clone().requires_grad_()
        (maps[method],) = torch.autograd.grad(score(features(x, rule)), x)
    layer = known["r2"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(score(layer), layer)
    cam = F.relu((gradient.mean((2, 3), keepdim=True) * layer).sum(1, keepdim=True)).detach()
    maps["gradcam"] = F.interpolate(cam, (8, 8), mode="bilinear", align_corners=False)
    maps["guided_gradcam"] = maps["guided_backprop"] * maps["gradcam"]
    return {name: value.numpy() for name, value in maps.items()}


def with_outputs(whole: onnx.ModelProto, names: Sequence[str], elem_type: int) -> onnx.ModelProto:
    shown = onnx.ModelProto()
    shown.CopyFrom(whole)
    shown.graph.output.extend(helper.make_tensor_value_info(name, elem_type, None) for name in names)
    return shown


@half_types
def test_maps_are_float32_backward_on_the_values_of_a_forward_pass_that_rounds(elem_type):
    """As in a runtime with half kernels for every node."""
    stored = stored_as(small_cnn(), elem_type)
    x = IMAGES.astype(numpy_type(elem_type))
    values = run_by_reference(with_outputs(stored, ["a", "r1", "b", "r2", "f", "z"], elem_type), {"x": x})
    got = run_by_reference(graphgbp.convert(stored, METHODS), {"x": x, "target": TARGETS})
    assert got["y"].dtype == numpy_type(elem_type) and np.array_equal(got["y"], values["y"])
    assert_maps_equal(got, torch_maps(stored, values | {"x": x}), "half", tolerance=1e-5)


LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")


def run_at(level: str, whole: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("network", [small_cnn, relu6_cnn])
def test_the_cpu_rounds_nothing_that_it_did_not_round_before(network, level):
    """Its forward pass stays bit-equal, and the maps are those of float32 arithmetic with half weights."""
    stored = stored_as(network(), TensorProto.FLOAT16)
    x = IMAGES.astype(np.float16)
    before = run_at(level, stored, {"x": x})
    got = run_at(level, graphgbp.convert(stored, METHODS), {"x": x, "target": TARGETS})
    assert np.array_equal(got["y"], before["y"])
    wide = stored_back(stored)
    expected = run_at(level, graphgbp.convert(wide, METHODS), {"x": x.astype(np.float32), "target": TARGETS})
    assert_maps_equal(got, {method: expected[method] for method in METHODS}, level, tolerance=1e-6)


def stored_back(stored: onnx.ModelProto) -> onnx.ModelProto:
    """The float32 model with exactly the weights of a half one."""
    made = onnx.ModelProto()
    made.CopyFrom(stored)
    for tensor in made.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.dtype.name in ("float16", "bfloat16"):
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    for value in [*made.graph.input, *made.graph.output]:
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return made


# -- masks ----------------------------------------------------------------------------------------------------


def every(elem_type: int) -> np.ndarray:
    """Every number of a half type but NaN."""
    values = np.arange(2**16, dtype=np.uint16).view(numpy_type(elem_type))
    return values[~np.isnan(values.astype(np.float32))]


def mask_of(x: np.ndarray, bound: float | None) -> np.ndarray:
    """What a cotangent of ones passes on at every x of a half model."""
    clipped = "y = Relu(x)" if bound is None else "y = Clip(x, zero, bound)"
    weights = {} if bound is None else {"zero": np.array(0, x.dtype), "bound": np.array(bound, x.dtype)}
    elem_type = helper.np_dtype_to_tensor_dtype(x.dtype)
    made = model([clipped], {"x": [len(x)]}, ["y"], weights, opset=18, dtype=elem_type)
    return run_by_reference(graphgbp.vjp(made), {"x": x, "y_grad": np.ones_like(x)})["x_grad"]


@half_types
def test_mask_of_a_relu_at_every_half(elem_type):
    """Exact, but for bfloat16's subnormals, which are float32's too: there a part passes, or nothing."""
    x = every(elem_type)
    mask, positive = mask_of(x, None).astype(np.float32), x > 0
    normal = np.abs(x.astype(np.float32)) >= np.finfo(np.float32).tiny
    exact = normal | (x <= 0)
    assert np.array_equal(mask[exact], positive[exact].astype(np.float32))
    assert ((mask >= 0) & (mask <= 1)).all() and (~exact).sum() == (127 if elem_type == TensorProto.BFLOAT16 else 0)


@half_types
@pytest.mark.parametrize("bound", [6, 1, 20, 1.5])
def test_mask_of_a_clip_at_every_half(elem_type, bound):
    x = every(elem_type)
    mask = mask_of(x, bound).astype(np.float32)
    wide = x.astype(np.float32)
    exact = (np.abs(wide) >= np.finfo(np.float32).tiny) | (wide <= 0)
    assert np.array_equal(mask[exact], ((wide > 0) & (wide < bound))[exact].astype(np.float32))


# -- range ----------------------------------------------------------------------------------------------------


@half_types
@pytest.mark.parametrize("factor", [64.0, 1 / 512])
def test_gradients_beyond_the_range_of_half(elem_type, factor):
    """Three factors: the forward pass stays in range, dS/dx = factor^3 v is above 65504, or below the least float16."""
    dtype = numpy_type(elem_type)
    nodes = [
        "a = Mul(x, k)",
        "b = Relu(a)",
        "c = Mul(b, k)",
        "d = Mul(c, k)",
        "y = MatMul(d, w)",
    ]
    k, w = np.array(factor, dtype), drawn(4, 3, seed=2).astype(dtype)
    made = model(nodes, {"x": ["N", 4]}, ["y"], {"k": k, "w": w}, dtype=elem_type)
    x = np.minimum(np.abs(drawn(2, 4, seed=3)) / factor**2, 3e4).astype(dtype)
    got = run_by_reference(
        graphgbp.convert(made, ["saliency", "guided_backprop"]), {"x": x, "target": np.array([0, 2])}
    )
    exact = float(k) ** 3 * w.astype(np.float64).T[[0, 2]]
    assert np.abs(exact).max() > 65504 or np.abs(exact).max() < 2**-25
    np.testing.assert_allclose(got["saliency"], exact, rtol=1e-6)
    np.testing.assert_allclose(got["guided_backprop"], np.maximum(exact, 0), rtol=1e-6)


def test_a_mean_over_more_than_float16_can_count():
    """300 x 300 positions: 1/90000 is one subnormal float16, 90000 none at all."""
    made = model(["p = ReduceMean<keepdims=0>(x, axes)", "y = MatMul(p, w)"], {"x": ["N", 2, "h", "w"]}, ["y"],
        {"axes": np.array([2, 3]), "w": np.eye(2, dtype=np.float16)}, dtype=TensorProto.FLOAT16)  # fmt: skip
    x = drawn(1, 2, 300, 300).astype(np.float16)
    got = run(graphgbp.convert(made, ["saliency"]), {"x": x, "target": np.array([1])})["saliency"]
    np.testing.assert_allclose(
        got, np.stack([np.zeros((1, 300, 300)), np.full((1, 300, 300), 1 / 90000)], 1), rtol=1e-6
    )
    back = run(graphgbp.vjp(made), {"x": x, "y_grad": np.array([[1000, 2000]], np.float16)})["x_grad"]
    assert back.dtype == np.float16
    np.testing.assert_allclose(back[0, :, 0, 0].astype(np.float64), [1000 / 90000, 2000 / 90000], rtol=1e-3)


def test_vjp_leaves_half_behind_between_its_ends():
    """A cotangent of 1 times 300 twice is 90000, times 1/512 is 176: only float32 gets there."""
    nodes = ["a = Mul(x, small)", "b = Mul(a, k)", "y = Mul(b, k)"]
    weights = {"small": np.float16(1 / 512), "k": np.float16(300)}
    made = model(nodes, {"x": [3]}, ["y"], weights, dtype=TensorProto.FLOAT16)
    got = run(graphgbp.vjp(made), {"x": np.ones(3, np.float16), "y_grad": np.ones(3, np.float16)})["x_grad"]
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, np.full(3, 90000 / 512, np.float16))


# -- files ----------------------------------------------------------------------------------------------------


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


# -- running --------------------------------------------------------------------------------------------------


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
