"""The converted file is plain ONNX: onnx's ReferenceEvaluator gives the maps that ONNX Runtime gives."""

import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

import graphgbp
from graphgbp import contract
from tests.build import drawn, model, small_cnn
from tests.maps import assert_maps_equal
from tests.rules.harness import run

ROOT = Path(__file__).parent.parent
RUNNING = (ROOT / "docs" / "running.md").read_text(encoding="utf-8")
MAPS = (*contract.METHODS, *contract.LAYER_OUTPUTS)


def capped_cnn() -> onnx.ModelProto:
    """ReLU6, max pooling, a strided convolution, a residual sum, and a Softmax behind the scores."""
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1)", "r1 = Clip(a, zero, six)",
        "p1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)",
        "b = Conv<pads=[1,1,1,1]>(p1, w2)", "s = Add(b, p1)", "r2 = Clip(s, zero, six)",
        "c = Conv<strides=[2,2], pads=[1,1,1,1]>(r2, w2)", "r3 = Relu(c)",
        "p2 = GlobalAveragePool(r3)", "f = Flatten(p2)", "z = MatMul(f, w3)", "y = Softmax<axis=1>(z)",
    ]  # fmt: skip
    weights = {"w1": drawn(6, 3, 3, 3, seed=1), "w2": drawn(6, 6, 3, 3, seed=2, scale=0.5), "w3": drawn(6, 5, seed=3)}
    bounds = {"zero": np.float32(0), "six": np.float32(6)}
    return model(nodes, {"x": ("N", 3, 12, 12)}, ["y"], weights | bounds)


def evaluate(explained: onnx.ModelProto, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    evaluator = ReferenceEvaluator(explained)
    with np.errstate(over="ignore"):  # a steep mask overflows to infinity before it is clipped to 1
        return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


@pytest.mark.parametrize("make", [small_cnn, capped_cnn])
def test_the_reference_evaluator_gives_the_same_maps(make):
    explained = graphgbp.convert(make(), contract.METHODS)
    images = drawn(2, 3, 12, 12, seed=7) if make is capped_cnn else drawn(2, 3, 8, 8, seed=7)
    targets = run(explained, {"x": images, "target": np.array([-1])})["y"].argsort(1)[:, -2]
    expected = run(explained, {"x": images, "target": targets})
    got = evaluate(explained, x=images, target=targets)
    assert_maps_equal(got, {name: expected[name] for name in MAPS}, "ReferenceEvaluator")
    np.testing.assert_array_equal(got["target_class"], targets)
    np.testing.assert_allclose(got["target_score"], expected["target_score"], rtol=1e-5)


def test_the_reference_evaluator_takes_the_predicted_class_and_refuses_one_out_of_range():
    required, optional = (graphgbp.convert(small_cnn(), ["saliency"], target=kind) for kind in ("required", "optional"))
    images = drawn(2, 3, 8, 8, seed=7)
    predicted = evaluate(optional, x=images)
    np.testing.assert_array_equal(predicted["target_class"], predicted["y"].argmax(1))
    assert evaluate(optional, x=images, target=np.array([3]))["target_class"].tolist() == [3, 3]
    for wrong in ([5], [-2], [0, 1, 2], []):
        with pytest.raises(ValueError, match="reshape"):
            evaluate(required, x=images, target=np.array(wrong, np.int64))


def test_the_guard_of_the_target_is_no_identity():
    """A Reshape from one axis to one axis is an identity wherever it succeeds: OpenVINO takes it out."""
    explained = graphgbp.convert(small_cnn(), ["saliency"])
    guard = next(node for node in explained.graph.node if node.name == contract.GUARD_NODE)
    explained.graph.output.append(helper.make_empty_tensor_value_info(guard.output[0]))
    assert evaluate(explained, x=drawn(2, 3, 8, 8), target=np.array([1, 2]))[guard.output[0]].shape == (2, 1)


def test_no_mask_is_written_with_a_coefficient_of_zero():
    """OpenVINO's CPU plugin takes HardSigmoid's alpha and beta of 0 for their defaults, 0.2 and 0.5."""
    explained = graphgbp.convert(capped_cnn(), contract.METHODS)
    masks = [node for node in explained.graph.node if node.op_type == "HardSigmoid"]
    assert masks
    assert all(attribute.f for node in masks for attribute in node.attribute)


def test_running_md_makes_the_files_that_its_programs_take(tmp_path, monkeypatch):
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(re.findall(r"```python\n(.*?)```", RUNNING, re.S)[0], "running.md", "exec"), {})
    image = np.fromfile("image.bin", np.float32).reshape(1, 3, 224, 224)
    got = run(onnx.load("explained.onnx"), {"image": image, "target": np.array([968])})
    assert got["target_class"] == [968] and got["gradcam"].max() > 0


@pytest.mark.parametrize("language", ["cpp", "csharp", "java", "js", "html", "python"])
def test_the_programs_of_running_md_know_the_files_names(language):
    """scripts/elsewhere_table.py runs them; here the names in them are held to those of the file."""
    program = re.findall(rf"```{language}\n(.*?)```", RUNNING, re.S)[-1]
    quoted = set(re.findall(r"""["'.\[](target\w*|graphgbp\.\w+|gradcam)\b""", program))
    assert contract.TARGET in quoted and contract.TARGET_CLASS in quoted
    assert quoted <= {contract.TARGET, contract.TARGET_CLASS, contract.GRADCAM, contract.MANIFEST_KEY}
