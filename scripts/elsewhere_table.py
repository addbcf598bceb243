"""Run one converted file in every runtime at hand, hold its outputs to ONNX Runtime's, and write docs/elsewhere.md.

    pip install -r scripts/requirements-elsewhere.txt -e .
    npm install --ignore-scripts --no-package-lock --prefix scripts/elsewhere
    python scripts/elsewhere_table.py --onnxruntime RELEASE --java JAR

RELEASE is an unpacked release of ONNX Runtime, with include/ and lib/ (npm's com.github.asus4.onnxruntime carries
both), JAR a file with ai.onnxruntime (the one in PyPI's pyserini will do), --chromium the browser. What is not at hand
has a row that says so. --model takes another model, or a converted file, with its --recipe; --page another page.

The programs are those of docs/running.md, as printed there.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from elsewhere_runtimes import IMAGE, Outcome, Runtime, Work, runtimes

import graphgbp
from graphgbp import contract
from graphgbp.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
MASK = "mask_{}"
METHODS = ("saliency", "guided_backprop", "deconvnet", "gradcam", "guided_gradcam")

Outputs = Mapping[str, np.ndarray]
Case = tuple[str, int | None, Outputs]  # model, class, outputs
Answers = Mapping[Runtime, Mapping[str, Outcome]]


class Baseline:
    """ONNX Runtime's Python package on the CPU."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self._names = [value.name for value in self._session.get_outputs()]

    def __call__(self, feeds: Outputs) -> dict[str, np.ndarray]:
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))


class Masked:
    """A converted model whose rectifiers' sides can be read in one runtime and told to another.

    A rectifier whose input is zero but for rounding opens in one runtime and stays shut in another. `probe` gives the
    masks as outputs too, `told` takes them as inputs: ONNX Runtime's maps for another runtime's sides.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        steep = [
            node for node in model.graph.node if node.op_type == "HardSigmoid" and node.name.startswith("graphgbp/")
        ]
        tensors = {node.output[0]: MASK.format(index) for index, node in enumerate(steep)}
        self.probe, self.told = onnx.ModelProto(), onnx.ModelProto()
        self.probe.CopyFrom(model)
        self.told.CopyFrom(model)
        for tensor, name in tensors.items():
            self.probe.graph.node.append(onnx.helper.make_node("Identity", [tensor], [name], name))
            self.probe.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
            self.told.graph.input.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
        del self.told.graph.node[:]
        self.told.graph.node.extend(node for node in model.graph.node if not tensors.keys() & set(node.output))
        self.tensors = tensors
        self._run: Baseline | None = None

    def __call__(self, masks: Outputs, feeds: Outputs) -> dict[str, np.ndarray]:
        """ONNX Runtime's outputs where the rectifiers open as another runtime's outputs of `probe` say."""
        self._run = self._run or Baseline(self.told)
        return self._run({**feeds, **{tensor: masks[name] for tensor, name in self.tensors.items()}})

    def switched(self, masks: Outputs, others: Outputs) -> int:
        """How many rectifiers have another side in one than in the other."""
        return sum(int((masks[name] != others[name]).sum()) for name in self.tensors.values())


@dataclass
class Question:
    """An image, a class that is not the predicted one, and what ONNX Runtime answers."""

    model: onnx.ModelProto
    image: np.ndarray
    target: int
    predicted: int
    classes: int
    outputs: Outputs
    masked: Masked
    probed: Outputs

    @property
    def feeds(self) -> Outputs:
        return {self.model.graph.input[0].name: self.image, contract.TARGET: np.array([self.target])}

    def differences(self, got: Outputs, expected: Outputs) -> dict[str, float]:
        """Of each output: the largest difference over the largest value."""
        return {name: relative(got[name], expected[name]) for name in self.outputs}


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    scale = np.abs(expected).max(initial=0)
    return float(np.abs(got.astype(np.float64) - expected).max(initial=0) / (scale or 1))


def question(model: onnx.ModelProto, recipe: Recipe, photo: Path) -> Question:
    manifest = _manifest(model)
    entry, run = manifest.input, Baseline(model)
    images = recipe.batch([photo], entry)[0]
    first = {entry["name"]: images}
    scores = run({**first, contract.TARGET: np.array([contract.PREDICTED])})[manifest.score["output"]]
    predicted, target = (int(index) for index in np.argsort(-scores[0])[:2])
    feeds = {**first, contract.TARGET: np.array([target])}
    masked = Masked(model)
    probed = Baseline(masked.probe)(feeds)
    return Question(model, images, target, predicted, scores.shape[1], run(feeds), masked, probed)


def _manifest(model: onnx.ModelProto) -> contract.Manifest:
    text = next(entry.value for entry in model.metadata_props if entry.key == contract.MANIFEST_KEY)
    return contract.Manifest.from_json(text)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])


def maps_tables(asked: Question, found: Answers) -> tuple[str, str, int]:
    """The file as it is; its probe, beside ONNX Runtime told the same masks; how many of these agree."""
    plain, told, right = [], [], 0
    for runtime, outcomes in found.items():
        as_is, probed = outcomes["as is"], outcomes.get("probe", outcomes["as is"])
        if as_is.outputs is None or probed.outputs is None:
            told.append([runtime.name, *[""] * (len(asked.outputs) + 1), f"not run: {probed.said or as_is.said}"])
            continue
        direct = asked.differences(as_is.outputs, asked.outputs)
        plain.append([runtime.name, *map(_figure, direct.values()), f"{as_is.ms:.0f}"])
        differences = asked.differences(probed.outputs, asked.masked(probed.outputs, asked.feeds))
        within = max(differences.values()) <= TOLERANCE
        right += within
        switched = str(asked.masked.switched(probed.outputs, asked.probed))
        verdict = ("same" if within else "DIFFERS") + (f"; {runtime.remark}" if runtime.remark else "")
        told.append([runtime.name, switched, *map(_figure, differences.values()), verdict])
    names = list(asked.outputs)
    header = ["runtime", "switched", *names, "verdict"]
    return table(["runtime", *names, "ms"], plain), table(header, told), right


def _figure(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def targets_table(asked: Question, found: Answers) -> str:
    header = ["runtime", "class fed", f"class {asked.classes} fed", "optional, none fed", "optional, class fed"]
    rows = []
    for runtime, outcomes in found.items():
        fed, out, unfed, override = (outcomes.get(key) for key in ("as is", "out", "unfed", "fed"))
        if fed is None or fed.outputs is None:
            continue
        cells = [
            _told(fed, asked.target),
            f"NOT REFUSED: {_told(out)}" if out and out.outputs else out.said if out else "-",
        ]
        rows.append([runtime.name, *cells, _told(unfed), _told(override, asked.target)])
    return table(header, rows)


def _told(outcome: Outcome | None, wanted: int | None = None) -> str:
    """Which class a run explained, and whether that is the one that was fed."""
    if outcome is None:
        return "-"
    if outcome.outputs is None:
        return f"refused: {outcome.said}"
    told = int(outcome.outputs[contract.TARGET_CLASS][0])
    return f"explains {told}" + ("" if wanted in (None, told) else ", DROPS the class fed")


def versions_table(found: Sequence[Runtime]) -> str:
    return table(["runtime", "version", "where"], [[r.name, r.version, r.where] for r in found])


def measure(work: Work, asked: Question, args: argparse.Namespace, light: onnx.ModelProto | None) -> Answers:
    """Every runtime on every case."""
    onnx.save(asked.model, work.folder / "required.onnx")
    onnx.save(asked.masked.probe, work.folder / "probe.onnx")
    asked.image.tofile(work.folder / IMAGE)
    cases: dict[str, Case] = {
        "as is": ("required", asked.target, asked.outputs),
        "probe": ("probe", asked.target, asked.probed),
        "out": ("required", asked.classes, asked.outputs),
    }
    if light is not None:
        onnx.save(light, work.folder / "optional.onnx")
        some = {name: asked.outputs[name] for name in (contract.TARGET_CLASS, contract.GRADCAM)}
        cases["unfed"], cases["fed"] = ("optional", None, some), ("optional", asked.target, some)
    found: dict[Runtime, dict[str, Outcome]] = {}
    for runtime in runtimes(work, args):
        found[runtime] = {"as is": work.run(runtime, *cases["as is"])}
        if found[runtime]["as is"].outputs is not None:
            found[runtime] |= {name: work.run(runtime, *case) for name, case in cases.items() if name != "as is"}
        print(runtime.name, {name: outcome.said or "ran" for name, outcome in found[runtime].items()}, flush=True)
    return found


def page(source: Path, asked: Question, found: Answers) -> str:
    plain, told, right = maps_tables(asked, found)
    ran = {runtime: outcomes for runtime, outcomes in found.items() if outcomes["as is"].outputs is not None}
    text = (Path(__file__).parent / "elsewhere.md.in").read_text("utf-8")
    masks = [asked.probed[name] for name in asked.masked.tensors.values()]
    values = {
        "source": source.name,
        "right": str(right),
        "ran": str(len(ran)),
        "versions": versions_table(list(found)),
        "methods": ", ".join(_manifest(asked.model).methods),
        "machine": f"{platform.system()} {platform.machine()}",
        "onnxruntime": ort.__version__,
        "target": str(asked.target),
        "predicted": str(asked.predicted),
        "masks": f"{sum(mask.size for mask in masks):,}",
        "plain": plain,
        "told": told,
        "targets": targets_table(asked, ran),
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "efficientnet_lite0.onnx")
    parser.add_argument("--recipe", type=Path, default=ROOT / "models" / "efficientnet_lite0.recipe.json")
    parser.add_argument("--photo", type=Path, default=ROOT / "models" / "coffee.png")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "elsewhere.md")
    parser.add_argument("--onnxruntime", type=Path, help="a release of ONNX Runtime, for C++")
    parser.add_argument("--java", type=Path, help="a jar with ai.onnxruntime")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--only", nargs="*", default=[], help="the runtimes whose name holds one of these words")
    args = parser.parse_args()
    model, light = onnx.load(args.model), None
    if all(entry.key != contract.MANIFEST_KEY for entry in model.metadata_props):
        model = graphgbp.convert(args.model, METHODS)
        light = graphgbp.convert(args.model, [contract.GRADCAM], target="optional")
    asked = question(model, Recipe.load(args.recipe), args.photo)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Work(Path(folder), ROOT), asked, args, light)
    text = page(args.model, asked, found)
    args.page.write_text(text, "utf-8")
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
