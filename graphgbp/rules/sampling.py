"""Sampling at given places: GridSample, AffineGrid and RoiAlign."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.registry import Cotangent, vjp
from graphgbp.rules.refusals import unknown_rank

# -- on a grid -------------------------------------------------------------------------------------------------------

# The weight of each tap as a polynomial of the fraction f of a coordinate: rows are powers of f, columns taps.
_CUBIC: list[list[float]] = [[0, 1, 0, 0], [-0.75, 0, 0.75, 0], [1.5, -2.25, 1.5, -0.75], [-0.75, 1.25, -1.25, 0.75]]
_POLYNOMIALS: dict[str, list[list[float]]] = {"nearest": [[1]], "linear": [[1, 0], [-1, 1]], "cubic": _CUBIC}
_OLD_NAMES = {"bilinear": "linear", "bicubic": "cubic"}  # of opset 16


@dataclass(frozen=True)
class _Taps:
    """What the samples read along one axis, each [N, P, taps]: places, weights, and their derivative by the grid."""

    index: gs.Tensor
    weight: gs.Tensor
    slope: gs.Tensor | None


@vjp("GridSample", versions=(16, 20, 22), wrt=(0, 1), refuse=unknown_rank(0, 1))
def grid_sample(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[Cotangent]:
    """y[p] = sum over the taps t of x[t] w_t(grid[p]), w being the product of the weights along each axis

    dx[t] = sum over p of w_t dy[p];  dgrid[p] = sum over the channels and t of dy[p] x[t] w_t'
    """
    x, grid = node.inputs
    axes = _taps_of_axes(g, node)
    batch, channels = g.size(x, 0), g.size(x, 1)
    index = axes[0].index
    for axis, taps in enumerate(axes[1:], start=3):
        following = g.mul(g.unsqueeze(index, [-1]), g.as_int_vector(g.size(x, axis)))
        index = g.reshape(g.add(following, g.unsqueeze(taps.index, [2])), [0, 0, -1])
    taps_of_each = g.op("Expand", g.reshape(index, [0, 1, -1]), g.join([1, channels, 1]))
    flat_dy = g.reshape(dy, [batch, channels, -1, 1])

    def to_x() -> gs.Tensor:
        weight = g.cast(_product(g, [taps.weight for taps in axes]), dy.dtype)
        updates = g.reshape(g.mul(flat_dy, g.unsqueeze(weight, [1])), [0, 0, -1])
        return g.reshape_like(g.scatter_add(g.reshape(x, [0, 0, -1]), taps_of_each, updates, axis=2), x)

    def to_grid() -> gs.Tensor:
        if axes[0].slope is None:
            return g.zeros_like(grid)
        read = g.op("GatherElements", g.reshape(x, [0, 0, -1]), taps_of_each, axis=2)
        read = g.reshape(read, [batch, channels, -1, len(_polynomial(node)[0]) ** len(axes)])
        pull = g.cast(g.reduce_sum(g.mul(flat_dy, read), [1], keepdims=False), grid.dtype)
        parts = []
        for axis in reversed(range(len(axes))):  # the grid counts from the last axis
            factors = [taps.slope if i == axis and taps.slope else taps.weight for i, taps in enumerate(axes)]
            parts.append(g.reduce_sum(g.mul(pull, _product(g, factors)), [2]))
        return g.reshape_like(g.concat(parts, 2), grid)

    return [to_x, to_grid]


def _polynomial(node: gs.Node) -> list[list[float]]:
    mode = node.attrs["mode"]
    return _POLYNOMIALS[_OLD_NAMES.get(mode, mode)]


def _product(g: Emitter, factors: Sequence[gs.Tensor]) -> gs.Tensor:
    """[N, P, a], [N, P, b], ... -> [N, P, a b ...]"""
    product = factors[0]
    for factor in factors[1:]:
        product = g.reshape(g.mul(g.unsqueeze(product, [-1]), g.unsqueeze(factor, [2])), [0, 0, -1])
    return product


def _taps_of_axes(g: Emitter, node: gs.Node) -> list[_Taps]:
    x, grid = node.inputs
    rank = len(x.shape) - 2
    points = g.reshape(grid, [g.size(grid, 0), -1, rank])
    return [
        _taps(g, node, g.slice(points, [rank - 1 - axis], [rank - axis], [2]), g.size(x, axis + 2))
        for axis in range(rank)
    ]


def _taps(g: Emitter, node: gs.Node, at: gs.Tensor, size: Size) -> _Taps:
    """The taps of one axis for coordinates [N, P, 1] between -1 and 1."""
    padding, corners, polynomial = node.attrs["padding_mode"], node.attrs["align_corners"], _polynomial(node)
    n = g.like(at, size) if isinstance(size, int) else g.cast(size, at.dtype)
    last = g.sub(n, g.like(at, 1))
    scale = g.scale(last if corners else n, 0.5)
    at = g.add(g.mul(at, scale), g.scale(last, 0.5))  # ((at + 1) n - 1) / 2, or (at + 1) (n - 1) / 2
    if padding != "zeros" and len(polynomial) < len(_CUBIC):
        at, direction = _inside(g, at, last, padding, corners)
        scale = g.mul(scale, direction)
    if len(polynomial) == 1:
        first, fraction = g.op("Round", at), None
    else:
        first = g.op("Floor", at)
        fraction = g.sub(at, first)
    count = len(polynomial[0])
    place = g.add(first, g.like(at, np.arange(count) - (count - 1) // 2))
    read = _inside(g, place, last, "border" if padding == "zeros" else padding, corners)[0]
    weight, slope = _evaluated(g, polynomial, fraction, at)
    if padding == "zeros":
        exists = g.cast(g.equal(read, place), at.dtype)
        weight, slope = g.mul(weight, exists), slope and g.mul(slope, exists)
    return _Taps(g.cast(read, np.int64), weight, slope and g.mul(slope, scale))


def _inside(g: Emitter, at: gs.Tensor, last: gs.Tensor, padding: str, corners: int) -> tuple[gs.Tensor, gs.Tensor]:
    """Coordinates moved to 0 ... last, and the derivative of that."""
    direction = g.like(at, 1)
    if padding == "reflection":
        lowest = g.like(at, 0 if corners else -0.5)
        span = g.maximum(last, g.like(at, 1)) if corners else g.add(last, g.like(at, 1))
        offset, period = g.sub(at, lowest), g.scale(span, 2)
        beyond = g.sub(g.sub(offset, g.mul(period, g.op("Floor", g.div(offset, period)))), span)
        at = g.add(g.sub(span, g.op("Abs", beyond)), lowest)
        direction = g.op("Sign", g.neg(beyond))
    clipped = g.maximum(g.minimum(at, last), g.like(at, 0))
    moves = g.op("And", g.greater(at, g.like(at, 0)), g.less(at, last))
    return clipped, g.mul(g.cast(moves, at.dtype), direction)


def _evaluated(
    g: Emitter, polynomial: list[list[float]], fraction: gs.Tensor | None, like: gs.Tensor
) -> tuple[gs.Tensor, gs.Tensor | None]:
    """The polynomials of every tap at the fractions, and their derivatives; none where they are constant."""
    powers = [g.like(like, [[power]]) for power in polynomial]  # each [1, 1, taps]
    if fraction is None:
        return powers[0], None
    slopes = [g.like(like, [[np.multiply(power, exponent)]]) for exponent, power in enumerate(polynomial)][1:]
    return _horner(g, powers, fraction), _horner(g, slopes, fraction)


def _horner(g: Emitter, coefficients: Sequence[gs.Tensor], x: gs.Tensor) -> gs.Tensor:
    value = coefficients[-1]
    for coefficient in coefficients[-2::-1]:
        value = g.add(g.mul(value, x), coefficient)
    return value


@vjp("AffineGrid", versions=(20,), refuse=unknown_rank(0))
def affine_grid(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y[n, p] = theta[n] (p, 1) for every place p; dtheta[n] = sum over p of dy[n, p] (p, 1)^T

    The places are what an identity makes of the grid.
    """
    theta, size = node.inputs
    rank = theta.shape[1] if isinstance(theta.shape[1], int) else len(node.outputs[0].shape) - 2
    identity = g.like(theta, [np.eye(rank, rank + 1)])
    one_image = g.concat([g.ints([1]), g.slice(size, [1], [rank + 2], [0])], 0)
    places = g.op("AffineGrid", identity, one_image, align_corners=node.attrs["align_corners"])
    places = g.op("Pad", g.reshape(places, [-1, rank]), g.ints([0, 0, 0, 1]), g.like(theta, 1))
    rows = g.reshape(dy, [0, -1, rank])
    return [g.matmul(g.transpose(rows, [0, 2, 1]), places)]


# -- in regions ------------------------------------------------------------------------------------------------------


def _refuse_regions(node: gs.Node) -> str | None:
    if node.attrs["mode"] != "avg":
        return f"mode={node.attrs['mode']}: runtimes disagree about it; export it with mode=avg"
    return unknown_rank(0)(node)


@vjp("RoiAlign", versions=(16, 22), refuse=_refuse_regions)
def roi_align(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y[r, c] = A_r x[b_r, c] B_r^T, A_r and B_r the samples of region r along each axis

    dx[n, c] = sum of A_r^T dy[r, c] B_r over the regions r of image n
    """
    x, _, image_of = node.inputs
    rows, columns = _samples(g, node, 0), _samples(g, node, 1)
    wide = g.matmul(dy, g.unsqueeze(g.transpose(columns, [0, 2, 1]), [1]))  # [R, C, o, W]
    wide = g.op("Flatten", g.transpose(wide, [0, 2, 1, 3]), axis=2)  # [R o, C W]
    images = g.op(
        "Range", g.constant(np.int64(0)), g.squeeze(g.as_int_vector(g.size(x, 0)), [0]), g.constant(np.int64(1))
    )
    belongs = g.cast(g.equal(g.unsqueeze(images, [1]), image_of), x.dtype)  # [N, R]
    tall = g.mul(g.unsqueeze(belongs, [1, 3]), g.transpose(rows, [1, 0, 2]))  # [N, H, R, o]
    dx = g.matmul(g.reshape(tall, [0, 0, -1]), wide)  # [N, H, C W]
    return [g.transpose(g.reshape(dx, [0, 0, g.size(x, 1), -1]), [0, 2, 1, 3])]


def _samples(g: Emitter, node: gs.Node, axis: int) -> gs.Tensor:
    """[R, size, o]: what each element of the output reads of each line of x, along one spatial axis.

    The very same RoiAlign takes it from an image one element wide, whose channel i is 1 at line i and 0 elsewhere.
    """
    x, regions, image_of = node.inputs
    size = g.as_int_vector(g.size(x, axis + 2))
    lines = g.op("Range", g.constant(np.int64(0)), g.squeeze(size, [0]), g.constant(np.int64(1)))
    identity = g.cast(g.equal(g.unsqueeze(lines, [1]), lines), x.dtype)
    begin, end = (g.slice(regions, [at], [at + 1], [1]) for at in (1 - axis, 3 - axis))
    if (
        node.attrs["sampling_ratio"] <= 0
    ):  # as many samples as the region has lines: none where it ends before it begins
        end = g.maximum(begin, end)
    left = g.mul(begin, g.like(begin, 0))
    right = g.add(left, g.like(begin, 1 / node.attrs["spatial_scale"]))
    output = node.attrs["output_height" if axis == 0 else "output_width"]
    read = g.op(
        "RoiAlign",
        g.unsqueeze(identity, [0, 3]),
        g.concat([left, begin, right, end], 1),
        g.op("Mul", image_of, g.ints([0])),
        output_height=output,
        output_width=1,
        **{key: node.attrs[key] for key in ("coordinate_transformation_mode", "sampling_ratio", "spatial_scale")},
    )
    return g.squeeze(read, [3])
