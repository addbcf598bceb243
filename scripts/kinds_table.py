"""docs/kinds.md: models of every kind, head, target and spelling that the tests build, each converted and verified.

    python scripts/kinds_table.py

The tests themselves hold the maps to torch; here every model they convert is also verified: its outputs against those
of the untouched model, its plain gradient against central differences of the untouched model in double precision, its
guided masks one by one.
"""

import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

import graphgbp

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kinds.md"
FILES = (
    "test_network_kinds", "test_exporters", "test_functions", "test_branches", "test_score", "test_segmentation",
    "test_several_inputs", "test_transformers", "test_detectors",
)  # fmt: skip
HEAD = """# Kinds of models

Models of every kind that the tests build: opsets, paddings, casts, sequences, volumes, features, exporters' files and
their rewritings, local functions, branches, heads, targets and transformers. {summary}

Made by `python scripts/kinds_table.py`, with {versions}.

Each test holds the maps to its own reference (torch in float64, Captum, own hooks). Each model it converts is besides
put to `graphgbp verify`, whose figures stand here: *forward*, the original outputs of the converted file against the
untouched model's; *gradient*, the relative error of the plain gradient against central differences of the untouched
model in double precision; *masks*, the rectifiers whose guided mask passes what it should and nothing else. *nodes*: of
the model and of the converted file; *s*: seconds to convert.

| test | forward | gradient | masks | nodes | s | verdict |
| --- | --- | --- | --- | --- | --- | --- |
"""


@dataclass
class Conversion:
    """The first conversion of a test: its source and what came of it."""

    source: onnx.ModelProto
    converted: onnx.ModelProto
    seconds: float


class Recorder:
    """A pytest plugin: one row for each test that passes and has converted a model."""

    def __init__(self) -> None:
        self.rows: list[str] = []
        self.wrong = 0
        self._seen: Conversion | None = None

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, None]:
        self._seen = None
        original = graphgbp.convert

        def convert(model: Any, *arguments: Any, **options: Any) -> onnx.ModelProto:
            start = time.perf_counter()
            made = original(model, *arguments, **options)
            if self._seen is None:
                source = model if isinstance(model, onnx.ModelProto) else onnx.load(model)
                self._seen = Conversion(_copy(source), _copy(made), time.perf_counter() - start)
            return made

        setattr(graphgbp, "convert", convert)  # noqa: B010  assigned for the time of the test
        outcome = yield
        setattr(graphgbp, "convert", original)  # noqa: B010
        name = f"{item.location[0].removeprefix('tests/test_').removesuffix('.py')}: {item.name.removeprefix('test_')}"
        if outcome.excinfo is not None:
            self.wrong += 1
            self.rows.append(f"| {_cell(name)} | | | | | | the test fails |")
        elif seen := self._take():
            self.rows.append(f"| {_cell(name)} | {' | '.join(self._verified(seen))} |")

    def _take(self) -> Conversion | None:
        return self._seen

    def _verified(self, seen: Conversion) -> list[str]:
        found = graphgbp.verify(seen.converted, seen.source)
        named = {check.name: check for check in found.checks}
        self.wrong += bool(found.failures)
        failures = ", ".join(f"{check.name}: {check.detail}" for check in found.failures)
        unchecked = ", ".join(check.name for check in found.unchecked)
        gradients = [named[key] for key in ("gradient", "layer gradient", "guided gradient") if key in named]
        error = next((check.figures["error"] for check in gradients if "error" in check.figures), None)
        masks = named["guided masks"].figures.get("masks", 0) if "guided masks" in named else "-"
        forward = named["forward"]
        return [
            "same bits" if forward.figures.get("bit_equal") else forward.status,
            "-" if error is None else f"{error:.0e}",
            str(masks),
            f"{len(seen.source.graph.node)} -> {len(seen.converted.graph.node)}",
            f"{seen.seconds:.2f}",
            _cell(f"WRONG: {failures}" if failures else f"right; not checked: {unchecked}" if unchecked else "right"),
        ]


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    import onnxruntime
    import torch

    recorder = Recorder()
    sys.path.insert(0, str(ROOT))
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *sys.argv[1:]]
    pytest.main([*arguments, *(str(ROOT / "tests" / f"{name}.py") for name in FILES)], plugins=[recorder])
    versions = f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}"
    right = len(recorder.rows) - recorder.wrong
    summary = f"{right} of {len(recorder.rows)} are right."
    PAGE.write_text(HEAD.format(versions=versions, summary=summary) + "\n".join(recorder.rows) + "\n", encoding="utf-8")
    print(summary, PAGE)
    return recorder.wrong


if __name__ == "__main__":
    sys.exit(main())
