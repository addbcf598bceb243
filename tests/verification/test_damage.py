"""A damaged file fails the check that its damage belongs to, and no other."""

import numpy as np
import onnx
import pytest

import graphgbp
from graphgbp import contract
from graphgbp.verification import double
from tests.build import drawn, model, small_cnn
from tests.scores import per_pixel
from tests.verification.files import OUTPUT, converted, failures
from tests.verification.networks import ALL, behind, edit_manifest, network, node, with_functions


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


def _foreign_size(made):
    made.graph.value_info.append(onnx.helper.make_tensor_value_info("nowhere", onnx.TensorProto.FLOAT, [1]))


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


def _is_gentle(node):
    """Whether the node is no step: the mask of a HardSigmoid rises by more than 1 between two neighbouring numbers."""
    return any(attribute.name == "alpha" and abs(attribute.f) <= 1 for attribute in node.attribute)


def _without_mask(begins, op):
    """A mask lets everything through."""

    def damage(made):
        mask = next(n for n in made.graph.node if n.name.startswith(begins) and n.op_type == op and not _is_gentle(n))
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
    "the size of a tensor that is nowhere": ((), _foreign_size, {"appended only"}),
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
    "a layer's gradient times 1.05": (("gradcam",), _slightly_larger_inside(GRADIENT, "Gemm"), {"layer gradient"}),
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


def test_what_is_inside_functions_is_told_as_finely():
    source = with_functions(network())
    made = graphgbp.convert(source, ALL)
    found = graphgbp.verify(made, source)
    assert found["guided gradient"].figures["error"] < 1e-6 and found["guided masks"].figures["masks"] == 3
    _slightly_larger_inside(GUIDED, "Conv")(made)
    assert failures(made, source) == {"guided gradient"}
