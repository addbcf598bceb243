"""Write docs/bench.md: what an explanation costs beside a forward pass, Captum and onnx-ad, measured in one run.

    make bench                                          # everything, environment included
    python scripts/bench.py                             # what is missing in docs/bench.json
    python scripts/bench.py resnet50 --threads 2 --batches 1 --contestants forward explained --out /tmp/bench.json
    python scripts/bench.py --quick --out /tmp/bench.json
    python scripts/bench.py --device cuda               # docs/bench.cuda.md, where a GPU is
    python scripts/bench.py --render                    # page and plot again, from docs/bench.json

Each measurement is a process of its own and is kept as soon as it is there. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import bench_networks
import bench_page
from bench_contestants import CONTESTANTS, SINGLE
from bench_networks import TITLES

from graphgbp import runtime

Results = dict[str, Any]

DOCS = Path(__file__).resolve().parent.parent / "docs"
THREADS, BATCHES = (2, 1), (1, 8)
PIXELS = {"resnet50": (128, 192, 256, 384, 512), "mobilenet_v2": (128, 192, 256, 384, 512)}
"""Networks that take an image of any size, and the sides measured."""
PARTS = ("times", "files", "pixels")
PACKAGES = ("onnx", "onnxruntime-gpu", "torch", "torchvision", "captum", "onnx-ad")
MEASURED_MEMORY = ("forward", "explained", "captum")


def main() -> int:
    asked = _arguments()
    if asked.render:
        bench_page.write(_read(asked.out), asked.out)
        return 0
    obstacle = runtime.cuda_obstacle() if asked.device != "cpu" else None
    if obstacle:
        print(f"--device {asked.device} cannot be used: {obstacle}", file=sys.stderr)
        return 7
    bench = Bench(asked)
    bench.run()
    bench_page.write(_read(asked.out), asked.out)
    bench.say(f"wrote {asked.out} and {asked.out.with_suffix('.md')}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"of {', '.join(TITLES)} (default: all)")
    parser.add_argument("--threads", type=int, nargs="+", help=f"default: {THREADS}; one on CUDA")
    parser.add_argument("--batches", type=int, nargs="+", help=f"default: {BATCHES}")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--rounds", type=int, help="how many blocks of each contestant at least (default: 3)")
    parser.add_argument("--device", default="cpu", help="'cpu' (default), 'cuda' or 'cuda:<number>'")
    parser.add_argument("--quick", action="store_true", help="MobileNetV2, one round, one image, two threads")
    parser.add_argument("--again", action="store_true", help="also what is there already")
    parser.add_argument("--out", type=Path, help="the results (default: docs/bench.json); the page lies beside them")
    parser.add_argument("--cache", type=Path, default=bench_networks.CACHE, help="where the exported networks are kept")
    parser.add_argument("--render", action="store_true", help="measure nothing, write page and plot")
    asked = parser.parse_args()
    unknown = sorted(set(asked.networks) - set(TITLES))
    if unknown:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(TITLES)}")
    cuda = asked.device != "cpu"
    asked.networks = asked.networks or (["mobilenet_v2"] if asked.quick else list(TITLES))
    asked.batches = asked.batches or ([1] if asked.quick else list(BATCHES))
    asked.rounds = asked.rounds or (1 if asked.quick else 3)
    asked.threads = asked.threads or ([1] if cuda else [THREADS[0]] if asked.quick else list(THREADS))
    asked.out = asked.out or DOCS / ("bench.cuda.json" if cuda else "bench.json")
    return asked


@dataclass(frozen=True)
class Unit:
    """One measurement: where its result stands under its network, the task of bench_measure.py, its options."""

    network: str
    key: tuple[str, ...]
    task: str
    options: dict[str, Any]

    @property
    def words(self) -> str:
        return f"{TITLES[self.network]}, {' '.join(self.key)}"


def units(asked: argparse.Namespace) -> Iterator[Unit]:
    """All that is asked for, in order."""
    common = {"device": asked.device, "rounds": asked.rounds, "span": 0 if asked.quick else None}
    most = {"threads": max(asked.threads)}
    for name in asked.networks:
        for threads in asked.threads if "times" in asked.parts else ():
            for batch in asked.batches:
                left_out = SINGLE if batch > 1 else () if threads == max(asked.threads) else ("compiled",)
                contestants = [who for who in asked.contestants if who not in left_out]
                options = {"threads": threads, "batch": batch, "contestants": contestants}
                yield Unit(name, ("times", str(threads), str(batch)), "times", common | options)
        if "files" in asked.parts:
            yield Unit(name, ("files",), "files", common | most | {"contestants": asked.contestants})
            for who in MEASURED_MEMORY:
                yield Unit(name, ("memory", who), "memory", common | most | {"contestants": [who]})
        for size in PIXELS.get(name, ()) if "pixels" in asked.parts else ():
            yield Unit(name, ("pixels", str(size)), "pixels", common | most | {"size": size})


def _version(package: str) -> str | None:
    """None for one that is not installed: a contestant may have been left out."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Bench:
    """A run of the benchmark; `results` holds all that was measured, this time or before."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self._start = time.monotonic()
        self.results = _read(asked.out) if asked.out.exists() and not asked.again else {"networks": {}}
        self.results |= {
            "graphgbp": bench_networks.measured_version(),
            "machine": _machine(),
            "device": asked.device,
            "versions": {name: found for name in PACKAGES if (found := _version(name))},
        }

    def run(self) -> None:
        """Everything that has no result yet, each unit kept as soon as it is measured."""
        missing = [left for unit in units(self.asked) if (left := self._left(unit))]
        for number, unit in enumerate(missing, 1):
            of = self.results["networks"].setdefault(unit.network, {"seconds": {}})
            if "layer" not in of or not self._exported(unit.network):
                self.say(f"{TITLES[unit.network]}: exporting")
                of["layer"] = self._measure(unit.network, "export", contestants=self.asked.contestants)
            self.say(f"{number} of {len(missing)}: {unit.words}")
            start = time.monotonic()
            found = self._measure(unit.network, unit.task, layer=of["layer"], **unit.options)
            label = " ".join(unit.key)
            of["seconds"][label] = round(of["seconds"].get(label, 0) + time.monotonic() - start, 1)
            *path, last = unit.key
            for part in path:
                of = of.setdefault(part, {})
            of[last] = of.get(last, {}) | found if isinstance(found, dict) else found
            _write(self.results, self.asked.out)

    def _left(self, unit: Unit) -> Unit | None:
        """The part of a unit that has no result yet: of one that is timed, the contestants that were left out."""
        found = self.results["networks"].get(unit.network, {})
        for part in unit.key:
            found = found.get(part, {})
        if unit.task != "times" or not found:
            return None if found else unit
        left = [who for who in unit.options["contestants"] if who not in found and f"not_{who}" not in found]
        return replace(unit, options=unit.options | {"contestants": left}) if left else None

    def _exported(self, name: str) -> bool:
        return bench_networks.weights_path(name, self.asked.cache).exists()

    def _measure(self, network: str, task: str, **options: Any) -> Any:
        """What bench_measure.py gives in a process of its own. Exits where that fails: half a table helps nobody."""
        command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("bench_measure.py")), task, network]
        for name, value in ({"cache": self.asked.cache} | options).items():
            if value is not None:
                command += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed with exit code {done.returncode}")
        return json.loads(done.stdout.splitlines()[-1])

    def say(self, words: str) -> None:
        """A line of progress, with the time since the start."""
        minutes, seconds = divmod(round(time.monotonic() - self._start), 60)
        print(f"[{minutes:3d}:{seconds:02d}] {words}", flush=True)


def _machine() -> str:
    """The processor and its cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {platform.machine()}" + (f", {names[0]}" if names else "")


def _read(path: Path) -> Results:
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def _write(results: Results, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(results), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """Floats to four significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main())
