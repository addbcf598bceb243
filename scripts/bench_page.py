"""docs/bench.md, its plot and the README's lines about speed, all from docs/bench.json."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean

import bench_plot
from bench_contestants import CONTESTANTS
from bench_goals import (
    Results,
    all_over,
    costs_of,
    exponent,
    goals,
    growth_of,
    main_setting,
    networks_of,
    over,
    parts_of,
    per_image,
    setting_words,
    settings_of,
    time_of,
)
from bench_networks import TITLES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PEERS = ("captum", "onnx_ad")
MARKS = ("<!-- speed: written by scripts/bench.py -->", "<!-- /speed -->")


def write(results: Results, out: Path) -> None:
    """The page and the plot beside the results; the README's lines too where those are docs/bench.json."""
    plot = out.parent / "images" / f"{out.stem}.svg"
    plot.parent.mkdir(exist_ok=True)
    networks, (threads, batch) = networks_of(results), main_setting(results)
    ratios = {
        TITLES[name]: {who: over(results, name, threads, batch, who, "forward") for who in ("explained", "captum")}
        for name in networks
    }
    bench_plot.write(ratios, plot)
    out.with_suffix(".md").write_text(page(results, plot.relative_to(out.parent)), encoding="utf-8")
    if out == ROOT / "docs" / "bench.json":
        README.write_text(with_speed(README.read_text(encoding="utf-8"), results), encoding="utf-8")


def page(results: Results, plot: Path) -> str:
    """docs/bench.md."""
    template = (Path(__file__).parent / "bench.md.in").read_text(encoding="utf-8")
    threads, batch = main_setting(results)
    seconds = sum(sum(of["seconds"].values()) for of in results["networks"].values())
    return template.format(
        machine=results["machine"],
        device=results["device"],
        versions=", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        graphgbp=results["graphgbp"],
        minutes=round(seconds / 60),
        setting=setting_words(threads, batch),
        plot=plot,
        goals=_table(("goal", "measured", "bound", ""), [goal.cells for goal in goals(results)]),
        times="\n\n".join(_times(results, *setting) for setting in settings_of(results)),
        captum=_captum(results),
        files=_files(results),
        batches=_batches(results),
        pixels=_pixels(results),
    )


# -- tables -----------------------------------------------------------------------------------------------------------


def _times(results: Results, threads: str, batch: str) -> str:
    """One setting: a row for each network, and the geometric means of the ratios."""
    setting = (threads, batch)
    shown = [who for who in CONTESTANTS if any(time_of(results, name, *setting, who) for name in networks_of(results))]
    peers = [pair for pair in (("captum", "explained"), ("onnx_ad", "saliency")) if set(pair) <= set(shown)]
    rows = []
    for name in networks_of(results):
        times = {who: time_of(results, name, *setting, who) for who in shown}
        cells = [
            _time_cell(times[who], over(results, name, *setting, who, "forward") if who != "forward" else None)
            for who in shown
        ]
        rows.append([TITLES[name], *cells, *(_ratio_cell(over(results, name, *setting, *pair)) for pair in peers)])
    means = [_mean_cell(all_over(results, setting, who, "forward")) if who != "forward" else "" for who in shown]
    means += [_mean_cell(all_over(results, setting, *pair)) for pair in peers]
    rows.append(["geometric mean", *means])
    titles = [*(CONTESTANTS[who] for who in shown), *(f"{CONTESTANTS[a]} / {CONTESTANTS[b]}" for a, b in peers)]
    return f"### {setting_words(*setting)}\n\n{_table(('network', *titles), rows)}"


def _time_cell(time: Mapping[str, float] | None, ratio: float | None) -> str:
    if time is None:
        return ""
    text = f"{_digits(time['median'])} ({_digits(time['low'])} - {_digits(time['high'])})"
    return text if ratio is None else f"{text} **{ratio:.2f}x**"


def _digits(value: float) -> str:
    """Three significant digits."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def _ratio_cell(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _mean_cell(ratios: Mapping[str, float]) -> str:
    return f"**{geometric_mean(ratios.values()):.2f}x**" if ratios else ""


def _captum(results: Results) -> str:
    lines = []
    for name in networks_of(results):
        of = results["networks"][name]
        what = f"Guided Grad-CAM at `{of['layer']}`" if of["layer"] else "Guided Backpropagation"
        notes = [one for batches in of.get("times", {}).values() for one in batches.values()]
        why = [f"; torch.compile fails: {one['not_compiled']}" for one in notes if "not_compiled" in one]
        far = [
            f"; compiled, its map differs by {one['compiled_differs']:.0e}"
            for one in notes
            if "compiled_differs" in one
        ]
        lines.append(f"- {TITLES[name]}: {what}{(why + far + [''])[0]}.")
    return "\n".join(lines)


def _files(results: Results) -> str:
    rows = []
    memory = parts_of(results, "memory")
    for name, of in parts_of(results, "files").items():
        (source, converted), peak = of["load"], memory.get(name, {})
        rows.append([
            TITLES[name], f"{of['convert']:.2f}", "" if of["onnx_ad"] is None else f"{of['onnx_ad']:.1f}",
            f"{source:.2f} -> {converted:.2f}", f"{growth_of(of):+.2%}",
            *(f"{peak[who][1]:.0f}" if who in peak else "" for who in ("forward", "explained", "captum")),
            " -> ".join(map(str, of["nodes"])), " -> ".join(map(str, of["nodes_run"])),
        ])  # fmt: skip
    titles = (
        "network",
        "conversion, s",
        "onnx-ad's, s",
        "load, s",
        "growth",
        "peak, MB: forward",
        "explained",
        "Captum",
        "nodes",
        "nodes that run",
    )
    bare = {who: [of[who][0] for of in memory.values() if who in of] for who in ("explained", "captum")}
    if not all(bare.values()):
        return _table(titles, rows)
    return (
        f"{_table(titles, rows)}\n\nOf the peak memory the imported libraries alone take "
        f"{max(bare['explained']):.0f} MB (ONNX Runtime) and {max(bare['captum']):.0f} MB (torch, torchvision, Captum)."
    )


def _batches(results: Results) -> str:
    rows = [
        [TITLES[name], threads, batch, *(_ratio_cell(ratios.get(who)) for who in ("forward", "explained", "captum"))]
        for name, threads, batch, ratios in per_image(results)
    ]
    return _table(("network", "threads", "batch", "forward", "explained", "Captum"), rows)


def _pixels(results: Results) -> str:
    rows = []
    for name, sizes in parts_of(results, "pixels").items():
        for who in ("forward", "explained"):
            costs = costs_of(sizes, who)
            cells = [_digits(cost / (side**2 / 1e6)) for side, cost in sorted(costs.items())]
            rows.append([TITLES[name], who, *cells, f"{exponent(costs):.2f}" if len(costs) > 1 else ""])
    sides = sorted({int(size) for sizes in parts_of(results, "pixels").values() for size in sizes})
    return _table(("network", "", *map(str, sides), "k"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "Not measured."
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the README -------------------------------------------------------------------------------------------------------


def with_speed(readme: str, results: Results) -> str:
    """The README with the lines between its marks written from the results; as it is, until files are measured too."""
    if not parts_of(results, "files"):
        return readme
    start, end = (readme.index(mark) for mark in MARKS)
    return f"{readme[: start + len(MARKS[0])]}\n{speed(results)}\n{readme[end:]}"


def speed(results: Results) -> str:
    """What the README says about speed, in three sentences."""
    setting, files = main_setting(results), parts_of(results, "files")
    explained = all_over(results, setting, "explained", "forward")
    means = {who: geometric_mean(all_over(results, setting, who, "forward").values()) for who in PEERS}
    low, high = (choose(explained, key=lambda name: explained[name]) for choose in (min, max))
    seconds = sorted(of["convert"] for of in files.values())
    sentences = (
        f"An image with its scores and all maps of Guided Grad-CAM costs {geometric_mean(explained.values()):.1f} "
        f"forward passes of ONNX Runtime ({setting_words(*setting)}; geometric mean of {len(explained)} networks, from "
        f"{explained[low]:.1f}, {TITLES[low]}, to {explained[high]:.1f}, {TITLES[high]}); a gradient cannot cost less "
        f"than two. Captum's Guided Grad-CAM in PyTorch costs {means['captum']:.1f} of them, the plain gradient that "
        f"onnx-ad writes {means['onnx_ad']:.1f}. Conversion takes {seconds[0]:.1f} to {seconds[-1]:.1f} s and adds at "
        f"most {max(map(growth_of, files.values())):.1%} to the file."
    )
    return "\n".join(textwrap.wrap(sentences, 120))
