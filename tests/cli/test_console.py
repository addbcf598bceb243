"""What every command shares: help at once, exit codes, colours, progress, pipes."""

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time

import click
import pytest
from click.testing import CliRunner

import graphgbp
from graphgbp import errors
from graphgbp.cli import console, main
from tests.cli.conftest import ROOT

HEAVY = {"onnx", "onnx_graphsurgeon", "onnxruntime", "numpy", "matplotlib", "PIL", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["explain", "--help"], []])
def test_help_imports_nothing_heavy(arguments):
    script = (
        "import sys\n"
        "from graphgbp.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        f"loaded = {HEAVY!r} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_version_and_commands(run):
    assert run("--version").stdout == f"graphgbp, version {graphgbp.__version__}\n"
    text = run("-h").stdout
    assert text.index("inspect ") < text.index("convert ") < text.index("explain ")
    assert run("convert", "-h").exit_code == 0


def test_a_command_line_that_does_not_parse_exits_with_2(run, folder):
    for arguments in (
        ["explode"],
        ["convert", "model.onnx"],
        ["explain", "model.onnx", "-o", "out"],
        ["inspect", "--x"],
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and result.stdout == "" and "Error" in result.stderr


def command(raises):
    @click.group(cls=console.Commands)
    def group():
        pass

    @group.command()
    def fail():
        raise raises

    return group


@pytest.mark.parametrize("kind", [errors.ImageError, errors.DeviceError, errors.OutputError, errors.GraphgbpError])
def test_each_error_has_its_exit_code(kind):
    result = CliRunner().invoke(command(kind("what, where, [bold]what next[/]")), ["fail"])
    assert result.exit_code == kind.exit_code
    assert result.stderr == "error: what, where, [bold]what next[/]\n" and result.stdout == ""


def test_an_interrupt_exits_with_130():
    result = CliRunner().invoke(command(KeyboardInterrupt()), ["fail"])
    assert result.exit_code == 130 and result.stderr == "error: interrupted\n"


def test_a_bug_shows_its_traceback():
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(command(ZeroDivisionError()), ["fail"], catch_exceptions=False)


def on_terminal(*arguments, **environment):
    """What a command prints on a terminal."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "graphgbp.cli", *arguments],
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(follower)
    printed = b""
    while True:
        try:
            chunk = os.read(leader, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        printed += chunk
    os.close(leader)
    return process.wait(), printed.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_colour_on_a_terminal_only_and_not_with_no_color(spawn, folder, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    for variable in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    code, coloured = on_terminal("inspect", "nothing.onnx")
    assert code == 3 and "\x1b[1;31merror: " in coloured
    assert "\x1b[1;31m" not in on_terminal("inspect", "nothing.onnx", NO_COLOR="1")[1]
    assert spawn("inspect", "nothing.onnx").stderr.startswith("error: ")
    assert "\x1b" in on_terminal("inspect", "model.onnx")[1]
    assert "\x1b" not in spawn("inspect", "model.onnx").stdout


def test_output_cut_short_is_no_error(folder):
    """As in `graphgbp inspect model.onnx --json | true`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "graphgbp.cli", "inspect", "model.onnx", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    process.wait()
    assert said == b""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_on_stderr(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    return stream


def test_progress_shows_after_its_patience(monkeypatch):
    terminal = terminal_on_stderr(monkeypatch)
    with console.progress("explaining", 3) as advance:
        advance(1)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(console, "PATIENCE", 0.05)
    with console.progress("explaining", 3) as advance:
        advance(2)
        time.sleep(0.4)
    assert "explaining" in terminal.getvalue() and "2/3" in terminal.getvalue()


def test_progress_says_how_many_in_a_second(monkeypatch):
    terminal = terminal_on_stderr(monkeypatch)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    with console.progress("explaining", 300, "images") as advance:
        for _ in range(4):
            time.sleep(0.1)
            advance(5)
    (*_, last) = re.findall(r"([\d.e+]+) images/s", terminal.getvalue())
    assert 5 < float(last) < 60, "about 50"


def test_progress_is_silent_where_piped(monkeypatch, capsys):
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    with console.progress("explaining", 3, "images") as advance:
        advance(1)
        time.sleep(0.1)
    assert capsys.readouterr() == ("", "")


def test_progress_ends_where_the_work_fails(monkeypatch):
    terminal = terminal_on_stderr(monkeypatch)
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    threads = threading.active_count()
    with pytest.raises(errors.ImageError), console.progress("explaining"):
        time.sleep(0.3)
        raise errors.ImageError("no")
    assert "explaining" in terminal.getvalue()
    deadline = time.monotonic() + 10
    while threading.active_count() > threads:
        assert time.monotonic() < deadline, "the bar goes on"
        time.sleep(0.02)


def test_a_letter_the_terminal_lacks_is_no_error(spawn, folder):
    (folder / "Katze-猫.onnx").write_text("no model")
    done = spawn("inspect", "Katze-猫.onnx", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 3 and "\\u732b" in done.stderr


def test_main_is_the_entry_point(spawn):
    assert spawn("--version").stdout.startswith("graphgbp, version ")
    assert main.name == "main"
