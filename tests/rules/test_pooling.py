"""Pooling against torch: its own operators where it has the option, else sums over explicit windows."""

import random

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.nn import functional as F

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, run, single_op
from tests.rules.test_convolution import same_pads

LOWEST = float(np.finfo(np.float32).min)  # what ONNX Runtime gives for a window that holds nothing


def window_count(size, kernel, stride, pads, dilation, ceil):
    span = dilation * (kernel - 1) + 1
    room = size + sum(pads) - span
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= size + pads[0] else count


def taps(x, fill, kernel, strides, pads, dilations, counts):
    """[N, C, o..., taps]: every window of x, `fill` where it reaches beyond."""
    rank = len(kernel)
    for axis in range(rank):
        reach = (counts[axis] - 1) * strides[axis] + dilations[axis] * (kernel[axis] - 1) + 1
        beyond = max(0, reach - pads[axis] - x.shape[axis * 2 + 2])
        sides = [0, 0] * (x.dim() - axis * 2 - 3) + [pads[axis], beyond]
        x = F.pad(x, sides, value=fill)
        index = torch.arange(counts[axis])[:, None] * strides[axis] + torch.arange(kernel[axis]) * dilations[axis]
        x = x.index_select(axis * 2 + 2, index.reshape(-1)).unflatten(axis * 2 + 2, index.shape)
    order = [0, 1, *range(2, 2 * rank + 2, 2), *range(3, 2 * rank + 3, 2)]
    return x.permute(order).flatten(2 + rank)


class Geometry:
    """One pooling: its ONNX attributes and what it computes, by definition."""

    def __init__(self, kernel, strides=None, pads=None, dilations=None, ceil=False):
        rank = len(kernel)
        self.kernel, self.ceil = kernel, ceil
        self.strides, self.dilations = strides or [1] * rank, dilations or [1] * rank
        self.pads = pads or [0] * (2 * rank)

    @property
    def attributes(self):
        common = {"kernel_shape": self.kernel, "strides": self.strides, "pads": self.pads, "ceil_mode": int(self.ceil)}
        return common | ({"dilations": self.dilations} if set(self.dilations) != {1} else {})

    def counts(self, x):
        rank = len(self.kernel)
        return [
            window_count(
                x.shape[a + 2], self.kernel[a], self.strides[a], self.pads[a::rank], self.dilations[a], self.ceil
            )
            for a in range(rank)
        ]

    def last_window_is_disputed(self, x, dynamic):
        """Whether, along an axis of known size, a window of ceil_mode would begin in the end padding."""
        rank = len(self.kernel)
        opened = range(rank + 2) if dynamic is True else (dynamic or {}).get(0, [])
        spans = [d * (k - 1) + 1 for d, k in zip(self.dilations, self.kernel, strict=True)]
        rounded = [
            -(-(x.shape[a + 2] + sum(self.pads[a::rank]) - spans[a]) // self.strides[a]) + 1 for a in range(rank)
        ]
        known = [a for a in range(rank) if a + 2 not in opened]
        return self.ceil and any(rounded[a] != self.counts(x)[a] for a in known)

    def windows(self, x, fill, pads=None, counts=None):
        counts = counts or self.counts(x)
        return taps(x, fill, self.kernel, self.strides, self.pads if pads is None else pads, self.dilations, counts)

    def maximum(self, x):
        windows = self.windows(x, LOWEST)
        first = torch.from_numpy(np.argmax(windows.detach().numpy(), -1))[..., None]
        return windows.gather(-1, first)[..., 0]

    def norm(self, p):
        return lambda x: torch.linalg.vector_norm(self.windows(x, 0), p, -1)

    def mean(self, count_include_pad):
        rank = len(self.kernel)

        def reference(x):
            ones = torch.ones_like(x[:1, :1])
            if count_include_pad:
                sides = [side for a in reversed(range(rank)) for side in self.pads[a::rank]]
                divisor = self.windows(F.pad(ones, sides, value=1), 0, [0] * 2 * rank, self.counts(x))
            else:
                divisor = self.windows(ones, 0)
            return self.windows(x, 0).sum(-1) / divisor.sum(-1).clamp(min=1)

        return reference


def check_pool(op, x, reference, geometry, *, opset=18, dynamic=False, **options):
    """check_rule, or a refusal where ONNX (before opset 22) and ONNX Runtime count different windows."""
    options = {**geometry.attributes, **options}
    if not (opset < 22 and geometry.last_window_is_disputed(x, dynamic)):
        check_rule(op, [x], reference, opset=opset, dynamic=dynamic, **options)
        return
    with pytest.raises(UnsupportedOperatorError, match="begin in the end padding"):
        graphgbp.vjp(single_op(op, [x], opset=opset, dynamic=dynamic, **options))


# -- torch's own options ---------------------------------------------------------------------------------------------

COMMON = [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 1), (2, 1, 0), (5, 3, 2), (3, 3, 1), (2, 2, 1)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("opset", [16, 26])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "pad"), COMMON)
def test_max_pool_equals_torch(kernel, stride, pad, ceil, opset, dynamic):
    for size in (7, 8):
        check_pool(
            "MaxPool",
            normal(2, 3, size, size),
            lambda x: F.max_pool2d(x, kernel, stride, pad, ceil_mode=ceil),
            Geometry([kernel] * 2, [stride] * 2, [pad] * 4, ceil=ceil),
            opset=opset,
            dynamic=dynamic,
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("opset", [16, 19, 22])
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "pad"), COMMON)
def test_average_pool_equals_torch(kernel, stride, pad, ceil, include, opset, dynamic):
    for size in (7, 8):
        check_pool(
            "AveragePool",
            normal(2, 3, size, size),
            lambda x: F.avg_pool2d(x, kernel, stride, pad, ceil_mode=ceil, count_include_pad=include),
            Geometry([kernel] * 2, [stride] * 2, [pad] * 4, ceil=ceil),
            opset=opset,
            dynamic=dynamic,
            count_include_pad=int(include),
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("image", ["constant", "zero", "quantised"])
@pytest.mark.parametrize(("kernel", "stride", "pad"), COMMON)
def test_max_pool_ties_go_to_the_first(image, kernel, stride, pad, dynamic):
    images = {
        "constant": np.full((2, 2, 7, 8), 3, np.float32),
        "zero": np.zeros((2, 2, 7, 8), np.float32),
        "quantised": np.round(normal(2, 2, 7, 8)),
    }
    check_rule(
        "MaxPool",
        [images[image]],
        lambda x: F.max_pool2d(x, kernel, stride, pad),
        dynamic=dynamic,
        **Geometry([kernel] * 2, [stride] * 2, [pad] * 4).attributes,
    )


# -- everything else -------------------------------------------------------------------------------------------------


def random_geometry(choose):
    rank = choose.choice([1, 2, 2, 3])
    kernel = [choose.randint(1, 4) for _ in range(rank)]
    strides = choose.choice([[1] * rank, kernel, [choose.randint(1, 4) for _ in range(rank)]])
    dilations = choose.choice([[1] * rank, [choose.randint(1, 3) for _ in range(rank)]])
    pads = [choose.randint(0, kernel[a % rank] - 1) for a in range(2 * rank)]
    sizes = [
        max(1, choose.randint(1, 9), dilations[a] * (kernel[a] - 1) + 1 - pads[a] - pads[a + rank]) for a in range(rank)
    ]
    axes = choose.sample(range(rank + 2), choose.randint(0, rank + 2))
    return Geometry(kernel, strides, pads, dilations, choose.random() < 0.5), normal(2, 3, *sizes), {0: axes}


def test_random_max_pools():
    choose = random.Random(0)
    for _ in range(100):
        geometry, x, dynamic = random_geometry(choose)
        x = choose.choice([x, np.round(x)])
        opset = choose.choice([16, 19, 22])
        check_pool("MaxPool", x, geometry.maximum, geometry, opset=opset, dynamic=dynamic)


def test_random_average_pools():
    choose = random.Random(0)
    for _ in range(150):
        geometry, x, dynamic = random_geometry(choose)
        opset = choose.choice([16, 18, 19, 22]) if set(geometry.dilations) == {1} else choose.choice([19, 22])
        include = choose.randint(0, 1)
        check_pool(
            "AveragePool",
            x,
            geometry.mean(include),
            geometry,
            opset=opset,
            dynamic=dynamic,
            count_include_pad=include,
        )


def test_random_norm_pools():
    choose = random.Random(0)
    for _ in range(150):
        geometry, x, dynamic = random_geometry(choose)
        plain = set(geometry.dilations) == {1} and not geometry.ceil
        opset = choose.choice([16, 18, 22]) if plain else choose.choice([18, 22])
        attributes = {key: value for key, value in geometry.attributes.items() if opset > 16 or key != "ceil_mode"}
        p = choose.randint(1, 4)
        x = choose.choice([x, np.round(x), np.zeros_like(x)])  # also windows of zeros
        check_rule("LpPool", [x], geometry.norm(p), opset=opset, dynamic=dynamic, tolerance=1e-4, p=p, **attributes)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("axes", [[], [2], [0, 2, 3]])
@pytest.mark.parametrize(("kernel", "stride"), [((2, 3), 1), ((3, 3), 2), ((3, 4), 3)])
@pytest.mark.parametrize("opset", [16, 22])
def test_auto_pad_same(auto_pad, axes, kernel, stride, opset):
    for sizes in [(7, 8), (4, 9)]:
        geometry = Geometry(kernel, [stride] * 2, same_pads(sizes, kernel, [stride] * 2, auto_pad == "SAME_UPPER"))
        options = {"kernel_shape": kernel, "strides": [stride] * 2, "auto_pad": auto_pad}
        options |= {"opset": opset, "dynamic": {0: axes}}
        x = normal(2, 2, *sizes)
        check_rule("MaxPool", [x], geometry.maximum, **options)
        for include in (0, 1):
            check_rule("AveragePool", [x], geometry.mean(include), count_include_pad=include, **options)
        check_rule("LpPool", [x], geometry.norm(3), p=3, **options)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_auto_pad_valid(op, dynamic):
    geometry = Geometry([3, 2], [2, 3], ceil=True)
    options = {key: value for key, value in geometry.attributes.items() if key != "pads"} | {"auto_pad": "VALID"}
    reference = geometry.maximum if op == "MaxPool" else geometry.mean(0)
    check_rule(op, [normal(2, 2, 8, 9)], reference, opset=22, dynamic=dynamic, **options)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_same_padding_where_the_runtime_is_wrong_is_refused(op):
    for attributes in ({"strides": [3]}, {"dilations": [2]}):
        for dynamic in (False, True):
            model = single_op(
                op, [normal(1, 1, 9)], opset=19, dynamic=dynamic, kernel_shape=[2], auto_pad="SAME_UPPER", **attributes
            )
            with pytest.raises(UnsupportedOperatorError, match="SAME_UPPER"):
                graphgbp.vjp(model)


@pytest.mark.parametrize("order", [0, 1])
def test_max_pool_that_gives_its_indices(order):
    """Its own Indices may count along columns, and nothing flows through them."""
    x = normal(2, 3, 7, 6)
    model = single_op(
        "MaxPool", [x], opset=18, outputs=2, kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1], storage_order=order
    )
    geometry = Geometry([3, 2], [2, 2], [1, 0, 1, 1])
    tensor = torch.from_numpy(x).requires_grad_()
    y = geometry.maximum(tensor)
    dy = normal(*y.shape, seed=1)
    y.backward(torch.from_numpy(dy))
    got = run(graphgbp.vjp(model, outputs=["y0"]), {"x0": x, "y0_grad": dy})
    np.testing.assert_allclose(got["x0_grad"], tensor.grad.numpy(), rtol=1e-6)


# -- the whole image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True, {0: [0]}, {0: [2]}])
@pytest.mark.parametrize("opset", [16, 22])
@pytest.mark.parametrize("sizes", [(5,), (4, 6), (2, 3, 4), (1, 1)])
def test_global_pools(sizes, opset, dynamic):
    rank = len(sizes)
    x = normal(2, 3, *sizes)
    mean = getattr(F, f"adaptive_avg_pool{rank}d")
    maximum = getattr(F, f"adaptive_max_pool{rank}d")
    check_rule("GlobalAveragePool", [x], lambda t: mean(t, 1), opset=opset, dynamic=dynamic)
    for image in (x, np.round(x), np.zeros_like(x)):
        check_rule("GlobalMaxPool", [image], lambda t: maximum(t, 1), opset=opset, dynamic=dynamic)


class GlobalLpPool(OpRun):
    """Since opset 22 neither ONNX Runtime nor ONNX's evaluator has it."""

    def _run(self, x, p):
        return (np.linalg.norm(x.reshape(*x.shape[:2], -1), p, -1).reshape(*x.shape[:2], *[1] * (x.ndim - 2)),)


def run_with_norm_pool(model, feeds):
    evaluator = ReferenceEvaluator(model, new_ops=[GlobalLpPool])
    return dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("opset", [16, 22])
@pytest.mark.parametrize("p", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [(5,), (4, 6), (2, 3, 4)])
def test_global_norm_pool(sizes, p, opset, dynamic):
    x = normal(2, 3, *sizes)
    x[0, 0] = 0
    dims = tuple(range(2, x.ndim))
    reference = lambda t: torch.linalg.vector_norm(t, p, dims, keepdim=True)  # noqa: E731
    evaluate = run if opset < 22 else run_with_norm_pool
    check_rule("GlobalLpPool", [x], reference, opset=opset, dynamic=dynamic, evaluate=evaluate, p=p)


@pytest.mark.parametrize("opset", [16, 22])
@pytest.mark.parametrize("dynamic", [False, True])
def test_max_unpool(dynamic, opset):
    x = normal(2, 3, 4, 6)
    pooled, places = F.max_pool2d(torch.from_numpy(x), 2, return_indices=True)
    offsets = 24 * np.arange(6).reshape(2, 3, 1, 1)  # torch counts within a channel, ONNX through the whole tensor

    def reference(x, places):
        return F.max_unpool2d(x, places - torch.from_numpy(offsets), 2)

    inputs = [pooled.numpy(), places.numpy() + offsets]
    options = {"kernel_shape": [2, 2], "strides": [2, 2], "dynamic": {0: (0, 1, 2, 3)} if dynamic else False}
    check_rule("MaxUnpool", inputs, reference, opset=opset, **options)


def test_max_unpool_to_a_given_size():
    places = np.array([[[[0, 8], [27, 34]]]])

    def reference(x, places, size):
        return (
            torch.zeros(1, 1, 5, 7, dtype=x.dtype)
            .flatten()
            .scatter(0, places.flatten(), x.flatten())
            .reshape(1, 1, 5, 7)
        )

    inputs = [normal(1, 1, 2, 2), places, np.array([1, 1, 5, 7])]
    check_rule("MaxUnpool", inputs, reference, kernel_shape=[2, 2], strides=[2, 2])
