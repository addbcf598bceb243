import numpy as np
import pytest
import torch
from torch.nn import functional

import graphgbp
from graphgbp.errors import UnsupportedOperatorError
from tests.rules.harness import check_rule, normal, single_op

OPSETS = (16, 21, 26)
DTYPES = ("float32", "float64")


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 3), (1, 4, 1), (2, 0, 1)])
def test_tile(repeats, dtype, known, dynamic, opset):
    inputs = [normal(2, 3, 4, seed=1).astype(dtype), np.array(repeats, np.int64)]
    options = {"constants": [1] if known else [], "dynamic": dynamic, "opset": opset}
    check_rule("Tile", inputs, lambda x, _: x.tile(repeats), **options)


def test_tile_of_one_axis():
    check_rule("Tile", [normal(3), np.array([2])], lambda x, _: x.tile(2))


def _to_blocks(x, block):
    """SpaceToDepth: the place inside a block varies slower than the channel."""
    batch, depth, height, width = x.shape
    blocks = x.reshape(batch, depth, height // block, block, width // block, block)
    return blocks.permute(0, 3, 5, 1, 2, 4).reshape(batch, -1, height // block, width // block)


def _from_blocks(x, block):
    """DepthToSpace in DCR order, undone by hand"""
    batch, depth, height, width = x.shape
    blocks = x.reshape(batch, block, block, depth // block**2, height, width)
    return blocks.permute(0, 3, 4, 1, 5, 2).reshape(batch, -1, height * block, width * block)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True, {0: [0]}, {0: [2, 3]}])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("mode", ["DCR", "CRD", None])
def test_depth_to_space(mode, block, dtype, dynamic, opset):
    reference = functional.pixel_shuffle if mode == "CRD" else _from_blocks
    attributes = {"mode": mode} if mode else {}
    x = normal(2, 2 * block**2, 3, 4, seed=1).astype(dtype)
    options = {"dynamic": dynamic, "opset": opset, "blocksize": block}
    check_rule("DepthToSpace", [x], lambda x: reference(x, block), **options, **attributes)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [1, 2, 3])
def test_space_to_depth(block, dtype, dynamic, opset):
    x = normal(2, 3, 2 * block, 4 * block, seed=1).astype(dtype)
    check_rule("SpaceToDepth", [x], lambda x: _to_blocks(x, block), dynamic=dynamic, opset=opset, blocksize=block)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("time_axis", "batch_axis"), [(0, 1), (1, 0)])
def test_reverse_sequence(time_axis, batch_axis, dtype, dynamic, opset):
    def reference(x, lengths):
        x = x.movedim(time_axis, 0)
        rows = [torch.cat([x[:n, i].flip(0), x[n:, i]]) for i, n in enumerate(lengths.tolist())]
        return torch.stack(rows, 1).movedim(0, time_axis)

    x = normal(5, 3, 2, seed=1).swapaxes(0, time_axis).astype(dtype)
    options = {"dynamic": dynamic, "opset": opset, "time_axis": time_axis, "batch_axis": batch_axis}
    for constants in ([], [1]):
        check_rule("ReverseSequence", [x, np.array([1, 5, 3])], reference, constants=constants, **options)


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upper", [0, 1, None])
@pytest.mark.parametrize("k", [None, 0, 1, -2, 9])
def test_triangle(k, upper, dtype, dynamic, opset):
    triangle = torch.tril if upper == 0 else torch.triu
    attributes = {} if upper is None else {"upper": upper}
    x = normal(2, 4, 5, seed=1).astype(dtype)
    options = {"dynamic": dynamic, "opset": opset, **attributes}
    check_rule("Trilu", [x] if k is None else [x, np.array(k)], lambda x, *_: triangle(x, k or 0), **options)
    if k is not None:
        check_rule("Trilu", [x, np.array(k)], lambda x, _: triangle(x, k), constants=[], **options)


@pytest.mark.parametrize("dynamic", [False, {0: (0, 1)}])
@pytest.mark.parametrize(
    ("size", "block", "geometry"),
    [
        ((5, 6), (2, 3), {}),
        ((6, 7), (3, 2), {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        ((7, 8), (2, 3), {"dilations": [2, 2], "strides": [1, 2]}),
    ],
)
def test_col2im(size, block, geometry, dynamic):
    options = {"dilation": geometry.get("dilations", 1), "stride": geometry.get("strides", 1)}
    options["padding"] = geometry.get("pads", [0, 0])[:2]
    columns = functional.unfold(torch.zeros(2, 3, *size), block, **options).shape

    def reference(x, *_):
        return functional.fold(x, size, block, **options)

    inputs = [normal(*columns), np.array(size), np.array(block)]
    check_rule("Col2Im", inputs, reference, dynamic=dynamic, **geometry)


def test_blocks_known_at_run_time_are_refused():
    model = single_op("Col2Im", [normal(1, 4, 9), np.array([4, 4]), np.array([2, 2])], opset=18, constants=[1])
    with pytest.raises(UnsupportedOperatorError, match="block_shape"):
        graphgbp.vjp(model)
