"""What the results of docs/bench.json say: ratios, scaling, and the goals, each measured against its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from bench_contestants import CONTESTANTS
from bench_networks import TITLES

Results = Mapping[str, Any]

CONVERSIONS = {"resnet50": 1.0, "vit_b_16": 3.0}
"""Seconds that a conversion may take."""


# -- reading the results ----------------------------------------------------------------------------------------------


def networks_of(results: Results) -> list[str]:
    return [name for name in TITLES if name in results["networks"]]


def settings_of(results: Results) -> list[tuple[str, str]]:
    """Threads and batch, as measured, the most threads first."""
    found = {
        (threads, batch)
        for of in results["networks"].values()
        for threads, batches in of.get("times", {}).items()
        for batch in batches
    }
    return sorted(found, key=lambda setting: (int(setting[1]), -int(setting[0])))


def main_setting(results: Results) -> tuple[str, str]:
    """The setting that the goals are about: the most threads, the fewest images."""
    return (settings_of(results) or [("2", "1")])[0]


def setting_words(threads: str, batch: str) -> str:
    return f"{threads} thread{'s' * (threads != '1')}, batch {batch}"


def time_of(results: Results, name: str, threads: str, batch: str, who: str) -> Mapping[str, float] | None:
    of = results["networks"][name].get("times", {}).get(threads, {}).get(batch, {})
    found: Mapping[str, float] | None = of.get(who)
    return found


def over(results: Results, name: str, threads: str, batch: str, who: str, other: str) -> float | None:
    """How many times as long one takes as the other, by medians."""
    one, two = (time_of(results, name, threads, batch, each) for each in (who, other))
    return one["median"] / two["median"] if one and two else None


def all_over(results: Results, setting: tuple[str, str], who: str, other: str) -> dict[str, float]:
    """That ratio of each network that has both."""
    found = {name: over(results, name, *setting, who, other) for name in networks_of(results)}
    return {name: ratio for name, ratio in found.items() if ratio is not None}


def parts_of(results: Results, part: str) -> dict[str, Any]:
    return {name: results["networks"][name][part] for name in networks_of(results) if part in results["networks"][name]}


def per_image(results: Results) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Network, threads, the larger batch, and what an image costs in it over what it costs alone, by contestant."""
    for threads, batch in settings_of(results):
        for name in networks_of(results) if batch != "1" else ():
            pairs = {
                who: [time_of(results, name, threads, size, who) for size in ("1", batch)]
                for who in ("forward", "explained", "captum")
            }
            ratios = {
                who: many["median"] / int(batch) / one["median"] for who, (one, many) in pairs.items() if one and many
            }
            if ratios:
                yield name, threads, batch, ratios


def exponent(costs: Mapping[int, float]) -> float:
    """k of the least-squares fit cost = c * pixels^k, the sides of square images being the keys: 1 is linear."""
    points = [(math.log(side**2), math.log(cost)) for side, cost in costs.items()]
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


# -- the goals --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """What is asked, what was measured, and whether it holds."""

    words: str
    figure: str
    bound: str
    holds: bool

    @property
    def cells(self) -> tuple[str, ...]:
        return self.words, self.figure, self.bound, "pass" if self.holds else "**fail**"


def goals(results: Results) -> list[Goal]:
    """Every goal that the results speak about."""
    setting = main_setting(results)
    ratios = {
        pair: all_over(results, setting, *pair)
        for pair in (("explained", "forward"), ("captum", "explained"), ("onnx_ad", "saliency"))
    }
    found = []
    for (who, other), mean, worst in (
        (("explained", "forward"), 2.8, 4.5),
        (("captum", "explained"), 2.8, 0.95),
        (("onnx_ad", "saliency"), 5.0, None),
    ):
        one = ratios[who, other]
        if one:
            words = f"{CONTESTANTS[who]} over {CONTESTANTS[other].removeprefix('ONNX Runtime, ')}"
            found += _ratio_goals(words, one, mean, worst, least=other != "forward")
    return found + _file_goals(results) + _scaling_goals(results)


def _ratio_goals(words: str, ratios: Mapping[str, float], mean: float, worst: float | None, least: bool) -> list[Goal]:
    """The geometric mean, and the worst network; `least`: the larger the better."""
    sign, choose = ("≥", min) if least else ("≤", max)

    def holds(value: float, bound: float) -> bool:
        return value >= bound if least else value <= bound

    value = geometric_mean(ratios.values())
    found = [Goal(f"{words}, geometric mean of {len(ratios)}", f"{value:.2f}", f"{sign} {mean}", holds(value, mean))]
    if worst is not None:
        name = choose(ratios, key=lambda each: ratios[each])
        figure = f"{ratios[name]:.2f} ({TITLES[name]})"
        found.append(Goal(f"{words}, the worst network", figure, f"{sign} {worst}", holds(ratios[name], worst)))
    return found


def _file_goals(results: Results) -> list[Goal]:
    files, memory = parts_of(results, "files"), parts_of(results, "memory")
    found = []
    for name, bound in CONVERSIONS.items():
        if name in files:
            seconds = files[name]["convert"]
            found.append(Goal(f"Conversion of {TITLES[name]}", f"{seconds:.2f} s", f"< {bound:.0f} s", seconds < bound))
    if files:
        name = max(files, key=lambda each: growth_of(files[each]))
        growth = growth_of(files[name])
        found.append(Goal("Growth of the file", f"{growth:.2%} ({TITLES[name]})", "< 1 %", growth < 0.01))
        name = max(files, key=lambda each: _load(files[each]))
        source, converted = files[name]["load"]
        figure = f"{converted:.2f} s, source {source:.2f} s ({TITLES[name]})"
        found.append(Goal("Loading", figure, "3x the source's, or half a second more", _load(files[name]) <= 1))
    memory = {name: of for name, of in memory.items() if {"explained", "captum"} <= set(of)}
    if memory:
        name = max(memory, key=lambda each: memory[each]["explained"][1] / memory[each]["captum"][1])
        ours, theirs = (memory[name][who][1] for who in ("explained", "captum"))
        figure = f"{ours:.0f} MB, Captum {theirs:.0f} MB ({TITLES[name]})"
        found.append(Goal("Peak memory", figure, "below Captum's", ours < theirs))
    return found


def growth_of(files: Mapping[str, Any]) -> float:
    before, after = files["bytes"]
    return float(after / before - 1)


def _load(files: Mapping[str, Any]) -> float:
    """Seconds to load the converted file, over what they may be."""
    source, converted = files["load"]
    return float(converted / max(3 * source, source + 0.5))


def _scaling_goals(results: Results) -> list[Goal]:
    found = []
    images = [
        (ratios["explained"], name, threads) for name, threads, _, ratios in per_image(results) if "explained" in ratios
    ]
    if images:
        ratio, name, threads = max(images)
        figure = f"{ratio:.2f} ({TITLES[name]}, {threads} thread{'s' * (threads != '1')})"
        found.append(Goal("An image's cost in a batch, over its cost alone", figure, "≤ 1.05", ratio <= 1.05))
    powers = {
        name: exponent(costs_of(of, "explained")) for name, of in parts_of(results, "pixels").items() if len(of) > 1
    }
    if powers:
        name = max(powers, key=lambda each: powers[each])
        figure = f"{powers[name]:.2f} ({TITLES[name]})"
        found.append(Goal("Cost by pixels: k of cost ~ pixels^k", figure, "≤ 1.05", powers[name] <= 1.05))
    return found


def costs_of(sizes: Mapping[str, Any], who: str) -> dict[int, float]:
    return {int(size): found[who]["median"] for size, found in sizes.items()}
