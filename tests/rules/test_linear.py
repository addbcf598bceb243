import numpy as np
import onnx
import pytest
import torch

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, single_op

BIASES = [None, (), (1,), (4,), (3, 1), (1, 4), (3, 4)]


def _gemm(alpha, beta, trans_a, trans_b):
    def reference(a, b, c=None):
        product = alpha * (a.T if trans_a else a) @ (b.T if trans_b else b)
        return product if c is None else product + beta * c

    return reference


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_gemm(trans_a, trans_b, bias, dynamic):
    a, b = normal(*((5, 3) if trans_a else (3, 5)), seed=1), normal(*((4, 5) if trans_b else (5, 4)), seed=2)
    inputs = [a, b] if bias is None else [a, b, np.asarray(normal(*bias, seed=3))]
    check_rule(
        "Gemm",
        inputs,
        _gemm(1.5, 0.5, trans_a, trans_b),
        wrt=range(len(inputs)),
        dynamic=dynamic,
        alpha=1.5,
        beta=0.5,
        transA=trans_a,
        transB=trans_b,
    )


@pytest.mark.parametrize("opset", [16, 21, 26])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fully_connected(dtype, opset):
    inputs = [normal(*shape, seed=index).astype(dtype) for index, shape in enumerate([(3, 5), (5, 4), (4,)])]
    check_rule("Gemm", inputs, _gemm(1, 1, 0, 0), opset=opset)


MATRICES = [
    ((3, 5), (5, 4)),
    ((5,), (5,)),
    ((5,), (5, 4)),
    ((3, 5), (5,)),
    ((5,), (2, 3, 5, 4)),
    ((2, 3, 4, 5), (5,)),
    ((2, 3, 5), (5, 4)),
    ((2, 6, 3, 5), (5, 4)),
    ((3, 5), (2, 5, 4)),
    ((2, 3, 5), (2, 5, 4)),
    ((2, 1, 3, 5), (6, 5, 4)),
    ((1, 3, 5), (2, 5, 4)),
    ((2, 3, 5), (1, 5, 4)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shapes", MATRICES)
def test_matmul(shapes, dynamic):
    inputs = [normal(*shape, seed=index) for index, shape in enumerate(shapes)]
    check_rule("MatMul", inputs, torch.matmul, wrt=(0, 1), dynamic=dynamic)


@pytest.mark.parametrize("opset", [16, 21, 26])
@pytest.mark.parametrize("wrt", [0, 1])
def test_matmul_with_a_constant_in_double(wrt, opset):
    inputs = [normal(2, 3, 5).astype(np.float64), normal(5, 4).astype(np.float64)]
    check_rule("MatMul", inputs, torch.matmul, wrt=(wrt,), opset=opset, dynamic=True, tolerance=1e-12)


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_plain_matrices_need_no_transpose(op):
    model = graphgbp.vjp(single_op(op, [normal(3, 5), normal(5, 4)], opset=18))
    assert [node.op_type for node in model.graph.node[1:]] == ["Gemm", "Gemm", "Identity", "Identity"]


def test_an_unknown_rank_is_refused():
    model = single_op("MatMul", [normal(3, 5), normal(5, 4)], opset=18, constants=[1])
    reshape = onnx.helper.make_node("Reshape", ["x0", "shape"], ["reshaped"])
    model.graph.node.insert(0, reshape)
    model.graph.node[1].input[0] = "reshaped"
    model.graph.input.append(onnx.helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, ["rank"]))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(UnsupportedOperatorError, match="'node': the rank of its input 'reshaped' cannot be inferred"):
        graphgbp.vjp(model, inputs=["x0"])
