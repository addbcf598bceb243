import json

import graphgbp
from graphgbp import operators
from tests.cli.conftest import refused


def test_a_row_for_each_operator_and_a_count_for_each_set(run):
    result = run("ops")
    assert result.exit_code == 0 and result.stderr == ""
    rows = [line.split() for line in result.stdout.splitlines()]
    table = graphgbp.ops()
    for operator in table:
        name = f"{operator.domain}.{operator.name}" if operator.domain else operator.name
        (row,) = [row for row in rows if row[:1] == [name]]
        assert operator.set in row
    for kind, count in operators.counts(table).items():
        assert [kind, str(count)] in rows


def test_json_is_the_table(run):
    table = json.loads(json.dumps([operator.to_dict() for operator in graphgbp.ops()]))
    assert json.loads(run("ops", "--json").stdout) == table


def test_named_operators_alone(run):
    found = json.loads(run("ops", "Relu", "Conv", "--json").stdout)
    assert [operator["name"] for operator in found] == ["Conv", "Relu"]
    refused(run("ops", "Relu", "Sharpen"), 5, "Sharpen")


def test_markdown_is_the_document(run):
    assert run("ops", "--markdown").stdout == operators.to_markdown()
