"""verify: good files of every kind pass, and each kind of damage fails the check that is there for it."""

import json
from functools import cache

import numpy as np
import onnx
import pytest

import graphgbp
from graphgbp import contract
from graphgbp.verification import double
from tests.build import drawn, model, small_cnn
from tests.scores import per_pixel
from tests.verification.networks import ALL, behind, edit_manifest, network, node, with_branches, with_functions

OUTPUT = f"{contract.SCOPE}/output"


@cache
def _converted(*methods: str) -> bytes:
    return graphgbp.convert(network(), methods or ALL).SerializeToString()


def converted(*methods: str) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(_converted(*methods))


def failures(made: onnx.ModelProto, source: onnx.ModelProto | None = None) -> set[str]:
    return {check.name for check in graphgbp.verify(made, network() if source is None else source).failures}


def segmentation() -> onnx.ModelProto:
    nodes = ["a = Conv<pads=[1,1,1,1]>(x, w1)", "r = Relu(a)", "y = Conv(r, w2)"]
    weights = {"w1": drawn(6, 3, 3, 3, seed=1), "w2": drawn(4, 6, 1, 1, seed=2)}
    return model(nodes, {"x": ["N", 3, 9, 9]}, ["y"], weights)


def weights_as_inputs(source: onnx.ModelProto) -> onnx.ModelProto:
    """As IR 3 wants it: every initializer is listed among the inputs."""
    source.graph.input.extend(
        onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        for weight in source.graph.initializer
    )
    return source


def two_inputs() -> onnx.ModelProto:
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(left, w1)",
        "b = Conv<pads=[1,1,1,1]>(right, w2)",
        "r = Relu(a)",
        "t = Relu(b)",
        "s = Add(r, t)",
        "q = Relu(s)",
        "p = GlobalAveragePool(q)",
        "f = Flatten(p)",
        "y = MatMul(f, w3)",
    ]
    weights = {"w1": drawn(6, 3, 3, 3, seed=1), "w2": drawn(6, 3, 3, 3, seed=2), "w3": drawn(6, 4, seed=3)}
    return model(nodes, {"left": ["N", 3, 9, 9], "right": ["N", 3, 9, 9]}, ["y"], weights)


def clothings() -> onnx.ModelProto:
    """Where(x > 0, x, 0), x * (x > 0) and Max(x, 0), one behind the other."""
    nodes = [
        "zero = Constant<value = float {0.0}>()",
        "a = Conv<pads=[1,1,1,1]>(x, w1)",
        "above = Greater(a, zero)",
        "r1 = Where(above, a, zero)",
        "b = Conv(r1, w2)",
        "positive = Greater(b, zero)",
        "number = Cast<to=1>(positive)",
        "r2 = Mul(b, number)",
        "c = Conv(r2, w2)",
        "r3 = Max(c, zero)",
        "p = GlobalAveragePool(r3)",
        "y = Flatten(p)",
    ]
    weights = {"w1": drawn(6, 3, 3, 3, seed=1), "w2": drawn(6, 6, 3, 3, seed=2, scale=0.3)}
    return model(nodes, {"x": ["N", 3, 9, 9]}, ["y"], weights)


# -- good files --------------------------------------------------------------------------------------------------------

two_classes = small_cnn(("y = Sigmoid(z)",), classes=1)
GOOD = {
    "every method": (network(), {"methods": ALL}),
    "default": (network(), {}),
    "input_x_gradient alone": (network(), {"methods": "input_x_gradient"}),
    **{f"{cam} alone": (network(), {"methods": cam}) for cam in contract.CAMS},
    "CAMs of both signs": (network(), {"methods": contract.CAMS, "target_layer": "s", "relu_attributions": False}),
    "guided_gradcam alone": (network(), {"methods": "guided_gradcam"}),
    "opset 16": (network(16), {"methods": ALL}),
    "opset 26": (network(26), {"methods": ALL}),
    "raised": (small_cnn(opset=12), {"methods": ALL}),
    "IR 3": (weights_as_inputs(small_cnn(ir_version=3)), {"methods": ALL}),
    "weights as inputs": (weights_as_inputs(network()), {"methods": ALL}),
    "optional": (network(), {"methods": ALL, "target": "optional"}),
    "weights": (network(), {"methods": ALL, "target": "weights"}),
    "cotangent": (network(), {"methods": ALL, "target": "cotangent"}),
    "probability": (network(), {"methods": ALL, "score": "probability"}),
    "neuron": (network(), {"methods": ALL, "target_tensor": "d", "target_layer": "r1"}),
    "several layers": (network(), {"methods": ALL, "target_layer": ["r1", "r3"]}),
    "mean of layers": (network(), {"methods": ALL, "target_layer": ["r1", "r3"], "aggregate": "mean"}),
    "nearest, signed": (network(), {"interpolate_mode": "nearest", "relu_attributions": False}),
    "segmentation": (segmentation(), {"methods": ALL, "target_layer": "r"}),
    "two inputs": (two_inputs(), {"methods": ALL}),
    "functions": (with_functions(network()), {"methods": ALL}),
    "a layer in a function": (with_functions(network()), {"methods": ALL, "target_layer": "call block/r2"}),
    "branches": (with_branches(network()), {"methods": ALL}),
    "clothings": (clothings(), {"methods": ALL}),
    "two classes in one": (two_classes, {"methods": ALL}),
    "two probabilities in one": (two_classes, {"methods": ALL, "score": "probability"}),
}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_passes(name):
    source, options = GOOD[name]
    found = graphgbp.verify(graphgbp.convert(source, **options), source)
    unproven = [check for check in found.checks if check.status != "pass"]
    assert [check.name for check in unproven] == (["grad-cam"] if name == "guided_gradcam alone" else []), unproven
    expected = {"fingerprint", "appended only", "names", "forward", "score", "gradient", "rectifiers"}
    assert expected | {"kernels CPU", "kernels CUDA"} <= {check.name for check in found.checks}


def test_what_is_inside_functions_is_told_as_finely():
    source = with_functions(network())
    made = graphgbp.convert(source, ALL)
    found = graphgbp.verify(made, source)
    assert found["guided gradient"].figures["error"] < 1e-6 and found["guided masks"].figures["masks"] == 3
    _slightly_larger_inside(GUIDED, "Conv")(made)
    assert failures(made, source) == {"guided gradient"}


def test_a_vjp_file_passes():
    for source in (network(), two_inputs()):
        found = graphgbp.verify(graphgbp.vjp(source), source)
        assert found.passed and found.kind == "vjp" and found["gradient"].figures["error"] < 1e-6


def test_smooth_activations_that_are_masked():
    """An operator is told by differences, one that is written out is not, and that is said."""
    swish = model(
        ["a = Conv(x, w)", "r = LeakyRelu(a)", "p = GlobalAveragePool(r)", "y = Flatten(p)"],
        {"x": ["N", 3, 9, 9]},
        ["y"],
        {"w": drawn(6, 3, 3, 3)},
    )
    assert graphgbp.verify(graphgbp.convert(swish, "guided_backprop", rectifiers="all"), swish).passed
    found = graphgbp.verify(graphgbp.convert(network(), "guided_backprop", rectifiers="all"), network())
    assert not found.failures and [check.name for check in found.unchecked] == ["guided gradient"]


def test_a_transformer_passes():
    """Erf, LayerNormalization, Softmax: smooth, so the smallest steps must not drown in rounding."""
    nodes = [
        "e = Conv<strides=[4,4]>(x, w1)",
        "t = Reshape(e, tokens)",
        "u = Transpose<perm=[0,2,1]>(t)",
        "n = LayerNormalization<axis=-1>(u, scale)",
        "q = MatMul(n, w2)",
        "k = Transpose<perm=[0,2,1]>(q)",
        "s = MatMul(q, k)",
        "p = Softmax<axis=-1>(s)",
        "v = MatMul(p, n)",
        "f = Erf(v)",
        "g = Mul(f, v)",
        "h = Add(g, u)",
        "m = ReduceMean<keepdims=0>(h, axis)",
        "y = MatMul(m, w3)",
    ]
    weights = {"w1": drawn(6, 3, 4, 4, scale=0.3), "scale": drawn(6), "w2": drawn(6, 6, scale=0.4), "w3": drawn(6, 4)}
    weights |= {"tokens": np.array([0, 6, -1]), "axis": np.array([1])}
    source = model(nodes, {"x": ["N", 3, 16, 16]}, ["y"], weights)
    found = graphgbp.verify(graphgbp.convert(source, "saliency"), source)
    assert found.passed and found["gradient"].figures["error"] < 1e-6


def test_figures_are_those_of_a_run():
    found = graphgbp.verify(converted(), network())
    assert found["gradient"].figures["error"] < 1e-6 and found["gradient"].figures["float32_distance"] < 1e-5
    directions = found["gradient"].figures["directions"]
    assert len(directions) == 5 and all(direction["settled"] for direction in directions)
    assert found["forward"].figures["bit_equal"] is True
    assert found["appended only"].figures["nodes"] == len(network().graph.node)
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_the_demo_model_passes(tmp_path):
    graphgbp.save(graphgbp.convert("models/efficientnet_lite0.onnx", "saliency"), tmp_path / "out.onnx")
    assert graphgbp.verify(tmp_path / "out.onnx", "models/efficientnet_lite0.onnx").passed


# -- the source --------------------------------------------------------------------------------------------------------


def test_the_source_is_found_beside_the_file(tmp_path):
    onnx.save(network(16), tmp_path / "another.onnx")
    onnx.save(small_cnn(opset=12), tmp_path / "source.onnx")
    graphgbp.save(graphgbp.convert(tmp_path / "source.onnx", "saliency"), tmp_path / "out.onnx")
    found = graphgbp.verify(tmp_path / "out.onnx")
    assert found.passed and found.source == str(tmp_path / "source.onnx")


def test_the_source_is_recovered_from_the_file():
    assert graphgbp.verify(converted()).source == "recovered"
    assert graphgbp.verify(converted()).passed


def test_what_needs_a_source_is_left_unchecked_without_one():
    raised = graphgbp.convert(small_cnn(opset=12), ALL)
    found = graphgbp.verify(raised)
    assert found.source is None and not found.passed and not found.failures
    assert [check.name for check in found.unchecked] == ["fingerprint", "appended only", "forward"]


def test_external_weights(tmp_path):
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    graphgbp.save(graphgbp.convert(tmp_path / "m.onnx", "saliency"), tmp_path / "out.onnx")
    assert graphgbp.verify(tmp_path / "out.onnx").passed
    data = bytearray((tmp_path / "m.data").read_bytes())
    data[5] ^= 1
    (tmp_path / "m.data").write_bytes(data)
    found = graphgbp.verify(tmp_path / "out.onnx")
    assert [check.name for check in found.failures] == ["fingerprint"] and "m.data" in found["fingerprint"].detail


def test_mistakes_are_refused(tmp_path):
    with pytest.raises(graphgbp.ModelFileError, match="not converted"):
        graphgbp.verify(network())
    with pytest.raises(graphgbp.AlreadyConvertedError, match="the source"):
        graphgbp.verify(converted(), converted())
    with pytest.raises(graphgbp.ModelFileError, match="no file"):
        graphgbp.verify(converted(), tmp_path / "none.onnx")


@pytest.mark.parametrize("methods", [["saliency", "gradcam"], ["guided_backprop"]])
def test_a_large_models_weights_stay_where_they_are(tmp_path, monkeypatch, methods):
    """What is said of it is what is said of a small one, but for the precision."""
    (tmp_path / "new").mkdir()
    path, out = tmp_path / "m.onnx", tmp_path / "new" / "out.onnx"
    onnx.save(small_cnn(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    graphgbp.save(graphgbp.convert(path, methods), out, weights_from=tmp_path)
    small = graphgbp.verify(out, path)
    monkeypatch.setattr("graphgbp.verification.subject._LIMIT", 1000)
    monkeypatch.setattr("graphgbp.verification.subject.with_small_weights", lambda *_: pytest.fail("read in"))
    large = graphgbp.verify(out, path)
    assert small.passed and not large.failures
    assert [check.name for check in large.checks] == [check.name for check in small.checks]
    assert "too large to be read in" in large["gradient"].detail and large["gradient"].status == "pass"
    assert {check.name for check in large.unchecked} <= {"guided gradient"}
    data = bytearray((tmp_path / "new" / "m.data").read_bytes())
    data[5] ^= 64
    (tmp_path / "new" / "m.data").write_bytes(data)
    found = graphgbp.verify(out, path)
    assert {"fingerprint", "forward"} <= {check.name for check in found.failures}
    assert "beside the file lie other weights" in found["fingerprint"].detail


def test_a_large_models_gradient_that_is_wrong_is_noticed(tmp_path, monkeypatch):
    path, out = tmp_path / "m.onnx", tmp_path / "out.onnx"
    onnx.save(small_cnn(), path, save_as_external_data=True, location="m.data", size_threshold=0)
    made = graphgbp.convert(path, ["saliency"])
    scaled = next(node for node in reversed(made.graph.node) if "saliency" in node.output)
    scaled.output[0] = "graphgbp/unscaled"
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(1.2), "graphgbp/scale"))
    made.graph.node.add(
        op_type="Mul", name="graphgbp/scaled", input=["graphgbp/unscaled", "graphgbp/scale"], output=["saliency"]
    )
    graphgbp.save(made, out)
    monkeypatch.setattr("graphgbp.verification.subject._LIMIT", 1000)
    assert [check.name for check in graphgbp.verify(out, path).failures] == ["gradient"]


def test_sparse_weights():
    made = model(["f = Flatten(x)", "h = MatMul(f, w)", "r = Relu(h)", "y = MatMul(r, v)"], {"x": ("N", 2, 3)}, ["y"],
                 {"w": drawn(6, 5), "v": drawn(5, 4)})  # fmt: skip
    dense = next(tensor for tensor in made.graph.initializer if tensor.name == "w")
    kept, places = onnx.numpy_helper.to_array(dense).reshape(-1)[::3], onnx.numpy_helper.from_array(np.arange(0, 30, 3))
    sparse = onnx.helper.make_sparse_tensor(onnx.numpy_helper.from_array(kept, "w"), places, [6, 5])
    made.graph.sparse_initializer.append(sparse)
    made.graph.initializer.remove(dense)
    assert graphgbp.verify(graphgbp.convert(made, ["saliency", "guided_backprop"]), made).passed


def test_weights_that_overflow_fail_quietly(tmp_path):
    """In the file of weights that it shares with its source; warnings of numpy are errors here."""
    path = tmp_path / "model.onnx"
    onnx.save(network(), path, save_as_external_data=True, location="model.data", size_threshold=0)
    graphgbp.save(graphgbp.convert(path), tmp_path / "out.onnx")
    (tmp_path / "model.data").write_bytes(np.full((tmp_path / "model.data").stat().st_size // 4, 1e38, "f4").tobytes())
    assert {"fingerprint", "forward", "score"} <= {
        check.name for check in graphgbp.verify(tmp_path / "out.onnx").failures
    }


def test_another_source_fails():
    other = network()
    weight = onnx.numpy_helper.to_array(other.graph.initializer[0]) * np.float32(1.1)
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    assert {"fingerprint", "appended only", "forward", "score", "gradient"} <= failures(converted(), other)


# -- damage ------------------------------------------------------------------------------------------------------------


def _foreign_sha(made):
    edit_manifest(made, lambda manifest: manifest["source"].update(sha256="0" * 64))


def _renamed_node(made):
    made.graph.node[0].name = "renamed"


def _outputs_in_another_order(made):
    first, *others = (onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in made.graph.output)
    del made.graph.output[:]
    made.graph.output.extend([*others, first])


def _foreign_node(made):
    made.graph.node.append(onnx.helper.make_node("Neg", ["y"], ["minus y"], "foreign"))


def _other_header(made):
    made.producer_name = "somebody else"


def _missing_name(made):
    edit_manifest(made, lambda manifest: manifest["passed_through"][0].update(tensor="nowhere"))


def _negative_score(made):
    node(made, f"{OUTPUT}/target_score").op_type = "Neg"


def _no_guard(made):
    guard = node(made, contract.GUARD_NODE)
    guard.op_type = "Identity"
    del guard.input[1:]


def _unlisted_rectifier(made):
    edit_manifest(made, lambda manifest: manifest["rectifiers"].pop())


def _listed_look_alike(made):
    edit_manifest(made, lambda manifest: manifest["rectifiers"].append({**manifest["rectifiers"][0], "tensor": "d"}))


def _slightly_larger(name):
    return lambda made: behind(made, name, "Mul", 1.05)


def _slightly_larger_inside(begins, op):
    return lambda made: behind(made, node(made, begins, op=op).output[0], "Mul", 1.05)


def _without_mask(begins, op):
    """A mask lets everything through."""

    def damage(made):
        mask = node(made, begins, op=op)
        if op == "HardSigmoid":
            del mask.attribute[:]
            mask.attribute.extend(onnx.helper.make_attribute(k, v) for k, v in (("alpha", 0.0), ("beta", 1.0)))
        else:
            mask.op_type = "Identity"

    return damage


def _without_cotangent(scope):
    """Where cotangents of two readers meet, only one counts."""

    def damage(made):
        meeting = next(n for n in made.graph.node if n.name.startswith(scope) and n.op_type == "Add")
        meeting.op_type = "Identity"
        del meeting.input[1]

    return damage


def _unrectified_cam(made):
    relu = node(made, f"{contract.SCOPE}/gradcam/", op="Relu")
    relu.op_type = "Identity"


def _smoother_cam(made):
    resize = node(made, f"{contract.SCOPE}/gradcam/", op="Resize")
    mode = next(attribute for attribute in resize.attribute if attribute.name == "coordinate_transformation_mode")
    mode.s = b"align_corners"


def _no_cuda_kernel(made):
    node(made, f"{OUTPUT}/saliency").op_type = "Mean"


def _manifest_says(**changes):
    return lambda made: edit_manifest(made, lambda manifest: manifest.update(changes))


def _one_less(cam, op):
    """A node of a head passes on what it reads."""

    def damage(made):
        weighed = node(made, f"{contract.SCOPE}/{cam}/", op=op)
        weighed.op_type = "Identity"
        del weighed.input[1:], weighed.attribute[:]

    return damage


def _squared(made):
    product = node(made, f"{contract.SCOPE}/input_x_gradient/", op="Mul")
    product.input[1] = product.input[0]


WEIGHED = {"layercam": "Relu", "gradcam_plusplus": "Div", "xgradcam": "Div"}
GRADIENT, GUIDED, DECONVNET = (f"{contract.SCOPE}/{scope}/" for scope in ("gradient", "guided", "deconvnet"))
DAMAGE = {
    "fingerprint": ((), _foreign_sha, {"fingerprint"}),
    "a node renamed": ((), _renamed_node, {"appended only"}),
    "outputs in another order": ((), _outputs_in_another_order, {"appended only"}),
    "a foreign node": ((), _foreign_node, {"appended only"}),
    "another header": ((), _other_header, {"appended only"}),
    "a name that is nowhere": ((), _missing_name, {"names", "manifest"}),
    "methods that are not told": ((), _manifest_says(methods=["saliency"]), {"manifest"}),
    "surrogates that are none": ((), _manifest_says(surrogates=["y"]), {"manifest"}),
    "activations that are not told": ((), _manifest_says(passed_through=[]), {"manifest"}),
    "the score's sign": ((), _negative_score, {"score"}),
    "no guard": ((), _no_guard, {"target guard"}),
    "saliency times 1.05": (("saliency",), _slightly_larger("saliency"), {"gradient"}),
    "a node of saliency times 1.05": (("saliency",), _slightly_larger_inside(GRADIENT, "Conv"), {"gradient"}),
    "a mask of saliency removed": (("saliency",), _without_mask(GRADIENT, "HardSigmoid"), {"gradient"}),
    "a cotangent of saliency dropped": (("saliency",), _without_cotangent(GRADIENT), {"gradient"}),
    "a layer's gradient times 1.05": (("gradcam",), _slightly_larger_inside(GRADIENT, None), {"layer gradient"}),
    "a rectifier not listed": ((), _unlisted_rectifier, {"rectifiers"}),
    "a rectifier that is none": ((), _listed_look_alike, {"rectifiers"}),
    "guided: a Relu removed": (("guided_backprop",), _without_mask(GUIDED, "Relu"), {"guided masks"}),
    "guided: a gate removed": (("guided_backprop",), _without_mask(GUIDED, "HardSigmoid"), {"guided masks"}),
    "guided: a node times 1.05": (("guided_backprop",), _slightly_larger_inside(GUIDED, "Conv"), {"guided gradient"}),
    "guided: a cotangent dropped": (("guided_backprop",), _without_cotangent(GUIDED), {"guided gradient"}),
    "guided_backprop times 1.05": (("guided_backprop",), _slightly_larger("guided_backprop"), {"guided gradient"}),
    "deconvnet: a Relu removed": (("deconvnet",), _without_mask(DECONVNET, "Relu"), {"deconvnet masks"}),
    "deconvnet: a node times 1.05": (
        ("deconvnet",),
        _slightly_larger_inside(DECONVNET, "Conv"),
        {"deconvnet gradient"},
    ),
    "Grad-CAM without its Relu": ((), _unrectified_cam, {"grad-cam"}),
    "Grad-CAM resized otherwise": ((), _smoother_cam, {"grad-cam"}),
    "Guided Grad-CAM times 1.05": ((), _slightly_larger("guided_gradcam"), {"grad-cam"}),
    **{f"{cam} times 1.05": ((), _slightly_larger(cam), {"grad-cam"}) for cam in contract.CAMS},
    **{f"the weights of {cam}": ((cam,), _one_less(cam, op), {"grad-cam"}) for cam, op in WEIGHED.items()},
    "Input x Gradient times 1.05": (
        ("input_x_gradient",),
        _slightly_larger("input_x_gradient"),
        {"gradient", "input x gradient"},
    ),
    "Input x Gradient beside saliency times 1.05": ((), _slightly_larger("input_x_gradient"), {"input x gradient"}),
    "the gradient of Input x Gradient times 1.05": (
        ("input_x_gradient",),
        _slightly_larger_inside(GRADIENT, "Conv"),
        {"gradient"},
    ),
    "another input than the one that is explained": (("input_x_gradient",), _squared, {"input x gradient"}),
    "an operator without a CUDA kernel": ((), _no_cuda_kernel, {"kernels CUDA"}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_fails_its_check_and_no_other(name):
    methods, damage, expected = DAMAGE[name]
    made = converted(*methods)
    damage(made)
    assert failures(made) == expected


def test_a_changed_weight_fails():
    made = converted()
    weight = onnx.numpy_helper.to_array(made.graph.initializer[0]) * np.float32(1.1)
    made.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    assert {"appended only", "forward", "score", "gradient"} <= failures(made)


def test_without_a_source_a_wrong_gradient_still_fails():
    source = small_cnn(opset=12)
    made = graphgbp.convert(source, "saliency")
    behind(made, "saliency", "Mul", 1.05)
    found = graphgbp.verify(made)
    assert [check.name for check in found.failures] == ["gradient"]


def test_in_float32_where_the_reference_evaluator_cannot_run(monkeypatch):
    """Coarser, and it says so: what cannot be told between kinks is left unchecked, a wrong gradient still fails."""

    class Nothing:
        def __init__(self, model):
            raise double.DoubleError("not today")

    monkeypatch.setattr("graphgbp.verification.gradient.DoubleModel", Nothing)
    assert not graphgbp.verify(converted(), network()).failures
    nodes = ["a = Conv(x, w)", "s = Sigmoid(a)", "b = Conv(s, v)", "t = Tanh(b)", "p = GlobalAveragePool(t)"]
    weights = {"w": drawn(6, 3, 3, 3, scale=0.3), "v": drawn(6, 6, 3, 3, scale=0.3)}
    smooth = model([*nodes, "y = Flatten(p)"], {"x": ["N", 3, 9, 9]}, ["y"], weights)
    made = graphgbp.convert(smooth, "saliency")
    found = graphgbp.verify(made, smooth)
    assert found["gradient"].status == "pass" and "not today" in found["gradient"].detail
    behind(made, "saliency", "Mul", 1.2)
    assert failures(made, smooth) == {"gradient"}


def test_every_way_to_choose_the_target_is_tried():
    """A mask that never leaves a pixel to the prediction, a position that is never looked at: both fail."""
    segmented = graphgbp.convert(per_pixel(), "saliency")
    assert graphgbp.verify(segmented, per_pixel()).passed
    share = next(n for n in segmented.graph.node if n.op_type == "Where" and n.input[0].endswith("Less_1"))
    share.input[1] = share.input[2]
    assert "score" in failures(segmented, per_pixel())
    layer = next(output for node in network().graph.node if node.op_type == "Conv" for output in node.output)
    neurons = graphgbp.convert(network(), "saliency", target_tensor=layer)
    assert graphgbp.verify(neurons, network()).passed
    for either in [n for n in neurons.graph.node if n.op_type == "Or" and "/target/" in n.name][-2:]:
        either.input[0] = either.input[1]
    assert "score" in failures(neurons, network())


@pytest.mark.parametrize("ir_version", [3, 4])
def test_weights_that_are_inputs(ir_version):
    source = small_cnn(opset=16, ir_version=ir_version)
    for tensor in source.graph.initializer:
        source.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert graphgbp.verify(graphgbp.convert(source, ALL), source).passed
