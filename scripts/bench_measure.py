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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import bench_contestants
import bench_networks
from bench_contestants import METHODS, SINGLE, Place, Run

ROUNDS = 3
BLOCKS = ((0.5, 10, 3), (2.0, 5, 1), (math.inf, 3, 1))
"""A run shorter than so many seconds: how many in a block, and how many of them are dropped."""
LOADS = CONVERSIONS = 3
MEMORY_RUNS = 3


# -- statistics -------------------------------------------------------------------------------------------------------


def block_of(seconds: float) -> tuple[int, int]:
    """Runs in a block, and the dropped ones among them, where one run takes so long."""
    return next((runs, dropped) for limit, runs, dropped in BLOCKS if seconds < limit)


def in_blocks(contestants: Mapping[str, Run], rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Milliseconds of each contestant's runs. One runs a whole block before the next: threads that still spin from
    another's run would slow it.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    blocks = {name: block_of(_seconds(run)) for name, run in contestants.items()}
    for _ in range(rounds):
        for name, run in contestants.items():
            runs, dropped = blocks[name]
            times[name] += [1000 * _seconds(run) for _ in range(runs)][dropped:]
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


def times(asked: argparse.Namespace) -> dict[str, Any]:
    """Every contestant at one number of threads, batch by batch."""
    found: dict[str, Any] = {"batches": {}, "notes": {}}
    place, wanted = Place(asked.device, asked.threads), asked.contestants
    sessions = _sessions(asked.network, asked.cache, place, wanted)
    captum = _captum(asked.network, asked.cache, place) if {"captum", "compiled"} & set(wanted) else None
    if captum is not None:
        found["layer"] = captum.layer
    for batch in asked.batches:
        runs: dict[str, Run] = {}
        for name in wanted:
            if name in SINGLE and batch != 1:
                continue
            if name in sessions:
                runs[name] = bench_contestants.of_session(sessions[name], bench_contestants.images(batch), place)
            elif captum is not None:
                try:
                    runs[name] = captum.runs(batch, compiled=name == "compiled")
                    runs[name]()
                    runs[name]()
                except Exception as error:  # torch.compile raises whatever its passes raise
                    if name != "compiled":
                        raise
                    del runs[name]
                    found["notes"][name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if {"captum", "compiled"} <= set(runs):
            eager, compiled = (runs[name]() for name in ("captum", "compiled"))
            found["difference"] = float((compiled - eager).norm() / eager.norm())
        measured = in_blocks(runs, asked.rounds)
        found["batches"][str(batch)] = {name: spread(one) for name, one in measured.items()}
    return found


def _sessions(name: str, cache: Path, place: Place, wanted: Sequence[str]) -> dict[str, Any]:
    """Those contestants that are files run by ONNX Runtime."""
    import graphgbp

    source = bench_networks.exported(name, cache)
    sessions = {"forward": place.open(str(source))} if "forward" in wanted else {}
    for contestant, methods in METHODS.items():
        if contestant in wanted:
            sessions[contestant] = place.open(graphgbp.convert(source, methods).SerializeToString())
    if "onnx_ad" in wanted:
        sessions["onnx_ad"] = place.open(str(bench_contestants.rewritten(name, cache)[0]))
    return sessions


def _captum(name: str, cache: Path, place: Place) -> bench_contestants.Captum:
    import graphgbp

    logging.getLogger("torch").setLevel(logging.ERROR)
    model = graphgbp.convert(bench_networks.exported(name, cache), ["gradcam"])
    session = Place("cpu", place.threads).open(model.SerializeToString())
    x = bench_contestants.images(1)
    (features,) = session.run(["gradcam_features"], bench_contestants.feeds_of(session, x))
    return bench_contestants.Captum.of(name, cache, place, features)


def pixels(asked: argparse.Namespace) -> dict[str, Any]:
    """Forward and explained at the asked size."""
    import graphgbp

    place, source = Place(asked.device, asked.threads), bench_networks.exported(asked.network, asked.cache, asked.size)
    explained = graphgbp.convert(source, METHODS["explained"]).SerializeToString()
    x = bench_contestants.images(1, asked.size)
    sessions = {"forward": place.open(str(source)), "explained": place.open(explained)}
    runs = {name: bench_contestants.of_session(session, x, place) for name, session in sessions.items()}
    return {name: spread(one) for name, one in in_blocks(runs, asked.rounds).items()}


def files(asked: argparse.Namespace) -> dict[str, Any]:
    """Conversion, loading, size and nodes."""
    import onnx
    from profile_operators import profile

    import graphgbp

    place, source = Place(asked.device, asked.threads), bench_networks.exported(asked.network, asked.cache)
    conversions = [_seconds(lambda: graphgbp.convert(source, METHODS["explained"])) for _ in range(1 + CONVERSIONS)]
    model = graphgbp.convert(source, METHODS["explained"])
    converted = explained(asked.network, asked.cache)
    loads = in_turns([lambda: place.open(str(source)), lambda: place.open(str(converted))])
    x = bench_contestants.images(1)
    run = [
        sum(
            count for _, count in profile(path.read_bytes(), feeds, asked.threads, runs=1)["operators"].values()
        )
        for path, feeds in ((source, {"image": x}), (converted, {"image": x, "target": _target()}))
    ]  # fmt: skip
    return {
        "convert": statistics.median(conversions[1:]),
        "load": loads,
        "bytes": [source.stat().st_size, converted.stat().st_size],
        "nodes": [len(onnx.load(source).graph.node), len(model.graph.node)],
        "nodes_run": run,
        **({"onnx_ad": bench_contestants.rewritten(asked.network, asked.cache)[1]} if "onnx_ad" in asked.contestants else {}),
    }
