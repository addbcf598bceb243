"""A folder to run commands in: `model.onnx`, its names and recipe, `photo.png`; and the runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from graphgbp.cli import main

ROOT = Path(__file__).parents[2]
CLASSES = ["tench", "crane", "cat", "Crane", "tabby cat"]


@pytest.fixture
def folder(tmp_path, monkeypatch, source):
    onnx.save(source, tmp_path / "model.onnx")
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    recipe = {"channels": "RGB", "resize": 8, "crop": 8, "scale": 1 / 255, "mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "model.recipe.json").write_text(json.dumps(recipe | {"class_names": "names.txt"}))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run():
    """Run a command in this process; anything but an exit is raised."""

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, catch_exceptions=False)

    return run


@pytest.fixture
def spawn():
    """Run a command in a process of its own."""

    def spawn(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "graphgbp.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                **environment,
            },
        )

    return spawn


def refused(result: Result, code: int, *words: str) -> None:
    """One line on stderr with the words in it, nothing on stdout, and the exit code."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr
