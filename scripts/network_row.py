"""One network by one exporter, measured: what graphgbp writes into it against what torch says in float64."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch_export
import torch_reference as reference
import vision_networks
from cam_row import cam_row
from network_task import IMAGES, Task, task_of
from torch import Tensor, nn
from vision_networks import Network

import graphgbp
from graphgbp.contract import Manifest
from graphgbp.model_file import read_manifest

FUSION = 1e-5
"""How far outputs may move where the runtime fuses other nodes than before; unoptimised, not a bit."""
SLACK, FLOOR = 3.0, 1e-4
"""A map may be this many times as far from float64 as torch's own float32 map is, plus the floor."""

MOVED = 6
"""How many times a network with rectifiers is computed with its input moved in the last place."""


@dataclass
class Explained:
    """A network exported and converted, and what ONNX Runtime then gives."""

    exporter: str
    opset: int
    nodes: int
    nodes_after: int
    manifest: Manifest
    seconds: float
    dynamic_batch: bool
    faults: list[str]
    moved: float
    moved_unoptimised: float
    maps: dict[str, np.ndarray]


def explained(network: Network, module: nn.Module, images: Tensor, exporter: str, task: Task) -> Explained:
    """Export, convert and run. Raises ExportError, GraphgbpError."""
    try:
        model, dynamic_batch = torch_export.export(module, images, network.outputs, exporter), True
    except torch_export.ExportError:
        model = torch_export.export(module, images, network.outputs, exporter, dynamic_batch=False)
        dynamic_batch = False
    start = time.perf_counter()
    converted = graphgbp.convert(model, task.methods, **task.options)
    seconds = time.perf_counter() - start
    feeds = {torch_export.INPUT: images.numpy()}
    before, after = run(model, feeds), run(converted, feeds | task.feeds)
    moved = moved_unoptimised = _farthest(before, after)
    if moved:  # the runtime fuses nodes only where nobody else reads what is between them
        before, plain = (run(m, f, optimised=False) for m, f in ((model, feeds), (converted, feeds | task.feeds)))
        moved_unoptimised = _farthest(before, plain)
    manifest = read_manifest(converted)
    assert manifest is not None
    return Explained(
        exporter=exporter,
        opset=model.opset_import[0].version,
        nodes=len(model.graph.node),
        nodes_after=len(converted.graph.node),
        manifest=manifest,
        seconds=seconds,
        dynamic_batch=dynamic_batch,
        faults=_changes(model, converted) + ([] if task.options else _surprises(model, manifest)),
        moved=moved,
        moved_unoptimised=moved_unoptimised,
        maps=after,
    )


def _changes(model: onnx.ModelProto, converted: onnx.ModelProto) -> list[str]:
    """The parts of the original that are not byte for byte the converted model's first."""
    changed = []
    for part in ("node", "initializer", "input", "output", "value_info"):
        ours, original = getattr(converted.graph, part), getattr(model.graph, part)
        kept = zip(ours[: len(original)], original, strict=True)
        if any(a.SerializeToString(deterministic=True) != b.SerializeToString(deterministic=True) for a, b in kept):
            changed.append(f"{part}s changed")
    return changed


def _surprises(model: onnx.ModelProto, done: Manifest) -> list[str]:
    """What `inspect` says before a conversion and the conversion did not do."""
    said = graphgbp.inspect(model)
    chosen = [layer["tensor"] for layer in said.layers if layer["chosen"]]
    surprises = [f"inspect reports {problem}" for problem in said.problems]
    if said.rectifiers != done.rectifiers:
        surprises.append("inspect finds other rectifiers")
    if done.target_layer is not None and chosen != [done.target_layer["tensor"]]:
        surprises.append("inspect chooses another layer")
    return surprises


def _farthest(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float:
    """How far the original's outputs have moved: 0 means no bit differs."""
    moved = [name for name, array in before.items() if array.tobytes() != after[name].tobytes()]
    return max((reference.relative(after[name], before[name]) for name in moved), default=0.0)


def run(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray], optimised: bool = True) -> dict[str, np.ndarray]:
    """Every output, by ONNX Runtime's CPU provider on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@dataclass
class Reference:
    """torch's maps in float64 and, rounded in several ways, in float32, and the rectifiers it calls."""

    plain: reference.Maps
    guided: np.ndarray
    guided_by: str
    rectifiers: int
    in_float32: list[tuple[reference.Maps, np.ndarray]]


def refer(module: nn.Module, images: Tensor, task: Task, features: Sequence[np.ndarray]) -> Reference:
    """Everything torch has to say, `features` being those of the target layers that were chosen."""
    called, seen_by_captum = reference.rectifier_calls(module, images)
    captum = 0 < seen_by_captum == called

    def both(network: nn.Module, images: Tensor) -> tuple[reference.Maps, np.ndarray]:
        plain = reference.maps(network, images, task.score_of, features=features)
        if not called:
            return plain, plain.gradient
        if captum:
            return plain, reference.captum_guided(network, images, task.score_of)
        return plain, reference.maps(network, images, task.score_of, guided=True).gradient

    double = reference.out_of_place(module, torch.float64)
    plain, guided = both(double, images)
    own = reference.maps(double, images, task.score_of, guided=True).gradient if captum else guided
    if reference.relative(own, guided) > 1e-9:
        raise AssertionError("Captum, and the guided rule laid over torch's functions, disagree in float64")
    by = "Captum" if captum else f"functions ({seen_by_captum} modules)" if called else "no rectifier"
    in_float32 = [both(*one) for one in reference.in_float32(module, images, MOVED if called else 0)]
    return Reference(plain, guided, by, called, in_float32)


@dataclass
class Distance:
    """The relative L2 distance from torch's float64 map: ours, and the farthest of torch's own float32 maps."""

    ours: float
    float32: float

    @property
    def bound(self) -> float:
        return SLACK * self.float32 + FLOOR

    @property
    def holds(self) -> bool:
        return self.ours <= self.bound


def distances(
    network: Network, task: Task, maps: Mapping[str, np.ndarray], torchs: Reference, layer: int
) -> dict[str, Distance]:
    """Of each map that was asked for; `layer` is the number of its target layer in the reference."""
    far = {
        "gradient": Distance(
            reference.relative(maps["saliency"], torchs.plain.gradient),
            max(reference.relative(plain.gradient, torchs.plain.gradient) for plain, _ in torchs.in_float32),
        ),
        "guided": Distance(
            reference.relative(maps["guided_backprop"], torchs.guided),
            max(reference.relative(guided, torchs.guided) for _, guided in torchs.in_float32),
        ),
    }
    if "gradcam" in task.methods:
        size = (network.size, network.size)

        def parts(one: reference.LayerMaps) -> tuple[np.ndarray, ...]:
            return one.features, one.gradients, reference.grad_cam(one, network.channels_last, size)

        exact = parts(torchs.plain.layers[layer])
        ours = (maps["gradcam_features"], maps["gradcam_gradients"], maps["gradcam"])
        theirs = [parts(plain.layers[layer]) for plain, _ in torchs.in_float32]
        far["gradcam"] = Distance(
            max(map(reference.relative, ours, exact)), max(max(map(reference.relative, one, exact)) for one in theirs)
        )
    return far


def rows(network: Network, exporters: Sequence[str]) -> list[dict[str, Any]]:
    """The table's rows for one network, plain data."""
    torch.set_num_threads(1)
    module = vision_networks.make(network)
    images = vision_networks.example(network, IMAGES, seed=7)
    with torch.no_grad():
        result = module(images)
    task = task_of(network, [result] if isinstance(result, Tensor) else list(result))
    found: dict[str, Explained | Exception] = {}
    for exporter in exporters:
        try:
            found[exporter] = explained(network, module, images, exporter, task)
        except (torch_export.ExportError, graphgbp.GraphgbpError) as error:
            found[exporter] = error
    done = [one for one in found.values() if isinstance(one, Explained)]
    features = [one.maps["gradcam_features"] for one in done if "gradcam" in task.methods]
    torchs = refer(module, images, task, features) if done else None
    made: list[dict[str, Any]] = []
    for exporter, one in found.items():
        row = {"network": network.name, "library": network.library, "size": network.size, "exporter": exporter}
        if not isinstance(one, Explained) or torchs is None:
            row["verdict"] = f"{'not exported' if isinstance(one, torch_export.ExportError) else 'refused'}: {one}"
        else:
            row |= _measured(network, task, one, torchs, done.index(one))
            if network.layer:
                row["cam"] = cam_row(network, network.layer, module, images, task.classes, one.maps)
        made.append(row)
    return made


def _measured(network: Network, task: Task, one: Explained, torchs: Reference, layer: int) -> dict[str, Any]:
    far = distances(network, task, one.maps, torchs, layer)
    manifest = one.manifest
    return {
        "explained": task.words,
        "batch": "any" if one.dynamic_batch else str(IMAGES),
        "opset": one.opset,
        "nodes": one.nodes,
        "nodes_after": one.nodes_after,
        "seconds": round(one.seconds, 2),
        "faults": one.faults,
        "moved": one.moved,
        "moved_unoptimised": one.moved_unoptimised,
        "distances": {
            name: {"ours": d.ours, "float32": d.float32, "bound": d.bound, "holds": d.holds} for name, d in far.items()
        },
        "guided_by": torchs.guided_by,
        "rectifiers": len(manifest.rectifiers),
        "rectifiers_called": torchs.rectifiers,
        "layer": torchs.plain.layers[layer].place if torchs.plain.layers else None,
        "layer_tensor": manifest.target_layer and manifest.target_layer["tensor"],
        "verdict": _verdict(one, far, len(manifest.rectifiers), torchs.rectifiers),
    }


def _verdict(one: Explained, far: Mapping[str, Distance], found: int, called: int) -> str:
    faults = [f"{name} {d.ours:.1e} > {d.bound:.1e}" for name, d in far.items() if not d.holds]
    faults += one.faults
    if one.moved_unoptimised or one.moved > FUSION:
        faults.append(f"outputs moved by {one.moved:.0e}, {one.moved_unoptimised:.0e} unoptimised")
    if found != called:
        faults.append(f"{found} rectifiers found, torch calls {called}")
    return "right" if not faults else "wrong: " + "; ".join(faults)
