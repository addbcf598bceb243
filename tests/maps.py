"""Explain a model as a user does and hold the maps to a reference."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

import graphgbp
from graphgbp import contract
from tests.rules.harness import run


def explain(
    model: onnx.ModelProto,
    images: np.ndarray,
    targets: np.ndarray,
    methods: Sequence[str] = contract.METHODS,
    **options: Any,
) -> dict[str, np.ndarray]:
    """Every output of the converted model for the input `image`; of a segmentation, every pixel counts."""
    explained = graphgbp.convert(model, methods, **options)
    feeds = {"image": images, "target": targets}
    if explained.graph.input[-1].name == contract.TARGET_MASK:
        feeds[contract.TARGET_MASK] = np.ones((1, 1, 1), np.float32)
    return run(explained, feeds)


def relative_l2(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest over the batch of |got - expected| / |expected|."""
    assert got.shape == expected.shape, f"shape {got.shape}, expected {expected.shape}"
    got, expected = (value.reshape(len(value), -1).astype(np.float64) for value in (got, expected))
    size = np.linalg.norm(expected, axis=1)
    assert (size > 0).all(), "an all-zero reference shows nothing"
    return float((np.linalg.norm(got - expected, axis=1) / size).max())


def assert_maps_equal(
    got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], what: str, tolerance: float = 1e-4
) -> None:
    """Assert that each expected map is there, float32, and equal to the tolerance in relative L2, image by image."""
    assert expected and all(got[name].dtype == np.float32 for name in expected)
    errors = {name: relative_l2(got[name], value) for name, value in expected.items()}
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"{what}: {wrong}"
