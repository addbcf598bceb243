import numpy as np
import pytest
import torch
from torch.nn import functional

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, run, run_by_reference, single_op


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3, None])
@pytest.mark.parametrize(("op", "reference"), [("Softmax", torch.softmax), ("LogSoftmax", torch.log_softmax)])
def test_softmax(op, reference, axis, dynamic):
    attributes = {} if axis is None else {"axis": axis}
    dim = -1 if axis is None else axis
    check_rule(op, [2 * normal(3, 4, 5)], lambda x: reference(x, dim), dynamic=dynamic, **attributes)


@pytest.mark.parametrize("opset", [16, 21, 26])
@pytest.mark.parametrize(("op", "reference"), [("Softmax", torch.softmax), ("LogSoftmax", torch.log_softmax)])
def test_softmax_in_double(op, reference, opset):
    check_rule(
        op, [2 * normal(3, 4).astype(np.float64)], lambda x: reference(x, 1), opset=opset, axis=1, tolerance=1e-12
    )


@pytest.mark.parametrize("opset", [16, 18, 22, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization(p, dtype, tolerance, dynamic, opset):
    for axis in (0, 1, -1):
        x = normal(3, 4, 5, seed=1).astype(dtype)
        reference = lambda x: functional.normalize(x, p=p, dim=axis)  # noqa: B023, E731
        options = {"dynamic": dynamic, "opset": opset, "tolerance": tolerance}
        check_rule("LpNormalization", [x], reference, p=p, axis=axis, **options)


def test_lp_normalization_by_default_is_along_the_last_axis_by_the_root_of_squares():
    check_rule("LpNormalization", [normal(3, 4, seed=1)], functional.normalize)


@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization_of_zeros(p):
    """ONNX makes them zeros, not 0/0; no gradient passes, and the other rows are none the worse."""
    x = np.array([[0, 0, 0], [3, 0, -4]], np.float32)
    reference = lambda x: torch.stack([0 * x[0], functional.normalize(x[1], p=p, dim=0)])  # noqa: E731
    check_rule("LpNormalization", [x], reference, p=p)


def _batch_norm(epsilon):
    def reference(x, scale, bias, mean, variance):
        shape = [-1] + [1] * (x.dim() - 2)
        scale, bias, mean, variance = (value.reshape(shape) for value in (scale, bias, mean, variance))
        return (x - mean) / torch.sqrt(variance + epsilon) * scale + bias

    return reference


def _channels(count, dtype="float32"):
    scale, bias, mean, variance = (normal(count, seed=index) for index in range(1, 5))
    return [value.astype(dtype) for value in (scale, bias, mean, np.abs(variance) + 0.2)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("wrt", [(0,), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 3, 5), (2, 4, 3, 2, 3)])
def test_batch_normalization(shape, wrt, dynamic):
    inputs = [normal(*shape), *_channels(4)]
    check_rule("BatchNormalization", inputs, _batch_norm(1e-2), wrt=wrt, dynamic=dynamic, epsilon=1e-2)


@pytest.mark.parametrize("opset", [16, 21, 26])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_batch_normalization_of_one_channel_by_default_epsilon(dtype, opset):
    inputs = [normal(2, 1, 3, 3).astype(dtype), *_channels(1, dtype)]
    check_rule("BatchNormalization", inputs, _batch_norm(1e-5), wrt=range(5), opset=opset)


def test_batch_normalization_in_training_is_refused():
    model = single_op("BatchNormalization", [normal(2, 4, 3), *_channels(4)], opset=18, outputs=3, training_mode=1)
    with pytest.raises(UnsupportedOperatorError, match="'node': it is in training mode"):
        graphgbp.vjp(model, inputs=["x0"], outputs=["y0"])


def _lrn(size, alpha, beta, bias):
    def reference(x):
        below, above = (size - 1) // 2, size - 1 - (size - 1) // 2
        squares = [(x[:, max(0, c - below) : c + above + 1] ** 2).sum(1) for c in range(x.shape[1])]
        return x / (bias + alpha / size * torch.stack(squares, 1)) ** beta

    return reference


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 9])
def test_lrn(size, dynamic):
    attributes = {"size": size, "alpha": 2.0, "beta": 0.6, "bias": 1.5}
    evaluate = run if size % 2 else run_by_reference  # ONNX Runtime has odd sizes alone
    images = 6  # as many as channels: the evaluator takes the one for the other
    check_rule("LRN", [normal(images, 6, 3, 4)], _lrn(**attributes), dynamic=dynamic, evaluate=evaluate, **attributes)


@pytest.mark.parametrize("opset", [16, 19, 22, 26])
def test_lrn_is_torchs_at_odd_sizes(opset):
    reference = lambda x: functional.local_response_norm(x, 5, 1e-4, 0.75, 1.0)  # noqa: E731
    check_rule("LRN", [30 * normal(2, 7, 3, 3)], reference, opset=opset, size=5)
