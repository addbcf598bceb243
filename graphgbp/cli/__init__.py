"""The command line: one module per command, `console` for what they share.

What a command needs beyond click is imported when it runs, so that `graphgbp --help` answers at once.
"""

import click

from graphgbp._version import __version__
from graphgbp.cli.console import Commands
from graphgbp.cli.convert import convert
from graphgbp.cli.explain import explain
from graphgbp.cli.inspect import inspect
from graphgbp.cli.ops import ops
from graphgbp.cli.verify import verify

__all__ = ["main"]


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="graphgbp")
def main() -> None:
    """Show where an exported ONNX model looks: Guided Backpropagation and Grad-CAM, written into the model."""


main.add_command(inspect)
main.add_command(convert)
main.add_command(explain)
main.add_command(verify)
main.add_command(ops)
