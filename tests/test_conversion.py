"""What a converted file promises: appended only, standard operators, kernels everywhere, the same bytes again."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import graphgbp
from graphgbp import contract
from graphgbp.kernels import missing_kernels
from tests.build import drawn, model, small_cnn
from tests.rules.harness import run

MODEL = "models/efficientnet_lite0.onnx"
ALL = list(contract.METHODS)


@pytest.fixture(scope="module")
def source():
    return onnx.load(MODEL)


@pytest.fixture(scope="module")
def explained():
    return graphgbp.convert(MODEL, ALL)


def manifest(explained):
    return json.loads(next(entry.value for entry in explained.metadata_props if entry.key == "graphgbp.manifest"))


def appended(explained, source):
    return list(explained.graph.node)[len(source.graph.node) :]


@pytest.mark.parametrize(
    "field", ["node", "initializer", "sparse_initializer", "value_info", "quantization_annotation"]
)
def test_only_appended(source, explained, field):
    old, new = (list(getattr(proto.graph, field)) for proto in (source, explained))
    assert [item.SerializeToString() for item in new[: len(old)]] == [item.SerializeToString() for item in old]


def test_inputs_outputs_and_the_rest_come_first_unchanged(source, explained):
    assert [x.name for x in explained.graph.input] == [*(x.name for x in source.graph.input), "target"]
    assert list(explained.graph.input)[: len(source.graph.input)] == list(source.graph.input)
    assert list(explained.graph.output)[: len(source.graph.output)] == list(source.graph.output)
    assert list(explained.functions) == list(source.functions)
    assert list(explained.opset_import) == list(source.opset_import)
    assert list(explained.metadata_props)[: len(source.metadata_props)] == list(source.metadata_props)
    assert explained.ir_version == source.ir_version


def test_outputs_are_those_of_the_contract(explained):
    names = [output.name for output in explained.graph.output]
    assert names[1:] == ["target_class", "target_score", *ALL, "gradcam_features", "gradcam_gradients"]


def test_metadata_functions_and_doc_strings_survive():
    made = small_cnn()
    made.metadata_props.add(key="author", value="us")
    made.graph.doc_string, made.doc_string, made.producer_name = "graph", "model", "somebody"
    made.graph.node[0].doc_string = "node"
    explained = graphgbp.convert(made)
    assert explained.graph.doc_string == "graph" and explained.doc_string == "model"
    assert explained.producer_name == "somebody" and explained.graph.node[0].doc_string == "node"
    assert explained.metadata_props[0].key == "author"


def test_standard_operators_only_and_all_scoped(source, explained):
    for node in appended(explained, source):
        assert node.domain == ""
        assert node.name.startswith("graphgbp/")
    onnx.checker.check_model(explained, full_check=True)


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDAExecutionProvider"])
@pytest.mark.parametrize("target", ["required", "weights"])
def test_every_appended_node_has_a_kernel(source, provider, target):
    explained = graphgbp.convert(MODEL, ALL, target=target)
    assert not missing_kernels(provider, explained, appended(explained, source))


@pytest.mark.parametrize("opset", range(16, 27))
def test_every_appended_node_has_a_kernel_at_every_opset(opset):
    made = small_cnn(["y = Softmax(z)"], size="H", opset=opset)
    explained = graphgbp.convert(made, ALL)
    for provider in ("CPUExecutionProvider", "CUDAExecutionProvider"):
        assert not missing_kernels(provider, explained, appended(explained, made))


def test_weights_are_not_copied(source, explained):
    added = list(explained.graph.initializer)[len(source.graph.initializer) :]
    assert sum(numpy_helper.to_array(tensor).nbytes for tensor in added) < 20_000
    assert explained.ByteSize() < 1.03 * source.ByteSize()


def test_the_same_bytes_again(tmp_path):
    script = "import graphgbp, sys; graphgbp.save(graphgbp.convert(sys.argv[1]), sys.argv[2])"
    digests = set()
    for seed in ("0", "1"):
        out = tmp_path / f"{seed}.onnx"
        subprocess.run([sys.executable, "-c", script, MODEL, str(out)], check=True, env={"PYTHONHASHSEED": seed})
        digests.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize(
    "level", [ort.GraphOptimizationLevel.ORT_DISABLE_ALL, ort.GraphOptimizationLevel.ORT_ENABLE_ALL]
)
def test_the_forward_pass_is_unchanged(source, explained, level):
    images = drawn(2, 3, 224, 224)
    logits = [_logits(proto, level, images) for proto in (source, explained)]
    if level == ort.GraphOptimizationLevel.ORT_DISABLE_ALL:
        np.testing.assert_array_equal(*logits)
    else:
        assert np.abs(logits[0] - logits[1]).max() <= 1e-5 * np.abs(logits[0]).max()


def _logits(proto, level, images):
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"image": images, "target": np.array([-1])}
    return session.run(["logits"], {x.name: feeds[x.name] for x in session.get_inputs()})[0]


def test_manifest(source, explained):
    told = manifest(explained)
    digest = hashlib.sha256(Path(MODEL).read_bytes()).hexdigest()
    assert told["source"]["sha256"] == digest
    assert told["methods"] == ALL
    assert told["score"]["tensor"] == "logits" and told["score"]["classes"] == 1000
    assert told["target_layers"][0]["op"] == "Clip" and "every path" in told["target_layers"][0]["reason"]
    clips = [node for node in source.graph.node if node.op_type == "Clip"]
    assert [entry["node"] for entry in told["rectifiers"]] == [node.name for node in clips]
    assert {entry["clothing"] for entry in told["rectifiers"]} == {"Clip(x, 0, 6)"}


@pytest.mark.parametrize("methods", [[method] for method in ALL] + [["saliency", "gradcam"]])
def test_any_subset_of_methods_gives_the_same_maps(explained, methods):
    feeds = {"image": drawn(1, 3, 224, 224), "target": np.array([7])}
    some, every = run(graphgbp.convert(MODEL, methods), feeds), run(explained, feeds)
    for method in methods:
        assert np.abs(some[method] - every[method]).max() <= 1e-5 * np.abs(every[method]).max()
    assert ("gradcam_features" in some) == (not set(methods).isdisjoint(contract.CAMS))


def test_a_file_with_one_method_holds_no_other(source):
    saliency, everything = (len(appended(graphgbp.convert(MODEL, m), source)) for m in (["saliency"], ALL))
    gradcam = len(appended(graphgbp.convert(MODEL, ["gradcam"]), source))
    assert gradcam < 50 < saliency < everything


def test_the_cams_share_one_backward_pass(source):
    """Each brings the nodes of its own head and no other's."""

    def scopes(methods):
        return Counter(node.name.split("/")[1] for node in appended(graphgbp.convert(MODEL, methods), source))

    alone = scopes(["gradcam"])
    for methods in ([*contract.CAMS], *([cam] for cam in contract.CAMS)):
        found = scopes(methods)
        assert set(found) == {"target", "gradient", "output", *methods}
        assert found["gradient"] == alone["gradient"] and found["target"] == alone["target"]
    saliency = scopes(["saliency"])
    found = scopes(["saliency", "input_x_gradient", *contract.CAMS])
    assert found["gradient"] == saliency["gradient"] and found["input_x_gradient"] == 1
    assert set(scopes(["input_x_gradient"])) == {*saliency, "input_x_gradient"}


def test_public_names_give_way_to_the_models_own():
    made = small_cnn(["gradcam = Relu(z)", "target = Neg(gradcam)", "y = Add(gradcam, target)"])
    explained = graphgbp.convert(made, ["gradcam"], output="y")
    names = manifest(explained)["names"]
    assert names["gradcam"] == "graphgbp_gradcam" and names["target"] == "graphgbp_target"
    got = run(explained, {"x": drawn(2, 3, 8, 8), "graphgbp_target": np.array([1])})
    assert got["graphgbp_gradcam"].shape == (2, 1, 8, 8)


def test_converting_again_is_refused_by_name(tmp_path, explained):
    with pytest.raises(graphgbp.AlreadyConvertedError, match="already converted by graphgbp"):
        graphgbp.convert(explained)
    graphgbp.save(explained, tmp_path / "x.onnx")
    with pytest.raises(graphgbp.AlreadyConvertedError, match=r"x\.onnx"):
        graphgbp.convert(tmp_path / "x.onnx")


def test_the_given_model_is_not_changed():
    made = small_cnn()
    before = made.SerializeToString()
    graphgbp.convert(made, ALL)
    graphgbp.vjp(made)
    assert made.SerializeToString() == before


def test_unsorted_and_nameless_nodes():
    made, sorted_ = small_cnn(), small_cnn()
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    explained = graphgbp.convert(made)
    assert list(explained.graph.node)[: len(nodes)] == nodes
    feeds = {"x": drawn(2, 3, 8, 8), "target": np.array([1])}
    got, expected = (run(proto, feeds) for proto in (explained, graphgbp.convert(sorted_)))
    np.testing.assert_allclose(got["guided_gradcam"], expected["guided_gradcam"], rtol=1e-5)


def test_ir_version_3():
    made = small_cnn(opset=16, ir_version=3)
    for tensor in made.graph.initializer:
        made.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.checker.check_model(made)
    explained = graphgbp.convert(made, ALL)
    onnx.checker.check_model(explained)
    feeds = {"x": drawn(2, 3, 8, 8), "target": np.array([1])}
    np.testing.assert_allclose(
        run(explained, feeds)["saliency"], run(graphgbp.convert(small_cnn(), ALL), feeds)["saliency"], rtol=1e-5
    )
    with pytest.raises(graphgbp.RequestError, match="IR version 4"):
        graphgbp.convert(made, target="optional")


def test_static_and_dynamic_shapes_give_the_same_maps():
    feeds = {"x": drawn(2, 3, 8, 8), "target": np.array([1, 4])}
    static, dynamic = graphgbp.convert(small_cnn(batch=2), ALL), graphgbp.convert(small_cnn(size="S"), ALL)
    assert len(static.graph.node) < len(dynamic.graph.node)
    for method in ALL:
        np.testing.assert_allclose(run(static, feeds)[method], run(dynamic, feeds)[method], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"methods": ["gradcan"]}, "unknown method 'gradcan'"),
        ({"methods": []}, "none given"),
        ({"methods": ["saliency"], "target_layer": "hardtanh_32"}, "is where a CAM is taken, and none of saliency"),
        ({"target_layer": "hardtanh_33"}, "near matches: .*hardtanh_32"),
        ({"target_layer": "logits"}, "no spatial positions"),
        ({"target_layer": "image"}, "no layer"),
        ({"score": "softmax"}, "score='softmax' is unknown"),
        ({"score": "probability"}, "has no Softmax"),
        ({"target": "none"}, "target='none' is unknown"),
        ({"rectifiers": "none"}, "rectifiers='none' is unknown"),
        ({"interpolate_mode": "cubic"}, "interpolate_mode='cubic' is unknown"),
        ({"inputs": "photo"}, "no float input"),
        ({"output": "photo"}, "no float output"),
    ],
)
def test_a_request_that_cannot_be_met(request_, message):
    with pytest.raises(graphgbp.RequestError, match=message):
        graphgbp.convert(MODEL, **request_)


def test_every_unsupported_operator_is_listed():
    nodes = ['a = Einsum<equation="bii->bi">(x)', "d = Det(x)", "b = Unsqueeze(d, axis)", "y = Mul(a, b)"]
    made = model(nodes, {"x": (2, 3, 3)}, ["y"], {"axis": np.array([1])})
    with pytest.raises(graphgbp.UnsupportedOperatorError) as caught:
        graphgbp.convert(made, ["saliency"])
    assert "2 nodes" in str(caught.value)
    assert "Einsum (ai.onnx 18, since 12)" in str(caught.value) and "Det (ai.onnx 18, since 11)" in str(caught.value)


def test_what_is_quantised_is_followed_and_not_taken_for_constant():
    """Straight through where the value fits into the type, and past the quantiser by the path beside it."""
    nodes = ["q = QuantizeLinear(x, s, o)", "d = DequantizeLinear(q, s, o)", "y = Add(d, x)"]
    quantised = model(nodes, {"x": [1, 4]}, ["y"], {"s": np.float32(0.1), "o": np.uint8(0)})
    x = np.array([[-1, 0.2, 25.5, 26]], np.float32)
    found = run(graphgbp.vjp(quantised), {"x": x, "y_grad": np.ones_like(x)})["x_grad"]
    assert found.tolist() == [[1, 2, 2, 1]]


def test_a_foreign_operator_is_refused_by_domain():
    made = small_cnn()
    made.graph.node[1].domain = "com.acme"
    made.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"Relu \(com\.acme 1\)"):
        graphgbp.convert(made)


def test_an_attribute_that_is_no_text():
    """tf2onnx keeps TensorFlow's serialized settings on nodes it cannot translate."""
    made = small_cnn()
    made.graph.node[1].attribute.add(name="config", type=onnx.AttributeProto.STRING, s=b"\x82\x01")
    made.graph.node[1].domain = "com.acme"
    made.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"Relu \(com\.acme 1\)"):
        graphgbp.convert(made)


def test_an_attribute_that_is_an_empty_list():
    made = model(["a = Exp(x)", "y = ReduceSum<axes : ints = []>(a)"], {"x": (2, 3)}, ["y"], opset=9)
    x = drawn(2, 3)
    explained = graphgbp.convert(made, ["saliency"])
    np.testing.assert_allclose(run(explained, {"x": x, "target": np.array([1])})["saliency"], np.exp(x), rtol=1e-6)


def test_operators_of_unknown_shape_are_listed_before_anything_else():
    nodes = ["a = Det(x)", "b = com.acme.Foo(a)", "y = Relu(b)"]
    made = model(["a = Relu(x)", "b = Relu(a)", "y = Relu(b)"], {"x": (2, 3, 3)}, ["y"])
    del made.graph.value_info[:], made.graph.output[0].type.tensor_type.shape.dim[:]
    made.graph.output[0].type.tensor_type.ClearField("shape")
    for node, text in zip(made.graph.node, nodes, strict=True):
        node.CopyFrom(onnx.parser.parse_node(text))
    made.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"2 nodes(.|\n)*Det(.|\n)*Foo \(com\.acme 1\)"):
        graphgbp.convert(made, ["saliency"])
    assert [gap["op"] for gap in graphgbp.inspect(made).gaps] == ["Det", "Foo"]


@pytest.mark.parametrize("opset", [27, 99])
def test_an_opset_nobody_has_read_is_refused(opset):
    made = small_cnn()
    made.opset_import[0].version = opset
    with pytest.raises(graphgbp.OpsetError, match=rf"opset {opset}.*up to opset 26"):
        graphgbp.convert(made)


def test_a_tensor_nothing_makes_is_named():
    made = small_cnn()
    made.graph.node[1].input[0] = "nowhere"
    with pytest.raises(graphgbp.ModelFileError, match="reads 'nowhere', which nothing makes"):
        graphgbp.convert(made)


@pytest.mark.parametrize("convert", [graphgbp.convert, graphgbp.vjp, graphgbp.inspect, graphgbp.Explainer])
def test_what_is_no_model_is_refused(convert):
    with pytest.raises(graphgbp.RequestError, match=r"a model is a path or an onnx\.ModelProto, and this is int"):
        convert(5)


def test_outputs_spell_the_batch_as_the_input_does(explained):
    first = {x.name: x.type.tensor_type.shape.dim[0].dim_param for x in explained.graph.output}
    assert {name: first[name] for name in ("target_class", "target_score", *ALL)} == dict.fromkeys(
        ("target_class", "target_score", *ALL), "batch"
    )


def test_external_weights_are_read_from_the_models_folder(tmp_path, monkeypatch):
    """A large constant decides what is a rectifier; another file of that name lies in the current folder."""
    zeros = np.zeros((1, 3, 32, 32), np.float32)
    made = model(["m = Max(x, zeros)", "y = GlobalAveragePool(m)"], {"x": ("N", 3, 32, 32)}, ["y"], {"zeros": zeros})
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    onnx.save(made, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (elsewhere / "m.data").write_bytes(np.ones_like(zeros).tobytes())
    for current in (tmp_path, elsewhere):
        monkeypatch.chdir(current)
        told = manifest(graphgbp.convert(folder / "m.onnx", ["guided_backprop"]))
        assert [entry["clothing"] for entry in told["rectifiers"]] == ["Max(x, 0)"]


def test_vjp_takes_a_name_twice_or_alone():
    made = small_cnn()
    for inputs in ("x", ["x", "x"]):
        assert [x.name for x in graphgbp.vjp(made, inputs=inputs).graph.output] == ["y", "x_grad"]


def test_no_float_input():
    made = model(["y = Cast<to=1>(x)"], {"x": (2, 3)}, ["y"])
    made.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    with pytest.raises(graphgbp.ModelFileError, match=r"no float input.*pixels.*uint8"):
        graphgbp.convert(made, ["saliency"])


def test_near_matches_are_each_named_once_and_no_weights():
    made = small_cnn()
    for node in made.graph.node:
        node.name = node.output[0]  # as some exporters have it
    with pytest.raises(graphgbp.RequestError) as e:
        graphgbp.convert(made, ["gradcam"], target_layer="r9")
    found = re.search("near matches: (.*)", str(e.value))[1].split(", ")
    assert {"r1", "r2"} <= set(found) and len(set(found)) == len(found) and not {"w1", "w2"} & set(found)


def test_a_score_that_does_not_depend_on_the_input():
    made = model(["s = Shape(x)", "y = Cast<to=1>(s)"], {"x": ("N", 3)}, ["y"])
    with pytest.raises(graphgbp.RequestError, match="does not depend"):
        graphgbp.convert(made, ["saliency"])
