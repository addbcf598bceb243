"""graphgbp ops: the operator table."""

from typing import TYPE_CHECKING

import click

from graphgbp.cli import console

if TYPE_CHECKING:
    from graphgbp.operators import Operator


@click.command(short_help="List every operator and how a gradient passes it.")
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--markdown", is_flag=True, help="Print docs/operators.md.")
def ops(names: tuple[str, ...], as_json: bool, markdown: bool) -> None:
    """List every operator of ONNX, and of ONNX Runtime's own (or those of NAMES), and how a gradient passes each."""
    from graphgbp import operators
    from graphgbp.errors import RequestError

    if markdown:
        click.echo(operators.to_markdown(), nl=False)
        return
    found = [operator for operator in operators.ops() if not names or operator.name in names]
    unknown = sorted(set(names) - {operator.name for operator in found})
    if unknown:
        raise RequestError(
            f"no operator of ONNX or ONNX Runtime is called {', '.join(unknown)}; names are spelled as in MatMul"
        )
    if as_json:
        console.print_json([operator.to_dict() for operator in found])
        return
    _show(found)
    console.print_facts([(kind, str(count)) for kind, count in operators.counts(found).items()])


def _show(found: "list[Operator]") -> None:
    table = console.table("operator", "versions", "set", "gradient to, or stands for")
    for operator in found:
        name = f"{operator.domain}.{operator.name}" if operator.domain else operator.name
        table.add_row(
            name,
            ", ".join(map(str, operator.versions)),
            operator.set,
            operator.stands_for or ", ".join(operator.gradients),
        )
    console.show(table)
