from functools import partial

import numpy as np
import pytest
import torch

import graphgbp
from tests.rules.harness import assert_close, check_rule, normal, run, single_op

OPSETS = (16, 18, 19, 21, 23, 24, 26)  # each has another version of some operator
LOWEST, HIGHEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def by_place(move):
    """A movement written for numpy arrays, as a torch function: it moves the places, torch takes the elements there."""

    def reference(x, *arguments):
        numbers = np.arange(x.numel()).reshape(x.shape)
        moved = move(numbers, *(None if value is None else value.detach().numpy() for value in arguments))
        taken = x.reshape(-1)[torch.from_numpy(np.maximum(moved, 0))]
        return torch.where(torch.from_numpy(moved < 0), 0.0, taken)

    return reference


# -- shape -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_reshape(known, dynamic, opset):
    x, shape = normal(2, 3, 4, 5), ints(0, -1, 5)
    options = {"constants": [1] if known else [], "opset": opset, "dynamic": dynamic}
    check_rule("Reshape", [x, shape], lambda x, _: x.reshape(2, 12, 5), **options)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, 4, -1, None])
def test_flatten(axis, dynamic, opset):
    attributes = {} if axis is None else {"axis": axis}
    lead = int(np.prod((2, 3, 4, 5)[: 1 if axis is None else axis]))
    check_rule(
        "Flatten", [normal(2, 3, 4, 5)], lambda x: x.reshape(lead, -1), opset=opset, dynamic=dynamic, **attributes
    )


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axes", [[1], [-1], [3, 1]])
def test_squeeze(axes, known, dynamic, opset):
    x = normal(2, 1, 3, 1)
    options = {"constants": [1] if known else [], "opset": opset, "dynamic": dynamic}
    shape = np.squeeze(x, tuple(axes)).shape
    check_rule("Squeeze", [x, ints(*axes)], lambda x, _: x.reshape(shape), **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_squeeze_of_every_axis_of_size_one(dynamic):
    check_rule("Squeeze", [normal(2, 1, 3, 1)], torch.squeeze, dynamic=dynamic)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axes", [[0], [-1], [3, 0], [1, 2]])
def test_unsqueeze(axes, known, dynamic, opset):
    x = normal(2, 3)
    options = {"constants": [1] if known else [], "opset": opset, "dynamic": dynamic}
    shape = np.expand_dims(x, tuple(axes)).shape
    check_rule("Unsqueeze", [x, ints(*axes)], lambda x, _: x.reshape(shape), **options)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("perm", [None, [0, 2, 3, 1], [0, 3, 1, 2], [3, 0, 2, 1], [0, 1, 2, 3]])
def test_transpose(perm, dynamic, opset):
    attributes = {} if perm is None else {"perm": perm}
    order = perm or [3, 2, 1, 0]
    check_rule(
        "Transpose", [normal(2, 3, 4, 5)], lambda x: x.permute(order), opset=opset, dynamic=dynamic, **attributes
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1), (1, 1), (1, 4), (5, 2, 3, 4)])
def test_expand(shape, known, dynamic):
    """The shape broadcasts with x's own: (1, 1) leaves it as it is."""
    wide = torch.broadcast_shapes((3, 1), shape)
    options = {"constants": [1] if known else [], "dynamic": dynamic}
    check_rule("Expand", [normal(3, 1), ints(*shape)], lambda x, _: x.expand(wide).clone(), **options)


# -- parts and wholes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
@pytest.mark.parametrize("wrt", [(0, 1, 2), (1,), (0, 2)])
def test_concat(wrt, axis, dynamic):
    shapes = [[2, 3, 4] for _ in range(3)]
    for shape, size in zip(shapes, (1, 5, 2), strict=True):
        shape[axis] = size
    inputs = [normal(*shape, seed=index) for index, shape in enumerate(shapes)]
    check_rule("Concat", inputs, lambda *x: torch.cat(x, axis), wrt=wrt, dynamic=dynamic, axis=axis)


@pytest.mark.parametrize("opset", [16, 18, 26])
def test_concat_of_one(opset):
    check_rule("Concat", [normal(2, 3)], torch.clone, opset=opset, axis=1)


@pytest.mark.parametrize("opset", [16, 18, 21])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("axis", [1, -2])
def test_split_by_sizes(axis, known, dynamic, opset):
    options = {"constants": [1] if known else [], "opset": opset, "dynamic": dynamic, "outputs": 3, "axis": axis}
    check_rule("Split", [normal(2, 6, 3), ints(1, 3, 2)], lambda x, _: torch.split(x, [1, 3, 2], axis), **options)


@pytest.mark.parametrize("dynamic", [False, True])
def test_split_in_equal_parts(dynamic):
    x = normal(6, 2)
    check_rule("Split", [x], lambda x: torch.split(x, 2), opset=16, outputs=3, dynamic=dynamic)
    check_rule("Split", [x], lambda x: torch.split(x, 2), opset=18, outputs=3, dynamic=dynamic, num_outputs=3)
    check_rule(
        "Split", [normal(7, 2)], lambda x: torch.split(x, 3), opset=21, outputs=3, dynamic=dynamic, num_outputs=3
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_split_where_one_part_alone_is_used(dynamic):
    model = single_op("Split", [normal(2, 6)], opset=18, outputs=3, dynamic=dynamic, axis=1, num_outputs=3)
    dy = normal(2, 2, seed=1)
    got = run(graphgbp.vjp(model, outputs=["y1"]), {"x0": normal(2, 6), "y1_grad": dy})
    assert_close(got["x0_grad"], np.pad(dy, ((0, 0), (2, 2))), 0, "gradient to the input of Split")


# -- slice ---------------------------------------------------------------------------------------------------------


def _slice(x, starts, ends, axes=None, steps=None):
    """ONNX's Slice by its own text: negative counts from the back, then clamped."""
    axes = range(len(starts)) if axes is None else axes
    steps = np.ones(len(starts), int) if steps is None else steps
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes, steps, strict=True):
        size = x.shape[axis]
        start, end = (value + size if value < 0 else value for value in (start, end))
        low, high = (0, size) if step > 0 else (-1, size - 1)
        start, end = min(max(start, max(low, 0)), high), min(max(end, low), high)
        x = np.take(x, list(range(start, end, int(step))), int(axis))
    return x


SLICES = [
    ([1], [3], None, None),
    ([0, 1], [2, HIGHEST], None, None),
    ([-3], [-1], [1], None),
    ([1, 0, 2], [100, 100, HIGHEST], [2, 0, 1], [1, 1, 1]),
    ([-100], [2], [-1], None),
    ([0], [HIGHEST], [2], [2]),
    ([1], [HIGHEST], [2], [2]),
    ([1], [6], [2], [3]),
    ([-6, 1], [-1, 5], [2, 1], [4, 3]),
    ([-1], [LOWEST], [1], [-1]),
    ([HIGHEST], [LOWEST], [2], [-2]),
    ([5, -1], [1, -4], [2, 1], [-3, -1]),
    ([-2], [-100], [2], [-2]),
    ([2], [0], [1], [-5]),
    ([1, 0], [3, 7], [1, 2], [1, 9]),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("starts", "ends", "axes", "steps"), SLICES)
def test_slice(starts, ends, axes, steps, known, dynamic):
    arguments = [None if values is None else ints(*values) for values in (starts, ends, axes, steps)]
    inputs = [normal(2, 5, 7), *arguments]
    constants = [index for index in range(1, 5) if known]
    check_rule("Slice", inputs, by_place(_slice), constants=constants, dynamic=dynamic)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("start", "end", "step"), [(3, 3, 1), (9, 12, 1), (2, 1, 2), (1, 3, -1), (-1, 9, -2)])
def test_slice_that_takes_nothing_has_no_gradient(start, end, step, known):
    inputs = [normal(2, 5), ints(start), ints(end), ints(1), ints(step)]
    model = single_op("Slice", inputs, opset=18, constants=[1, 2, 3, 4] if known else [], dynamic=True)
    feeds = {f"x{index}": value for index, value in enumerate(inputs) if not (known and index)}
    feeds["y0_grad"] = np.zeros((2, 0), np.float32)
    got = run(graphgbp.vjp(model, inputs=["x0"]), feeds)
    np.testing.assert_array_equal(got["x0_grad"], np.zeros((2, 5)))


@pytest.mark.parametrize("opset", [16, 21, 26])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("index_dtype", ["int32", "int64"])
def test_slice_of_every_type(index_dtype, dtype, opset):
    arguments = [np.array(values, index_dtype) for values in ([0, 1], [5, 7], [1, 2], [2, 1])]
    for constants in ([1, 2, 3, 4], []):
        inputs = [normal(2, 5, 7).astype(dtype), *arguments]
        check_rule("Slice", inputs, by_place(_slice), constants=constants, opset=opset)


def test_known_slice_is_one_pad():
    model = single_op("Slice", [normal(2, 5), ints(1), ints(4), ints(1)], opset=18, constants=[1, 2, 3])
    assert [node.op_type for node in graphgbp.vjp(model).graph.node[1:]] == ["Pad", "Identity"]


# -- pad -----------------------------------------------------------------------------------------------------------


def _pad(x, pads, _=None, axes=None, mode="constant"):
    """numpy's own pad, after the crop that negative pads mean; -1 marks the border."""
    axes = list(range(x.ndim)) if axes is None else axes.tolist()
    widths = np.zeros((x.ndim, 2), int)
    widths[axes] = pads.reshape(2, -1).T
    crop = tuple(slice(-min(a, 0), min(b, 0) or None) for a, b in widths)
    extra = {"constant_values": -1} if mode == "constant" else {}
    return np.pad(x[crop], np.maximum(widths, 0), mode=mode, **extra)


PADS = [(0, 0, 1, 2, 0, 0, 3, 1), (0, 1, 0, 2, 1, 0, 2, 0), (0, 0, -1, -2, 0, 0, -1, 0), (0, 0, 2, -1, 0, 0, -2, 1)]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pads", [*PADS, (0,) * 8])
def test_pad_by_a_constant(pads, known, dynamic, opset):
    constants = [1, 2] if known else [2]
    options = {"constants": constants, "opset": opset, "dynamic": dynamic}
    check_rule("Pad", [normal(2, 3, 4, 5), ints(*pads)], by_place(_pad), **options)

    def bordered(x, pads, border):
        inside = by_place(_pad)(torch.ones_like(x), pads) > 0
        return torch.where(inside, by_place(_pad)(x, pads), border)

    check_rule("Pad", [normal(2, 3, 4, 5), ints(*pads), np.array(0.5, np.float32)], bordered, **options)


@pytest.mark.parametrize("opset", [16, 18, 21, 26])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
@pytest.mark.parametrize("pads", PADS[:2])
def test_pad_by_the_elements(pads, mode, known, dynamic, opset):
    opset = max(opset, 19) if mode == "wrap" else opset
    options = {"constants": [1] if known else [], "opset": opset, "dynamic": dynamic, "mode": mode}
    check_rule("Pad", [normal(2, 3, 4, 5), ints(*pads)], by_place(partial(_pad, mode=mode)), **options)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
@pytest.mark.parametrize("axes", [(2, 3), (-1, 1), (3,)])
def test_pad_of_some_axes(axes, mode, known):
    pads = ints(*range(len(axes)), *[2] * len(axes))
    options = {"constants": [1, 3] if known else [], "dynamic": True, "mode": mode}
    check_rule("Pad", [normal(2, 3, 4, 5), pads, None, ints(*axes)], by_place(partial(_pad, mode=mode)), **options)


def test_pad_in_double():
    inputs = [normal(2, 3, 4, 5).astype(np.float64), ints(*PADS[0])]
    for mode in ("constant", "reflect"):
        check_rule("Pad", inputs, by_place(partial(_pad, mode=mode)), mode=mode, tolerance=1e-12)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("size", "sizes"), [((4, 7), (6, 4)), ((5, 6), (2, 9)), ((4, 4), (4, 4)), ((7, 5), (4, 8))])
def test_center_crop_pad(size, sizes, dynamic):
    def reference(x, _):
        for axis, wanted in enumerate(sizes):
            spare = x.shape[axis] - wanted
            if spare > 0:
                x = x.narrow(axis, spare // 2, wanted)
            else:
                widths = [0, 0] * (x.ndim - 1 - axis) + [-spare // 2, -spare - -spare // 2]
                x = torch.nn.functional.pad(x, widths)
        return x

    for opset in (18, 26):
        check_rule("CenterCropPad", [normal(*size), np.array(sizes)], reference, dynamic=dynamic, opset=opset)


def test_center_crop_pad_of_some_axes():
    def reference(x, _):
        return torch.nn.functional.pad(x[:, 1:4], (1, 2))

    check_rule("CenterCropPad", [normal(2, 5, 3), np.array([6, 3])], reference, axes=[2, 1])
