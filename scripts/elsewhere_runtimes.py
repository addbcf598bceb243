"""The runtimes of scripts/elsewhere_table.py: what each needs, how it is called, what it says when it refuses."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

SCRIPTS = Path(__file__).resolve().parent
NODE = SCRIPTS / "elsewhere"
TIMEOUT = 1800  # seconds; the ReferenceEvaluator takes minutes
PROGRAMS = {
    "cpp": "explain.cpp",
    "csharp": "Program.cs",
    "java": "Explain.java",
    "js": "explain.mjs",
    "html": "explain.html",
}
REASONS = (
    r"(?:Non-zero status code returned while )?running \w+ node\. Name:'[^']+'",
    r"The input tensor cannot be reshaped to the requested shape[^\n]*",
    r"\[CPU\] Reshape node with name '[^']+'",
    r"Port for tensor name \w+ was not found",
    r"Unexpected number of inputs[^\n]*",
    r"(?i:unsupported model ir version[^\n]*)",
    r"invalid input '[^']+'",
    r"ValueError: [^\n]*",
    r"\S*Error: [^\n]*",
)


@dataclass(frozen=True)
class Runtime:
    """`command(model, image, target)` runs it in a folder, where it leaves `<output>.bin`; None where `missing`."""

    name: str
    version: str
    where: str
    command: Callable[[str, str, list[str]], list[str]] | None = None
    missing: str = ""
    remark: str = ""


@dataclass
class Outcome:
    """The outputs by name, or what was said instead."""

    outputs: Mapping[str, np.ndarray] | None = None
    said: str = ""


class Work:
    """A folder with the programs of docs/running.md, the models and the images."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder = folder
        text = (root / "docs" / "running.md").read_text("utf-8")
        for language, name in PROGRAMS.items():
            (folder / name).write_text(blocks(text, language)[0], "utf-8")
        (folder / "openvino_program.py").write_text(blocks(text, "python")[-1], "utf-8")
        if (NODE / "node_modules").exists():
            (folder / "node_modules").symlink_to((NODE / "node_modules").resolve())

    def run(
        self, runtime: Runtime, image: str, model: str, target: int | None, like: Mapping[str, np.ndarray]
    ) -> Outcome:
        """One run; the outputs have the types and shapes of those in `like`."""
        if runtime.command is None:
            return Outcome(said=runtime.missing)
        asked = [] if target is None else [str(target)]
        with tempfile.TemporaryDirectory() as out:
            command = runtime.command(f"{model}.onnx", f"{image}.bin", asked)
            done = subprocess.run(command, cwd=out, capture_output=True, text=True, timeout=TIMEOUT)
            if done.returncode:
                return Outcome(said=reason(done.stderr))
            if lacking := [name for name in like if not (Path(out) / f"{name}.bin").exists()]:
                return Outcome(said=f"it gives no {', '.join(lacking)}")
            outputs = {
                name: np.fromfile(Path(out) / f"{name}.bin", value.dtype).reshape(value.shape)
                for name, value in like.items()
            }
        return Outcome(outputs)


def blocks(text: str, language: str) -> list[str]:
    """The pieces of code in a page."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def reason(stderr: str) -> str:
    """The words that say why, of all that a runtime prints."""
    found = next((match[0] for pattern in REASONS if (match := re.search(pattern, stderr))), "")
    return " ".join((found or stderr.strip().splitlines()[-1]).replace("|", "/").split())


def printed(*command: str) -> str:
    """A tool's first line on its own version."""
    done = subprocess.run(command, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[0]


def runtimes(work: Work, args: argparse.Namespace) -> Iterator[Runtime]:
    """All of them, those that are not at hand too."""
    for make in (_reference, _openvino, _node, _web, _threaded_web, _cpp, _java, _csharp, _unoptimised):
        runtime = make(work, args)
        if not args.only or any(word in runtime.name for word in args.only):
            yield runtime


def _python(name: str, package: str, program: Path, work: Work) -> Runtime:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return Runtime(name, "-", "-", missing=f"{package} is not installed")

    def command(model: str, image: str, target: list[str]) -> list[str]:
        return [sys.executable, str(program), str(work.folder / model), str(work.folder / image), *target]

    return Runtime(name, version, f"Python {platform.python_version()}", command)


def _reference(work: Work, args: argparse.Namespace) -> Runtime:
    return _python("onnx ReferenceEvaluator", "onnx", NODE / "reference.py", work)


def _unoptimised(work: Work, args: argparse.Namespace) -> Runtime:
    name = "ONNX Runtime, Python, optimiser off"
    return _python(name, "onnxruntime-gpu", NODE / "unoptimised.py", work)


def _openvino(work: Work, args: argparse.Namespace) -> Runtime:
    return _python("OpenVINO, CPU, float32", "openvino", work.folder / "openvino_program.py", work)


def _package(name: str) -> str | None:
    described = NODE / "node_modules" / name / "package.json"
    return json.loads(described.read_text("utf-8"))["version"] if described.exists() else None


def _node(work: Work, args: argparse.Namespace) -> Runtime:
    name, version = "onnxruntime-node", _package("onnxruntime-node")
    if version is None:
        return Runtime(name, "-", "-", missing="it is not installed")

    def command(model: str, image: str, target: list[str]) -> list[str]:
        return ["node", str(work.folder / "explain.mjs"), str(work.folder / model), str(work.folder / image), *target]

    return Runtime(name, version, f"Node.js {printed('node', '--version')}", command)


def _web(work: Work, args: argparse.Namespace, isolated: bool = False) -> Runtime:
    name = f"onnxruntime-web, WASM, {'threads' if isolated else 'one thread'}"
    version = _package("onnxruntime-web")
    if version is None or not Path(args.chromium).exists():
        return Runtime(name, "-", "-", missing="it, or Chromium, is not installed")

    def command(model: str, image: str, target: list[str]) -> list[str]:
        query = f"model={model}&image={image}" + (f"&class={target[0]}" if target else "")
        folder, ways = str(work.folder), ["isolated"] if isolated else []
        return ["node", str(NODE / "browser.mjs"), folder, query, args.chromium, *ways]

    found = re.search(r"Chromium [\d.]+", printed(args.chromium, "--version"))
    return Runtime(name, version, f"headless {found[0] if found else 'browser'}", command)


def _threaded_web(work: Work, args: argparse.Namespace) -> Runtime:
    return _web(work, args, isolated=True)


def _cpp(work: Work, args: argparse.Namespace) -> Runtime:
    name = "ONNX Runtime, C++"
    if args.onnxruntime is None or shutil.which("g++") is None:
        return Runtime(name, "-", "-", missing="no release of ONNX Runtime, or no g++")
    include, library = args.onnxruntime.resolve() / "include", args.onnxruntime.resolve() / "lib"
    build = ["g++", "-std=c++17", "-Wall", "-I", str(include), "explain.cpp", "-L", str(library), "-lonnxruntime"]
    subprocess.run([*build, f"-Wl,-rpath,{library}", "-o", "explain"], cwd=work.folder, check=True)
    api = re.search(r"define ORT_API_VERSION (\d+)", (include / "onnxruntime_c_api.h").read_text("utf-8"))

    def command(model: str, image: str, target: list[str]) -> list[str]:
        return [str(work.folder / "explain"), str(work.folder / model), str(work.folder / image), *target]

    return Runtime(name, f"1.{api[1]}" if api else "-", printed("g++", "--version"), command)


def _java(work: Work, args: argparse.Namespace) -> Runtime:
    name = "ONNX Runtime, Java"
    if args.java is None or shutil.which("javac") is None:
        return Runtime(name, "-", "-", missing="no jar, or no JDK")
    jar, remark, suffix = str(args.java.resolve()), "", ""
    subprocess.run(["javac", "-cp", jar, "Explain.java"], cwd=work.folder, check=True)
    with zipfile.ZipFile(jar) as archive:
        pom = archive.read("META-INF/maven/com.microsoft.onnxruntime/onnxruntime/pom.xml").decode()
    version = re.search(r"<version>([\d.]+)</version>", pom)
    number = version[1] if version else "-"
    if tuple(map(int, number.split(".")[:2])) < (1, 18):
        remark, suffix = "IR version 10 set to 9, all that this release takes", "-ir9"
        for path in [*work.folder.glob("*.onnx")]:
            model = onnx.load(path)
            model.ir_version = min(model.ir_version, 9)
            onnx.save(model, path.with_stem(path.stem + suffix))

    def command(model: str, image: str, target: list[str]) -> list[str]:
        own = work.folder / model.replace(".onnx", f"{suffix}.onnx")
        path = f"{jar}:{work.folder}"
        return ["java", "-cp", path, "Explain", str(own), str(work.folder / image), *target]

    return Runtime(name, number, printed("java", "--version"), command, remark=remark)


def _csharp(work: Work, args: argparse.Namespace) -> Runtime:
    return Runtime("ONNX Runtime, C#", "-", "-", missing="no .NET at hand")
