"""Resize against torch where the two agree, and everywhere against the matrix of the untouched model."""

import itertools
import random

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from graphgbp.kernels import missing_kernels
from tests.build import model
from tests.rules.affine import matrix_and_offset
from tests.rules.harness import check_rule, normal, run, single_op

COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]
EVERY_SIZE = {0: range(4)}
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def vector(*values):
    return np.asarray(values, np.float32)


def whole(*values):
    return np.asarray(values, np.int64)


def check(x, roi=None, scales=None, sizes=None, *, opset=19, dynamic=False, constants=(1, 2, 3), **attributes):
    """Against y = A x + b, whose columns come from running the model, as it was given, on each unit image."""
    inputs = [x, roi, scales, sizes]
    while inputs[-1] is None:
        inputs.pop()
    constants = [index for index in constants if index < len(inputs) and inputs[index] is not None]
    model = single_op("Resize", inputs, opset=opset, constants=constants, dynamic=dynamic, **attributes)
    matrix, offset = matrix_and_offset(model, inputs, constants)
    reference = lambda image, *_: matrix @ image.flatten() + offset  # noqa: E731
    check_rule("Resize", inputs, reference, opset=opset, constants=constants, dynamic=dynamic, **attributes)


# -- as torch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, {0: [0]}, {0: [2, 3]}, True])
@pytest.mark.parametrize("opset", [16, 18, 26])
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("sizes", [(8, 6), (2, 9), (1, 1), (4, 3)])
def test_interpolate(mode, corners, sizes, opset, dynamic):
    coordinates = "align_corners" if corners else "half_pixel"
    options = {"mode": mode, "coordinate_transformation_mode": coordinates, "opset": opset, "dynamic": dynamic}
    check_rule(
        "Resize",
        [normal(2, 3, 4, 3), None, None, whole(2, 3, *sizes)],
        lambda x, *_: F.interpolate(x, sizes, mode=f"bi{mode}", align_corners=corners),
        tolerance=2e-5,
        **options,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("sizes", [(5,), (4, 6), (2, 3, 4)])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize(
    ("coordinates", "rounding"),
    [("asymmetric", "floor"), ("half_pixel", "round_prefer_floor"), ("half_pixel_symmetric", "round_prefer_ceil")],
)
def test_nearest_by_a_whole_factor(coordinates, rounding, factor, sizes, dynamic):
    attributes = {"mode": "nearest", "coordinate_transformation_mode": coordinates, "nearest_mode": rounding}
    scales = vector(1, 1, *[factor] * len(sizes))
    reference = lambda x, *_: F.interpolate(x, scale_factor=factor)  # noqa: E731
    check_rule("Resize", [normal(2, 3, *sizes), None, scales], reference, opset=19, dynamic=dynamic, **attributes)


def test_nearest_by_a_whole_factor_is_a_pooling():
    for attributes in ({"nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}, {}):
        for dynamic in (False, True):
            inputs = [normal(1, 2, 3, 3), None, vector(1, 1, 2, 3)]
            model = single_op("Resize", inputs, opset=18, constants=[2], dynamic=dynamic, mode="nearest", **attributes)
            assert [node.op_type for node in graphgbp.vjp(model).graph.node[1:]] == ["AveragePool", "Mul", "Identity"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_trilinear(dynamic):
    check_rule(
        "Resize",
        [normal(1, 2, 3, 4, 2), None, vector(1, 1, 2, 1.5, 2.5)],
        lambda x, *_: F.interpolate(x, (6, 6, 5), mode="trilinear"),
        mode="linear",
        dynamic=dynamic,
    )


# -- as the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coordinates", [*COORDINATES, "half_pixel_symmetric"])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("scales", [(2, 2), (0.6, 1.6), (1.3, 0.4), (3, 1)])
def test_every_coordinate_rule(mode, coordinates, scales):
    roundings = ROUNDINGS if mode == "nearest" else ["round_prefer_floor"]
    for rounding, dynamic in itertools.product(roundings, [False, {0: [2, 3]}]):
        check(
            normal(1, 2, 4, 5),
            scales=vector(1, 1, *scales),
            dynamic=dynamic,
            mode=mode,
            nearest_mode=rounding,
            coordinate_transformation_mode=coordinates,
        )


@pytest.mark.parametrize("exclude", [0, 1])
@pytest.mark.parametrize("coefficient", [-0.5, -0.75])
@pytest.mark.parametrize("antialias", [0, 1])
def test_cubic(coefficient, exclude, antialias):
    attributes = {"mode": "cubic", "cubic_coeff_a": coefficient, "exclude_outside": exclude, "antialias": antialias}
    for sizes in [(8, 7), (2, 2), (5, 3)]:
        check(normal(1, 1, 4, 5), sizes=whole(1, 1, *sizes), **attributes)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_antialiased_linear(coordinates, dynamic):
    for scales in [(0.5, 0.4), (2, 0.7), (0.75, 1)]:
        check(
            normal(1, 1, 6, 5),
            scales=vector(1, 1, *scales),
            dynamic=dynamic,
            mode="linear",
            antialias=1,
            coordinate_transformation_mode=coordinates,
        )


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("constants", [(1, 2, 3), (2, 3), (1,), ()])
def test_crop_and_resize(mode, constants):
    attributes = {"mode": mode, "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 2.5}
    roi = vector(0, 0, 0.1, -0.4, 1, 1, 0.8, 1.3)
    for sizes, dynamic in itertools.product([(3, 6), (4, 5), (8, 1)], [False, EVERY_SIZE]):
        options = {"constants": constants, "dynamic": dynamic, **attributes}
        check(normal(1, 2, 4, 5), roi, sizes=whole(1, 2, *sizes), **options)
        check(normal(1, 2, 4, 5), roi, scales=vector(1, 1, *np.divide(sizes, (4, 5))), opset=16, **options)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("opset", [16, 19])
def test_what_comes_at_run_time(mode, opset):
    for sizes, dynamic in itertools.product([(8, 7), (4, 7), (4, 5)], [False, EVERY_SIZE]):
        options = {"opset": opset, "dynamic": dynamic, "constants": (), "mode": mode}
        check(normal(1, 2, 4, 5), sizes=whole(1, 2, *sizes), **options)
        check(normal(1, 2, 4, 5), scales=vector(1, 1, *np.divide(sizes, (4, 5))), **options)


@pytest.mark.parametrize("dynamic", [False, EVERY_SIZE])
def test_scales_that_change_no_size(dynamic):
    """ONNX Runtime copies there: but where another axis grows, it interpolates this one too."""
    for mode, constants in itertools.product(["nearest", "linear", "cubic"], [(2,), ()]):
        options = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "constants": constants}
        for scales in [(1.3, 1.2), (1.3, 2)]:
            check(normal(1, 1, 3, 4), scales=vector(1, 1, *scales), dynamic=dynamic, **options)


@pytest.mark.parametrize("axes", [[2, 3], [3, 2], [-1], [-3, -2]])
def test_axes(axes):
    x, dynamic = normal(2, 3, 4, 5), EVERY_SIZE
    for mode in ["nearest", "linear"]:
        check(x, scales=vector(2, 0.5, 1.4)[: len(axes)], opset=18, mode=mode, axes=axes)
        check(x, sizes=whole(7, 3)[: len(axes)], dynamic=dynamic, mode=mode, axes=axes)


def test_any_axis_may_be_resized():
    for shape, scales in [((4, 5), (1.5, 2)), ((3,), (2,)), ((2, 3, 4), (2, 1.5, 0.5)), ((1, 2, 3, 2), (3, 2, 0.7, 2))]:
        for dynamic in (False, {0: range(len(shape))}):
            check(normal(*shape), scales=vector(*scales), dynamic=dynamic, mode="nearest")
    check(normal(2, 3, 4, 3), scales=vector(1, 2, 1.5, 1), mode="linear")


def test_random_resizes():
    choose = random.Random(0)
    for _ in range(150):
        mode = choose.choice(["nearest", "linear", "cubic"])
        x = normal(*[1, 2, choose.randint(1, 6), choose.randint(1, 6)])
        sizes = [choose.randint(1, 9), choose.randint(1, 9)]
        steps = [(size + choose.choice([0.25, 0.5])) / n for size, n in zip(sizes, x.shape[2:], strict=True)]
        by_size = choose.random() < 0.5
        check(
            x,
            scales=None if by_size else vector(1, 1, *steps),
            sizes=whole(1, 2, *sizes) if by_size else None,
            opset=choose.choice([16, 18, 19, 26]),
            dynamic={0: choose.sample(range(4), choose.randint(0, 4))},
            constants=choose.choice([(2, 3), ()]),
            mode=mode,
            coordinate_transformation_mode=choose.choice(COORDINATES),
            nearest_mode=choose.choice(ROUNDINGS),
            exclude_outside=choose.randint(0, 1) if mode == "cubic" else 0,
        )


def test_empty_optional_inputs():
    """As exporters before opset 13 wrote them."""
    check(normal(1, 1, 3, 4), vector(), vector(), whole(1, 1, 5, 5), mode="linear")


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_one_axis_keeps_its_aspect_ratio_by_itself(policy):
    check(normal(2, 3, 4), sizes=whole(7), mode="linear", axes=[2], keep_aspect_ratio_policy=policy)


# -- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "attributes", "reason"),
    [
        (
            [None, None, whole(7, 8)],
            {"axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"},
            "over several",
        ),
        (
            [vector(0, 0, 0, 0, 1, 1, 1, 1), vector(1, 1, 2, 2)],
            {"antialias": 1, "mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize"},
            "antialias together with",
        ),
        ([None, vector(1, 1, 1.6666666, 2)], {}, "round its scales to different sizes"),
    ],
)
def test_refused(inputs, attributes, reason):
    constants = [index for index, value in enumerate(inputs, start=1) if value is not None]
    model = single_op("Resize", [normal(1, 1, 3, 4), *inputs], opset=19, constants=constants, **attributes)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        graphgbp.vjp(model)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_every_node_has_a_kernel_on_cuda(mode, dtype):
    for opset, constants, scales in itertools.product([16, 19, 26], [[2], []], [(2, 2), (1.5, 1)]):
        inputs = [normal(1, 2, 3, 4).astype(dtype), None, vector(1, 1, *scales)]
        for dynamic in (False, EVERY_SIZE):
            made = single_op("Resize", inputs, opset=opset, constants=constants, dynamic=dynamic, mode=mode)
            explained = graphgbp.vjp(made, inputs=["x0"])
            assert not missing_kernels("CUDAExecutionProvider", explained, list(explained.graph.node))


def test_equal_sizes_are_known_to_be_equal():
    """A Resize by 2 and a ConvTranspose by 2 meet in a sum: whether it broadcasts is not asked at run time."""
    nodes = [
        'up = Resize<mode="linear">(x, , scales)',
        "learned = ConvTranspose<strides=[2, 2], pads=[1, 1, 1, 1]>(x, w)",
        "y = Add(up, learned)",
    ]
    weights = {"scales": vector(1, 1, 2, 2), "w": normal(3, 3, 4, 4, seed=1)}
    made = model(nodes, {"x": ("n", 3, "h", "w")}, ["y"], weights)
    explained = graphgbp.vjp(made)
    assert not {"NonZero", "ReduceSum"} & {node.op_type for node in explained.graph.node}
    x = torch.from_numpy(normal(2, 3, 4, 5)).double().requires_grad_()
    up = F.interpolate(x, scale_factor=2, mode="bilinear")
    dy = torch.from_numpy(normal(*up.shape, seed=2)).double()
    (up + F.conv_transpose2d(x, torch.from_numpy(weights["w"]).double(), stride=2, padding=1)).backward(dy)
    got = run(explained, {"x": x.detach().float().numpy(), "y_grad": dy.float().numpy()})["x_grad"]
    np.testing.assert_allclose(got, x.grad.numpy(), atol=1e-5)


def test_no_matrix_is_stored():
    inputs = [normal(1, 1, 64, 64), None, vector(1, 1, 1.5, 2.5)]
    explained = graphgbp.vjp(single_op("Resize", inputs, opset=18, constants=[2], mode="linear"))
    assert max(onnx.numpy_helper.to_array(tensor).size for tensor in explained.graph.initializer) <= 8
