"""The explained inputs: which they are, and their layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.backward import is_float
from graphgbp.errors import ModelFileError, RequestError
from graphgbp.prepare import View

_PHOTO_CHANNELS = (1, 3, 4)
_KEEP_LAYOUT = {
    "Cast",
    "Identity",
    "Sub",
    "Add",
    "Mul",
    "Div",
    "Pad",
    "BatchNormalization",
    "QuantizeLinear",
    "DequantizeLinear",
}
_TO_CHANNELS_FIRST = [0, 3, 1, 2]


@dataclass(frozen=True)
class Image:
    """An explained input: its tensor, and its layout "NCHW" or "NHWC"; None where nothing tells it."""

    tensor: gs.Tensor
    layout: str | None

    def describe(self) -> dict[str, object]:
        x = self.tensor
        return {
            "name": x.name,
            "shape": list(x.shape or ()),
            "dtype": np.dtype(x.dtype).name,
            "layout": self.layout,
        }


def find_images(view: View, names: Sequence[str] | None = None) -> list[Image]:
    """The float inputs that are explained: those named, else all.

    Raises ModelFileError where the model has no float input, RequestError where it has none of a name.
    """
    inputs = {tensor.name: tensor for tensor in view.graph.inputs if is_float(tensor)}
    if not inputs:
        raise ModelFileError("the model has no float input: a gradient with respect to integers does not exist")
    for name in names or ():
        if name not in inputs:
            raise RequestError(f"'{name}' is no float input of the model; it has {', '.join(inputs)}")
    return [Image(inputs[name], _layout(inputs[name])) for name in dict.fromkeys(names or inputs)]


def _layout(x: gs.Tensor) -> str | None:
    """From the first operator that fixes it, else from where a photo's channels can be."""
    if x.shape is None or len(x.shape) != 4:
        return None
    told = _told_by_reader(x)
    first, last = (x.shape[axis] in _PHOTO_CHANNELS for axis in (1, 3))
    guess = None if first == last else "NCHW" if first else "NHWC"
    return told or guess


def _told_by_reader(x: gs.Tensor) -> str | None:
    found = set()
    frontier = [x]
    while frontier:
        for node in frontier.pop().outputs:
            if node.op in ("Conv", "MaxPool", "AveragePool"):
                found.add("NCHW")
            elif node.op == "Transpose" and list(node.attrs.get("perm", ())) == _TO_CHANNELS_FIRST:
                found.add("NHWC")
            elif node.op in _KEEP_LAYOUT:
                frontier.extend(node.outputs)
    return found.pop() if len(found) == 1 else None
