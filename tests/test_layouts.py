"""Where channels and positions stand, how much of a tensor reaches the score, what normalizes before attention."""

import numpy as np
import pytest

from graphgbp import attention
from graphgbp.analysis import Analysis
from graphgbp.extents import ALL, NOTHING, Extent, one_to_one, reaching
from graphgbp.layouts import Layouts
from graphgbp.nodes import label
from graphgbp.prepare import prepare
from tests.build import drawn, model

WEIGHTS = {
    "w": drawn(8, 3, 2, 2),
    "d": drawn(8, 8, seed=1),
    "token": drawn(1, 2, 8, seed=2),
    "flat": np.array([0, 8, -1]),
    "map": np.array([0, 4, 3, 8]),
    "split": np.array([0, 2, 2, 3, 8]),
    "merged": np.array([0, 2, 3, 16]),
    "order": np.array([2, 0, 3, 1]),
    **{name: np.array([value]) for name, value in (("zero", 0), ("one", 1), ("two", 2), ("end", 2**62))},
    "i": drawn(4, 8, 1, 1, seed=4),
    "gain": drawn(8, seed=3),
    "eps": np.array([1e-3], np.float32),
    "half": np.array(2.0, np.float32),
    "last_axis": np.array([-1]),
}
PATCHES = ["c = Conv<strides=[2,2]>(x, w)", "f = Reshape(c, flat)", "t = Transpose<perm=[0,2,1]>(f)"]
IN_FRONT = ["s = Shape<end=1>(x)", "sizes = Concat<axis=0>(s, one, one)", "e = Expand(token, sizes)"]
MAP = "m = Reshape(t, map)"


def analysis(*nodes: str) -> Analysis:
    """Of a network whose last tensor is `last`, summed up in a way that tells nothing of it."""
    return Analysis(
        prepare(model([*PATCHES, *nodes, "y = ReduceSum(last, one)"], {"x": ("N", 3, 8, 6)}, ["y"], WEIGHTS))
    )


def layouts(*nodes: str) -> Layouts:
    return analysis(*nodes).layouts


@pytest.mark.parametrize(
    "node", ["last = Identity(t)", "last = MatMul(t, d)", "last = Softmax(t)", "last = Add(gain, t)"]
)
def test_tokens_are_the_positions_of_the_map_they_were_made_of(node):
    layout = layouts(node)["last"]
    assert (layout.batch_axis, layout.channel_axis, layout.sizes, layout.folded) == (0, 2, [4, 3], True)


def test_tokens_in_front_stand_for_no_position():
    cut = ["a = Concat<axis=1>(e, t)", "b = Slice(a, one, end, one)", "last = Slice(b, one, end, one)"]
    found = analysis(*IN_FRONT, *cut)
    for name, prefix in (("a", 2), ("b", 1), ("last", 0)):
        layout = found.layouts[name]
        assert layout.sizes == [4, 3] and layout.prefix(found.view.tensors[name]) == prefix


@pytest.mark.parametrize(
    "nodes",
    [
        [*IN_FRONT, "last = Concat<axis=1>(t, e)"],  # other tokens behind
        ["last = Slice(t, one, end, one)"],  # the first position cut off
        ["last = Concat<axis=1>(t, t)"],
        [MAP, "last = Slice(m, one, end, one)"],  # a crop
        [MAP, "last = Transpose<perm=[0,2,1,3]>(m)"],  # rows become columns
        [MAP, "a = Slice(m, one, end, one)", "b = Slice(m, zero, one, one)", "last = Concat<axis=1>(a, b)"],  # rolled
        [MAP, "last = Gather<axis=1>(m, order)"],
        [MAP, "last = Reshape(m, split)"],
    ],
)
def test_positions_that_do_not_lie_as_in_the_image(nodes):
    found = layouts(*nodes)
    assert "t" in found and "last" not in found


def test_neighbours_are_merged_into_channels():
    """As between the stages of a Swin: a split, a transposition, a merge."""
    found = layouts(
        MAP, "q = Reshape(m, split)", "r = Transpose<perm=[0,1,3,2,4]>(q)", "last = Reshape(r, merged)"
    )  # fmt: skip
    assert (found["m"].channel_axis, found["m"].sizes) == (3, [4, 3])
    assert (found["last"].channel_axis, found["last"].sizes) == (3, [2, 3])


@pytest.mark.parametrize(
    ("strides", "shape", "grid"), [("8,2", (8, 6), [1, 3]), ("2,6", (8, 6), [4, 1]), ("8,6", (8, 6), [1, 1])]
)
@pytest.mark.parametrize("flat", ["f = Reshape(c, flat)", "f = Squeeze(c, gone)"])
def test_a_grid_of_one_row_or_column_keeps_both_directions(strides, shape, grid, flat):
    weights = WEIGHTS | {"gone": np.array([2 if grid[0] == 1 else 3])}
    nodes = [f"c = Conv<strides=[{strides}]>(x, w)", flat, "t = Transpose<perm=[0,2,1]>(f)", "y = ReduceSum(t, one)"]
    found = Analysis(prepare(model(nodes, {"x": ("N", 3, *shape)}, ["y"], weights))).layouts
    assert (found["f"].channel_axis, found["f"].sizes) == (1, grid)
    assert (found["t"].channel_axis, found["t"].sizes, found["t"].folded) == (2, grid, True)


def test_every_second_position():
    assert layouts(MAP, "last = Slice(m, zero, end, one, two)")["last"].sizes == [2, 3]


def extents(*nodes: str) -> dict[str, Extent]:
    found = analysis(*IN_FRONT, "a = Concat<axis=1>(e, t)", *nodes)
    return reaching(found.active, found.score.tensor)


@pytest.mark.parametrize(
    ("nodes", "reached"),
    [
        (["last = Gather<axis=1>(a, zero)"], Extent(1, 1)),
        (["last = Slice(a, zero, two, one)"], Extent(1, 2)),
        (["b = Erf(a)", "q = MatMul(b, d)", "last = Gather<axis=1>(q, zero)"], Extent(1, 1)),
        (["b = Transpose<perm=[1,0,2]>(a)", "last = Gather<axis=0>(b, zero)"], Extent(1, 1)),
        (["b = Softmax<axis=1>(a)", "last = Gather<axis=1>(b, zero)"], ALL),
        (["b = ReduceMean(a, last_axis)", "q = Sub(a, b)", "last = Gather<axis=1>(q, zero)"], Extent(1, 1)),
        (["b = ReduceMean(a, one)", "q = Sub(a, b)", "last = Gather<axis=1>(q, zero)"], ALL),
        (["b = Slice(a, zero, one, one)", "q = Slice(a, zero, two, one)", "last = Add(q, b)"], Extent(1, 2)),
    ],
)  # fmt: skip
def test_how_much_reaches_the_score(nodes, reached):
    assert extents(*nodes)["a"] == reached


def test_behind_a_concatenation_nothing_is_left_of_what_is_not_read():
    found = extents("b = Slice(a, two, end, one)", "q = Concat<axis=1>(a, b)", "last = Gather<axis=1>(q, zero)")
    assert found["b"] == NOTHING and found["a"] == Extent(1, 1)


ATTENTION = [
    "k = MatMul(n, d)", "kt = Transpose<perm=[0,2,1]>(k)", "z = MatMul(n, kt)", "p = Softmax(z)", "v = MatMul(n, d)",
    "o = MatMul(p, v)", "r = Add(t, o)",
]  # fmt: skip
CENTRED = ["mu = ReduceMean(t, last_axis)", "a = Sub(t, mu)"]
NORMS = {
    "operator": ["n = LayerNormalization(t, gain, gain)"],
    "torch, before opset 17": [
        *CENTRED, "sq = Pow(a, half)", "var = ReduceMean(sq, last_axis)", "se = Add(var, eps)", "sd = Sqrt(se)",
        "q = Div(a, sd)", "g = Mul(q, gain)", "n = Add(g, gain)",
    ],
    "Keras": [
        *CENTRED, "sq = Mul(a, a)", "var = ReduceMean(sq, last_axis)", "se = Add(var, eps)", "sd = Sqrt(se)",
        "is = Reciprocal(sd)", "ig = Mul(is, gain)", "xg = Mul(t, ig)", "mg = Mul(mu, ig)", "bg = Sub(gain, mg)",
        "n = Add(xg, bg)",
    ],
    "root mean square": [
        "sq = Pow(t, half)", "var = ReduceMean(sq, last_axis)", "se = Add(var, eps)", "sd = Sqrt(se)", "q = Div(t, sd)",
        "n = Mul(q, gain)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
def test_a_normalization_that_feeds_attention(norm):
    """However it is written; the one behind, and the residual around both, are none."""
    found = analysis(*NORMS[norm], *ATTENTION, "last = LayerNormalization(r, gain, gain)")
    norms = attention.normalizations(found.active)
    assert [each.output.name for each in norms] == ["n", "last"]
    assert [each.output.name for each in attention.attending(found.active, norms)] == ["n"]
    assert [label(node) for node in attention.attentions(found.active)] == ["o"]
    assert found.layer("auto").tensor.name == "n"


def test_a_convolution_behind_attention_makes_feature_maps():
    maps = ["m = Reshape(r, map)", "u = Transpose<perm=[0,3,1,2]>(m)", "last = Conv(u, i)"]
    found = analysis(*NORMS["operator"], *ATTENTION, *maps)
    assert attention.convolves_after_attention(found.active)
    assert found.layer("auto").tensor.name == "last"


@pytest.mark.parametrize(
    ("nodes", "place"),
    [
        (["z = Sigmoid(c)"], 1),
        (["q = GlobalAveragePool(c)", "z = Flatten(q)"], 1),
        (["z = ReduceMean<keepdims=0>(c, places)"], 1),
        (["z = Resize(c, , scales)"], 1),
        (["q = Transpose<perm=[0,2,3,1]>(c)", "z = Reshape(q, flat_last)"], 1),
        (["z = Conv<group=8>(c, depthwise)"], 1),
        (["z = ConvTranspose<group=8, strides=[2,2]>(c, depthwise)"], 1),
        (["z = BatchNormalization(c, gain, gain, gain, gain)"], 1),
        (["z = Slice(c, zero, two, two)"], 1),
        (["q = Softmax<axis=1>(c)", "z = Identity(q)"], 1),
        (["q = GlobalAveragePool(c)", "z = Mul(c, q)"], 1),
        (["z = Conv(c, i)"], None),
        (["z = LRN<size=3>(c)"], None),
        (["q = Transpose<perm=[0,2,3,1]>(c)", "z = MatMul(q, d)"], None),
        (["q = ReduceMean(c, one)", "z = Sub(c, q)"], None),
        (["z = Slice(c, one, two, one)"], None),
        (["q = Conv(c, i)", "s = Sigmoid(q)", "z = Mul(c, s)"], None),
    ],
)
def test_which_channels_are_the_classes(nodes, place):
    """Those behind which nothing mixes them, so that a class has no gradient but in its own."""
    weights = WEIGHTS | {
        "places": np.array([2, 3]), "scales": np.array([1, 1, 2, 2], np.float32), "flat_last": np.array([0, -1, 8]),
        "depthwise": drawn(8, 1, 1, 1, seed=5), "i": drawn(8, 8, 1, 1, seed=6),
    }  # fmt: skip
    made = model(["c = Conv<strides=[2,2]>(x, w)", *nodes], {"x": ("N", 3, 8, 6)}, ["z"], weights)
    found = Analysis(prepare(made))
    assert found.score.class_axis is not None
    assert one_to_one(found.active, found.score.tensor, found.score.class_axis).get("c") == place
