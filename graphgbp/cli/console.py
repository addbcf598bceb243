"""What the commands share: options, tables, progress, errors, JSON."""

import json
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from graphgbp.contract import METHODS
from graphgbp.errors import GraphgbpError, OutputError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.table import Table

INTERRUPTED = 130
PATIENCE = 2.0
"""Seconds of work before its progress is shown."""

_PIPED_WIDTH = 10_000  # no terminal, so nothing to wrap for


class Commands(click.Group):
    """A group whose commands end with one line on stderr, and the error's own exit code, where graphgbp refuses."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if error.filename is not None:
                raise  # another file than the terminal, pipe or file that the output goes to
            say("error", f"cannot write the output: {error.strerror or error}")
            sys.exit(OutputError.exit_code)

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except GraphgbpError as error:
            say("error", str(error))
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            say("error", "interrupted")
            ctx.exit(INTERRUPTED)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order they are used


def terminal(*, stderr: bool = False) -> "Console":
    """Rich's console: coloured on a terminal only, and never where NO_COLOR is set; unwrapped where piped."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _PIPED_WIDTH
    return console


_STYLES = {"error": "bold red", "warning": "bold yellow"}


def say(kind: str, message: str) -> None:
    """One message on stderr: `error: ...` or `warning: ...`."""
    from rich.text import Text

    terminal(stderr=True).print(Text.assemble((f"{kind}: ", _STYLES[kind]), message), soft_wrap=True)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def show(content: "RenderableType") -> None:
    """A text or a table on stdout; where piped, without spaces at the ends of lines."""
    console = terminal()
    if console.is_terminal:
        console.print(content)
        return
    with console.capture() as captured:
        console.print(content)
    click.echo("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()), nl=False)


def table(*headings: str, title: str | None = None) -> "Table":
    from rich import box
    from rich.table import Table

    found = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        found.add_column(heading, overflow="fold")
    return found


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values in two columns."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(name, value)
    show(grid)


@contextmanager
def progress(task: str, total: int | None = None, unit: str | None = None) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, shown on a terminal where the work takes longer than two seconds.

    Yields the function that advances it; without a total the bar only says that work goes on. With a `unit`, such as
    "images", it says how many are done in a second.
    """
    console = terminal(stderr=True)
    if not console.is_terminal:
        yield lambda steps: None
        return
    bar = _bar(console, total is not None, unit)
    number = bar.add_task(task, total=total)
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda steps: bar.advance(number, steps)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


def _bar(console: "Console", counted: bool, unit: str | None) -> "Progress":
    from rich import progress as bars
    from rich.text import Text

    class Speed(bars.ProgressColumn):
        def render(self, task: "bars.Task") -> Text:
            speed = task.finished_speed or task.speed
            return Text("" if speed is None else f"{speed:.3g} {unit}/s")

    count = (bars.MofNCompleteColumn(), bars.TimeRemainingColumn()) if counted else (bars.TimeElapsedColumn(),)
    columns = (bars.TextColumn("{task.description}"), bars.BarColumn(), *count, *([Speed()] if unit else []))
    return bars.Progress(*columns, console=console, transient=True)


def split_words(ctx: click.Context, parameter: click.Parameter, values: Sequence[str]) -> tuple[str, ...]:
    """An option given as a,b or twice, as the words in it."""
    return tuple(word.strip() for value in values for word in value.split(",") if word.strip())


def methods_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """The option --methods, as convert and explain take it."""
    return click.option(
        "--methods",
        multiple=True,
        callback=split_words,
        metavar="A,B",
        help=f"Any of {', '.join(METHODS)}.  [default: guided_gradcam,gradcam,guided_backprop]",
    )(command)


def spell_shape(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "unknown"
    return f"[{', '.join('?' if size is None or size == '' else str(size) for size in shape)}]"


def spell_bytes(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
