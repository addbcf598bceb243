"""The operator table: no surprises in it, and a test for everything in it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest

from graphgbp import operators, registry, rules
from graphgbp.registry import Rule, nondifferentiable, vjp

TABLE = registry.table()
QUANTISERS = {"QuantizeLinear", "DequantizeLinear"}
RULE_TESTS = Path(__file__).parent / "rules"


def test_a_second_registration_raises():
    with pytest.raises(ValueError, match=r"ai\.onnx Relu-14 is registered twice"):
        vjp("Relu", versions=(14,))(lambda g, node, dy: [dy])
    with pytest.raises(ValueError, match=r"ai\.onnx Relu-14 is registered twice"):
        nondifferentiable("Relu", (14,))
    assert registry.table() == TABLE


def test_lookup_reads_the_version_through_the_opset():
    node = gs.Node("HardSwish")
    assert registry.since_version(node, {"": 21}) == 14
    assert registry.since_version(node, {"": 22}) == 22
    assert registry.lookup(node, {"": 21}) is TABLE["", "HardSwish", 14]


def test_what_nobody_reviewed_fails_closed():
    relu = gs.Node("Relu")
    assert registry.lookup(relu, {"": 13}) is None  # Relu-13: never reviewed
    assert registry.lookup(gs.Node("Sharpen"), {"": 18}) is None
    assert registry.lookup(gs.Node("Relu", domain="org.example"), {"": 18, "org.example": 1}) is None
    assert registry.lookup(gs.Node("Relu", domain="org.example"), {"": 18}) is None


@pytest.mark.parametrize("key", sorted(TABLE), ids=lambda key: f"{key[1]}-{key[2]}")
def test_registered_versions_are_those_that_supported_opsets_use(key):
    """Each exists; and none that an opset in between would use is missing from beside it."""
    domain, op, _ = key
    opsets = [opset for opset in operators.OPSETS[domain] if onnx.defs.has(op, opset, domain)]
    alive = {onnx.defs.get_schema(op, opset, domain).since_version for opset in opsets}
    assert {version for d, o, version in TABLE if (d, o) == (domain, op)} == alive


@pytest.mark.parametrize("key", sorted(TABLE), ids=lambda key: f"{key[1]}-{key[2]}")
def test_a_rule_fits_its_schema(key):
    entry, schema = TABLE[key], onnx.defs.get_schema(key[1], key[2], key[0])
    if isinstance(entry, Rule):
        assert max(entry.wrt or (0,)) < max(schema.max_input, len(schema.inputs))
        assert entry.outputs is None or entry.outputs <= schema.max_output


def test_every_rule_has_a_test_against_an_oracle():
    """Some `check_rule` names the operator, at once or through its test's parameters.

    A quantiser has no derivative that `check_rule` could find: tests/rules/test_quantisation.py holds it to torch's.
    """
    modules = [ast.parse(path.read_text("utf-8")) for path in RULE_TESTS.glob("test_*.py")]
    checked = {word for module in modules for word in _checked_words(module)}
    assert {op for (_, op, _), entry in TABLE.items() if isinstance(entry, Rule)} - QUANTISERS <= checked


def test_the_search_for_tests_sees_only_what_is_checked():
    module = """
@mark.parametrize("op", ["Relu"])
def test_directly(op):
    check_rule(op, [])
def _check(op):
    check_rule(op, [])
def test_by_a_helper():
    _check("Tanh")
PAIRS = [("Add", add)]
@mark.parametrize("pair", PAIRS)
def test_by_a_table(pair):
    _check(pair[0])
def test_of_something_else():
    refuse("Sharpen")
"""
    assert {"Relu", "Tanh", "Add"} <= set(_checked_words(ast.parse(module)))
    assert "Sharpen" not in set(_checked_words(ast.parse(module)))


def _checked_words(module: ast.Module) -> Iterator[str]:
    """Words in the arguments of check_rule, and in the parameters of tests that come to call it."""
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    tables = {
        target.id: node.value
        for node in module.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    callers = {"check_rule"}
    while found := {name for name, node in functions.items() if name not in callers and _calls(node, callers)}:
        callers |= found
    for name in callers & set(functions):
        parts: list[ast.AST] = [*functions[name].decorator_list, *_calls(functions[name], callers)]
        named = {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
        parts += [tables[variable] for variable in named & set(tables)]
        for node in (node for part in parts for node in ast.walk(part)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def _calls(function: ast.FunctionDef, names: set[str]) -> list[ast.Call]:
    """The calls inside a function to one of the named functions."""
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]


def test_every_family_is_imported():
    families = {path.stem for path in Path(rules.__file__).parent.glob("*.py") if "@vjp" in path.read_text("utf-8")}
    assert families <= set(rules.__all__)
