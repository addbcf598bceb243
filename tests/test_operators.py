"""The operator table: all of ONNX, each operator in one set, and the document that shows it."""

import re
from dataclasses import replace
from pathlib import Path

import onnx
import pytest

import graphgbp
from graphgbp import forms, operators, registry
from graphgbp.operators import PLAIN, RULE, SETS, SURROGATE, UNSUPPORTED, ZERO
from graphgbp.prepare import READ_AS

ROOT = Path(__file__).parent.parent
TABLE = graphgbp.ops()
SET = {(operator.domain, operator.name): operator.set for operator in TABLE}


def test_each_operator_is_in_exactly_one_set():
    assert len(SET) == len(TABLE)
    assert {kind for (domain, _), kind in SET.items() if domain in operators.OPSETS} <= set(SETS)
    assert {kind for (domain, _), kind in SET.items() if domain not in operators.OPSETS} == {PLAIN}


@pytest.mark.parametrize("domain", operators.OPSETS)
def test_every_operator_of_onnx_is_there(domain):
    names = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == domain}
    opsets = operators.OPSETS[domain]
    alive = {name for name in names for opset in (opsets[0], opsets[-1]) if _is_alive(name, opset, domain)}
    assert len(alive) > 10 and alive == {name for where, name in SET if where == domain}


def _is_alive(name: str, opset: int, domain: str) -> bool:
    return onnx.defs.has(name, opset, domain) and not onnx.defs.get_schema(name, opset, domain).deprecated


def test_the_table_is_the_registry():
    registered = registry.table()
    listed = {(o.domain, o.name, version): o.set for o in TABLE for version in o.versions}
    assert set(registered) <= set(listed)
    for key, found in listed.items():
        if found == PLAIN or key[1] in READ_AS or key in forms.table():
            continue
        entry = registered.get(key)
        if found == UNSUPPORTED:
            assert entry is None or isinstance(entry, registry.Unsupported)
        else:
            assert isinstance(entry, registry.Rule | registry.Nondifferentiable)
            assert (found == ZERO) == (entry is registry.NONDIFFERENTIABLE)


def test_what_is_seen_as_plain_nodes_is_a_surrogate_where_it_quantises():
    quantised = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear")
    assert {SET["", name] for name in quantised} == {SURROGATE}


def test_every_form_of_onnx_runtimes_own_operators_is_there_with_what_it_stands_for():
    own = {name for domain, name, _ in forms.table() if domain == forms.MICROSOFT}
    found = {operator.name: operator.stands_for for operator in TABLE if operator.set == PLAIN}
    assert own - set(found) == {"DynamicQuantizeLSTM", "GatherBlockQuantized"}
    assert set(found) - own == {"LayerNormalization", "SimplifiedLayerNormalization"}
    assert all(found.values()) and found["FusedConv"] == "activation(Conv(x, w, b) + z)"


def test_what_is_read_as_another_operator_is_in_its_set():
    assert READ_AS and all(SET["", name] == SET["", other] for name, other in READ_AS.items())


def test_examples():
    known = {"Conv": RULE, "Shape": ZERO, "Floor": ZERO, "LSTM": UNSUPPORTED}
    assert {name: SET["", name] for name in known} == known
    by_name = {operator.name: operator for operator in TABLE if not operator.domain}
    assert by_name["Conv"].gradients == ("X", "W", "B") and by_name["Conv"].versions == (11, 22)
    assert by_name["Concat"].gradients == ("inputs...",)
    assert by_name["Shape"].gradients == ()


def test_a_stand_in_is_a_surrogate():
    rule = registry.table()["", "Relu", 14]
    assert operators.set_of(rule) == RULE
    assert operators.set_of(replace(rule, surrogate=True)) == SURROGATE


def test_the_document_is_the_table():
    document = (ROOT / "docs" / "operators.md").read_text("utf-8")
    assert document == operators.to_markdown(), "write it again: graphgbp ops --markdown > docs/operators.md"


def test_the_readme_counts_the_rules():
    (count,) = re.findall(r"(\d+) have a rule", (ROOT / "README.md").read_text("utf-8"))
    assert int(count) == operators.counts(TABLE)[RULE]
