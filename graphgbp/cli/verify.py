"""graphgbp verify: a converted file held against its source."""

from typing import TYPE_CHECKING

import click

from graphgbp.cli import console

if TYPE_CHECKING:
    from graphgbp.verification import Verification


@click.command(no_args_is_help=True, short_help="Check a converted file against its source.")
@click.argument("out")
@click.option("--source", metavar="MODEL", help="The model it was converted from, where it does not lie beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify(out: str, source: str | None, as_json: bool) -> None:
    """Check the converted file OUT: forward unchanged, gradient right, masks and kernels present."""
    import graphgbp

    with console.progress(f"verifying {out}"):
        found = graphgbp.verify(out, source)
    if as_json:
        console.print_json(found.to_dict())
    else:
        _show(found)
    found.require()


def _show(found: "Verification") -> None:
    against = {None: "nothing: the source was not found", "recovered": "the source, recovered from the file itself"}
    console.print_facts([("file", str(found.file)), ("against", against.get(found.source, str(found.source)))])
    table = console.table("", "check", "found")
    styles = {"pass": "green", "fail": "bold red", "not checked": "yellow"}
    for check in found.checks:
        table.add_row(
            check.status, check.name, check.detail, style=None if check.status == "pass" else styles[check.status]
        )
    console.show(table)
    passed = len(found.checks) - len(found.failures) - len(found.unchecked)
    left = f", {len(found.unchecked)} not checked: it is not proven" if found.unchecked else ""
    console.show(f"{passed} of {len(found.checks)} checks passed{left}")
