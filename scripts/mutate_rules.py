"""Does a test fail when a rule is wrong? Each fault of tests/faults.py is put in, alone, and its tests are run.

A fault in a rule must be noticed by the tests of the rule's own family, any other fault by any test but the slow ones:
noticed means that an assertion fails, not that something breaks.
First the tests run as they are, to see which passes which code. Prints what noticed each fault; exits with 1 where one
survived. `make mutation` runs it. Words on the command line choose among the faults: families of rules
(`convolution`), or beginnings of names (`Conv-11`).
"""

import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from time import perf_counter

import pytest
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.faults import Fault, all_faults  # noqa: E402
from tests.mutation import Chosen, Coverage  # noqa: E402

OPTIONS = ["-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow"]
_NOT_REFUSED = "Failed: DID NOT RAISE"  # pytest.raises, where nothing was raised
PRELOADED = ["torch", "captum.attr", "onnxruntime", "pytest", "graphgbp.conversion"]
WORKERS = os.cpu_count() or 1


@dataclass(frozen=True)
class Outcome:
    """What became of one fault: the test that noticed it, if any did, by an assertion or by breaking."""

    fault: str
    tests: int
    killer: str | None
    message: str
    seconds: float

    @property
    def noticed(self) -> bool:
        return self.killer is not None and self.message.startswith(("AssertionError", "assert ", _NOT_REFUSED))

    @property
    def verdict(self) -> str:
        if self.killer is None:
            return "[red]nothing[/red]"
        test = escape(self.killer.removeprefix("tests/"))
        return test if self.noticed else f"[red]broke[/red] {test}: {escape(self.message)}"


def main(words: Sequence[str]) -> int:
    os.chdir(ROOT)
    console = Console(width=None if sys.stdout.isatty() else 140)
    faults = [fault for fault in all_faults().values() if not words or _is_named(fault, words)]
    coverage = _measure(faults, console)
    if coverage.failures:
        console.print("These tests fail as they are, so they can prove nothing:", *coverage.failures, sep="\n  ")
        return 1
    outcomes = _try_all(faults, coverage, console)
    survivors = [outcome for outcome in outcomes if not outcome.noticed]
    console.print(_report(outcomes))
    console.print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} faults noticed")
    for outcome in survivors:
        console.print(f"{outcome.fault}: {outcome.tests} tests pass there; noticed by {outcome.verdict}")
    return 1 if survivors else 0


def _is_named(fault: Fault, words: Sequence[str]) -> bool:
    return any(word == fault.family or fault.name.startswith(word) for word in words)


def _executor() -> ProcessPoolExecutor:
    """A fresh process for each task, forked where the slow imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return ProcessPoolExecutor(WORKERS, mp_context=context, max_tasks_per_child=1)


def _measure(faults: Sequence[Fault], console: Console) -> Coverage:
    """All tests that might notice one of the faults, run as they are, a file at a time."""
    families = {fault.family for fault in faults}
    files = [path for path in _test_files() if None in families or path.stem.removeprefix("test_") in families]
    whole = Coverage()
    with _executor() as executor, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("as they are", total=len(files))
        for done in as_completed([executor.submit(_measure_file, path) for path in files]):
            part = done.result()
            whole.sites |= part.sites
            whole.seconds |= part.seconds
            whole.failures += part.failures
            progress.advance(bar)
    return whole


def _test_files() -> list[Path]:
    return [path.relative_to(ROOT) for path in sorted((ROOT / "tests").rglob("test_*.py"))]


def _measure_file(path: Path) -> Coverage:
    coverage = Coverage()
    coverage.watch(all_faults().values())
    code, said = _pytest([str(path)], coverage)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) and not coverage.failures:
        coverage.failures.append(f"{path}: {said}")
    return coverage


def _try_all(faults: Sequence[Fault], coverage: Coverage, console: Console) -> list[Outcome]:
    with _executor() as executor, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("with a fault", total=len(faults))
        tasks = [executor.submit(_try, fault.name, _tests_of(fault, coverage)) for fault in faults]
        for _ in as_completed(tasks):
            progress.advance(bar)
        return [task.result() for task in tasks]


def _tests_of(fault: Fault, coverage: Coverage) -> list[str]:
    """The tests that pass the fault's site, the quickest first."""
    home = None if fault.family is None else f"tests/rules/test_{fault.family}.py::"
    tests = [test for test, sites in coverage.sites.items() if fault.site in sites]
    return sorted((test for test in tests if home is None or test.startswith(home)), key=coverage.seconds.__getitem__)


def _try(name: str, tests: list[str]) -> Outcome:
    start, chosen = perf_counter(), Chosen(tests)
    if tests:
        all_faults()[name].inject()
        code, said = _pytest(["-x", *dict.fromkeys(test.partition("::")[0] for test in tests)], chosen)
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise RuntimeError(f"the tests did not run with the fault '{name}':\n{said}")
    return Outcome(name, len(tests), chosen.killer, chosen.message, perf_counter() - start)


def _pytest(arguments: Iterable[str], plugin: object) -> tuple[int, str]:
    """pytest's exit code, and what it said at last."""
    with StringIO() as text, redirect_stdout(text), redirect_stderr(text):
        code = pytest.main([*OPTIONS, *arguments], plugins=[plugin])
        return code, "\n".join(text.getvalue().splitlines()[-30:])


def _report(outcomes: Sequence[Outcome]) -> Table:
    table = Table("fault", "tests there", "noticed by", "seconds", box=None)
    for column in table.columns:
        column.no_wrap = True
    for outcome in outcomes:
        table.add_row(outcome.fault, str(outcome.tests), outcome.verdict, f"{outcome.seconds:.1f}")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
