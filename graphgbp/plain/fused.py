"""Nodes that ONNX Runtime fused of a layer and its activation."""

from typing import Any

import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.forms import MICROSOFT, NotPlainError, plain
from graphgbp.plain.quantised import convolution


def activation(g: Emitter, x: gs.Tensor, name: str | None, parameters: list[float]) -> gs.Tensor:
    """The activation that a fused node names, with the parameters it gives in order."""
    if not name:
        return x
    if name == "Clip":
        low, high = parameters
        return g.op("Clip", x, g.like(x, low), g.like(x, high))
    if name not in _PARAMETERS:
        raise NotPlainError(f"its activation '{name}' is not known; save the model again without that fusion")
    given: dict[str, Any] = dict(zip(_PARAMETERS[name], parameters, strict=False))
    return g.op(name, x, **given)


_PARAMETERS: dict[str, tuple[str, ...]] = {
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
}


@plain("FusedConv", domain=MICROSOFT)
def fused_conv(
    g: Emitter,
    node: gs.Node,
    x: gs.Tensor,
    w: gs.Tensor,
    b: gs.Tensor | None = None,
    z: gs.Tensor | None = None,
) -> gs.Tensor:
    """activation(Conv(x, w, b) + z)"""
    y = convolution(g, node, x, w, b)
    y = y if z is None else g.add(y, z)
    return activation(g, y, node.attrs.get("activation"), node.attrs.get("activation_params") or [])
