"""Operators of ONNX Runtime that say what an operator of ONNX says."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, attributes, plain

_LINEAR_SINCE = 20  # the opset from which GridSample calls its modes linear and cubic


@plain("Pad", domain=MICROSOFT)
def pad(g: Emitter, node: gs.Node, x: gs.Tensor, pads: gs.Tensor, value: gs.Tensor | None = None) -> gs.Tensor:
    """Pad, whose pads may be a row"""
    value = None if value is None else g.reshape(value, [])
    return g.op("Pad", x, g.reshape(pads, [-1]), value, mode=node.attrs.get("mode", "constant"))


@plain("Trilu", domain=MICROSOFT)
def trilu(g: Emitter, node: gs.Node, x: gs.Tensor, k: gs.Tensor | None = None) -> gs.Tensor:
    """Trilu"""
    return g.op("Trilu", x, None if k is None else g.reshape(k, []), upper=node.attrs.get("upper", 1))


@plain("GatherND", domain=MICROSOFT)
def gather_nd(g: Emitter, node: gs.Node, x: gs.Tensor, indices: gs.Tensor) -> gs.Tensor:
    """GatherND"""
    return g.op("GatherND", x, g.cast(indices, np.int64))


@plain("ExpandDims", domain=MICROSOFT)
def expand_dims(g: Emitter, node: gs.Node, x: gs.Tensor, axis: gs.Tensor) -> gs.Tensor:
    """Unsqueeze of one axis"""
    if not isinstance(axis, gs.Constant):
        raise NotPlainError("its axis is known only at run time")
    return g.unsqueeze(x, [int(axis.values.reshape(()))])


@plain("GridSample", domain=MICROSOFT)
def grid_sample(g: Emitter, node: gs.Node, x: gs.Tensor, grid: gs.Tensor) -> gs.Tensor:
    """GridSample"""
    mode = node.attrs.get("mode", "bilinear")
    if g.opset >= _LINEAR_SINCE:
        mode = {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode)
    return g.op("GridSample", x, grid, mode=mode, **attributes(node, "align_corners", "padding_mode"))
