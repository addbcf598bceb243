"""docs/profile.md: where the time goes, by kind of operator, as ONNX Runtime's own profiler tells it.

    python scripts/profile_operators.py                        # docs/profile.json and docs/profile.md
    python scripts/profile_operators.py vgg16 --print          # a table on the terminal, nothing written
    python scripts/profile_operators.py -o docs/profile.before.json    # a record to hold later ones against
    python scripts/profile_operators.py --render               # the page again, from its records

What runs is the graph after ONNX Runtime's optimiser: nodes fused, constants folded, tensors reordered into blocks of
channels and back (ReorderInput, ReorderOutput). PYTHONPATH decides which graphgbp is measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import bench_networks
import numpy as np
import onnx
import onnxruntime

import graphgbp

Profile = dict[str, Any]
"""`run`: ms of a whole run; `operators`: {kind: [ms of all its nodes in one run, how many they are]}."""

DOCS = Path(__file__).resolve().parent.parent / "docs"
NETWORKS = ("resnet50", "mobilenet_v2")
LIMIT = 2.0
"""An input gradient costs one more forward pass: no explanation is below two."""
RUNS, DROPPED = 20, 5
LEAST = 0.01
"""Kinds below this share of a forward pass, in every column, are summed up in one row."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"default: {' '.join(NETWORKS)}")
    parser.add_argument("-o", "--out", type=Path, default=DOCS / "profile.json", help="default: docs/profile.json")
    parser.add_argument("--before", type=Path, default=DOCS / "profile.before.json", help="the record to compare with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--method", default="guided_gradcam")
    parser.add_argument("--cache", type=Path, default=bench_networks.CACHE, help="where the exported networks are kept")
    parser.add_argument("--print", action="store_true", help="write nothing")
    parser.add_argument("--render", action="store_true", help="measure nothing, write the page from its records")
    asked = parser.parse_args()
    networks = asked.networks or list(NETWORKS)
    unknown = sorted(set(networks) - set(bench_networks.TITLES))
    if unknown:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(bench_networks.TITLES)}")
    page = asked.out.with_suffix(".md")
    if asked.render:
        page.write_text(_page(_read(asked.before), _read(asked.out)), encoding="utf-8")
        return 0
    record: dict[str, Any] = {
        "graphgbp": bench_networks.measured_version(),
        "onnxruntime": onnxruntime.__version__,
        "threads": asked.threads,
        "batch": asked.batch,
        "method": asked.method,
        "networks": {},
    }
    for name in networks:
        record["networks"][name] = measure(name, asked)
        print(f"{bench_networks.TITLES[name]}\n\n{_table(None, record['networks'][name])}\n", flush=True)
    if not asked.print:
        asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if asked.out.resolve() != asked.before.resolve() and asked.before.exists():
            page.write_text(_page(_read(asked.before), record), encoding="utf-8")
    return 0


# -- measuring --------------------------------------------------------------------------------------------------------


def measure(name: str, asked: argparse.Namespace) -> dict[str, Profile]:
    """The profiles of a network's source file and of its converted one."""
    path = bench_networks.exported(name, asked.cache)
    shape = (asked.batch, 3, bench_networks.SIZE, bench_networks.SIZE)
    images = {"image": np.random.default_rng(0).standard_normal(shape, np.float32)}
    converted = graphgbp.convert(path, [asked.method])
    return {
        "forward": profile(path.read_bytes(), images, asked.threads),
        "explained": profile(converted, images | {"target": np.array([1])}, asked.threads),
    }


def profile(model: bytes | onnx.ModelProto, feeds: Mapping[str, np.ndarray], threads: int, runs: int = RUNS) -> Profile:
    """What ONNX Runtime's CPU provider spends, the median of some runs node by node."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        for _ in range(runs):
            session.run(None, dict(feeds))
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return summary(events, min(DROPPED, runs - 1))


def summary(events: Sequence[Mapping[str, Any]], dropped: int) -> Profile:
    """By kind of operator, from the profiler's events; the first runs do not count."""
    kernels: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            kernels.setdefault((event["args"]["op_name"], event["name"]), []).append(event["dur"] / 1000)
    operators: dict[str, list[float]] = {}
    for (kind, _), times in kernels.items():
        ms, count = operators.get(kind, (0.0, 0))
        operators[kind] = [ms + median(times[dropped:]), count + 1]
    runs = [event["dur"] / 1000 for event in events if event["cat"] == "Session" and event["name"] == "model_run"]
    ordered = sorted(operators.items(), key=lambda item: -item[1][0])
    return {"run": round(median(runs[dropped:]), 3), "operators": {k: [round(v[0], 3), v[1]] for k, v in ordered}}


# -- the page ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _page(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    template = (Path(__file__).parent / "profile.md.in").read_text(encoding="utf-8")
    same = [name for name in after["networks"] if name in before["networks"]]
    return template.format(
        onnxruntime=after["onnxruntime"],
        threads=after["threads"],
        batch=after["batch"],
        before=before["graphgbp"],
        runs=RUNS - DROPPED,
        least=f"{LEAST:.0%}",
        networks="\n\n".join(
            f"## {bench_networks.TITLES[name]}\n\n{_words(before['networks'][name], after['networks'][name])}\n\n"
            f"{_table(before['networks'][name], after['networks'][name])}"
            for name in same
        ),
    )


def _kernels(profile: Profile) -> float:
    return float(sum(ms for ms, _ in profile["operators"].values()))


def _ratio(profiles: Mapping[str, Profile]) -> float:
    return _kernels(profiles["explained"]) / _kernels(profiles["forward"])


def _words(before: Mapping[str, Profile], after: Mapping[str, Profile]) -> str:
    counts = [
        sum(count for _, count in one["operators"].values())
        for one in (after["forward"], before["explained"], after["explained"])
    ]
    return (
        f"Explained over forward: {_ratio(before):.2f} before, {_ratio(after):.2f} now; {_ratio(after) - LIMIT:.2f} "
        f"forward passes above the limit of {LIMIT:.1f}. Nodes that run: {counts[0]} forward, {counts[1]} explained "
        f"before, {counts[2]} now."
    )


def _table(before: Mapping[str, Profile] | None, after: Mapping[str, Profile]) -> str:
    """One row per kind of operator; without a record from before, without its column."""
    columns = {"forward": after["forward"], "explained": after["explained"]}
    if before is not None:
        columns = {"forward": after["forward"], "before": before["explained"], "now": after["explained"]}
    one, last = _kernels(after["forward"]), list(columns)[-1]

    def cost(column: str, kinds: Sequence[str]) -> tuple[float, int]:
        found = [columns[column]["operators"].get(kind, (0.0, 0)) for kind in kinds]
        return sum(ms for ms, _ in found), sum(count for _, count in found)

    def above(kinds: Sequence[str]) -> float:
        return (cost(last, kinds)[0] - LIMIT * cost("forward", kinds)[0]) / one

    everything = list(dict.fromkeys(kind for profile in columns.values() for kind in profile["operators"]))
    shown = [kind for kind in everything if max(cost(column, [kind])[0] for column in columns) >= LEAST * one]
    rows = [(kind, [kind]) for kind in sorted(shown, key=lambda kind: above([kind]), reverse=True)]
    rest = [kind for kind in everything if kind not in shown]
    rows += [(f"{len(rest)} others", rest)] * bool(rest) + [("**all**", everything)]
    lines = [f"| operator | {' | '.join(columns)} | above {LIMIT:.0f}x |", "| --- " * (len(columns) + 2) + "|"]
    for title, kinds in rows:
        cells = [f"{ms:.2f} ({count})" if count else "" for ms, count in (cost(column, kinds) for column in columns)]
        lines.append(f"| {title} | {' | '.join(cells)} | {above(kinds):+.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
