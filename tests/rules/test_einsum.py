import numpy as np
import pytest
import torch

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, run, single_op

SIZES = dict(zip("bhijkD", (2, 3, 4, 5, 6, 7), strict=True))
EQUATIONS = [
    "ij,jk->ik",
    "ij,kj->ki",
    "bij,bjk->bik",
    "bhik,bhjk->bhij",
    "bhij,bhjk->bihk",
    "ij,j->i",
    "i,j->ij",
    "i,i->",
    "ij,ij->ij",
    "ij,jk,k->i",
    "i,j,k->kij",
    "ij->ji",
    "ij->j",
    "ij->",
    "i->i",
    "ij,k->i",
    "ij,jk",
    "jk,ij",
    "iD,Dj->ij",
    "iD,jD->ijD",
    "bi , ij -> bj",
    ",ij->j",
    ",->",
]
ELLIPSES = [
    ("...ij,...jk->...ik", ["bhij", "bhjk"], "bhij,bhjk->bhik"),
    ("...ij,jk->...ik", ["bhij", "jk"], "bhij,jk->bhik"),
    ("...ij,...j->...i", ["bhij", "bhj"], "bhij,bhj->bhi"),
    ("i...,i...->...", ["ibh", "ibh"], "ibh,ibh->bh"),
    ("...,...", ["bij", "bij"], "bij,bij->bij"),
    ("...,ij", ["bh", "ij"], "bh,ij->bhij"),
    ("...i->...", ["i"], "i->"),
    ("j...,ij", ["jb", "ij"], "jb,ij->bi"),
]


def _operands(terms, dtype="float32"):
    shapes = [[SIZES[label] for label in term.strip()] for term in terms]
    return [np.asarray(normal(*shape, seed=index + 1), dtype) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize("dynamic", [False, True, {0: [0], 1: [0]}])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum(equation, dynamic):
    operands = _operands(equation.split("->")[0].split(","))
    dynamic = (
        {key: axes for key, axes in dynamic.items() if key < len(operands)} if isinstance(dynamic, dict) else dynamic
    )
    reference = lambda *x: torch.einsum(equation, *x)  # noqa: E731
    check_rule("Einsum", operands, reference, wrt=range(len(operands)), dynamic=dynamic, equation=equation)
    for index in range(len(operands)):
        check_rule("Einsum", operands, reference, wrt=(index,), equation=equation)


@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_in_double(equation, opset):
    operands = _operands(equation.split("->")[0].split(","), "float64")
    reference = lambda *x: torch.einsum(equation, *x)  # noqa: E731
    options = {"wrt": range(len(operands)), "opset": opset, "tolerance": 1e-12}
    check_rule("Einsum", operands, reference, equation=equation, **options)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("equation", "terms", "spelled"), ELLIPSES)
def test_ellipsis(equation, terms, spelled, dynamic):
    operands = _operands(terms)
    reference = lambda *x: torch.einsum(spelled, *x)  # noqa: E731
    check_rule("Einsum", operands, reference, wrt=range(len(terms)), dynamic=dynamic, equation=equation)


@pytest.mark.parametrize("wide", [0, 1])
def test_an_open_size_that_turns_out_to_be_one(wide):
    """ij,ij->j with one operand repeated along i."""
    a, b = normal(3 if wide == 0 else 1, 4, seed=1), normal(3 if wide == 1 else 1, 4, seed=2)
    reference = lambda a, b: (a * b).sum(0)  # noqa: E731
    check_rule("Einsum", [a, b], reference, wrt=(0, 1), dynamic={0: [0], 1: [0]}, equation="ij,ij->j")


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("ii->i", [(3, 3)], "it takes the diagonal of an operand \\('ii'\\)"),
        ("ij,jkj->ik", [(2, 3), (3, 4, 3)], "it takes the diagonal of an operand \\('jkj'\\)"),
        ("ij,jk->ik", [(2, 1), (3, 4)], "it repeats an operand of size 1 along a label"),
    ],
)
def test_refusals(equation, shapes, reason):
    model = single_op("Einsum", [normal(*shape) for shape in shapes], opset=18, equation=equation)
    with pytest.raises(UnsupportedOperatorError, match=f"'node': {reason}"):
        graphgbp.vjp(model)


def test_equal_open_sizes_need_no_question_at_run_time():
    model = single_op("Einsum", _operands(["bij", "jk"]), opset=18, dynamic={0: [0]}, equation="bij,jk->bik")
    explained = graphgbp.vjp(model)
    assert [node.op_type for node in explained.graph.node] == ["Einsum"] * 3 + ["Identity"] * 2
    assert run(explained, {"x0": normal(1, 4, 5), "x1": normal(5, 6), "y0_grad": normal(1, 4, 6)})
