"""Layers fused with activation, bias, residual, scale or transposition, against torch."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

import graphgbp
from tests.plain.harness import check_form, fused_op
from tests.rules.harness import normal

LARGEST = float(np.finfo(np.float32).max)


def hard_sigmoid(x, alpha, beta):
    return (alpha * x + beta).clamp(0, 1)


CONV_ACTIVATIONS = {
    "Relu": ([], torch.relu),
    "Sigmoid": ([], torch.sigmoid),
    "Tanh": ([], torch.tanh),
    "HardSwish": ([], functional.hardswish),
    "LeakyRelu": ([0.2], partial(functional.leaky_relu, negative_slope=0.2)),
    "HardSigmoid": ([0.3, 0.4], partial(hard_sigmoid, alpha=0.3, beta=0.4)),
    "Clip": ([0.0, 1.5], lambda x: x.clamp(0, 1.5)),
    "Clip without a bound above": ([0.0, LARGEST], torch.relu),
    "Clip without a bound below": ([-LARGEST, 0.5], lambda x: x.clamp(max=0.5)),
}


@pytest.mark.parametrize("name", CONV_ACTIVATIONS)
def test_fused_conv(name):
    parameters, function = CONV_ACTIVATIONS[name]
    x, w, b = normal(2, 4, 7, 6), normal(6, 2, 3, 3, seed=1), normal(6, seed=2)
    conv = partial(functional.conv2d, stride=(2, 1), padding=(1, 0), groups=2)
    check_form(
        "FusedConv",
        [x, w, b],
        lambda x, w, b: function(conv(x, w, b)),
        wrt=(0, 1, 2),
        dynamic={0: range(4)} if name == "Relu" else {},
        activation=name.split()[0],
        **({"activation_params": parameters} if parameters else {}),
        strides=[2, 1],
        pads=[1, 0, 1, 0],
        group=2,
    )


def test_fused_conv_with_a_residual():
    x, w, z = normal(2, 3, 6, 6), normal(4, 3, 3, 3, seed=1), normal(2, 4, 4, 4, seed=2)
    reference = lambda x, w, _, z: torch.relu(functional.conv2d(x, w) + z)  # noqa: E731
    check_form("FusedConv", [x, w, None, z], reference, wrt=(0, 3), activation="Relu")


def test_an_unknown_activation_is_refused_by_name():
    made = fused_op("FusedConv", [normal(1, 2, 4, 4), normal(2, 2, 3, 3)], constants=[1], activation="Wavy")
    with pytest.raises(graphgbp.UnsupportedOperatorError, match=r"FusedConv \(com.microsoft.*'Wavy' is not known"):
        graphgbp.vjp(made)


def test_missing_parameters_are_refused():
    made = fused_op("FusedConv", [normal(1, 2, 4, 4), normal(2, 2, 3, 3)], constants=[1], activation="Clip")
    with pytest.raises(graphgbp.UnsupportedOperatorError, match="0 of its activation's parameters"):
        graphgbp.vjp(made)


def channels_last(x):
    return None if x is None else x.permute(0, 2, 3, 1)


def channels_first(x):
    return None if x is None else x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["Relu", "Sigmoid"])
def test_nhwc_fused_conv(name):
    function = CONV_ACTIVATIONS[name][1]

    def reference(x, w, b, z):
        return function(channels_last(functional.conv2d(channels_first(x), w, b, padding=1)) + z)

    inputs = [normal(2, 5, 6, 3), normal(4, 3, 3, 3, seed=1), normal(4, seed=2), normal(2, 5, 6, 4, seed=3)]
    check_form("NhwcFusedConv", inputs, reference, wrt=(0, 1, 2, 3), kernel=False, activation=name, pads=[1, 1, 1, 1])


def test_nhwc_conv():
    """Its kernel too has the channels last."""
    reference = lambda x, w, b: channels_last(functional.conv2d(channels_first(x), channels_first(w), b))  # noqa: E731
    inputs = [normal(2, 5, 6, 3), normal(4, 3, 2, 3, seed=1), normal(4, seed=2)]
    check_form("NhwcConv", inputs, reference, wrt=(0, 1, 2), kernel=False)


def test_conv_transpose_with_dynamic_pads():
    inputs = [normal(1, 3, 4, 5), normal(3, 2, 3, 3, seed=1), np.array([1, 0, 1, 0]), normal(2, seed=2)]
    reference = lambda x, w, _, b: functional.conv_transpose2d(x, w, b, stride=2, padding=(1, 0))  # noqa: E731
    check_form("ConvTransposeWithDynamicPads", inputs, reference, wrt=(0, 1, 3), strides=[2, 2])


def test_conv_transpose_whose_pads_are_not_known_is_refused():
    inputs = [normal(1, 3, 4, 5), normal(3, 2, 3, 3, seed=1), np.array([1, 0, 1, 0])]
    made = fused_op("ConvTransposeWithDynamicPads", inputs, constants=[1])
    with pytest.raises(graphgbp.UnsupportedOperatorError, match="its pads are known only at run time; export"):
        graphgbp.vjp(made, inputs=["x0"])


GEMM_ACTIVATIONS = {
    "Relu": ({}, torch.relu),
    "Sigmoid": ({}, torch.sigmoid),
    "Tanh": ({}, torch.tanh),
    "Softplus": ({}, functional.softplus),
    "Softsign": ({}, functional.softsign),
    "Elu": ({"alpha": 0.7}, partial(functional.elu, alpha=0.7)),
    "Celu": ({"alpha": 0.7}, partial(functional.celu, alpha=0.7)),
    "Selu": ({"alpha": 1.2, "gamma": 0.8}, lambda x: 0.8 * functional.elu(x, 1.2)),
    "LeakyRelu": ({"alpha": 0.2}, partial(functional.leaky_relu, negative_slope=0.2)),
    "HardSigmoid": ({"alpha": 0.3, "beta": 0.4}, partial(hard_sigmoid, alpha=0.3, beta=0.4)),
    "ThresholdedRelu": ({"alpha": 0.5}, lambda x: functional.threshold(x, 0.5, 0)),
    "ScaledTanh": ({"alpha": 1.7, "beta": 0.6}, lambda x: 1.7 * torch.tanh(0.6 * x)),
    "ParametricSoftplus": ({"alpha": 1.7, "beta": 0.6}, lambda x: 1.7 * functional.softplus(0.6 * x)),
}


@pytest.mark.parametrize("name", GEMM_ACTIVATIONS)
def test_fused_gemm(name):
    parameters, function = GEMM_ACTIVATIONS[name]
    given = {f"activation_{key}": value for key, value in parameters.items()}
    reference = lambda a, b, c: function(0.5 * a.T @ b.T + 2 * c)  # noqa: E731
    inputs = [normal(5, 3), normal(4, 5, seed=1), normal(4, seed=2)]
    options = {"alpha": 0.5, "beta": 2.0, "transA": 1, "transB": 1}
    check_form("FusedGemm", inputs, reference, wrt=(0, 1, 2), activation=name, **given, **options)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("trans", ["", "A", "B", "AB"])
def test_fused_matmul(shape, trans):
    a, b = normal(*shape), normal(*shape[:-2], 5, 4, seed=1)
    a, b = (np.ascontiguousarray(x.swapaxes(-1, -2)) if side in trans else x for x, side in ((a, "A"), (b, "B")))
    turned = lambda x, side: x.transpose(-1, -2) if side in trans else x  # noqa: E731
    reference = lambda a, b: 0.3 * turned(a, "A") @ turned(b, "B")  # noqa: E731
    for op in ("FusedMatMul", "TransposeMatMul"):
        check_form(op, [a, b], reference, wrt=(0, 1), alpha=0.3, **{f"trans{side}": 1 for side in trans})


@pytest.mark.parametrize("trans", ["", "AB"])
def test_fused_matmul_with_the_batch_behind(trans):
    """transBatch: the first axis is the rows' (or, transposed, the columns'), the batch behind it."""
    a, b = normal(3, 2, 4, 5), normal(5, 2, 4, 6, seed=1)
    if "A" in trans:
        a, b = normal(5, 2, 4, 3), normal(6, 2, 4, 5, seed=1)

    def turned(x, side):
        moved = x.permute(1, 2, 0, 3)
        return moved.transpose(-1, -2) if side in trans else moved

    reference = lambda a, b: turned(a, "A") @ turned(b, "B")  # noqa: E731
    flags = {f"trans{side}": 1 for side in trans}
    check_form("FusedMatMul", [a, b], reference, wrt=(0, 1), transBatchA=1, transBatchB=1, **flags)


def test_a_vector_is_not_transposed():
    check_form("FusedMatMul", [normal(5), normal(5, 4, seed=1)], lambda a, b: a @ b, wrt=(0, 1), transA=1)


def test_fused_matmul_activation():
    check_form(
        "FusedMatMulActivation",
        [normal(2, 3, 5), normal(2, 4, 5, seed=1)],
        lambda a, b: functional.leaky_relu(2 * a @ b.transpose(1, 2), 0.3),
        wrt=(0, 1),
        kernel=False,
        activation="LeakyRelu",
        activation_alpha=0.3,
        alpha=2.0,
        transB=1,
    )


def test_bias_add():
    inputs = [normal(2, 3, 4), normal(4, seed=1), normal(2, 3, 4, seed=2)]
    check_form("BiasAdd", inputs, lambda x, b, skip: x + b + skip, wrt=(0, 1, 2), kernel=False)


@pytest.mark.parametrize(("axis", "shape"), [(3, (2, 1, 1, 5)), (2, (4, 5)), (-1, (1, 1, 4, 5))])
def test_bias_softmax(axis, shape):
    def reference(x, bias):
        y = x + bias
        return y.flatten(axis % 4).softmax(-1).reshape(y.shape)

    check_form(
        "BiasSoftmax",
        [normal(2, 3, 4, 5), normal(*shape, seed=1)],
        reference,
        wrt=(0, 1),
        kernel=False,
        axis=axis,
        is_inner_broadcast=1,
    )


def test_bias_dropout():
    inputs = [normal(2, 3, 4), normal(4, seed=1), normal(2, 3, 4, seed=2)]
    check_form("BiasDropout", inputs, lambda x, b, z: x + b + z, wrt=(0, 1, 2), kernel=False)
    check_form("BiasDropout", inputs[:2], lambda x, b: x + b, wrt=(0, 1), kernel=False)


def test_dropout_in_training_is_refused():
    inputs = [normal(2, 4), normal(4), normal(2, 4), np.array(0.5, np.float32), np.array(True)]
    made = fused_op("BiasDropout", inputs, constants=[1, 2, 3, 4])
    with pytest.raises(graphgbp.UnsupportedOperatorError, match="training_mode"):
        graphgbp.vjp(made)
