"""The options that say what is to be explained, as inspect and convert take them."""

from collections.abc import Callable, Mapping
from typing import Any

import click

SCORES = ("auto", "pre_softmax", "probability")
TARGETS = ("required", "optional", "weights", "cotangent")

_OPTIONS = (
    click.option(
        "--score", type=click.Choice(SCORES), default="auto", help="Explain the score before or after the softmax."
    ),
    click.option(
        "--target",
        type=click.Choice(TARGETS),
        default="required",
        help="What the file takes to be told what to explain.",
    ),
    click.option("--target-tensor", metavar="NAME", help="Explain neurons of this tensor instead of an output."),
    click.option("--class-axis", type=int, metavar="AXIS", help="The axis of the scores that holds the classes."),
    click.option(
        "--input-name",
        "inputs",
        multiple=True,
        metavar="NAME",
        help="An input to explain; may be repeated.  [default: all]",
    ),
    click.option("--output-name", "output", metavar="NAME", help="The output to explain."),
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the options say, by the library's names; repeated ones that were not used are left to it."""
    names = ("score", "target", "target_tensor", "class_axis", "inputs", "output")
    return {name: values[name] or None if name == "inputs" else values[name] for name in names}
