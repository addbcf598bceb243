"""docs/folders.md: images per second of `graphgbp explain` on a folder beside the bare runtime's, and its peak memory.

    python scripts/throughput.py [--model MODEL] [--photos N] [--rounds N] [--print]

The command's rate leaves its start out (imports, conversion, loading): N photos less the start of N, by a run on a
single batch. The bare rate is `InferenceSession.run` in a loop on the same converted model, threads, batch, images.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import graphgbp

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "folders.md"
MODELS = ROOT / "models"
SMALL = MODELS / "paddle_mobile.onnx"
COUNTS = (100, 1000, 10000)
WRITES = ("arrays", "panels", "both")
MARK = "<!-- scripts/throughput.py -->"


@dataclass(frozen=True)
class Run:
    """One command, ended: its seconds and the peak of its resident memory in bytes."""

    seconds: float
    peak: int


def explain(model: Path, photos: Path, *options: str) -> Run:
    """`graphgbp explain` in a process of its own. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "graphgbp", "explain", str(model), str(photos), "-o", out, "--force"]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--device", "cpu", *options],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(process.args)} ended with {process.returncode}")  # type: ignore[arg-type]
    return Run(seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def copies(folder: Path, count: int) -> Path:
    """The bundled photos as JPEG files, again and again."""
    folder.mkdir()
    files = []
    for n, photo in enumerate(sorted(MODELS.glob("*.png"))):
        files.append(folder / f"{n:05d}.jpg")
        Image.open(photo).convert("RGB").save(files[-1], quality=90)
    for n in range(len(files), count):
        shutil.copyfile(files[n % len(files)], folder / f"{n:05d}.jpg")
    return folder


def bare_rate(
    model: Path, recipe: graphgbp.Recipe, photos: list[Path], threads: int, size: int, seconds: float = 4
) -> float:
    """Images per second of the converted model in a loop of `InferenceSession.run`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    converted = graphgbp.convert(model)
    session = onnxruntime.InferenceSession(converted.SerializeToString(), options, providers=["CPUExecutionProvider"])
    explainer = graphgbp.Explainer(converted, device="cpu")
    images, _ = recipe.batch([photos[n % len(photos)] for n in range(size)], explainer.input)
    feeds = {explainer.input["name"]: images, "target": np.full(size, -1)}
    session.run(None, feeds)
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        session.run(None, feeds)
        runs += 1
    return runs * size / (time.perf_counter() - start)


def decoding_rate(model: Path, recipe: graphgbp.Recipe, photos: list[Path]) -> float:
    """Images per second of reading and preparing alone, in one thread."""
    spec = graphgbp.recipe.ImageInput.of(graphgbp.Explainer(model, device="cpu").input)
    start = time.perf_counter()
    for photo in photos:
        recipe.prepare(photo, spec)
    return len(photos) / (time.perf_counter() - start)


# -- the two tables ---------------------------------------------------------------------------------------------------


def rates(model: Path, count: int, size: int, rounds: int) -> Iterator[str]:
    """Rows: threads, bare rate, and the command's, by what it writes."""
    recipe = graphgbp.Recipe.load(model.with_suffix(".recipe.json"))
    with tempfile.TemporaryDirectory() as home:
        few, many = copies(Path(home) / "few", size), copies(Path(home) / "many", count)
        photos = sorted(many.iterdir())
        yield f"Reading and preparing a photo takes {1e3 / decoding_rate(model, recipe, photos):.1f} ms of one core."
        yield ""
        yield "| threads | runtime alone, images/s | arrays | panels | both |"
        yield "|---|---|---|---|---|"
        for threads in (1, 2):
            options = ("--threads", str(threads), "--batch-size", str(size))
            found: dict[str, list[float]] = {what: [] for what in ("bare", *WRITES)}
            for _ in range(rounds):
                found["bare"].append(bare_rate(model, recipe, photos, threads, size))
                for what in WRITES:
                    whole, start = (explain(model, f, *options, "--write", what) for f in (many, few))
                    found[what].append((count - size) / (whole.seconds - start.seconds))
            rate = {what: statistics.median(values) for what, values in found.items()}
            cells = [f"{rate[what]:.1f} ({100 * rate[what] / rate['bare']:.0f} %)" for what in WRITES]
            yield f"| {threads} | {rate['bare']:.1f} | {' | '.join(cells)} |"


def peaks(counts: tuple[int, ...] = COUNTS) -> Iterator[str]:
    """Rows: images, peak memory of the whole process."""
    yield "| images | peak memory |"
    yield "|---|---|"
    with tempfile.TemporaryDirectory() as home:
        rng = np.random.default_rng(0)
        for count in counts:
            folder = Path(home) / str(count)
            folder.mkdir()
            for n in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{n:05d}.png")
            run = explain(SMALL, folder, "--preprocess", "unit", "--methods", "gradcam")
            yield f"| {count:,} | {run.peak / 1e6:.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "efficientnet_lite0.onnx", help="with its recipe beside")
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--print", action="store_true", help="leave docs/folders.md as it is")
    parser.add_argument("--only", choices=("rates", "peaks"))
    given = parser.parse_args()
    # Linux counts the memory of this process to the peak of those it starts, and measuring rates takes much
    tables = {"peaks": (1, peaks()), "rates": (0, rates(given.model, given.photos, given.batch_size, given.rounds))}
    for name, (place, rows) in tables.items():
        if given.only in (None, name):
            lines = []
            for row in rows:
                print(row, flush=True)
                lines.append(row)
            if not given.print:
                replace_table(place, lines)


def replace_table(place: int, lines: list[str]) -> None:
    """Between the page's marks: two around each table."""
    parts = PAGE.read_text(encoding="utf-8").split(MARK)
    parts[2 * place + 1] = "\n\n".join(["", "\n".join(lines), ""])
    PAGE.write_text(MARK.join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
