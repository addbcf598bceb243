"""What a verification found: a status and a sentence with figures for each check."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphgbp.errors import VerificationError

PASS, FAIL, UNCHECKED = "pass", "fail", "not checked"


@dataclass(frozen=True)
class Check:
    """One question asked of a file; `detail` says what was found, `figures` the numbers behind it."""

    name: str
    status: str  # PASS, FAIL or UNCHECKED
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)


def passed(name: str, detail: str, **figures: Any) -> Check:
    return Check(name, PASS, detail, figures)


def failed(name: str, detail: str, **figures: Any) -> Check:
    return Check(name, FAIL, detail, figures)


def unchecked(name: str, detail: str, **figures: Any) -> Check:
    return Check(name, UNCHECKED, detail, figures)


@dataclass(frozen=True)
class Verification:
    """The checks of one file. `source` says what it was held against: a path, "recovered", or None for nothing."""

    file: str | None
    source: str | None
    kind: str
    checks: tuple[Check, ...]

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if check.status == FAIL]

    @property
    def unchecked(self) -> list[Check]:
        return [check for check in self.checks if check.status == UNCHECKED]

    @property
    def passed(self) -> bool:
        """Whether every check passed: none failed, and none was left out."""
        return all(check.status == PASS for check in self.checks)

    def require(self) -> None:
        """Raise VerificationError where a check failed."""
        if self.failures:
            names = ", ".join(check.name for check in self.failures)
            raise VerificationError(
                f"{self.file or 'the model'} does not pass: {names}; convert its source again, and if it fails then "
                "too, please report it with the model"
            )

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}
