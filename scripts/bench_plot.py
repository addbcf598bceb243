"""The plot of docs/bench.md and the README: how many forward passes an explanation costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK = "#010203"
"""Stands for the colour of the page's text, which the reader's light or dark mode decides."""
BARS = {
    "explained": ("graphgbp: scores and all maps, ONNX Runtime", "#3b82f6"),
    "captum": ("Captum, PyTorch", "#a8a29e"),
}
STYLE = "<style>svg{color:#1f2328}@media(prefers-color-scheme:dark){svg{color:#e6edf3}}</style>"


def write(ratios: Mapping[str, Mapping[str, float | None]], path: Path) -> None:
    """An SVG of bars, by network and contestant, in forward passes of ONNX Runtime."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    with plt.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.family": "sans-serif", "font.size": 11}
    ):
        figure, axes = plt.subplots(figsize=(8, 0.62 * max(len(ratios), 2) + 0.9))
        _draw(axes, ratios)
        figure.tight_layout()
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    drawn = path.read_text(encoding="utf-8").replace(INK, "currentColor")
    path.write_text(re.sub(r"(<svg [^>]*>)", rf"\1{STYLE}", drawn, count=1), encoding="utf-8")


def _draw(axes: Any, ratios: Mapping[str, Mapping[str, float | None]]) -> None:
    height = 0.36
    for offset, (who, (words, colour)) in zip((-height / 2, height / 2), BARS.items(), strict=True):
        drawn = [(row + offset, one[who]) for row, one in enumerate(ratios.values()) if one[who] is not None]
        rows, lengths = ([pair[index] for pair in drawn] for index in (0, 1))
        bars = axes.barh(rows, lengths, height * 0.92, color=colour, label=words)
        axes.bar_label(bars, fmt="%.1f", padding=4, color=INK, fontsize=10)
    for x, words in ((1, "one forward pass "), (2, " two: the least that a gradient costs")):
        axes.axvline(x, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=0)
        axes.text(x, -0.62, words, color=INK, fontsize=9, va="bottom", ha="left" if x > 1 else "right", alpha=0.75)
    axes.set_yticks(range(len(ratios)), list(ratios), color=INK)
    axes.set_ylim(len(ratios) - 0.45, -0.75)
    axes.set_xlim(0)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=2, frameon=False, labelcolor=INK)
