"""If, seen through where its condition is known and refused where it is not; Loop and Scan, refused."""

import numpy as np
import onnx
import pytest
import torch

import graphgbp
from graphgbp.contract import RECOMPUTED
from tests.build import drawn, model
from tests.rules.harness import run

BRANCH = """
c = If(k) <
  then_branch = then () => (t) { n = Neg (a)  t = Mul (n, w) },
  else_branch = otherwise () => (e) { s = Sigmoid (a)  e = Mul (s, s) }
>"""


@pytest.mark.parametrize("condition", [True, False])
def test_the_taken_branch_of_a_known_condition_is_differentiated(condition):
    """Its inner tensors are computed again: the main graph cannot read them."""
    nodes = ["a = Exp(x)", BRANCH, "y = Relu(c)"]
    made = model(nodes, {"x": (2, 3)}, ["y"], {"k": np.array(condition), "w": drawn(3)})
    x, dy = drawn(2, 3, seed=1), drawn(2, 3, seed=2)
    got = run(graphgbp.vjp(made), {"x": x, "y_grad": dy})["x_grad"]
    leaf = torch.from_numpy(x).requires_grad_()
    a = leaf.exp()
    torch.relu(-a * torch.from_numpy(drawn(3)) if condition else a.sigmoid() ** 2).backward(torch.from_numpy(dy))
    np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_a_layer_can_be_named_by_its_if():
    """What the If gives out is read where it is, not computed again."""
    nodes = [
        "a = Conv(x, w)",
        "c = If(k) <then_branch = t () => (r) { b = Conv (a, v)  r = Relu (b) }, "
        "else_branch = o () => (e) { e = Abs (a) }>",
        "y = GlobalAveragePool(c)",
    ]
    weights = {"k": np.array(True), "w": drawn(4, 3, 3, 3), "v": drawn(5, 4, 3, 3, seed=1)}
    made = model(nodes, {"x": (2, 3, 8, 8)}, ["y"], weights)
    made.graph.node[1].name = "chosen"
    plain = model(["a = Conv(x, w)", "b = Conv(a, v)", "c = Relu(b)", nodes[-1]], {"x": (2, 3, 8, 8)}, ["y"], weights)
    feeds = {"x": drawn(2, 3, 8, 8, seed=2), "target": np.array([1])}
    explained = graphgbp.convert(made, ["gradcam", "saliency"], target_layer="chosen")
    assert not [node for node in explained.graph.node if node.name.startswith(RECOMPUTED)]
    expected = run(graphgbp.convert(plain, ["gradcam", "saliency"], target_layer="c"), feeds)
    got = run(explained, feeds)
    for name in ("saliency", "gradcam", "gradcam_features", "gradcam_gradients"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
    inside = run(graphgbp.convert(made, ["gradcam"], target_layer="chosen/b"), feeds)
    np.testing.assert_allclose(np.maximum(inside["gradcam_features"], 0), got["gradcam_features"], rtol=1e-5, atol=1e-6)


def test_a_branch_gives_out_what_takes_an_identity():
    """A constant, one of several tensors that a node makes; the other is read directly."""
    branch = (
        "b, c, e = If(k) <then_branch = t () => (two, m, p) "
        "{ two = Constant <value_float = 2.0> ()  m = Exp (a)  p, r = Split<axis=1, num_outputs=2> (m) }, "
        "else_branch = o () => (n, l, q) { n = Abs (a)  l = Neg (a)  q = Neg (a) }>"
    )
    nodes = ["a = Sin(x)", branch, "s = Mul(b, c)", "z = Concat<axis=1>(s, e)", "y = Tanh(z)"]
    made = model(nodes, {"x": (2, 4)}, ["y"], {"k": np.array(True)})
    x, dy = drawn(2, 4, seed=1), drawn(2, 6, seed=2)
    got = run(graphgbp.vjp(made), {"x": x, "y_grad": dy})
    leaf = torch.from_numpy(x).requires_grad_()
    e = leaf.sin().exp()
    y = torch.cat([2 * e, e[:, :2]], 1).tanh()
    y.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(got["y"], y.detach().numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["x_grad"], leaf.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_a_known_branch_within_a_known_branch():
    inner = (
        "d = If(k) <then_branch = i () => (u) { v = Exp (a)  u = Neg (v) }, else_branch = j () => (l) { l = Abs (a) }>"
    )
    outer = (
        f"c = If(k) <then_branch = t () => (e) {{ {inner}  e = Sin (d) }}, else_branch = o () => (g) {{ g = Abs (a) }}>"
    )
    made = model(["a = Tanh(x)", outer, "y = Exp(c)"], {"x": (2, 3)}, ["y"], {"k": np.array(True)})
    made.graph.node[0].name = "v"  # also the name of a tensor inside
    x, dy = drawn(2, 3, seed=1), drawn(2, 3, seed=2)
    got = run(graphgbp.vjp(made), {"x": x, "y_grad": dy})
    leaf = torch.from_numpy(x).requires_grad_()
    y = (-leaf.tanh().exp()).sin().exp()
    y.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(got["y"], y.detach().numpy(), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got["x_grad"], leaf.grad.numpy(), rtol=1e-5, atol=1e-7)


def test_a_condition_that_a_caller_can_replace_is_not_known():
    made = model(["a = Exp(x)", BRANCH, "y = Relu(c)"], {"x": (2, 3)}, ["y"], {"k": np.array(True), "w": drawn(3)})
    made.graph.input.append(onnx.helper.make_tensor_value_info("k", onnx.TensorProto.BOOL, []))
    with pytest.raises(
        graphgbp.UnsupportedOperatorError, match=r"If .*'k' is an input with a default, which a caller can"
    ):
        graphgbp.vjp(made)


def test_a_branch_chosen_at_run_time_is_refused():
    nodes = ["a = Exp(x)", "m = ReduceSum<keepdims=0>(a)", "k = Greater(m, zero)", BRANCH, "y = Relu(c)"]
    made = model(nodes, {"x": (2, 3)}, ["y"], {"zero": np.float32(0), "w": drawn(3)})
    with pytest.raises(
        graphgbp.UnsupportedOperatorError, match=r"If .*'k' is known only at run time; make it a constant"
    ):
        graphgbp.vjp(made)
    problem = graphgbp.inspect(made).gaps[0]["reason"]
    assert "'k' is known only at run time" in problem


def test_a_branch_chosen_at_run_time_behind_the_score_is_left_alone():
    nodes = ["y = Exp(x)", "m = ReduceSum<keepdims=0>(y)", "k = Greater(m, zero)", BRANCH.replace("(a", "(y")]
    made = model(nodes, {"x": (2, 3)}, ["y", "c"], {"zero": np.float32(0), "w": drawn(3)})
    x = drawn(2, 3)
    got = run(graphgbp.vjp(made, outputs=["y"]), {"x": x, "y_grad": np.ones_like(x)})["x_grad"]
    np.testing.assert_allclose(got, np.exp(x), rtol=1e-5)


def test_a_condition_on_sizes_that_are_known():
    """As torch.jit.script writes squeeze: the channels are known, the batch is not."""
    choice = (
        "c = If(k) <then_branch = t () => (t) { t = Squeeze (a, one) }, else_branch = o () => (e) { e = Identity (a) }>"
    )
    nodes = ["a = Exp(x)", "s = Shape(a)", "n = Slice(s, one, two)", "q = Squeeze(n)", "k = Equal(q, first)", choice]
    weights = {"one": np.array([1]), "two": np.array([2]), "first": np.int64(1)}
    made = model([*nodes, "y = Sin(c)"], {"x": ("N", 1)}, ["y"], weights)
    x = drawn(2, 1)
    got = run(graphgbp.vjp(made), {"x": x, "y_grad": np.ones_like(x[:, 0])})["x_grad"]
    np.testing.assert_allclose(got, np.cos(np.exp(x)) * np.exp(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("repeated", ["Loop", "Scan"])
def test_a_body_that_is_repeated_is_refused(repeated):
    if repeated == "Loop":
        node = (
            "c = Loop(n, , a) <body = b (int64 i, bool k, float[2, 3] p) => (j, q) { j = Identity (k)  q = Sin (p) }>"
        )
    else:
        node = "c = Scan(a) <num_scan_inputs = 1, body = b (float[3] p) => (float[3] q) { q = Sin (p) }>"
    made = model(["a = Exp(x)", node, "y = Sin(c)"], {"x": (2, 3)}, ["y"], {"n": np.int64(3)})
    with pytest.raises(
        graphgbp.UnsupportedOperatorError, match=f"{repeated} .*how often its body runs .*loop unrolled"
    ):
        graphgbp.vjp(made)
