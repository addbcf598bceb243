"""One measurement of docs/bench.md in a process of its own: its result is the last line printed, as JSON.

scripts/bench.py starts these; nothing is imported before it is needed, because the memory of a process counts.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import bench_contestants
import bench_networks
import numpy as np
from bench_contestants import METHODS, Captum, Place, Run

from graphgbp import contract
from graphgbp.errors import GraphgbpError

ROUNDS = 3
SPAN = 30.0
"""Seconds over which all contestants are measured at least, in more rounds: a machine is now faster, now slower."""
BLOCKS = ((0.5, 10, 3), (2.0, 5, 1), (math.inf, 3, 1))
"""A run shorter than so many seconds: how many in a block, and how many of them are dropped."""
WARM = 5
"""How many conversions and loads are timed, after one that is not."""
MEMORY_RUNS = 3


# -- statistics -------------------------------------------------------------------------------------------------------


def block_of(seconds: float) -> tuple[int, int]:
    """Runs in a block, and the dropped ones among them, where one run takes so long."""
    return next((runs, dropped) for limit, runs, dropped in BLOCKS if seconds < limit)


def in_blocks(contestants: Mapping[str, Run], rounds: int = ROUNDS, span: float = SPAN) -> dict[str, list[float]]:
    """Milliseconds of each contestant's runs, in so many rounds and seconds at least. One runs a whole block before the
    next: threads that still spin from another's run would slow it.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    blocks = {name: block_of(_seconds(run)) for name, run in contestants.items()}
    start = time.perf_counter()
    done = 0
    while done < rounds or time.perf_counter() - start < span:
        for name, run in contestants.items():
            runs, dropped = blocks[name]
            times[name] += [1000 * _seconds(run) for _ in range(runs)][dropped:]
        done += 1
    return times


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and the least, and of how many."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high, "least": min(times), "runs": len(times)}


# -- what is measured -------------------------------------------------------------------------------------------------


def export(asked: argparse.Namespace) -> str | None:
    """Make the files that other tasks read, where they are missing; the module where Captum takes Grad-CAM."""
    import graphgbp

    name, cache = asked.network, asked.cache
    source = bench_networks.exported(name, cache)
    bench_networks.weights(name, cache)
    if "onnx_ad" in asked.contestants:
        bench_contestants.rewritten(name, cache)
    session = Place("cpu", asked.threads).open(graphgbp.convert(source, ["gradcam"]).SerializeToString())
    feeds = bench_contestants.feeds_of(session, bench_contestants.images(1))
    (features,) = session.run([contract.GRADCAM_FEATURES], feeds)
    return bench_contestants.captum_layer(bench_networks.loaded(name, cache), features)


def times(asked: argparse.Namespace) -> dict[str, Any]:
    """Every contestant at one number of threads and one batch."""
    place = Place(asked.device, asked.threads)
    x, sessions = bench_contestants.images(asked.batch), _sessions(asked.network, asked.cache, place, asked.contestants)
    runs = {name: bench_contestants.of_session(session, x, place) for name, session in sessions.items()}
    found: dict[str, Any] = {}
    if {"captum", "compiled"} & set(asked.contestants):
        captum = Captum(bench_networks.loaded(asked.network, asked.cache), asked.layer, place)
        runs["captum"] = captum.run(asked.batch)
        if "compiled" in asked.contestants:
            runs |= _compiled(captum, asked.batch, runs["captum"], found)
    measured = in_blocks({name: runs[name] for name in asked.contestants if name in runs}, asked.rounds, asked.span)
    return found | {name: spread(one) for name, one in measured.items()}


def _sessions(name: str, cache: Path, place: Place, wanted: Sequence[str]) -> dict[str, Any]:
    """Those contestants that are files run by ONNX Runtime."""
    import graphgbp

    source = bench_networks.exported(name, cache)
    sessions = {"forward": place.open(str(source))} if "forward" in wanted else {}
    for contestant, methods in METHODS.items():
        if contestant in wanted:
            sessions[contestant] = place.open(graphgbp.convert(source, methods).SerializeToString())
    if "onnx_ad" in wanted:
        sessions["onnx_ad"] = place.open(str(bench_contestants.rewritten(name, cache)))
    return sessions


def _compiled(captum: Captum, batch: int, eager: Run, found: dict[str, Any]) -> dict[str, Run]:
    """Captum by torch.compile, compiled before it is timed, with its distance from eager; or why it does not work."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    run = captum.run(batch, compiled=True)
    try:
        maps = [run() for _ in range(2)][-1]
    except Exception as error:  # whatever its many passes raise
        found["not_compiled"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return {}
    expected = eager()
    found["compiled_differs"] = float((maps - expected).norm() / expected.norm())
    return {"compiled": run}


def pixels(asked: argparse.Namespace) -> dict[str, Any]:
    """Forward and explained at one size."""
    import graphgbp

    place, source = Place(asked.device, asked.threads), bench_networks.exported(asked.network, asked.cache, asked.size)
    explained = graphgbp.convert(source, METHODS["explained"]).SerializeToString()
    sessions = {"forward": place.open(str(source)), "explained": place.open(explained)}
    x = bench_contestants.images(1, asked.size)
    runs = {name: bench_contestants.of_session(session, x, place) for name, session in sessions.items()}
    return {name: spread(one) for name, one in in_blocks(runs, asked.rounds, asked.span).items()}


def files(asked: argparse.Namespace) -> dict[str, Any]:
    """Conversion, loading, size and nodes; the converted file is left in the cache."""
    import onnx
    from profile_operators import profile

    import graphgbp

    place = Place(asked.device, asked.threads)
    source, converted = (_file(name, asked) for name in ("forward", "explained"))
    (conversion,) = _in_turn(lambda: graphgbp.convert(source, METHODS["explained"]))
    model = graphgbp.convert(source, METHODS["explained"])
    converted.write_bytes(model.SerializeToString())
    feeds = {"image": bench_contestants.images(1)}
    profiles = [
        profile(source.read_bytes(), feeds, asked.threads, runs=1),
        profile(model, feeds | {"target": np.array([bench_contestants.TARGET])}, asked.threads, runs=1),
    ]
    return {
        "convert": conversion,
        "load": _in_turn(*(partial(place.open, str(path)) for path in (source, converted))),
        "bytes": [path.stat().st_size for path in (source, converted)],
        "nodes": [len(onnx.load(source).graph.node), len(model.graph.node)],
        "nodes_run": [sum(count for _, count in one["operators"].values()) for one in profiles],
        "onnx_ad": bench_contestants.rewrite(asked.network, asked.cache)[1] if "onnx_ad" in asked.contestants else None,
    }


def _in_turn(*runs: Run) -> list[float]:
    """Seconds of each, the median of a few after the first."""
    times = [[_seconds(run) for run in runs] for _ in range(1 + WARM)]
    return [statistics.median(of) for of in zip(*times[1:], strict=True)]


def _file(contestant: str, asked: argparse.Namespace) -> Path:
    source = bench_networks.exported(asked.network, asked.cache)
    return source if contestant == "forward" else source.with_suffix(f".{contestant}.onnx")


def memory(asked: argparse.Namespace) -> list[float]:
    """The most memory, in MB, that this process has held: with its libraries imported, and after a few runs."""
    place, contestant = Place("cpu", asked.threads), asked.contestants[0]
    if contestant == "captum":
        import captum.attr  # noqa: F401
        import torchvision  # noqa: F401
    else:
        import onnxruntime  # noqa: F401
    imported = _peak_memory()
    if contestant == "captum":
        run = Captum(bench_networks.loaded(asked.network, asked.cache), asked.layer, place).run(1)
    else:
        session = place.open(str(_file(contestant, asked)))
        run = bench_contestants.of_session(session, bench_contestants.images(1), place)
    for _ in range(MEMORY_RUNS):
        run()
    return [imported, _peak_memory()]


def _peak_memory() -> float:
    """VmHWM where Linux tells it: ru_maxrss also counts the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


TASKS = {"export": export, "times": times, "pixels": pixels, "files": files, "memory": memory}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("network", choices=bench_networks.TITLES)
    parser.add_argument("--contestants", nargs="+", default=[])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, default=bench_networks.SIZE)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--span", type=float, default=SPAN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layer", help="the module where Captum takes Grad-CAM")
    parser.add_argument("--cache", type=Path, default=bench_networks.CACHE)
    asked = parser.parse_args()
    try:
        print(json.dumps(TASKS[asked.task](asked)))
    except GraphgbpError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
