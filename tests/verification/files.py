"""Converted files to verify."""

from functools import cache

import onnx

import graphgbp
from graphgbp import contract
from tests.build import drawn, model
from tests.verification.networks import ALL, network

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
