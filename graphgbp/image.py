"""The explained inputs: which they are, and their layout."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.backward import is_float
from graphgbp.errors import ModelFileError, RequestError
from graphgbp.nodes import axes_of, permutation
from graphgbp.view import View

CHANNELS_FIRST = {3: "NCW", 4: "NCHW", 5: "NCDHW"}
CHANNELS_LAST = {3: "NWC", 4: "NHWC", 5: "NDHWC"}
_PHOTO_CHANNELS = (1, 3, 4)
_READS_CHANNELS_FIRST = {"Conv", "MaxPool", "AveragePool"}
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
_MOVES_AXES = {"Transpose", "Squeeze", "Unsqueeze"}
_TO_CHANNELS_FIRST = [0, 3, 1, 2]


@dataclass(frozen=True)
class Image:
    """An explained input: its tensor, the type that it is fed in, and its layout; None where nothing tells it.

    A photo's is "NCHW" or "NHWC", a sequence's "NCW" or "NWC", a volume's "NCDHW" or "NDHWC".
    """

    tensor: gs.Tensor
    dtype: str
    layout: str | None

    @property
    def position_axes(self) -> list[int]:
        """The axes behind batch and channels; RequestError where the layout is not known."""
        if self.layout is None:
            raise RequestError(
                f"the layout of input '{self.tensor.name}' {list(self.tensor.shape or ())} is ambiguous: Grad-CAM "
                "needs channels and positions, such as a photo [N, C, H, W] or [N, H, W, C] with 1, 3 or 4 channels, "
                "or a convolution that reads it"
            )
        return [axis for axis, name in enumerate(self.layout) if name not in "NC"]

    def describe(self) -> dict[str, object]:
        x = self.tensor
        return {
            "name": x.name,
            "shape": list(x.shape or ()),
            "dtype": self.dtype,
            "layout": self.layout,
        }


def find_images(view: View, names: Sequence[str] | None = None) -> list[Image]:
    """The float inputs that are explained: those named, else all.

    Raises ModelFileError where the model has no float input, RequestError where it has none of a name.
    """
    inputs = {tensor.name: tensor for tensor in view.graph.inputs if is_float(tensor)}
    if not inputs:
        raise ModelFileError(
            "the model has no float input, and a gradient with respect to integers does not exist; where they are "
            "pixels, export it with an input of type uint8, int8 or float"
        )
    for name in names or ():
        if name not in inputs:
            raise RequestError(f"'{name}' is no float input of the model; it has {', '.join(inputs)}")
    found = [inputs[name] for name in dict.fromkeys(names or inputs)]
    return [Image(x, np.dtype(view.stored.get(x.name, x.dtype)).name, _layout(x)) for x in found]


def _layout(x: gs.Tensor) -> str | None:
    """From the first operator that fixes it, else from where a photo's or a volume's channels can be."""
    rank = 0 if x.shape is None else len(x.shape)
    if rank not in CHANNELS_FIRST:
        return None
    channels = _told_by_readers(x)
    if len(channels) == 1:
        return {1: CHANNELS_FIRST, rank - 1: CHANNELS_LAST}.get(channels.pop(), {}).get(rank)
    first, last = (rank > 3 and x.shape[axis] in _PHOTO_CHANNELS for axis in (1, -1))
    return None if first == last else (CHANNELS_FIRST if first else CHANNELS_LAST)[rank]


def _told_by_readers(x: gs.Tensor) -> set[int]:
    """The axes of x that convolutions, poolings and transpositions take for channels; -1 where they take none."""
    found = set()
    frontier = [(x, list(range(len(x.shape))))]  # tensors, and which axis of x each of theirs is; -1: none
    while frontier:
        tensor, axes = frontier.pop()
        for node in tensor.outputs:
            if node.op in _READS_CHANNELS_FIRST:
                positions = [axis for axis in axes[2:] if axis >= 0]
                found.add(axes[1] if axes[0] == 0 and positions == sorted(positions) else -1)
            elif node.op in _MOVES_AXES and tensor is node.inputs[0]:
                moved = _moved(node, axes)
                frontier.append((node.outputs[0], moved))
                found |= {3} if moved == _TO_CHANNELS_FIRST else set()
            elif node.op in _KEEP_LAYOUT:
                frontier.append((node.outputs[0], axes))
    return found


def _moved(node: gs.Node, axes: list[int]) -> list[int]:
    if node.op == "Transpose":
        return [axes[axis] for axis in permutation(node)]
    if node.op == "Squeeze":
        gone = axes_of(node, len(axes))
        return [axis for place, axis in enumerate(axes) if place not in gone]
    new = axes_of(node, len(node.outputs[0].shape))
    old = iter(axes)
    return [-1 if place in new else next(old) for place in range(len(axes) + len(new))]
