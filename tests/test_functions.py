"""Local functions are seen through: held to torch, to Captum and to the same model with its functions inlined."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, inliner, numpy_helper, parser

import graphgbp
from graphgbp.contract import METHODS, RECOMPUTED
from tests import networks
from tests.build import drawn
from tests.maps import assert_maps_equal, explain
from tests.oracles import captum_maps, settled_samples
from tests.rules.harness import assert_close, run

PARTS = ("MaxPool", *(f"features.{index}" for index in range(3, 9)))


def with_functions(model: onnx.ModelProto, parts: tuple[str, ...]) -> onnx.ModelProto:
    """The model with the nodes of each part, told by their names, as a local function of that name."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.node[:], made.graph.value_info[:]
    made.opset_import.add(domain="net", version=1)
    part_of = [next((part for part in parts if f"/{part}/" in f"{node.name}/"), None) for node in model.graph.node]
    for part in dict.fromkeys(part_of):
        nodes = [node for node, found in zip(model.graph.node, part_of, strict=True) if found == part]
        if part is None:
            continue
        inside = {name for node in nodes for name in node.output}
        others = [node for node in model.graph.node if not any(node is mine for mine in nodes)]
        read = {name for node in others for name in node.input} | {value.name for value in model.graph.output}
        inputs = list(dict.fromkeys(name for node in nodes for name in node.input if name and name not in inside))
        outputs = [name for node in nodes for name in node.output if name in read]
        made.functions.append(helper.make_function("net", part, inputs, outputs, nodes, made.opset_import))
    called = set()
    for node, part in zip(model.graph.node, part_of, strict=True):
        if part is None:
            made.graph.node.append(node)
        elif part not in called:
            called.add(part)
            function = next(function for function in made.functions if function.name == part)
            made.graph.node.append(
                helper.make_node(part, function.input, function.output, f"call {part}", domain="net")
            )
    onnx.checker.check_model(made)
    return made


@pytest.fixture(scope="module")
def network() -> networks.Classifier:
    return networks.build("resnet_basic")


@pytest.fixture(scope="module")
def resnet(network) -> onnx.ModelProto:
    """A ResNet whose blocks are functions."""
    made = with_functions(networks.export(network, torch.zeros(3, 3, 64, 64)), PARTS)
    assert len(made.functions) == len(PARTS)
    return made


def test_a_resnet_of_functions_has_captums_maps(network, resnet):
    found = settled_samples(network, captum_maps(network.target), (64, 64))
    got = explain(resnet, found.images, found.targets, interpolate_mode="nearest")
    expected = {name: value for name, value in found.maps.items() if name != "cam"}
    assert_maps_equal(got, expected, "blocks as functions")


def test_the_forward_pass_stays_and_what_it_shows_is_not_computed_again(resnet):
    explained = graphgbp.convert(resnet, METHODS)
    onnx.checker.check_model(explained, full_check=True)
    count = len(resnet.graph.node)
    assert [node.SerializeToString() for node in explained.graph.node[:count]] == [
        node.SerializeToString() for node in resnet.graph.node
    ]
    assert explained.functions == resnet.functions
    again = [node for node in explained.graph.node if node.name.startswith(RECOMPUTED)]
    blocks = [part for part in PARTS if part.startswith("features")]
    assert sum(node.op_type == "Conv" for node in again) == len(blocks), "only the one before a block's inner ReLU"
    assert not {name for node in again for name in node.output} & {name for n in resnet.graph.node for name in n.output}


def test_layers_inside_a_function_can_be_named(network, resnet):
    """By the call, by a path to a node inside it, by the tensor."""
    inside = next(node for node in resnet.functions[-1].node if node.op_type == "Relu")
    call = resnet.graph.node[[node.name for node in resnet.graph.node].index(f"call {PARTS[-1]}")]
    for request, layer in (
        (call.name, network.target),
        (call.output[0], network.target),
        (f"{call.name}/{inside.name}", "features.8.body.1"),
        (f"{call.name}/{inside.output[0]}", "features.8.body.1"),
        (f"{RECOMPUTED}/{call.name}/{inside.output[0]}", "features.8.body.1"),
    ):
        found = settled_samples(network, captum_maps(layer), (64, 64))
        got = explain(resnet, found.images, found.targets, ["gradcam"], target_layer=request)
        expected = {name: found.maps[name] for name in ("gradcam_features", "gradcam_gradients")}
        assert_maps_equal(got, expected, request)


def test_inspect_names_what_is_inside(resnet):
    found = graphgbp.inspect(resnet)
    assert found.explainable
    names = [rectifier["node"] for rectifier in found.rectifiers]
    assert len(names) == 13 and len(set(names)) == 13
    assert any(name.startswith(f"call {PARTS[-1]}/") for name in names)


def gradient_of(
    text: str, x: np.ndarray, weights: dict[str, np.ndarray] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The output of a model of one input and output written as text, and its vjp with a drawn cotangent."""
    made = parser.parse_model(text)
    made.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (weights or {}).items())
    y = run(made, {"x": x})["y"]
    return y, run(graphgbp.vjp(made), {"x": x, "y_grad": drawn(*y.shape, seed=9)})["x_grad"]


def check(text: str, reference, weights: dict[str, np.ndarray] | None = None) -> None:
    x = drawn(2, 4, seed=1)
    y, got = gradient_of(text, x, weights)
    leaf = torch.from_numpy(x).double().requires_grad_()
    expected = reference(leaf)
    assert_close(y, expected.detach().numpy(), 1e-5, "the reference is another function")
    expected.backward(torch.from_numpy(drawn(*y.shape, seed=9)).double())
    assert_close(got, leaf.grad.numpy(), 1e-5, "gradient")


HEAD = '<ir_version: 10, opset_import: ["" : 18, "f" : 1]> g (float[N, 4] x) => (float[N, M] y)'


def test_attributes_and_their_defaults_through_nested_calls():
    """onnx.inliner loses the default."""
    check(
        f"""{HEAD} {{ a = f.outer (x)  b = f.outer <slope = 0.3> (a)  y = f.outer <slope = 0.5, axis = 0> (b) }}
        <domain: "f", opset_import: ["" : 18, "f" : 1]>
        outer <slope: float = 0.2, axis: int = 1> (x) => (y)
          {{ a = f.inner <alpha: float = @slope> (x)  y = LogSoftmax <axis: int = @axis> (a) }}
        <domain: "f", opset_import: ["" : 18]>
        inner <alpha> (x) => (y)
          {{ a = Exp (x)  b = Neg (x)  c = Mul (a, b)  y = LeakyRelu <alpha: float = @alpha> (c) }}
        """,
        lambda x: _outer(_outer(_outer(x, 0.2, 1), 0.3, 1), 0.5, 0),
    )


def _outer(x: torch.Tensor, slope: float, axis: int) -> torch.Tensor:
    return F.leaky_relu(-x * x.exp(), slope).log_softmax(axis)


def test_what_a_call_leaves_out():
    """An optional input, a trailing one, an attribute without default, an output."""
    check(
        f"""{HEAD} {{ a = f.bounded (x, , one)  b = f.bounded (a)  y, , c = f.several <p = 1> (b) }}
        <domain: "f", opset_import: ["" : 18]>
        bounded (x, low, high) => (y) {{ s = Sin (x)  c = Clip (s, low, high)  y = Mul (c, s) }}
        <domain: "f", opset_import: ["" : 18]>
        several <p, q> (x) => (y, z, w)
          {{ z = Exp (x)  w = Softmax <axis: int = @q> (z)  y = LpNormalization <p: int = @p> (w) }}
        """,
        lambda x: F.normalize(_bounded(_bounded(x, 0.5), None).exp().softmax(-1), p=1, dim=-1),
        {"one": np.float32(0.5)},
    )


def _bounded(x: torch.Tensor, high: float | None) -> torch.Tensor:
    return x.sin() * (x.sin() if high is None else x.sin().clamp(max=high))


def test_an_output_made_beside_inner_tensors():
    """It is read outside; the part beside it is computed again."""
    check(
        f"""{HEAD} {{ e = Exp (x)  a, b = f.halves (e)  y = Concat <axis = 1> (a, b) }}
        <domain: "f", opset_import: ["" : 18]>
        halves (x) => (y, z) {{ y, r = Split <axis = 1, num_outputs = 2> (x)  s = Mul (r, r)  z = Mul (s, y) }}
        """,
        lambda x: torch.cat([x.exp()[:, :2], x.exp()[:, 2:] ** 2 * x.exp()[:, :2]], 1),
    )


def test_overloads():
    check(
        f"""{HEAD} {{ a = f.act:one (x)  b = f.act:two (a)  y = f.act (b) }}
        <domain: "f", overload: "one", opset_import: ["" : 18]> act (x) => (y) {{ y = Sin (x) }}
        <domain: "f", overload: "two", opset_import: ["" : 18]> act (x) => (y) {{ y = Tanh (x) }}
        <domain: "f", opset_import: ["" : 18]> act (x) => (y) {{ y = Exp (x) }}
        """,
        lambda x: x.sin().tanh().exp(),
    )


def test_an_operator_wins_over_a_function_of_its_name():
    """As in ONNX Runtime."""
    check(
        f"""{HEAD} {{ a = Mish (x)  y = Exp (a) }}
        <domain: "", opset_import: ["" : 18]> Mish (x) => (y) {{ y = Sin (x) }}
        """,
        lambda x: F.mish(x).exp(),
    )


def test_a_known_if_inside_a_function_and_a_function_inside_its_branch():
    check(
        f"""{HEAD} {{ a = f.chosen (x)  y = f.chosen (a) }}
        <domain: "f", opset_import: ["" : 18, "f" : 1]>
        chosen (x) => (y) {{
          k = Constant <value_int = 1> ()  c = Cast <to = 9> (k)  s = Sin (x)
          y = If (c) <then_branch = t () => (o) {{ e = f.act (s)  o = Mul (e, s) }},
                      else_branch = l () => (o) {{ o = Neg (s) }}>
        }}
        <domain: "f", opset_import: ["" : 18]> act (x) => (y) {{ m = Exp (x)  y = Mul (m, m) }}
        """,
        lambda x: _chosen(_chosen(x)),
    )


def _chosen(x: torch.Tensor) -> torch.Tensor:
    return x.sin().exp() ** 2 * x.sin()


def test_rectifiers_inside_functions_are_masked():
    """Also where the model is one function: then everything a mask needs is computed again."""
    text = f"""{HEAD} {{ y = f.net (x, w, v) }}
        <domain: "f", opset_import: ["" : 18, "f" : 1]>
        net (x, w, v) => (p) {{ a = MatMul (x, w)  h = f.relu (a)  z = MatMul (h, v)  p = Softmax (z) }}
        <domain: "f", opset_import: ["" : 18]>
        relu (x) => (y) {{ k = Constant <value_float = 0.0> ()  y = Max (x, k) }}"""
    made = parser.parse_model(text.replace("float[N, M] y", "float[N, 3] y"))
    weights = {"w": drawn(4, 6), "v": drawn(6, 3, seed=1)}
    made.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    x = drawn(5, 4, seed=2)
    got = run(graphgbp.convert(made, ["guided_backprop"]), {"x": x, "target": np.array([1])})
    dh = np.broadcast_to(weights["v"][:, 1], (5, 6))
    expected = (dh * (dh > 0) * (x @ weights["w"] > 0)) @ weights["w"].T
    assert_close(got["guided_backprop"], expected, 1e-5, "guided")
    assert_close(got["target_score"], (np.maximum(x @ weights["w"], 0) @ weights["v"])[:, 1], 1e-5, "score")


def test_functions_as_onnx_inlines_them(resnet):
    inlined = inliner.inline_local_functions(resnet)
    x = drawn(2, 3, 48, 56, seed=3)
    got, expected = (
        explain(model, x, np.array([-1, 3]), target_layer=resnet.graph.node[-3].input[0]) for model in (resnet, inlined)
    )
    assert_maps_equal(got, {name: expected[name] for name in METHODS}, "against onnx.inliner")


def test_a_function_of_another_opset():
    """It is taken where its nodes mean the same in the model's opset, else refused with what to do."""
    text = f"""{HEAD} {{ y = f.act (x) }}
        <domain: "f", opset_import: ["" : 16]> act (x) => (y) {{ s = Sin (x)  NODE }}"""
    check(text.replace("NODE", "y = Exp (s)"), lambda x: x.sin().exp())
    made = parser.parse_model(text.replace("NODE", "y = ReduceMean <axes = [0]> (s)"))
    with pytest.raises(
        graphgbp.OpsetError, match=r"'f::act' imports ai.onnx 16 and the model 18, .*ReduceMean.*inline"
    ):
        graphgbp.vjp(made)


def test_a_function_that_calls_itself_is_refused():
    made = parser.parse_model(
        f'{HEAD} {{ y = f.a (x) }} <domain: "f", opset_import: ["" : 18, "f" : 1]> a (x) => (y) {{ y = f.a (x) }}'
    )
    with pytest.raises(graphgbp.ModelFileError, match="'f::a' calls itself"):
        graphgbp.vjp(made)
