"""The README's code runs as printed."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_as_printed(tmp_path, monkeypatch, capsys):
    """Both pieces in one go: the second runs, without graphgbp, the file the first has saved."""
    first, second = re.findall(r"```python\n(.*?)```", README, re.S)
    shutil.copytree(ROOT / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(first, "README", "exec"), {})
    told = capsys.readouterr().out
    assert "967" in told and (tmp_path / "maps" / "index.json").is_file()
    assert "graphgbp" not in second
    assert len(second.strip().splitlines()) <= 9
    exec(compile(second, "README", "exec"), {})
    assert "967" in capsys.readouterr().out


def test_every_file_it_points_to_is_there():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert targets
    assert not [target for target in targets if not (ROOT / target).exists()]


@pytest.mark.parametrize("name", ["demo", "test", "check", "mutation"])
def test_the_makefile_has_what_the_documents_name(name):
    assert re.search(rf"^{name}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
