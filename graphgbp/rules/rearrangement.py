"""Rearrangement: elements repeated, put into blocks, added up from them, reversed, or kept in a triangle."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter, Size
from graphgbp.registry import vjp
from graphgbp.rules.refusals import unknown_rank


@vjp("DepthToSpace", versions=(13,))
def depth_to_space(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy's blocks back into channels, depth last (DCR) as SpaceToDepth has it or depth first (CRD)"""
    (x,) = node.inputs
    block = node.attrs["blocksize"]
    if node.attrs["mode"] == "DCR":
        return [g.op("SpaceToDepth", dy, blocksize=block)]
    batch, depth, height, width = g.size(dy, 0), g.size(dy, 1), g.size(x, 2), g.size(x, 3)
    blocks = g.reshape(dy, [batch, depth, height, block, width, block])
    return [g.reshape_like(g.transpose(blocks, [0, 1, 3, 5, 2, 4]), x)]


@vjp("SpaceToDepth", versions=(13,))
def space_to_depth(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy's channels back into blocks"""
    return [g.op("DepthToSpace", dy, blocksize=node.attrs["blocksize"])]


@vjp("ReverseSequence", versions=(10,))
def reverse_sequence(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy reversed once more"""
    axes = {key: node.attrs[key] for key in ("batch_axis", "time_axis")}
    return [g.op("ReverseSequence", dy, node.inputs[1], **axes)]


@vjp("Tile", versions=(13,), refuse=unknown_rank(0))
def tile(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """dy, summed over the copies"""
    x, repeats = node.inputs
    rank = len(x.shape)
    if isinstance(repeats, gs.Constant):
        copies: list[Size] = repeats.values.tolist()
    else:
        copies = [g.slice(repeats, [axis], [axis + 1], [0]) for axis in range(rank)]
    sizes = [size for axis in range(rank) for size in (copies[axis], g.size(x, axis))]
    copied = g.op("Reshape", dy, g.join(sizes), allowzero=1)
    return [g.reduce_sum(copied, range(0, 2 * rank, 2), keepdims=False)]


@vjp("Trilu", versions=(14,))
def trilu(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """the same triangle of dy"""
    return [g.op("Trilu", dy, *node.inputs[1:], upper=node.attrs["upper"])]


def _open_block(node: gs.Node) -> str | None:
    return None if isinstance(node.inputs[2], gs.Constant) else "its block_shape is known only at run time"


@vjp("Col2Im", versions=(18,), refuse=_open_block)
def col2im(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """Every block of dy as a column: a convolution whose filters each pick one element of the block"""
    x, _, block = node.inputs
    kernel: list[int] = block.values.tolist()
    picks = np.eye(int(np.prod(kernel))).reshape([-1, 1, *kernel])
    channels = g.reshape(dy, [-1, 1, *(g.size(dy, axis) for axis in range(2, len(dy.shape)))])
    geometry = {key: node.attrs.get(key) for key in ("dilations", "pads", "strides")}
    return [g.reshape_like(g.op("Conv", channels, g.like(dy, picks), kernel_shape=kernel, **geometry), x)]
