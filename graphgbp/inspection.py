"""What can be explained in a model, said before anything is converted."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphgbp import model_file
from graphgbp.analysis import Analysis
from graphgbp.errors import GraphgbpError
from graphgbp.nodes import label
from graphgbp.prepare import View, prepare
from graphgbp.source import ModelLike, raised, read, weights_folder


@dataclass(frozen=True)
class Inspection:
    """What a conversion would find; every field is plain data.

    `problems` says in words what stands in the way (no float input, an ambiguous score, ...); `gaps` lists the nodes
    on the path that have no derivative rule. Both empty: the model can be explained. `rectifiers` are masked by the
    guided rule, `passed_through` (smooth and leaky activations) only where that is asked for, `not_rectifiers` never:
    they only look like it; each with its reason.
    """

    file: str | None
    opset: int
    ir_version: int
    opset_raised: dict[str, Any] | None
    nodes: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    explained: list[dict[str, Any]]
    score: dict[str, Any] | None
    layers: list[dict[str, Any]]
    rectifiers: list[dict[str, str]]
    passed_through: list[dict[str, str]]
    not_rectifiers: list[dict[str, str]]
    gaps: list[dict[str, str]]
    problems: list[str]
    converted: dict[str, Any] | None

    @property
    def explainable(self) -> bool:
        """Whether convert accepts the model with default options for guided backpropagation and saliency."""
        return not self.gaps and self.score is not None and self.converted is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: ModelLike) -> Inspection:
    """Read a model, plain or converted, and say what can be explained in it and what cannot.

    Raises ModelFileError where it is no usable ONNX model, OpsetError where it cannot be raised to opset 16.
    """
    source = read(model)
    path = None if isinstance(model, onnx.ModelProto) else Path(model)
    manifest = model_file.read_manifest(source)
    ours, record = raised(source, weights_folder(model))
    view = prepare(ours, weights_folder(model))
    findings = _findings(view) if manifest is None else {}
    empty: dict[str, Any] = {
        "explained": [], "score": None, "layers": [], "rectifiers": [], "passed_through": [], "not_rectifiers": [],
        "gaps": [], "problems": [],
    }  # fmt: skip
    return Inspection(
        file=str(path) if path else None,
        opset=next(entry.version for entry in source.opset_import if entry.domain in ("", "ai.onnx")),
        ir_version=source.ir_version,
        opset_raised=record,
        nodes=len(source.graph.node),
        inputs=[_describe(tensor) for tensor in view.graph.inputs],
        outputs=[_describe(tensor) for tensor in view.graph.outputs],
        converted=None if manifest is None else asdict(manifest),
        **{**empty, **findings},
    )


def _findings(view: View) -> dict[str, Any]:
    try:
        analysis = Analysis(view)
    except GraphgbpError as error:
        return {"problems": [str(error)]}
    layers, problem = _layers(analysis)
    return {
        "explained": [image.describe() for image in analysis.images],
        "score": analysis.score.describe(),
        "layers": layers,
        "rectifiers": [rectifier.describe() for rectifier in analysis.rectifiers],
        "passed_through": [activation.describe() for activation in analysis.smooth],
        "not_rectifiers": [found.describe() for found in analysis.activations.look_alikes],
        "gaps": [
            {
                "node": label(gap.node),
                "op": gap.node.op,
                "domain": gap.node.domain or "ai.onnx",
                "reason": gap.reason,
            }
            for gap in analysis.gaps
        ],
        "problems": [problem] if problem else [],
    }


def _layers(analysis: Analysis) -> tuple[list[dict[str, Any]], str | None]:
    """The candidate layers, the chosen one marked, and why there is none."""
    try:
        chosen, problem = analysis.layer("auto").tensor.name, None
    except GraphgbpError as error:
        chosen, problem = None, str(error)
    return [{**layer.describe(), "chosen": layer.tensor.name == chosen} for layer in analysis.layers], problem


def _describe(tensor: gs.Tensor) -> dict[str, Any]:
    kind = None if tensor.dtype is None or isinstance(tensor.dtype, int) else np.dtype(tensor.dtype).name
    return {"name": tensor.name, "dtype": kind, "shape": None if tensor.shape is None else list(tensor.shape)}
