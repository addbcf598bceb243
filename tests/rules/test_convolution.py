"""Conv against torch: explicit padding, then the plain convolution."""

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
