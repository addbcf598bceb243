"""Sampling against torch's own."""

import itertools

import numpy as np
import pytest
from torch.nn import functional as F

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.affine import matrix_and_offset
from tests.rules.harness import check_rule, normal, run, run_by_reference, single_op

TORCH_MODES = {"nearest": "nearest", "linear": "bilinear", "cubic": "bicubic"}


# -- on a grid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True, {0: [2, 3], 1: [1, 2]}, {0: [0], 1: [0]}])
@pytest.mark.parametrize("opset", [16, 20, 22])
@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_grid_sample(mode, padding, corners, opset, dynamic):
    for sizes in [(4, 5), (1, 3)]:
        check_rule(
            "GridSample",
            [normal(2, 3, *sizes), normal(2, 6, 7, 2, seed=1) * 1.2],
            lambda x, grid: F.grid_sample(x, grid, TORCH_MODES[mode], padding, bool(corners)),
            wrt=(0, 1),
            opset=opset,
            dynamic=dynamic,
            tolerance=1e-4,
            mode=TORCH_MODES[mode] if opset < 20 else mode,
            padding_mode=padding,
            align_corners=corners,
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_grid_sample_of_volumes(mode, padding, corners, dynamic):
    check_rule(
        "GridSample",
        [normal(2, 2, 3, 4, 5), normal(2, 3, 2, 4, 3, seed=1)],
        lambda x, grid: F.grid_sample(x, grid, TORCH_MODES[mode], padding, bool(corners)),
        wrt=(0, 1),
        opset=20,
        dynamic=dynamic,
        tolerance=1e-4,
        mode=mode,
        padding_mode=padding,
        align_corners=corners,
    )


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
def test_grid_that_hits_the_pixels(padding):
    """At a pixel the slope is that to its right."""
    grid = np.stack(np.meshgrid(np.arange(-4, 5) / 2, np.arange(-3, 4)), -1)[None].astype(np.float32)
    check_rule(
        "GridSample",
        [normal(1, 2, 3, 5), grid],
        lambda x, grid: F.grid_sample(x, grid, "bilinear", padding, True),
        wrt=(0, 1),
        padding_mode=padding,
        align_corners=1,
    )


@pytest.mark.parametrize("dynamic", [False, True, {0: [0]}])
@pytest.mark.parametrize("corners", [0, 1])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (3, 1, 2, 4), (2, 3, 4, 2, 3)])
def test_affine_grid(size, corners, dynamic):
    rank = len(size) - 2
    for constants in ([1], []):
        check_rule(
            "AffineGrid",
            [normal(size[0], rank, rank + 1), np.asarray(size, np.int64)],
            lambda theta, size: F.affine_grid(theta, size.tolist(), bool(corners)),
            opset=20,
            dynamic=dynamic if constants else {0: [0]},
            constants=constants,
            align_corners=corners,
        )


# -- in regions ------------------------------------------------------------------------------------------------------

REGIONS = [
    [0, 0, 8, 6],
    [2.5, 1.2, 5.1, 9.7],
    [-3, -2, 4, 30],
    [6, 5, 6.2, 5.1],
    [7, 5, 2, 1],
    [3, 3, 3, 3],
    [20, 1, 25, 3],
]


@pytest.mark.parametrize("coordinates", ["half_pixel", "output_half_pixel"])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("dynamic", [False, {0: range(4), 1: [0], 2: [0]}])
def test_roi_align(coordinates, sampling_ratio, dynamic):
    """Against the matrix of the untouched model; regions of every kind, also empty ones and ones off the image."""
    attributes = {"sampling_ratio": sampling_ratio, "coordinate_transformation_mode": coordinates, "dynamic": dynamic}
    for constants, scale in itertools.product([(1, 2), ()], [1.0, 0.6]):
        check_roi_align(normal(3, 2, 5, 7), constants, opset=16, spatial_scale=scale, **attributes)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_roi_align_of_opset_22(sampling_ratio):
    """By ONNX's evaluator, as ONNX Runtime's CPU provider does not have it yet."""
    check_roi_align(normal(3, 1, 3, 4), (), opset=22, by_reference=True, sampling_ratio=sampling_ratio)


def check_roi_align(x, constants, by_reference=False, **attributes):
    inputs = [x, np.asarray(REGIONS, np.float32), np.asarray([0, 2, 2, 0, 2, 0, 2], np.int64)]
    attributes |= {"constants": constants, "output_height": 3, "output_width": 2}
    matrix, offset = matrix_and_offset(single_op("RoiAlign", inputs, **attributes), inputs, constants, by_reference)
    evaluate = run_by_reference if by_reference else run
    check_rule("RoiAlign", inputs, lambda x, *_: matrix @ x.flatten() + offset, evaluate=evaluate, **attributes)


def test_roi_align_by_the_maximum_is_refused():
    inputs = [normal(1, 1, 4, 4), np.asarray(REGIONS[:1], np.float32), np.zeros(1, np.int64)]
    with pytest.raises(UnsupportedOperatorError, match="mode=max"):
        graphgbp.vjp(single_op("RoiAlign", inputs, opset=16, mode="max", output_height=2), inputs=["x0"])


def test_the_gradient_to_the_regions_is_refused():
    inputs = [normal(1, 1, 4, 4), np.asarray(REGIONS[:1], np.float32), np.zeros(1, np.int64)]
    with pytest.raises(UnsupportedOperatorError, match="no rule gives the gradient to its input 1"):
        graphgbp.vjp(single_op("RoiAlign", inputs, opset=16, output_height=2), inputs=["x0", "x1"])
