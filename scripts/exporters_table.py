"""Hold graphgbp against each framework's own gradients, on the file that the framework's exporter writes.

    python scripts/exporters_table.py keras      # in the environment of scripts/requirements-keras.txt
    python scripts/exporters_table.py keras_torch  # ... of scripts/requirements-keras-torch.txt
    python scripts/exporters_table.py paddle     # ... of scripts/requirements-paddle.txt
    python scripts/exporters_table.py jax        # ... of scripts/requirements-jax.txt
    python scripts/exporters_table.py sklearn    # ... of scripts/requirements-sklearn.txt

Each adds its rows to docs/exporters.json and writes docs/exporters.md again. Rows that are there already are kept;
--again makes them anew. A file that is refused has a row too, with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

import graphgbp

DOCS = Path(__file__).resolve().parent.parent / "docs"
IMAGES = 5
KINDS = {
    "keras": "Keras",
    "keras_torch": "Keras on torch",
    "paddle": "Paddle",
    "jax": "JAX",
    "sklearn": "scikit-learn and its like",
}
SLACK, FLOOR = 3, 1e-4  # a float32 map may lie so many times as far from float64 as the framework's own, plus this
HEADER = ("network", "exporter", "forward", "gradient", "guided", "Grad-CAM", "target layer", "nodes", "s", "verdict")

Maps = Mapping[str, np.ndarray]


@dataclass
class Reference:
    """The framework's maps in float64, how far its own float32 maps are from them, and what is to be said of them."""

    maps: Maps
    float32: dict[str, list[float]]
    remarks: list[str] = field(default_factory=list)


@dataclass
class Case:
    """A file, what is explained in it, and what its framework says of the same network.

    `reference(features)` is asked for the maps, by graphgbp's method names; `features` is the target layer's value, by
    which the framework finds its own name of it.
    """

    model: onnx.ModelProto
    exporter: str
    images: np.ndarray = field(default_factory=lambda: np.zeros(0))
    targets: np.ndarray = field(default_factory=lambda: np.zeros(0))
    reference: Callable[[np.ndarray | None], Reference] | None = None
    methods: tuple[str, ...] = ("saliency", "guided_backprop", "gradcam")


@dataclass
class Row:
    """What was measured: relative L2 distances from float64 by method and image, ours and the framework's own.

    In one image or another the rounding of float32 switches a ReLU near zero, in ONNX Runtime and in the framework
    alike: the median over the images counts, and for the plain gradient, which feels each, the least disturbed image.
    """

    kind: str
    network: str
    exporter: str
    errors: dict[str, list[float]] = field(default_factory=dict)
    float32: dict[str, list[float]] = field(default_factory=dict)
    forward: float = 0.0
    layer: str = ""
    nodes: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    refused: str = ""

    def within(self, method: str, over: Callable[[list[float]], float]) -> bool:
        return over(self.errors[method]) <= SLACK * over(self.float32[method]) + FLOOR

    @property
    def disturbed(self) -> bool:
        """Whether rounding disturbs the plain gradient of most images, but not of all."""
        return "saliency" in self.errors and not self.within("saliency", median) and self.within("saliency", min)

    @property
    def right(self) -> bool:
        maps = [method for method in self.errors if not (method == "saliency" and self.disturbed)]
        return bool(maps) and not self.forward and all(self.within(method, median) for method in maps)

    @property
    def verdict(self) -> str:
        return "refused" if self.refused else "right" if self.right else "WRONG"


def measure(kind: str, network: str, case: Case) -> Row:
    row = Row(kind, network, case.exporter)
    start = time.perf_counter()
    try:
        explained = graphgbp.convert(case.model, case.methods)
    except graphgbp.GraphgbpError as error:
        row.refused = "; ".join(line.strip() for line in str(error).splitlines()).replace(":;", ":")
        return row
    row.seconds = time.perf_counter() - start
    row.nodes = len(case.model.graph.node), len(explained.graph.node)
    assert case.reference is not None

    images = {case.model.graph.input[0].name: case.images}
    before, after = outputs(case.model, images), outputs(explained, {**images, "target": case.targets})
    row.forward = max(_change(value, after[name]) for name, value in before.items())
    row.layer = _layer(explained)
    told = case.reference(after.get("gradcam_features"))
    row.errors = {method: distances(after[method], told.maps[method]) for method in case.methods}
    row.float32, row.remarks = told.float32, told.remarks
    return row


def outputs(model: onnx.ModelProto, feeds: Maps) -> dict[str, Any]:
    """What a model gives by output name, its nodes run as they are."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _change(before: Any, after: Any) -> float:
    """The largest difference; of what is no array of numbers (labels, a ZipMap's), infinite where there is one."""
    if isinstance(before, np.ndarray) and before.dtype.kind in "fiu":
        return float(np.abs(after - before).max())
    return 0.0 if np.array_equal(before, after) else float("inf")


def _layer(explained: onnx.ModelProto) -> str:
    manifest = json.loads(next(entry.value for entry in explained.metadata_props if entry.key == "graphgbp.manifest"))
    return next((layer["tensor"] for layer in manifest["target_layers"]), "")


def distances(got: np.ndarray, exact: np.ndarray) -> list[float]:
    """|got - exact| / |exact| of each image in which the exact map is not zero throughout."""
    assert got.shape == exact.shape, f"shape {got.shape}, expected {exact.shape}"
    got, exact = (np.asarray(value, np.float64).reshape(len(value), -1) for value in (got, exact))
    size = np.linalg.norm(exact, axis=1)
    seen = size > 0
    assert seen.any(), "an all-zero reference shows nothing"
    return list(np.linalg.norm(got - exact, axis=1)[seen] / size[seen])


def distance(got: np.ndarray, exact: np.ndarray) -> float:
    """The median over the images."""
    return median(distances(got, exact))


def own_distances(maps_of: Callable[[np.ndarray], Maps], images: np.ndarray, exact: Maps) -> dict[str, list[float]]:
    """How far a framework's float32 maps are from the exact ones, image by image: the farther of two runs.

    The second run has every pixel at the next float32 number up or down: a run that differs by rounding alone.
    """
    ways = np.random.default_rng(0).choice([-np.inf, np.inf], images.shape).astype(np.float32)
    runs = [maps_of(images), maps_of(np.nextafter(images, ways))]
    found = {method: [distances(run[method], value) for run in runs] for method, value in exact.items()}
    return {method: [max(pair) for pair in zip(*both, strict=True)] for method, both in found.items()}


def ranked(scores: np.ndarray) -> np.ndarray:
    """A target for each image: its best class and its second best in turns."""
    return np.argsort(-scores, axis=1)[np.arange(len(scores)), np.arange(len(scores)) % 2]


def read(folder: Path) -> dict[str, Row]:
    path = folder / "exporters.json"
    rows = [Row(**entry) for entry in json.loads(path.read_text("utf-8"))] if path.exists() else []
    return {f"{row.kind}/{row.network}": row for row in rows}


def write(rows: Mapping[str, Row], folder: Path) -> None:
    """The rows as JSON, one a line, and as the page."""
    ordered = sorted(rows.values(), key=lambda row: (list(KINDS).index(row.kind), row.network))
    lines = ",\n".join(json.dumps(asdict(row)) for row in ordered)
    (folder / "exporters.json").write_text(f"[\n{lines}\n]\n", "utf-8")
    (folder / "exporters.md").write_text(page(ordered), "utf-8")


def page(rows: list[Row]) -> str:
    parts = [(Path(__file__).parent / "exporters.md.in").read_text("utf-8").rstrip()]
    for kind, title in KINDS.items():
        here = [row for row in rows if row.kind == kind]
        if here:
            parts += ["", f"## {title}", "", _line(HEADER), _line(["---"] * len(HEADER))]
            parts += [_line(_cells(row)) for row in here]
            remarks = [
                f"- {row.network}: {text}"
                for row in here
                for text in [*_disturbance(row), *row.remarks, row.refused]
                if text
            ]
            parts += ["", *remarks] if remarks else []
    return "\n".join(parts) + "\n"


def _disturbance(row: Row) -> list[str]:
    if not row.disturbed:
        return []
    best = _figures(row, "saliency", min)
    return [f"rounding disturbs the plain gradient of most images; in the least disturbed one it is {best}"]


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    if row.refused:
        return [row.network, row.exporter, *["-"] * 7, row.verdict]

    def error(method: str) -> str:
        return _figures(row, method, median) if method in row.errors else "-"

    forward = f"{row.forward:.0e}" if row.forward else "same"
    layer = f"`{row.layer}`" if row.layer else "-"
    errors = [error(method) for method in ("saliency", "guided_backprop", "gradcam")]
    nodes = "{} -> {}".format(*row.nodes)
    return [row.network, row.exporter, forward, *errors, layer, nodes, f"{row.seconds:.1f}", row.verdict]


def _figures(row: Row, method: str, over: Callable[[list[float]], float]) -> str:
    return f"{over(row.errors[method]):.0e} ({over(row.float32[method]):.0e})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("networks", nargs="*", help="default: all of the kind")
    parser.add_argument("--again", action="store_true", help="also the rows that are there already")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of exporters.json and exporters.md")
    arguments = parser.parse_args()

    cases: Mapping[str, Callable[[], Case]] = import_module(f"exporters_{arguments.kind}").CASES
    wrong = []
    for network in arguments.networks or cases:
        name = f"{arguments.kind}/{network}"
        row = None if arguments.again else read(arguments.docs).get(name)
        if row is None:
            row = measure(arguments.kind, network, cases[network]())
            write({**read(arguments.docs), name: row}, arguments.docs)
            print(_line(_cells(row)), flush=True)
        wrong += [network] if row.verdict == "WRONG" else []
    write(read(arguments.docs), arguments.docs)
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else None)


if __name__ == "__main__":
    main()
