"""Are Grad-CAM and Guided Grad-CAM put together as published? Worked out again from what the file gives out."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from graphgbp import contract
from graphgbp.contract import role_of
from graphgbp.equivalence import RunError, outputs_of
from graphgbp.verification.double import DoubleModel
from graphgbp.verification.masks import GUIDED, masked_maps
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject, part_for

_TOLERANCE = 1e-4  # of the largest value
_MODES = {
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
}
_STABLE = 1e-7  # pytorch-grad-cam's


class _Unknown(Exception):
    """A layout that is not worked out again."""


def check_cams(subject: Subject) -> Check | None:
    """Features, Grad-CAM and Guided Grad-CAM; None where the file holds none of them."""
    name, manifest = "grad-cam", subject.manifest
    if not set(manifest.methods) & {contract.GRADCAM, contract.GUIDED_GRADCAM}:
        return None
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    if contract.GRADCAM not in manifest.methods:
        return unchecked(name, "the file does not give out the layer's features and gradients (methods: gradcam)")
    maps = masked_maps(subject, GUIDED) if contract.GUIDED_GRADCAM in manifest.methods else {}
    try:
        wanted = [*manifest.names.values(), *maps.values()]
        values = outputs_of(part_for(subject.file, _outputs_among(subject, wanted)), _feeds(subject))
        layers = [entry["tensor"] for entry in manifest.target_layers]
        primal = outputs_of(part_for(subject.graph, layers), subject.point)
        pairs = list(_pairs(subject, values, primal, maps))
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run the file: {error}")
    except _Unknown as reason:
        return unchecked(name, str(reason))
    worst = 0.0
    for what, found, expected in pairs:
        if found.shape != expected.shape:
            return failed(name, f"{what} has shape {list(found.shape)}, expected {list(expected.shape)}")
        off = float(np.abs(found - expected).max(initial=0) / (np.abs(expected).max(initial=0) or 1.0))
        if not off <= _TOLERANCE:
            return failed(name, f"{what} is off by {off:.1e} of its largest value")
        worst = max(worst, off)
    return passed(name, f"{len(pairs)} tensors are as worked out again, within {worst:.1e}", error=worst)


def _feeds(subject: Subject) -> dict[str, np.ndarray]:
    return {**subject.point, **subject.targets}


def _outputs_among(subject: Subject, names: Sequence[str]) -> list[str]:
    inputs = {value.name for value in subject.model.graph.input}
    return [name for name in names if name not in inputs]


def _pairs(
    subject: Subject, values: dict[str, Any], primal: dict[str, Any], maps: dict[str, str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(what, as the file gives it, as it should be)"""
    manifest, names = subject.manifest, subject.manifest.names
    several = len(manifest.target_layers) > 1
    raw: dict[tuple[str, ...], np.ndarray] = {}
    for layer in manifest.target_layers:
        key: tuple[str, ...] = (layer["name"],) if several else ()
        features, gradients = (names[role_of(method, *key)] for method in contract.LAYER_OUTPUTS)
        yield features, values[features], primal[layer["tensor"]]
        raw[key] = _raw(layer, *(values[name].astype(np.float64) for name in (features, gradients)))
    signed = not manifest.options["relu_attributions"]
    images = {entry["name"]: entry for entry in manifest.inputs}
    for key, cams in (
        {(): list(raw.values())} if manifest.options["aggregate"] else {k: [v] for k, v in raw.items()}
    ).items():
        cam = names[role_of(contract.GRADCAM, *key)]
        yield cam, values[cam], _over(subject, cams, manifest.input, signed)
        for image, guided in maps.items():
            role = role_of(contract.GUIDED_GRADCAM, *key, *([image] if len(images) > 1 else []))
            if role in names:
                product = values[guided] * _over(subject, cams, images[image], signed=False)
                yield names[role], values[names[role]], product


def _raw(layer: dict[str, Any], features: np.ndarray, gradients: np.ndarray) -> np.ndarray:
    """sum_k alpha_k A_k, [N, 1, *positions]"""
    channels, grid = layer["channel_axis"], layer["grid"]
    tensors = [np.moveaxis(x, channels, 1) for x in (features, gradients)]
    if grid is not None:
        if channels != 2 or features.ndim != 3 or not all(isinstance(size, int) for size in grid):
            raise _Unknown(f"how the tokens of '{layer['tensor']}' are laid out is not worked out again")
        count = prod(grid)
        tensors = [x[:, :, x.shape[2] - count :].reshape(*x.shape[:2], *grid) for x in tensors]
    a, da = tensors
    return (a * da.mean(tuple(range(2, da.ndim)), keepdims=True)).sum(1, keepdims=True)


def _over(subject: Subject, cams: Sequence[np.ndarray], image: dict[str, Any], signed: bool) -> np.ndarray:
    """Maps in the image's size and layout: one as it is, rectified unless `signed`; the mean of several, normalised."""
    mode = subject.manifest.options["interpolate_mode"]
    shape, layout = subject.point[image["name"]].shape, image["layout"]
    sizes = [size for size, axis in zip(shape, layout, strict=True) if axis not in "NC"]
    cams = [_without_single(cam, cam.ndim - len(shape)) for cam in cams]
    if subject.manifest.options["aggregate"]:
        resized = [np.maximum(_resized(_normalised(np.maximum(cam, 0)), sizes, mode), 0) for cam in cams]
        cam = _normalised(np.mean(resized, axis=0))
    else:
        cam = _resized(cams[0] if signed else np.maximum(cams[0], 0), sizes, mode)
    made = ["N", "C", *(axis for axis in layout if axis not in "NC")]
    return cam.transpose([made.index(axis) for axis in layout])


def _without_single(cam: np.ndarray, surplus: int) -> np.ndarray:
    """The map without as many axes of positions that hold only one."""
    single = [axis for axis in range(2, cam.ndim) if cam.shape[axis] == 1]
    return cam.squeeze(tuple(single[: max(0, surplus)]))


def _normalised(cam: np.ndarray) -> np.ndarray:
    axes = tuple(range(1, cam.ndim))
    above = cam - cam.min(axes, keepdims=True)
    return above / (above.max(axes, keepdims=True) + _STABLE)


def _resized(x: np.ndarray, sizes: Sequence[int], mode: str) -> np.ndarray:
    """By ONNX's own definition of Resize."""
    node = helper.make_node("Resize", ["x", "", "", "sizes"], ["y"], **_MODES[mode])
    graph = helper.make_graph(
        [node],
        "resize",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)],
        [numpy_helper.from_array(np.asarray([*x.shape[:2], *sizes], np.int64), "sizes")],
    )
    return DoubleModel(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])).run(["y"], {"x": x})[0]
