"""What can be explained in a model, said before anything is converted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx.external_data_helper import uses_external_data

from graphgbp import model_file
from graphgbp import target as targets
from graphgbp.analysis import Analysis
from graphgbp.contract import LAYER_METHODS, METHODS
from graphgbp.deployment import deployed, origin
from graphgbp.errors import GraphgbpError
from graphgbp.nodes import label
from graphgbp.options import Request, names
from graphgbp.prepare import prepare
from graphgbp.source import ModelLike, raised, read, weights_folder
from graphgbp.stored import Stored
from graphgbp.view import View
from graphgbp.weights import external_locations, locate, size, tensors


@dataclass(frozen=True)
class Inspection:
    """What a conversion would find; every field is plain data.

    `methods` are those that `convert` accepts with its other options left alone, `target_inputs` the inputs that the
    converted file takes beside the model's own. `problems` says in words what stands in the way of the others (no
    float input, an ambiguous score, no layer, ...); `gaps` lists the nodes on the path that have no derivative rule.
    `weights` says how many bytes of them are `inline`, in the file itself, and how many each `external` file has, by
    its location. `rectifiers` are masked by the guided rule, `passed_through` (smooth and leaky activations) only where
    that is asked for, `not_rectifiers` never: they only look like it; each with its reason. `surrogates` are the
    quantisers that the gradient goes straight through.

    `producer` and `opsets` (by domain) are the file's. `precision` has a `type`, or "mixed", and how many `tensors` are
    made in each; `quantisation` (None without) its `form` (QDQ, QOperator, dynamic, weights only), the types of its
    `weights` and `activations`, and how many nodes of which `operators` do it. `fused` counts, by operator, the nodes
    that are seen as plain ones, `recomputed` the nodes that a gradient which needs them computes again, by what they
    belong to.
    """

    file: str | None
    opset: int
    ir_version: int
    opset_raised: dict[str, Any] | None
    nodes: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    weights: dict[str, Any]
    producer: dict[str, str]
    opsets: dict[str, int]
    precision: dict[str, Any]
    quantisation: dict[str, Any] | None
    fused: dict[str, int]
    recomputed: dict[str, int]
    converted: dict[str, Any] | None
    explained: list[dict[str, Any]] = field(default_factory=list)
    score: dict[str, Any] | None = None
    methods: list[str] = field(default_factory=list)
    target_inputs: list[str] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    rectifiers: list[dict[str, str]] = field(default_factory=list)
    passed_through: list[dict[str, str]] = field(default_factory=list)
    not_rectifiers: list[dict[str, str]] = field(default_factory=list)
    surrogates: list[str] = field(default_factory=list)
    gaps: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def explainable(self) -> bool:
        """Whether there is anything that convert accepts with its options left alone."""
        return bool(self.methods)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(
    model: ModelLike,
    *,
    score: str = "auto",
    target: str = "required",
    target_tensor: str | None = None,
    class_axis: int | None = None,
    inputs: str | Sequence[str] | None = None,
    output: str | None = None,
) -> Inspection:
    """Read a model, plain or converted, and say what can be explained in it and what cannot.

    `score`, `target`, `target_tensor`, `class_axis`, `inputs` and `output` are those of `convert`: what is said is what
    such a conversion does. Raises ModelFileError where it is no usable ONNX model, OpsetError where it cannot be raised
    to opset 16, UnsupportedError where ONNX Runtime saved it for one machine, RequestError for options that contradict
    each other.
    """
    request = Request(score, target, target_tensor, class_axis, names("inputs", inputs) or None, output)
    source = read(model)
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    manifest = model_file.read_manifest(source)
    described = _described(source, path)
    ours, record = raised(source, weights_folder(model), in_place=path is not None)
    view = prepare(ours, weights_folder(model))
    findings = _findings(view, request) if manifest is None else {}
    return Inspection(
        **described,
        **deployed(ours, view),
        opset_raised=record,
        inputs=[_describe(tensor, view.stored) for tensor in view.graph.inputs],
        outputs=[_describe(tensor, view.stored) for tensor in view.graph.outputs],
        converted=None if manifest is None else asdict(manifest),
        **findings,
    )


def _described(model: onnx.ModelProto, path: Path | None) -> dict[str, Any]:
    """What is said of the model as it was read."""
    inline = sum(size(tensor) for tensor in tensors(model) if not uses_external_data(tensor))
    files = external_locations(model)
    external = {name: locate(path.parent, name).stat().st_size for name in files if path}
    return {
        "file": str(path) if path else None,
        "opset": next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None),
        "ir_version": model.ir_version,
        "nodes": len(model.graph.node),
        "weights": {"inline": inline, "external": external},
        **origin(model),
    }


def _findings(view: View, request: Request) -> dict[str, Any]:
    try:
        analysis = Analysis(view, request)
    except GraphgbpError as error:
        return {"problems": [str(error)]}
    layers, layer_problem = _layers(analysis)
    score_problem = _refusal(analysis.refuse_scoreless)
    refused = bool(score_problem or analysis.gaps)
    return {
        "explained": [image.describe() for image in analysis.images],
        "score": analysis.score.describe(),
        "methods": [m for m in METHODS if not refused and (layer_problem is None or m not in LAYER_METHODS)],
        "target_inputs": [] if refused else targets.input_roles(analysis.score, request.target),
        "layers": layers,
        "rectifiers": [rectifier.describe() for rectifier in analysis.rectifiers],
        "passed_through": [activation.describe() for activation in analysis.smooth],
        "not_rectifiers": [found.describe() for found in analysis.activations.look_alikes],
        "surrogates": analysis.surrogates,
        "gaps": [
            {
                "node": label(gap.node),
                "op": gap.node.op,
                "domain": gap.node.domain or "ai.onnx",
                "reason": gap.reason,
            }
            for gap in analysis.gaps
        ],
        "problems": [problem for problem in (score_problem, layer_problem) if problem],
    }


def _refusal(check: Callable[[], None]) -> str | None:
    """The words with which a check refuses."""
    try:
        check()
    except GraphgbpError as error:
        return str(error)
    return None


def _layers(analysis: Analysis) -> tuple[list[dict[str, Any]], str | None]:
    """The candidate layers, the chosen one marked, and why there is none."""
    try:
        chosen, problem = analysis.layer("auto").tensor.name, None
    except GraphgbpError as error:
        chosen, problem = None, str(error)
    return [{**layer.describe(), "chosen": layer.tensor.name == chosen} for layer in analysis.layers], problem


def _describe(tensor: gs.Tensor, stored: Stored) -> dict[str, Any]:
    dtype = stored.get(tensor.name, tensor.dtype)
    kind = None if dtype is None or isinstance(dtype, int) else np.dtype(dtype).name
    return {"name": tensor.name, "dtype": kind, "shape": None if tensor.shape is None else list(tensor.shape)}
