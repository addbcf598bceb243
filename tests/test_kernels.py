"""The kernel table: known facts about ONNX Runtime, and a run that agrees."""

import pytest
from onnx import helper

from graphgbp.kernels import PROVIDERS, missing_kernels
from tests.build import model

CPU, CUDA = PROVIDERS


@pytest.mark.parametrize(
    ("node", "dtype", "without"),
    [
        ("y = Conv(x, x)", 1, []),
        ("y = Conv(x, x)", 11, [CPU]),
        ("y = Tan(x)", 1, [CUDA]),
        ("y = Relu(x)", 1, []),
        ("y = Identity(x)", 1, []),
    ],
)
def test_known_kernels(node, dtype, without):
    made = model([node], {"x": [1, 1, 1, 1]}, ["y"], dtype=dtype)
    found = [provider for provider in PROVIDERS if missing_kernels(provider, made, made.graph.node)]
    assert found == without


def test_an_operator_nobody_knows_has_none():
    made = model(["y = Relu(x)"], {"x": [1]}, ["y"])
    assert missing_kernels(CPU, made, [helper.make_node("Sharpen", ["x"], ["y"])])
    assert not missing_kernels(CPU, made, [helper.make_node("Constant", [], ["y"])])
