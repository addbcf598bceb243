"""ONNX Runtime's own normalizations against torch."""

import pytest
import torch
from torch.nn import functional

import graphgbp
from tests.plain.harness import check_form, fused_op
from tests.rules.harness import normal


def rms_norm(x, scale, epsilon, axes=1):
    return functional.rms_norm(x, x.shape[-axes:], scale, epsilon)


@pytest.mark.parametrize("axis", [-1, 1])
def test_layer_normalization_before_onnx_had_it(axis):
    """ONNX Runtime writes the operator into ONNX's domain whatever the opset."""
    sizes = (4, 5)[-1 if axis == -1 else 0 :]
    inputs = [normal(2, 4, 5), normal(*sizes, seed=1), normal(*sizes, seed=2)]
    reference = lambda x, scale, bias: functional.layer_norm(x, sizes, scale, bias, 1e-3)  # noqa: E731
    check_form("LayerNormalization", inputs, reference, wrt=(0, 1, 2), domain="", opset=16, axis=axis, epsilon=1e-3)


@pytest.mark.parametrize("opset", [16, 18, 23])
def test_simplified_layer_normalization(opset):
    reference = lambda x, scale: rms_norm(x, scale, 1e-3)  # noqa: E731
    inputs = [normal(2, 4, 5), normal(5, seed=1)]
    check_form(
        "SimplifiedLayerNormalization", inputs, reference, wrt=(0, 1), domain="", opset=opset, axis=-1, epsilon=1e-3
    )


@pytest.mark.parametrize("opset", [16, 18])
@pytest.mark.parametrize("skip", [(2, 3, 8), (1, 3, 8), (3, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_skip_layer_normalization(skip, bias, opset):
    def reference(x, skip, scale, shift, bias=None):
        total = x + skip if bias is None else x + skip + bias
        return functional.layer_norm(total, (8,), scale, shift, 1e-5)

    inputs = [normal(2, 3, 8), normal(*skip, seed=1), *(normal(8, seed=2 + index) for index in range(2 + bias))]
    check_form("SkipLayerNormalization", inputs, reference, wrt=range(len(inputs)), opset=opset, epsilon=1e-5)


def with_sum(op):
    """The models of a normalization that gives out its sum as its fourth output."""
    inputs = [normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)]
    made = fused_op(op, inputs, constants=[2], outputs=4, epsilon=1e-5)
    made.graph.node[0].output[1:] = ["", "", "y1"]
    del made.graph.output[2:]
    return made, inputs


@pytest.mark.parametrize("op", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_the_sum_is_given_out(op):
    from tests.rules.harness import check_model

    def reference(x, skip, scale):
        total = x + skip
        layer = op == "SkipLayerNormalization"
        y = functional.layer_norm(total, (8,), scale, None, 1e-5) if layer else rms_norm(total, scale, 1e-5)
        return y, total

    made, inputs = with_sum(op)
    check_model(made, inputs, reference, wrt=(0, 1), tolerance=1e-5)


def test_skip_simplified_layer_normalization():
    inputs = [normal(2, 3, 8), *(normal(*shape, seed=1 + i) for i, shape in enumerate([(2, 3, 8), (8,), (8,)]))]
    reference = lambda x, skip, scale, bias: rms_norm(x + skip + bias, scale, 1e-5)  # noqa: E731
    check_form("SkipSimplifiedLayerNormalization", inputs, reference, wrt=(0, 1, 2, 3), epsilon=1e-5)


def test_a_statistic_that_is_read_is_refused():
    inputs = [normal(2, 3, 8), normal(2, 3, 8, seed=1), normal(8, seed=2)]
    made = fused_op("SkipLayerNormalization", inputs, constants=[2], outputs=2)
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"output 1 \('y1'\) is read"):
        graphgbp.vjp(made)


def group_norm(x, scale, shift, last, silu):
    first = x.permute(0, 3, 1, 2) if last else x
    y = functional.group_norm(first, 2, scale, shift, 1e-4)
    y = functional.silu(y) if silu else y
    return y.permute(0, 2, 3, 1) if last else y


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("silu", [True, False])
def test_group_norm(last, silu):
    x = normal(2, 5, 6, 4) if last else normal(2, 4, 5, 6)
    check_form(
        "GroupNorm",
        [x, normal(4, seed=1), normal(4, seed=2)],
        lambda *inputs: group_norm(*inputs, last, silu),
        wrt=(0, 1, 2),
        kernel=False,
        groups=2,
        epsilon=1e-4,
        activation=int(silu),
        channels_last=int(last),
    )


@pytest.mark.parametrize("skip", [(2, 5, 6, 4), (2, 1, 1, 4), (2, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_skip_group_norm(skip, bias):
    def reference(x, scale, shift, skip, bias=None):
        total = x + (skip[:, None, None] if skip.dim() == 2 else skip) + (0 if bias is None else bias)
        return group_norm(total, scale, shift, True, True), total

    inputs = [normal(2, 5, 6, 4), normal(4, seed=1), normal(4, seed=2), normal(*skip, seed=3)]
    inputs += [normal(4, seed=4)] if bias else []
    options = {"groups": 2, "epsilon": 1e-4, "activation": 1, "outputs": 2}
    check_form("SkipGroupNorm", inputs, reference, wrt=range(len(inputs)), kernel=False, **options)


def test_torch_has_the_same_root_mean_square():
    x = torch.from_numpy(normal(3, 5))
    torch.testing.assert_close(rms_norm(x, None, 1e-3), x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt())
