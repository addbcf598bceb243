"""Linear layers: Gemm and MatMul."""

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.refusals import unknown_rank


@vjp("Gemm", versions=(13,), wrt=(0, 1, 2), broadcast=True)
def gemm(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y = alpha A B + beta C, A and B transposed where asked; dA = alpha dy B^T, dB = alpha A^T dy, dC = beta dy"""
    a, b = node.inputs[:2]
    alpha, beta = node.attrs["alpha"], node.attrs["beta"]
    trans_a, trans_b = node.attrs["transA"], node.attrs["transB"]

    def product(left: gs.Tensor, right: gs.Tensor, trans_left: int, trans_right: int, like: gs.Tensor) -> gs.Tensor:
        made = g.op("Gemm", left, right, alpha=alpha, transA=trans_left, transB=trans_right)
        return g.with_shape(made, like)

    return [
        lambda: product(b, dy, trans_b, 1, a) if trans_a else product(dy, b, 0, 1 - trans_b, a),
        lambda: product(dy, a, 1, trans_a, b) if trans_b else product(a, dy, 1 - trans_a, 0, b),
        lambda: g.scale(dy, beta),
    ]


@vjp("MatMul", versions=(13,), wrt=(0, 1), broadcast=True, refuse=unknown_rank(0, 1))
def matmul(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y = A B; dA = dy B^T, dB = A^T dy. A vector stands for one row A or one column B that y lacks."""
    a, b = node.inputs
    if len(a.shape) == 1:
        dy = g.unsqueeze(dy, [-1] if len(b.shape) == 1 else [-2])
    if len(b.shape) == 1:
        dy = g.unsqueeze(dy, [-1])
    return [lambda: _to_left(g, dy, a, b), lambda: _to_right(g, dy, a, b)]


def _to_left(g: Emitter, dy: gs.Tensor, a: gs.Tensor, b: gs.Tensor) -> gs.Tensor:
    """dy B^T in A's matrices; for a vector A, [..., K]"""
    if len(b.shape) == 1:
        da = g.mul(dy, b)
    elif len(dy.shape) == len(b.shape) == 2:
        da = g.op("Gemm", dy, b, transB=1)
    else:
        da = g.matmul(dy, _transposed(g, b))
    return g.squeeze(da, [-2]) if len(a.shape) == 1 else _in_matrices(da, dy, a)


def _to_right(g: Emitter, dy: gs.Tensor, a: gs.Tensor, b: gs.Tensor) -> gs.Tensor:
    """A^T dy in B's matrices; for a vector B, [..., K]"""
    if len(a.shape) == 1:
        db = g.mul(g.unsqueeze(a, [1]), dy)
    elif len(b.shape) == 2 or len(a.shape) == 2 == len(dy.shape):
        db = g.op("Gemm", _rows(g, a), _rows(g, dy), transA=1)
        dy = db
    else:
        db = g.matmul(_transposed(g, a), dy)
    return g.squeeze(db, [-1]) if len(b.shape) == 1 else _in_matrices(db, dy, b)


def _rows(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    return x if len(x.shape) == 2 else g.reshape(x, [-1, g.size(x, -1)])


def _transposed(g: Emitter, x: gs.Tensor) -> gs.Tensor:
    rank = len(x.shape)
    return g.transpose(x, [*range(rank - 2), rank - 1, rank - 2])


def _in_matrices(dx: gs.Tensor, dy: gs.Tensor, x: gs.Tensor) -> gs.Tensor:
    """dx, known to be a stack of x's matrices, one for each of dy's."""
    shape: Sequence[int | str] = (*dy.shape[:-2], *x.shape[-2:])
    dx.shape = shape
    return dx
