"""docs/deployed.md: one network in every form that production models are deployed in, each converted, run and verified.

    make deployed

The demo model has trained weights; the transformer's are drawn. Each form is made by the tool that people make it with
(scripts/deployed_kinds.py), converted, run on three photos, compared with the float32 original's maps, and put to
`graphgbp verify`.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deployed_kinds
import numpy as np
import onnx
import onnxruntime as ort
import torch
from deployed_kinds import Kind, Source, VisionTransformer
from export_efficientnet_lite0 import load_network, preprocess
from PIL import Image
from scipy import stats

import graphgbp
from graphgbp import panel

ROOT = Path(__file__).resolve().parent.parent
MODELS, DOCS = ROOT / "models", ROOT / "docs"
PHOTOS = {"coffee.png": 967, "chelsea.png": 282, "astronaut.png": 560}  # espresso, tiger cat, football helmet
METHODS = ("gradcam", "guided_backprop", "guided_gradcam", "saliency")
PANELS = {
    "float32 as exported": "float32",
    "optimised, extended": "optimised by ORT, extended",
    "float16": "float16",
    "int8 QDQ, uint8 activations, per channel": "int8 QDQ",
    "int8 QOperator": "int8 QOperator",
}
"""The forms whose maps are drawn side by side, and their headings."""

Maps = dict[str, np.ndarray]


@dataclass
class Row:
    """What was measured of one file. `agreement` holds, by map, cosine and rank correlation, mean over the photos."""

    network: str
    kind: str
    tool: str
    forward: str = "-"
    gradient: str = "-"
    agreement: dict[str, tuple[float, float]] | None = None
    rectifiers: str = "-"
    seconds: float | None = None
    growth: str = "-"
    verdict: str = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="the kinds whose name holds this text")
    parser.add_argument("--unverified", action="store_true", help="leave `graphgbp verify` out, which takes minutes")
    arguments = parser.parse_args()
    store = DOCS / "deployed.json"
    rows = {(row["network"], row["kind"]): row for row in (json.loads(store.read_text()) if store.exists() else [])}
    drawn: dict[str, Maps] = {}
    order: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for network, kinds, source in _networks(Path(folder)):
            original: Maps | None = None
            for kind in kinds:
                first = kind is kinds[0]
                if not (first or arguments.only is None or arguments.only in kind.name):
                    continue
                row, maps = _measure(network, kind, source, original, Path(folder), not arguments.unverified)
                original = maps if first else original
                if network == "EfficientNet-Lite0" and kind.name in PANELS and maps:
                    drawn[kind.name] = maps
                rows[network, kind.name] = asdict(row)
                print(row, flush=True)
                store.write_text(json.dumps(list(rows.values()), indent=1) + "\n", encoding="utf-8")
            order += [(network, kind.name) for kind in kinds]
    if set(drawn) == set(PANELS):
        _draw(drawn)
    listed = [rows[key] for key in order if key in rows]
    _write_page(listed)
    return sum(row["verdict"].startswith("WRONG") for row in listed)


def _networks(folder: Path) -> list[tuple[str, tuple[Kind, ...], Source]]:
    images = np.concatenate([preprocess((MODELS / name).read_bytes()) for name in PHOTOS])
    lite = Source(MODELS / "efficientnet_lite0.onnx", "image", images, load_network())
    return [
        ("EfficientNet-Lite0", deployed_kinds.CNN, lite),
        ("vision transformer", deployed_kinds.VIT, _transformer(folder, images)),
    ]


def _transformer(folder: Path, images: np.ndarray) -> Source:
    """Two blocks of 64 channels and 4 heads over 14 x 14 patches, every parameter drawn."""
    torch.manual_seed(0)
    network = VisionTransformer().eval()
    path = folder / "transformer.onnx"
    deployed_kinds.export(network, torch.from_numpy(images), path, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    return Source(path, "image", images, network)


# -- one file -----------------------------------------------------------------------------------------------------


def _measure(
    network: str, kind: Kind, source: Source, original: Maps | None, folder: Path, verified: bool
) -> tuple[Row, Maps]:
    row, path = Row(network, kind.name, kind.tool), folder / "deployed.onnx"
    kind.make(source, path)
    start = time.perf_counter()
    try:
        converted = graphgbp.convert(path, METHODS)
    except graphgbp.GraphgbpError as error:
        row.verdict = f"refused: {' '.join(str(error).split())[:300]}"
        return row, {}
    row.seconds = round(time.perf_counter() - start, 2)
    out = folder / "explained.onnx"
    graphgbp.save(converted, out)
    before, after = path.stat().st_size, out.stat().st_size
    row.growth = f"{(after - before) / 1000:.0f} kB ({after / before - 1:.1%})"
    manifest = json.loads(next(entry.value for entry in converted.metadata_props if entry.key == "graphgbp.manifest"))
    swallowed = sum("swallowed" in entry["clothing"] for entry in manifest["rectifiers"])
    fused = sum(" in " in entry["clothing"] for entry in manifest["rectifiers"])
    words = ", ".join(f"{count} {word}" for count, word in ((fused, "fused"), (swallowed, "swallowed")) if count)
    row.rectifiers = f"{len(manifest['rectifiers'])} ({words})" if words else str(len(manifest["rectifiers"]))
    maps = _maps(out, kind, source)
    row.forward = _forward(path, kind, source, maps)
    row.agreement = {
        method: _agreement(maps[method], (original or maps)[method][: len(maps[method])]) for method in METHODS
    }
    row.verdict = _verdict(row, out, path) if verified else "not verified"
    return row, maps


def _run(path: Path, kind: Kind, source: Source, **feeds: np.ndarray) -> Maps:
    """By ONNX Runtime with its default optimisations; where it has no kernels, by ONNX's evaluator, one photo."""
    model = onnx.load(path)
    image = model.graph.input[0]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(image.type.tensor_type.elem_type)
    if not kind.runs:
        from onnx.reference import ReferenceEvaluator

        evaluator = ReferenceEvaluator(model)
        feeds = {name: value[:1] for name, value in feeds.items()}
        values = evaluator.run(None, {image.name: source.images[:1].astype(dtype), **feeds})
        return dict(zip(evaluator.output_names, values, strict=True))
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    batch = image.type.tensor_type.shape.dim[0]
    if batch.HasField("dim_value"):
        runs = [
            session.run(names, {image.name: x[None].astype(dtype), **{k: v[i : i + 1] for k, v in feeds.items()}})
            for i, x in enumerate(source.images)
        ]
        return {name: np.concatenate([values[index] for values in runs]) for index, name in enumerate(names)}
    return dict(zip(names, session.run(names, {image.name: source.images.astype(dtype), **feeds}), strict=True))


def _maps(path: Path, kind: Kind, source: Source) -> Maps:
    classes = np.array(list(PHOTOS.values()))
    return _run(path, kind, source, target=classes if source.path.parent == MODELS else classes % 10)


def _forward(path: Path, kind: Kind, source: Source, maps: Maps) -> str:
    """The outputs of the untouched file against those that the converted one gives beside its maps."""
    errors = [
        (
            np.abs(maps[name].astype(np.float64) - value.astype(np.float64)).max()
            / np.abs(value.astype(np.float64)).max()
        )
        for name, value in _run(path, kind, source).items()
    ]
    return "same bits" if max(errors) == 0 else f"{max(errors):.0e}"


def _agreement(maps: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    pairs = [(a.ravel().astype(np.float64), b.ravel().astype(np.float64)) for a, b in zip(maps, wanted, strict=True)]
    cosine = [float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in pairs]
    rank = [float(stats.spearmanr(a, b).statistic) for a, b in pairs]
    return float(np.mean(cosine)), float(np.mean(rank))


def _verdict(row: Row, out: Path, source: Path) -> str:
    found = graphgbp.verify(out, source)
    for check in found.checks:
        if check.name == "gradient" and "error" in check.figures:
            row.gradient = f"{check.figures['error']:.0e}"
    if found.failures:
        return "WRONG: " + "; ".join(f"{check.name}: {check.detail}" for check in found.failures)
    unchecked = ", ".join(check.name for check in found.unchecked)
    return f"right; not checked: {unchecked}" if unchecked else "right"


# -- the pictures -------------------------------------------------------------------------------------------------


def _draw(drawn: dict[str, Maps]) -> None:
    """One picture for each photo: the forms of PANELS side by side, their maps below each other."""
    import matplotlib.pyplot as plt

    shown, forms = METHODS[:3], [drawn[kind] for kind in PANELS]
    for index, photo_name in enumerate(PHOTOS):
        photo = np.asarray(_seen(photo_name))
        figure, axes = plt.subplots(len(shown), len(forms), figsize=(12, 7.9), dpi=85)
        for column, maps in zip(axes.T, forms, strict=True):
            own = {method: maps[method][index].transpose(1, 2, 0) for method in shown}
            tiles = {tile.method: tile for tile in panel.tiles(photo, own)}
            for place, method in zip(column, shown, strict=True):
                place.imshow(tiles[method].pixels)
                place.set_xticks([])
                place.set_yticks([])
                one = slice(index, index + 1)
                cosine, rank = _agreement(maps[method][one], forms[0][method][one])
                place.set_xlabel("" if maps is forms[0] else f"cosine {cosine:.3f}, rank {rank:.3f}", fontsize=9)
        for place, title in zip(axes[0], PANELS.values(), strict=True):
            place.set_title(title, fontsize=11)
        for place, method in zip(axes[:, 0], shown, strict=True):
            place.set_ylabel(panel.HEADINGS[method], fontsize=11)
        figure.tight_layout()
        _save(figure, DOCS / "images" / f"deployed_{photo_name}")
        plt.close(figure)


def _save(figure: Any, path: Path) -> None:
    """In 256 colours, a third of the size."""
    buffer = io.BytesIO()
    figure.savefig(buffer)
    picture = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(path, optimize=True)


def _seen(name: str) -> Image.Image:
    """A photo as the demo model sees it: short side 256, the middle 224."""
    photo = Image.open(MODELS / name).convert("RGB")
    scale = 256 / min(photo.size)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    left, top = (photo.width - 224) // 2, (photo.height - 224) // 2
    return photo.crop((left, top, left + 224, top + 224))


# -- the page -----------------------------------------------------------------------------------------------------


def _write_page(rows: list[dict[str, Any]]) -> None:
    template = (ROOT / "scripts" / "deployed.md.in").read_text(encoding="utf-8")
    wrong = sum(row["verdict"].startswith("WRONG") for row in rows)
    refused = sum(row["verdict"].startswith("refused") for row in rows)
    lines = []
    for network in dict.fromkeys(row["network"] for row in rows):
        lines += ["", f"## {network}", "", *_table([row for row in rows if row["network"] == network])]
    versions = f"onnx {onnx.__version__}, onnxruntime {ort.__version__}, torch {torch.__version__}"
    summary = f"{len(rows) - wrong - refused} of {len(rows)} forms are right, {refused} refused with the reason."
    page = template.format(versions=versions, summary=summary, tables="\n".join(lines))
    (DOCS / "deployed.md").write_text(page, encoding="utf-8")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    titles = ["form", "made by", "forward", "gradient", *METHODS, "rectifiers", "s", "growth", "verdict"]
    lines = [f"| {' | '.join(titles)} |", "|" + " --- |" * len(titles)]
    for row in rows:
        agreement = row["agreement"] or {}
        cells = [f"{agreement[m][0]:.3f} / {agreement[m][1]:.3f}" if m in agreement else "-" for m in METHODS]
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.2f}"
        values = [row["kind"], row["tool"], row["forward"], row["gradient"], *cells]
        values += [row["rectifiers"], seconds, row["growth"], " ".join(row["verdict"].split()).replace("|", "\\|")]
        lines.append(f"| {' | '.join(values)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
