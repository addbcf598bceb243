"""verify: files that are fused, of half precision or quantised; and each kind of damage that only they can have."""

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import graphgbp
from graphgbp import contract
from graphgbp.verification.subject import Subject
from tests.build import drawn, model
from tests.verification.networks import ALL, behind, edit_manifest, network, node

RECOMPUTED = contract.RECOMPUTED
GRADIENT, GUIDED = f"{contract.SCOPE}/gradient/", f"{contract.SCOPE}/guided/"


def _scales(name: str, step: float, zero: int) -> dict[str, np.ndarray]:
    return {f"{name}_scale": np.float32(step), f"{name}_zero": np.uint8(zero)}


def _quantised_weight(name: str, *shape: int, seed: int) -> dict[str, np.ndarray]:
    q = np.random.default_rng(seed).integers(-100, 100, shape).astype(np.int8)
    return {name: q, f"{name}_scale": np.float32(0.004), f"{name}_zero": np.int8(0)}


WEIGHTS = {
    **_scales("x", 0.02, 128),  # the input saturates beyond 2.54
    **_scales("a", 0.01, 0),
    **_scales("b", 0.01, 0),
    **_scales("z", 0.02, 128),
    **_quantised_weight("w1", 6, 3, 3, 3, seed=1),
    **_quantised_weight("w2", 5, 6, 3, 3, seed=2),
}


def qdq() -> onnx.ModelProto:
    """A swallowed ReLU, a max pooling among ties, a ReLU of its own, quantisers that saturate."""
    nodes = [
        "xq = QuantizeLinear(x, x_scale, x_zero)",
        "xd = DequantizeLinear(xq, x_scale, x_zero)",
        "w1d = DequantizeLinear(w1, w1_scale, w1_zero)",
        "a = Conv<pads=[1,1,1,1]>(xd, w1d)",
        "aq = QuantizeLinear(a, a_scale, a_zero)",
        "ad = DequantizeLinear(aq, a_scale, a_zero)",
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(ad)",
        "mq = QuantizeLinear(m, a_scale, a_zero)",
        "md = DequantizeLinear(mq, a_scale, a_zero)",
        "w2d = DequantizeLinear(w2, w2_scale, w2_zero)",
        "b = Conv<pads=[1,1,1,1]>(md, w2d)",
        "r = Relu(b)",
        "rq = QuantizeLinear(r, b_scale, b_zero)",
        "rd = DequantizeLinear(rq, b_scale, b_zero)",
        "p = GlobalAveragePool(rd)",
        "y = Flatten(p)",
    ]
    return model(nodes, {"x": ["N", 3, 12, 12]}, ["y"], WEIGHTS)


def signed() -> onnx.ModelProto:
    """The same with activations of int8: the file computes its quantised tensors again."""
    made = qdq()
    for tensor in made.graph.initializer:
        if tensor.name.endswith("_zero"):
            zero = numpy_helper.to_array(tensor)
            zero = (zero.astype(np.int16) - 128).astype(np.int8) if zero.dtype == np.uint8 else zero
            tensor.CopyFrom(numpy_helper.from_array(zero, tensor.name))
    del made.graph.value_info[:]
    return made


def qoperator() -> onnx.ModelProto:
    nodes = [
        "xq = QuantizeLinear(x, x_scale, x_zero)",
        "aq = QLinearConv<pads=[1,1,1,1]>(xq, x_scale, x_zero, w1, w1_scale, w1_zero, a_scale, a_zero)",
        "mq = MaxPool<kernel_shape=[2,2], strides=[2,2]>(aq)",
        "bq = QLinearConv<pads=[1,1,1,1]>(mq, a_scale, a_zero, w2, w2_scale, w2_zero, b_scale, b_zero)",
        "bd = DequantizeLinear(bq, b_scale, b_zero)",
        "p = GlobalAveragePool(bd)",
        "y = Flatten(p)",
    ]
    return model(nodes, {"x": ["N", 3, 12, 12]}, ["y"], WEIGHTS)


def dynamic() -> onnx.ModelProto:
    nodes = [
        "xq, s, zero = DynamicQuantizeLinear(x)",
        "i = ConvInteger<pads=[1,1,1,1]>(xq, w1, zero, w1_zero)",
        "f = Cast<to=1>(i)",
        "unit = Mul(s, w1_scale)",
        "a = Mul(f, unit)",
        "r = Relu(a)",
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)",
        "mq, t, low = DynamicQuantizeLinear(m)",
        "j = ConvInteger<pads=[1,1,1,1]>(mq, w2, low, w2_zero)",
        "h = Cast<to=1>(j)",
        "other = Mul(t, w2_scale)",
        "b = Mul(h, other)",
        "c = LeakyRelu<alpha=0.1>(b)",
        "p = GlobalAveragePool(c)",
        "y = Flatten(p)",
    ]
    return model(nodes, {"x": ["N", 3, 12, 12]}, ["y"], WEIGHTS)


def half() -> onnx.ModelProto:
    """The network in half precision, its input as well; random input of it is exact in both."""
    made = network()
    del made.graph.value_info[:]
    for value in [*made.graph.input, *made.graph.output]:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    for tensor in made.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return made


def fused() -> onnx.ModelProto:
    """Convolutions with their ReLU, as ONNX Runtime fuses them."""
    made = model(
        ["a = Conv(x, w1)", "b = Conv(a, w2)", "p = GlobalAveragePool(b)", "y = Flatten(p)"],
        {"x": ["N", 3, 12, 12]},
        ["y"],
        {"w1": drawn(6, 3, 3, 3, seed=1), "w2": drawn(5, 6, 3, 3, seed=2)},
    )
    for conv in made.graph.node[:2]:
        conv.op_type, conv.domain = "FusedConv", "com.microsoft"
        conv.attribute.append(helper.make_attribute("activation", "Relu"))
    made.opset_import.add(domain="com.microsoft", version=1)
    return made


GOOD = {"qdq": qdq, "signed": signed, "qoperator": qoperator, "dynamic": dynamic, "half": half, "fused": fused}


@cache
def _converted(name: str) -> bytes:
    return graphgbp.convert(GOOD[name](), ALL).SerializeToString()


def converted(name: str) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(_converted(name))


def failures(made: onnx.ModelProto, name: str) -> set[str]:
    return {check.name for check in graphgbp.verify(made, GOOD[name]()).failures}


@pytest.mark.parametrize("name", GOOD)
def test_a_good_file_passes(name):
    found = graphgbp.verify(converted(name), GOOD[name]())
    assert found.passed, [check for check in found.checks if check.status != "pass"]
    assert "plain nodes" in {check.name for check in found.checks}
    assert found["gradient"].figures["error"] < 1e-4 and found["guided gradient"].figures["error"] < 1e-4
    assert found["gradient"].figures["float32_distance"] < 1e-2
    masks = {"qdq": 4, "signed": 4, "qoperator": 3, "dynamic": 2}
    assert name not in masks or found["saturation"].figures["masks"] == masks[name]


@pytest.mark.parametrize("name", GOOD)
def test_a_vjp_file_passes(name):
    found = graphgbp.verify(graphgbp.vjp(GOOD[name]()), GOOD[name]())
    assert found.passed, [check for check in found.checks if check.status != "pass"]


@pytest.mark.parametrize("name", ["qdq", "signed", "dynamic"])
def test_a_file_without_a_gradient_by_the_input_passes(name):
    found = graphgbp.verify(graphgbp.convert(GOOD[name](), "gradcam"), GOOD[name]())
    assert found.passed, [check for check in found.checks if check.status != "pass"]


def test_quantised_values_saturate_and_tie():
    """What the tests above are about happens on their input."""
    held = Subject(converted("qdq"), qdq()).pins
    assert {"xq", "aq", "mq", "rq"} <= set(held.exact)
    assert all((held.constants[f"{contract.SCOPE}/moves/{name}"] == 0).any() for name in ("xq", "rq"))
    windows = held.exact["aq"].reshape(2, 6, 6, 2, 6, 2).swapaxes(3, 4).reshape(-1, 4)
    best = windows.max(1, keepdims=True)
    assert ((windows == best).sum(1) > 1).any()


def cancels() -> onnx.ModelProto:
    """Half precision, where b and c all but cancel."""
    nodes = [
        "a = Mul(x, three)",
        "b = Mul(a, seven)",
        "c = Mul(x, less)",
        "s = Add(b, c)",
        "r = Relu(s)",
        "p = GlobalAveragePool(r)",
        "y = Flatten(p)",
    ]
    weights = {"three": np.float16(3.3), "seven": np.float16(7.7), "less": np.float16(-25.3)}
    made = model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights)
    for value in [*made.graph.input, *made.graph.output]:
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    del made.graph.value_info[:]
    return made


def test_half_precision_that_the_runtime_rounds_elsewhere():
    """b is read before it is rounded: the sum, which all but cancels, is off by many steps of its own."""
    pins = Subject(graphgbp.convert(cancels(), "saliency"), cancels()).pins
    by = np.random.default_rng(1).uniform(-1, 1, pins.exact["b"].shape)
    moved = pins.exact["b"] * by * 2.0**-11
    assert (np.abs(moved) > 2.0**-9 * np.abs(pins.exact["s"])).any()
    pins.exact["b"] += moved
    assert pins.fault is None


def test_a_score_that_only_plain_nodes_make_is_made_of_what_the_runtime_quantises():
    subject = Subject(converted("qoperator"), qoperator())
    hidden = next(x for x in subject.graph.graph.node if x.op_type == "Conv").output[0]
    assert not any(hidden in node.output for node in subject.whole_forward.graph.node)
    before = subject.primal([hidden])[0]
    subject.pins.exact["xq"] += 8
    assert np.abs(subject.primal([hidden])[0] - before).max() > 1e-3


@pytest.mark.parametrize("name, tensor", [("half", "a"), ("half", "s"), ("half", "z"), ("signed", "aq"), ("qdq", "rq")])
def test_tensors_that_are_not_what_makes_them_are_found(name, tensor):
    pins = Subject(converted(name), GOOD[name]()).pins
    assert pins.fault is None
    pins = Subject(converted(name), GOOD[name]()).pins
    pins.exact[tensor] = pins.exact[tensor] * 1.02 + (1 if name == "qdq" else 0)
    assert pins.fault is not None and f"'{tensor}'" in pins.fault


def rounds_floats() -> onnx.ModelProto:
    """A quantised convolution before floats whose nodes ONNX Runtime fuses only where nobody reads what is inside."""
    nodes = [
        "xq = QuantizeLinear(x, x_scale, x_zero)",
        "xd = DequantizeLinear(xq, x_scale, x_zero)",
        "w1d = DequantizeLinear(w1, w1_scale, w1_zero)",
        "a = Conv(xd, w1d)",
        "aq = QuantizeLinear(a, a_scale, x_zero)",
        "ad = DequantizeLinear(aq, a_scale, x_zero)",
        "t = Reshape(ad, tokens)",
        "u = Sigmoid(t)",
        "s = Add(t, u)",
        "n = LayerNormalization<axis=-1>(s, gain, shift)",
        "y = ReduceMean<axes=[1], keepdims=0>(n)",
    ]
    weights = {name: x for name, x in WEIGHTS.items() if name[:2] in ("x_", "a_", "w1")}
    weights |= {"tokens": np.asarray([0, 6, 36], np.int64), "gain": drawn(36, seed=3), "shift": drawn(36, seed=4)}
    return model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights, opset=17)


def test_rounding_of_floats_in_a_quantised_model_is_told_from_a_step():
    source = rounds_floats()
    made = graphgbp.convert(source, "saliency")
    found = graphgbp.verify(made, source)
    assert found.passed, [check for check in found.checks if check.status != "pass"]
    assert not found["forward"].figures["bit_equal"] and "within" in found["forward"].detail
    weight = next(x for x in made.graph.initializer if x.name == "w1")
    values = numpy_helper.to_array(weight).copy()
    values[0, 0, 0, 0] += 1
    weight.CopyFrom(numpy_helper.from_array(values, "w1"))
    assert "forward" in {check.name for check in graphgbp.verify(made, source).failures}
    exact = graphgbp.verify(converted("qdq"), qdq())["forward"]
    assert exact.figures["bit_equal"] and "bit for bit" in exact.detail


# -- damage ------------------------------------------------------------------------------------------------------------


def _larger(begins, op):
    return lambda made: behind(made, node(made, begins, op=op).output[0], "Mul", 1.05)


def _without_saturation(made):
    """A quantiser's gradient passes where it saturates as well."""
    choice = node(made, f"{GRADIENT}xq", op="Where")
    choice.op_type = "Identity"
    choice.input[:] = [choice.input[1]]


def _no_surrogate(made):
    """A quantiser's gradient is zero, as the derivative of rounding is."""
    behind(made, node(made, f"{GRADIENT}aq/", op="Where").output[0], "Mul", 0.0)


def _passes_everything(scope):
    def damage(made):
        mask = next(n for n in made.graph.node if n.name.startswith(scope) and n.op_type == "HardSigmoid")
        del mask.attribute[:]
        mask.attribute.extend(helper.make_attribute(k, v) for k, v in (("alpha", 0.0), ("beta", 1.0)))

    return damage


def _unrectified(made):
    """The cotangent of a swallowed ReLU passes where it is negative as well."""
    node(made, f"{GUIDED}aq/", op="Relu").op_type = "Identity"


def _rounded_down(made):
    """A tensor that is quantised again lies up to a step away."""
    node(made, f"{RECOMPUTED}/again/aq/", op="Round").op_type = "Floor"


def _of_half_the_input(made):
    behind(made, node(made, f"{RECOMPUTED}/again/rq/", op="Div").output[0], "Mul", 0.5)


def _no_surrogates_told(made):
    edit_manifest(made, lambda manifest: manifest.update(surrogates=[]))


def _clothing_untold(made):
    edit_manifest(made, lambda manifest: manifest["rectifiers"][0].update(clothing="Relu"))


def _turned(begins, op, into):
    def damage(made):
        node(made, begins, op=op).op_type = into

    return damage


def _one_step_more(made):
    """A quantiser's mask opens one step too far."""
    mask = node(made, f"{GRADIENT}aq/", op="LessOrEqual")
    bound = next(x for x in made.graph.initializer if x.name == mask.input[1])
    made.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(bound) + 1, "more"))
    mask.input[1] = "more"


DAMAGE = {
    "a bound shut": ("qdq", _turned(f"{GRADIENT}aq/", "LessOrEqual", "Less"), "saturation"),
    "a lower bound shut": ("qdq", _turned(f"{GRADIENT}aq/", "GreaterOrEqual", "Greater"), "saturation"),
    "a mask that rounds down": ("qdq", _turned(f"{GRADIENT}aq/", "Round", "Floor"), "saturation"),
    "a mask one step wider": ("qdq", _one_step_more, "saturation"),
    "int8: a bound shut": ("signed", _turned(f"{GRADIENT}rq/", "LessOrEqual", "Less"), "saturation"),
    "QLinearConv: a bound shut": ("qoperator", _turned(f"{GRADIENT}bq/", "LessOrEqual", "Less"), "saturation"),
    "dynamic: a mask that rounds down": ("dynamic", _turned(f"{GRADIENT}mq/", "Round", "Floor"), "saturation"),
    "a convolution times 1.05": ("qdq", _larger(GRADIENT, "Conv"), "gradient"),
    "a guided convolution times 1.05": ("qdq", _larger(GUIDED, "Conv"), "guided gradient"),
    "saturation ignored": ("qdq", _without_saturation, "gradient"),
    "no surrogate": ("qdq", _no_surrogate, "gradient"),
    "a swallowed ReLU unmasked": ("qdq", _passes_everything(f"{GRADIENT}aq"), "gradient"),
    "a swallowed ReLU unmasked, guided": ("qdq", _unrectified, "guided masks"),
    "a fused ReLU unmasked": ("fused", _passes_everything(GRADIENT), "gradient"),
    "half: a convolution times 1.05": ("half", _larger(GRADIENT, "Conv"), "gradient"),
    "half: a mask removed": ("half", _passes_everything(GRADIENT), "gradient"),
    "int8: a convolution times 1.05": ("signed", _larger(GRADIENT, "Conv"), "gradient"),
    "int8: a guided convolution times 1.05": ("signed", _larger(GUIDED, "Conv"), "guided gradient"),
    "int8: quantised again, rounded down": ("signed", _rounded_down, "plain nodes"),
    "int8: quantised again, of another input": ("signed", _of_half_the_input, "plain nodes"),
    "QLinearConv times 1.05": ("qoperator", _larger(GRADIENT, "Conv"), "gradient"),
    "ConvInteger times 1.05": ("dynamic", _larger(GRADIENT, "Conv"), "gradient"),
    "surrogates that are not told": ("qdq", _no_surrogates_told, "manifest"),
    "clothing that is not told": ("qoperator", _clothing_untold, "rectifiers"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_found(what):
    name, damage, check = DAMAGE[what]
    made = converted(name)
    damage(made)
    assert check in failures(made, name)


def test_plain_nodes_that_compute_something_else_are_found(monkeypatch):
    """A sum that is too large by more than two steps, in the nodes that a quantised convolution is seen as."""
    from graphgbp.plain import sums

    right = sums.convolution
    monkeypatch.setattr(sums, "convolution", lambda g, *args: g.add(right(g, *args), g.constant(np.float32(400))))
    made = graphgbp.convert(qoperator(), "saliency")
    assert "plain nodes" in failures(made, "qoperator")
