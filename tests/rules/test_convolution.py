"""Conv and ConvTranspose against torch: explicit padding, or the whole transpose cut to size."""

import random

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional as F

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, run, single_op


def convolution(strides, pads, dilations, group):
    rank = len(strides)
    sides = [side for axis in reversed(range(rank)) for side in (pads[axis], pads[axis + rank])]

    def reference(x, w, b=None):
        conv = getattr(F, f"conv{rank}d")
        return conv(F.pad(x, sides), w, b, stride=strides, dilation=dilations, groups=group)

    return reference


def same_pads(sizes, kernel, strides, upper):
    """Padding of auto_pad SAME_* by ONNX's definition: the output has ceil(size / stride) windows."""
    begins, ends = [], []
    for size, taps, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + taps - size)
        begins.append(total // 2 if upper else total - total // 2)
        ends.append(total - begins[-1])
    return begins + ends


def check(x, w, b=None, *, strides, pads, dilations=None, group=1, wrt=(0,), auto_pad=None, **options):
    dilations = dilations or [1] * len(strides)
    attributes = {"pads": pads} if auto_pad is None else {"auto_pad": auto_pad}
    check_rule(
        "Conv",
        [x, w] if b is None else [x, w, b],
        convolution(strides, pads, dilations, group),
        wrt=wrt,
        strides=strides,
        dilations=dilations,
        group=group,
        **attributes,
        **options,
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("opset", [16, 18, 22, 26])
@pytest.mark.parametrize("size", [8, 9])
@pytest.mark.parametrize(
    ("kernel", "stride", "pads"),
    [(1, 1, 0), (1, 2, 0), (2, 2, 0), (3, 1, 1), (3, 2, 1), (3, 3, 1), (4, 2, 1), (7, 2, 3)],
)
def test_common_convolutions(kernel, stride, pads, size, opset, dynamic):
    x, w = normal(2, 3, size, size), normal(4, 3, kernel, kernel, seed=1)
    check(x, w, strides=[stride] * 2, pads=[pads] * 4, opset=opset, dynamic=dynamic)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "filters", "group"), [(4, 4, 4), (3, 6, 3), (4, 6, 2), (6, 3, 3), (6, 4, 2)])
def test_groups(channels, filters, group, stride):
    x, w = normal(2, channels, 7, 6), normal(filters, channels // group, 3, 3, seed=1)
    b = normal(filters, seed=2)
    for dynamic in ({}, {0: [0, 2, 3]}):
        check(x, w, b, strides=[stride] * 2, pads=[1] * 4, group=group, wrt=(0, 1, 2), dynamic=dynamic)


def test_random_geometries():
    """Every kernel, stride, dilation, group, odd size, and pads of any size on either side."""
    choose = random.Random(0)
    for _ in range(160):
        rank = choose.choice([1, 2, 2, 3])
        group, channels, filters = choose.choice([(1, 2, 3), (1, 1, 1), (2, 2, 2), (3, 1, 1), (2, 1, 3), (3, 2, 1)])
        kernel = [choose.randint(1, 4) for _ in range(rank)]
        strides = choose.choice([[1] * rank, [choose.randint(1, 4) for _ in range(rank)]])
        dilations = choose.choice([[1] * rank, [choose.randint(1, 3) for _ in range(rank)]])
        pads = [choose.randint(0, 5) for _ in range(2 * rank)]
        sizes = [
            max(1, choose.randint(1, 9), dilations[a] * (kernel[a] - 1) + 1 - pads[a] - pads[a + rank])
            for a in range(rank)
        ]
        check(
            normal(2, group * channels, *sizes),
            normal(group * filters, channels, *kernel, seed=1),
            normal(group * filters, seed=2),
            strides=strides,
            pads=pads,
            dilations=dilations,
            group=group,
            wrt=(0, 1, 2),
            opset=choose.choice([16, 18, 22]),
            dynamic={0: choose.sample(range(rank + 2), choose.randint(0, rank + 2))},
        )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("axes", [[], [0], [2], [0, 2, 3]])
@pytest.mark.parametrize("kernel", [(1, 2), (2, 3), (3, 3), (5, 4)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_auto_pad_same(auto_pad, axes, kernel, stride):
    for sizes in [(7, 8), (4, 9)]:
        pads = same_pads(sizes, kernel, [stride] * 2, auto_pad == "SAME_UPPER")
        x, w = normal(2, 2, *sizes), normal(3, 2, *kernel, seed=1)
        check(x, w, strides=[stride] * 2, pads=pads, auto_pad=auto_pad, wrt=(0, 1), dynamic={0: axes})


@pytest.mark.parametrize("dynamic", [False, True])
def test_auto_pad_valid(dynamic):
    x, w = normal(2, 2, 8, 9), normal(3, 2, 3, 2, seed=1)
    check(x, w, strides=[2, 3], pads=[0] * 4, auto_pad="VALID", dynamic=dynamic)


def test_same_padding_where_the_runtime_is_wrong_is_refused():
    x, w = normal(1, 1, 8), normal(1, 1, 1, seed=1)
    for dynamic in (False, True):
        model = single_op("Conv", [x, w], opset=18, constants=[1], dynamic=dynamic, auto_pad="SAME_UPPER", strides=[4])
        with pytest.raises(UnsupportedOperatorError, match="SAME_UPPER"):
            graphgbp.vjp(model)


def test_weight_of_unknown_shape_is_refused():
    model = single_op("Conv", [normal(1, 1, 8), normal(1, 1, 3)], opset=18, dynamic=True)
    with pytest.raises(UnsupportedOperatorError, match="weight 'x1'"):
        graphgbp.vjp(model, inputs=["x0"])


def test_weights_are_not_copied():
    for stride in (1, 2):
        w = normal(64, 64, 3, 3, seed=1)
        model = single_op("Conv", [normal(1, 64, 8, 8), w], opset=18, constants=[1], strides=[stride] * 2)
        explained = graphgbp.vjp(model)
        assert explained.ByteSize() < model.ByteSize() + 4096
        assert not [t.name for t in explained.graph.initializer if np.prod(t.dims) > 64 and t.name != "x1"]


def test_transposed_convolutions_are_spelled_as_every_provider_takes_them():
    """Symmetric pads (CUDA takes no others), output_padding below the stride, no output_shape."""
    pads = [0, 2, 3, 1]
    for dynamic in (False, True):
        for stride in (2, 3):
            w = normal(3, 2, 4, 4, seed=1)
            model = single_op(
                "Conv",
                [normal(2, 2, 9, 8), w],
                opset=18,
                constants=[1],
                strides=[stride] * 2,
                pads=pads,
                dynamic=dynamic,
            )
            nodes = [node for node in graphgbp.vjp(model).graph.node if node.op_type == "ConvTranspose"]
            assert len(nodes) == 1
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in nodes[0].attribute}
            assert attributes["pads"][:2] == attributes["pads"][2:]
            assert max(attributes["output_padding"]) < stride
            assert "output_shape" not in attributes


def test_half_precision():
    x, w = (value.astype(np.float16) for value in (normal(1, 2, 9, 9), normal(3, 2, 3, 3, seed=1)))
    model = single_op("Conv", [x, w], opset=18, constants=[1], strides=[2, 2], pads=[1] * 4)
    dy = normal(1, 3, 5, 5, seed=2).astype(np.float16)
    tensor = torch.from_numpy(x.astype(np.float64)).requires_grad_()
    F.conv2d(tensor, torch.from_numpy(w.astype(np.float64)), stride=2, padding=1).backward(
        torch.from_numpy(dy.astype(np.float64))
    )
    got = run(graphgbp.vjp(model), {"x0": x, "y0_grad": dy})["x0_grad"]
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, tensor.grad.numpy(), atol=2e-2)


# -- the transposed convolution --------------------------------------------------------------------------------------


def transposed(strides, pads, dilations, group, beyond, sizes=None):
    """The whole transpose, then cut: by pads, or from their begin to the asked sizes."""
    rank = len(strides)

    def reference(x, w, b=None):
        options = {"stride": strides, "dilation": dilations, "groups": group}
        y = getattr(F, f"conv_transpose{rank}d")(x, w, None, **options)
        y = F.pad(y, [side for padding in reversed(beyond) for side in (0, padding)])
        for axis in range(rank):
            size = y.shape[axis + 2] - pads[axis] - pads[axis + rank] if sizes is None else sizes[axis]
            missing = max(0, pads[axis] + size - y.shape[axis + 2])
            y = F.pad(y, [0, 0] * (rank - 1 - axis) + [0, missing]).narrow(axis + 2, pads[axis], size)
        return y if b is None else y + b.reshape(-1, *[1] * rank)

    return reference


def check_transposed(x, w, b=None, *, strides, pads, dilations=None, group=1, beyond=None, attributes=None, **options):
    rank = len(strides)
    dilations, beyond = dilations or [1] * rank, beyond or [0] * rank
    attributes = {"pads": pads} if attributes is None else attributes
    check_rule(
        "ConvTranspose",
        [x, w] if b is None else [x, w, b],
        transposed(strides, pads, dilations, group, beyond, attributes.get("output_shape")),
        strides=strides,
        dilations=dilations,
        group=group,
        output_padding=beyond,
        **attributes,
        **options,
    )


@pytest.mark.parametrize("dynamic", [False, {0: [0]}, {0: [0, 1, 2, 3]}])
@pytest.mark.parametrize("opset", [16, 22, 26])
@pytest.mark.parametrize(
    ("kernel", "stride", "pads", "beyond"),
    [(2, 2, 0, 0), (3, 2, 1, 1), (4, 2, 1, 0), (3, 1, 1, 0), (5, 3, 2, 2), (1, 2, 0, 0)],
)
def test_common_transposed_convolutions(kernel, stride, pads, beyond, opset, dynamic):
    x, w, b = normal(2, 4, 5, 3), normal(4, 3, kernel, kernel, seed=1), normal(3, seed=2)
    options = {"strides": [stride] * 2, "pads": [pads] * 4, "beyond": [beyond] * 2, "opset": opset, "dynamic": dynamic}
    check_transposed(x, w, b, wrt=(0, 1, 2), **options)
    check_transposed(x, w, b, wrt=(0,), **options)


def test_random_transposed_convolutions():
    choose = random.Random(0)
    for _ in range(160):
        rank = choose.choice([1, 2, 2, 3])
        group, channels, filters = choose.choice([(1, 2, 3), (1, 1, 1), (2, 2, 2), (3, 1, 1), (2, 1, 3), (3, 2, 1)])
        kernel = [choose.randint(1, 4) for _ in range(rank)]
        strides, dilations = ([choose.randint(1, 3) for _ in range(rank)] for _ in range(2))
        beyond = [choose.randint(0, stride - 1) for stride in strides]
        sizes = [choose.randint(1, 5) for _ in range(rank)]
        room = [
            strides[a] * (sizes[a] - 1) + dilations[a] * (kernel[a] - 1) + beyond[a] for a in range(rank)
        ]  # that pads may take
        begins = [choose.randint(0, min(3, room[a])) for a in range(rank)]
        ends = [choose.randint(0, min(3, room[a] - begins[a])) for a in range(rank)]
        check_transposed(
            normal(2, group * channels, *sizes),
            normal(group * channels, filters, *kernel, seed=1),
            normal(group * filters, seed=2),
            strides=strides,
            pads=begins + ends,
            dilations=dilations,
            group=group,
            beyond=beyond,
            wrt=(0, 1, 2),
            tolerance=1e-4,
            opset=choose.choice([16, 22]),
            dynamic={0: choose.sample(range(rank + 2), choose.randint(0, rank + 2))},
        )


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("dynamic", [False, {0: [0, 2, 3]}])
@pytest.mark.parametrize(
    ("kernel", "stride"), [((1, 2), 1), ((2, 3), 1), ((2, 3), 2), ((5, 4), 2), ((3, 4), 3), ((5, 5), 3)]
)
def test_transposed_auto_pad(auto_pad, kernel, stride, dynamic):
    sizes = (4, 3)
    totals = [max(0, taps - stride) if auto_pad.startswith("SAME") else 0 for taps in kernel]
    begins = [total // 2 if auto_pad == "SAME_UPPER" else total - total // 2 for total in totals]
    pads = begins + [total - begin for total, begin in zip(totals, begins, strict=True)]
    reference = transposed([stride] * 2, pads, [1, 1], 1, [0, 0])
    attributes = {"strides": [stride] * 2, "auto_pad": auto_pad, "dynamic": dynamic}
    check_rule(
        "ConvTranspose", [normal(1, 2, *sizes), normal(2, 3, *kernel, seed=1)], reference, wrt=(0, 1), **attributes
    )


@pytest.mark.parametrize("auto_pad", ["NOTSET", "SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("sizes", [(9, 8), (10, 9), (8, 7), (11, 10), (12, 9)])
def test_transposed_output_shape(auto_pad, sizes):
    """3 taps, stride 2 on 5 x 4: 11 x 9 by themselves."""
    totals = [max(0, 11 - sizes[0]), max(0, 9 - sizes[1])]
    begins = [total // 2 if auto_pad == "SAME_UPPER" else total - total // 2 for total in totals]
    check_transposed(
        normal(2, 3, 5, 4),
        normal(3, 2, 3, 3, seed=1),
        strides=[2, 2],
        pads=begins,
        attributes={"output_shape": sizes, "auto_pad": auto_pad},
        wrt=(0, 1),
        dynamic={0: [0]},
    )


@pytest.mark.parametrize(
    ("attributes", "dynamic", "reason"),
    [
        ({"output_shape": [9]}, {0: [2]}, "output_shape for an input"),
        ({"output_shape": [3]}, False, "output_shape is smaller"),
        ({"output_padding": [1], "auto_pad": "SAME_UPPER"}, False, "SAME_UPPER beyond"),
        ({"dilations": [1], "kernel_shape": [3], "strides": [4], "auto_pad": "SAME_LOWER"}, False, "SAME_LOWER beyond"),
        ({"output_padding": [2], "dilations": [3]}, False, "not below its stride"),
        ({}, {1: [2]}, "the shape of its weight 'x1'"),
    ],
)
def test_transposed_refusals(attributes, dynamic, reason):
    model = single_op(
        "ConvTranspose", [normal(1, 1, 4), normal(1, 1, 3)], opset=18, dynamic=dynamic, **{"strides": [2], **attributes}
    )
    with pytest.raises(UnsupportedOperatorError, match=reason):
        graphgbp.vjp(model, inputs=["x0"])


@pytest.mark.parametrize(("kernel", "group"), [(1, 1), (3, 3), (3, 1)])
def test_strided_of_unknown_rank(kernel, group):
    x, w = normal(2, 3, 17, 16), normal(3 if group == 3 else 8, 3 // group, kernel, kernel)
    made = single_op("Conv", [x, w], opset=17, constants=(1,), strides=[2, 2], group=group)
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.ClearField("shape")
    y = run(made, {"x0": x})["y0"]
    found = run(graphgbp.vjp(made), {"x0": x, "y0_grad": np.ones_like(y)})["x0_grad"]
    image = torch.from_numpy(x).double().requires_grad_()
    F.conv2d(image, torch.from_numpy(w).double(), stride=2, groups=group).sum().backward()
    np.testing.assert_allclose(found, image.grad.numpy(), atol=1e-5)
