"""Pytest plugins to ask a test suite whether it notices the faults of tests/faults.py.

As a command line plugin it puts one fault into graphgbp before the tests run; scripts/mutate_rules.py tries them all.

    GRAPHGBP_FAULT="Conv-11:0 times 1.05" python -m pytest -p tests.mutation -x tests/rules/test_convolution.py
"""

import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from graphgbp.registry import Rule
from tests.faults import Fault, all_faults

FAULT = "GRAPHGBP_FAULT"


def pytest_configure() -> None:
    if name := os.environ.get(FAULT):
        all_faults()[name].inject()


@dataclass(eq=False)
class Coverage:
    """Notes which sites each test passes and how many seconds it takes, and which tests do not pass."""

    sites: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    _here: set[str] = field(default_factory=set)

    def watch(self, faults: Iterable[Fault]) -> None:
        for fault in {fault.site: fault for fault in faults}.values():
            replace(fault, wrap=self._watcher(fault.site)).inject()

    def _watcher(self, site: str) -> Callable[[Any], Any]:
        def note(original: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*arguments: Any, **options: Any) -> Any:
                self._here.add(site)
                return original(*arguments, **options)

            return noted

        return lambda original: (
            replace(original, vjp=note(original.vjp)) if isinstance(original, Rule) else note(original)
        )

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self._here.clear()
        result = yield
        self.sites[item.nodeid] = sorted(self._here)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration
        if report.failed:
            self.failures.append(report.nodeid)


@dataclass(eq=False)
class Chosen:
    """Runs the given tests alone, in the order given, and notes the one that fails, and how."""

    tests: list[str]
    killer: str | None = None
    message: str = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        order = {test: index for index, test in enumerate(self.tests)}
        items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.killer is None:
            self.killer = report.nodeid
            crash = getattr(report.longrepr, "reprcrash", None)
            self.message = crash.message if crash else str(report.longrepr)
