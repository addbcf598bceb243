"""Are the CAMs, Guided Grad-CAM and Input x Gradient put together as published? Worked out again in numpy.

The CAMs' weights stand here as their papers write them. One that divides by what all but cancels is as uncertain as its
features are, in float32: as far as rounding those moves it, the file's may be off.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from graphgbp import contract
from graphgbp.contract import role_of
from graphgbp.equivalence import Feeds, RunError
from graphgbp.verification.double import DoubleModel
from graphgbp.verification.masks import GUIDED, masked_maps
from graphgbp.verification.parts import part_for
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject

_TOLERANCE = 1e-4  # of the largest value
_MODES = {
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
}
_HALF = 2.0**-10  # where the tensor is rounded and what reads it is not
_STABLE = 1e-7  # pytorch-grad-cam's
_SLACK = 30  # times as far as rounding moves a map


class _Unknown(Exception):
    """A layout that is not worked out again."""


@dataclass(frozen=True)
class _Pair:
    """A tensor as the file gives it, as it should be, and how far off it may be, of the largest value."""

    what: str
    found: np.ndarray
    expected: np.ndarray
    tolerance: float = _TOLERANCE


def check_cams(subject: Subject) -> Check | None:
    """Features, the CAMs and Guided Grad-CAM; None where the file holds none of them."""
    name, manifest = "grad-cam", subject.manifest
    methods = set(manifest.methods)
    if methods.isdisjoint(contract.LAYER_METHODS):
        return None
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    if methods.isdisjoint(contract.CAMS):
        return unchecked(name, "the file does not give out the layer's features and gradients (methods: gradcam)")
    maps = masked_maps(subject, GUIDED) if contract.GUIDED_GRADCAM in methods else {}
    try:
        layers = [entry["tensor"] for entry in manifest.target_layers]
        wanted = [*manifest.names.values(), *maps.values(), *layers]
        values = subject.run(part_for(subject.file, _outputs_among(subject, wanted)), _feeds(subject))
        return _compared(name, list(_pairs(subject, values, _primals(subject, values, layers), maps)))
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run the file: {error}")
    except _Unknown as reason:
        return unchecked(name, str(reason))


def _primals(subject: Subject, values: Feeds, layers: Sequence[str]) -> list[Feeds]:
    """The layers' values by the forward pass. In few bits the runtime rounds by what else it is asked for: there also
    as the same run has them.
    """
    if subject.halves:
        return [values]
    if not subject.pins:
        return [subject.run(part_for(subject.graph, layers), subject.point)]
    return [subject.pinned(layers), *([values] if values.keys() >= set(layers) else [])]


def check_input_x_gradient(subject: Subject) -> Check | None:
    """Each explained input times its gradient; None where the file does not hold it."""
    name = "input x gradient"
    gradients, products = subject.gradients, subject.by_input(contract.INPUT_X_GRADIENT)
    if not products:
        return None
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    try:
        part = part_for(subject.file, [*products.values(), *gradients.values()])
        values = subject.run(part, _feeds(subject))
    except RunError as error:
        return failed(name, f"ONNX Runtime does not run the file: {error}")
    wide = {x: subject.point[x].astype(np.float64) for x in products}
    return _compared(name, [_Pair(y, values[y], wide[x] * values[gradients[x]]) for x, y in products.items()])


def _compared(name: str, pairs: Sequence[_Pair]) -> Check:
    worst = 0.0
    for pair in pairs:
        shape, expected = list(pair.found.shape), list(pair.expected.shape)
        if shape != expected:
            return failed(name, f"{pair.what} has shape {shape}, expected {expected}")
        off = _distance(pair.found, pair.expected)
        if not off <= pair.tolerance:
            return failed(name, f"{pair.what} is off by {off:.1e} of its largest value")
        worst = max(worst, off)
    return passed(name, f"{len(pairs)} tensors are as worked out again, within {worst:.1e}", error=worst)


def _distance(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, over the largest value."""
    return float(np.abs(found - expected).max(initial=0) / (np.abs(expected).max(initial=0) or 1.0))


def _feeds(subject: Subject) -> dict[str, np.ndarray]:
    return {**subject.point, **subject.targets}


def _outputs_among(subject: Subject, names: Sequence[str]) -> list[str]:
    inputs = {value.name for value in subject.model.graph.input}
    return [name for name in names if name not in inputs]


def _pairs(subject: Subject, values: dict[str, Any], primals: Sequence[Feeds], maps: dict[str, str]) -> Iterator[_Pair]:
    manifest, names = subject.manifest, subject.manifest.names
    several = len(manifest.target_layers) > 1
    layers: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
    for layer in manifest.target_layers:
        key: tuple[str, ...] = (layer["name"],) if several else ()
        features, gradients = (names[role_of(method, *key)] for method in contract.LAYER_OUTPUTS)
        expected = min((primal[layer["tensor"]] for primal in primals), key=partial(_distance, values[features]))
        yield _Pair(features, values[features], expected, _HALF if subject.halves else _TOLERANCE)
        layers[key] = _on_positions(layer, *(values[name].astype(np.float64) for name in (features, gradients)))
    groups = {(): [*layers.values()]} if manifest.options["aggregate"] else {key: [x] for key, x in layers.items()}
    images = {entry["name"]: entry for entry in manifest.inputs}
    signed = not manifest.options["relu_attributions"]
    for key, group in groups.items():
        for method in (cam for cam in contract.CAMS if cam in manifest.methods):
            cam = names[role_of(method, *key)]
            expected, moved = (
                _over(subject, _raw(method, x), manifest.input, signed) for x in (group, _rounded(group))
            )
            tolerance = max(_TOLERANCE, _SLACK * _distance(moved, expected))
            yield _Pair(cam, values[cam], expected, tolerance)
        for image, guided in maps.items():
            role = role_of(contract.GUIDED_GRADCAM, *key, *([image] if len(images) > 1 else []))
            if role in names:
                cams = _raw(contract.GRADCAM, group)
                product = values[guided] * _over(subject, cams, images[image], signed=False)
                yield _Pair(names[role], values[names[role]], product)


def _on_positions(layer: dict[str, Any], features: np.ndarray, gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A and dS/dA, [N, C, *positions]"""
    channels, grid = layer["channel_axis"], layer["grid"]
    a, da = (np.moveaxis(x, channels, 1) for x in (features, gradients))
    if grid is None:
        return a, da
    if channels != 2 or features.ndim != 3 or not all(isinstance(size, int) for size in grid):
        raise _Unknown(f"how the tokens of '{layer['tensor']}' are laid out is not worked out again")
    count = prod(grid)
    a, da = (x[:, :, x.shape[2] - count :].reshape(*x.shape[:2], *grid) for x in (a, da))
    return a, da


def _raw(method: str, layers: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """sum_k w_k A_k of each layer, [N, 1, *positions]"""
    with np.errstate(divide="ignore", invalid="ignore"):
        return [
            (a * np.nan_to_num(_WEIGHTS[method](a, da), posinf=0, neginf=0)).sum(1, keepdims=True) for a, da in layers
        ]


def _sum(x: np.ndarray) -> np.ndarray:
    return x.sum(tuple(range(2, x.ndim)), keepdims=True)


def _plus_plus(a: np.ndarray, da: np.ndarray) -> np.ndarray:
    alpha = da**2 / (2 * da**2 + _sum(a) * da**3)
    return _sum(np.where((da > 0) & np.isfinite(alpha), alpha * da, 0))


_WEIGHTS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    contract.GRADCAM: lambda a, da: _sum(da) / prod(da.shape[2:]),
    contract.HIRESCAM: lambda a, da: da,
    contract.LAYERCAM: lambda a, da: np.maximum(da, 0),
    contract.GRADCAM_PLUSPLUS: _plus_plus,
    contract.XGRADCAM: lambda a, da: _sum(a * da) / _sum(a),
}


def _rounded(layers: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The same with the last digits of float32 drawn anew."""
    rng, step = np.random.default_rng(0), np.finfo(np.float32).eps
    return [
        (a * (1 + rng.uniform(-step, step, a.shape)), da * (1 + rng.uniform(-step, step, a.shape))) for a, da in layers
    ]


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
