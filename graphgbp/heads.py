"""The attribution maps, from cotangents (Selvaraju et al. 2017, arXiv 1610.02391).

Grad-CAM         L = relu(sum_k alpha_k A_k), alpha_k the spatial mean of dS/dA_k
Guided Grad-CAM  guided backpropagation times L, element by element
"""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.errors import RequestError
from graphgbp.image import Image
from graphgbp.layers import Layer

# half_pixel with linear is what image libraries call bilinear; asymmetric with floor is torch's "nearest"
INTERPOLATE_MODES = {
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
}


def cam(g: Emitter, layer: Layer, gradient: gs.Tensor) -> gs.Tensor:
    """sum_k alpha_k A_k, float32 [N, 1, h, w]: before ReLU and resize."""
    features, gradient = (g.cast(tensor, np.float32) for tensor in (layer.tensor, gradient))
    alpha = g.reduce_mean(gradient, layer.spatial_axes)
    weighted = g.reduce_sum(g.mul(features, alpha), [layer.channel_axis])
    rank = len(layer.tensor.shape)
    return g.transpose(weighted, [0, layer.channel_axis, *(a for a in range(1, rank) if a != layer.channel_axis)])


def resize_to(g: Emitter, x: gs.Tensor, image: Image, mode: str) -> gs.Tensor:
    """A map [N, 1, h, w] in the image's size and layout, one channel."""
    assert image.layout is not None
    axes = [image.layout.index(axis) for axis in "HW"]
    if g.opset >= 18:
        resized = g.op("Resize", x, None, None, g.sizes(image.tensor, axes), axes=[2, 3], **INTERPOLATE_MODES[mode])
    else:
        sizes = g.join([g.size(x, 0), 1, *(g.size(image.tensor, axis) for axis in axes)])
        resized = g.op("Resize", x, None, None, sizes, **INTERPOLATE_MODES[mode])
    return g.transpose(resized, ["NCHW".index(axis) for axis in image.layout])


def mean(g: Emitter, cams: Sequence[gs.Tensor], image: Image, mode: str) -> gs.Tensor:
    """The maps of several layers in the image's size, each normalised to [0, 1], averaged, and normalised again."""
    resized = [resize_to(g, _normalised(g, g.relu(cam)), image, mode) for cam in cams]
    return _normalised(g, g.scale(g.sum([g.relu(cam) for cam in resized]), 1 / len(resized)))


def _normalised(g: Emitter, cam: gs.Tensor) -> gs.Tensor:
    """Each image's map between its own minimum and maximum, as pytorch-grad-cam scales it."""
    axes = range(1, len(cam.shape))
    above = g.add(cam, g.reduce_max(g.neg(cam), list(axes)))
    return g.div(above, g.add(g.reduce_max(above, list(axes)), g.like(cam, 1e-7)))


def require_image(image: Image, layer: Layer) -> None:
    """Refuse Grad-CAM where the image's layout is not known or the layer is not two-dimensional."""
    if image.layout is None:
        raise RequestError(
            f"the layout of input '{image.tensor.name}' {list(image.tensor.shape or ())} is ambiguous: Grad-CAM "
            "needs a photo [N, C, H, W] or [N, H, W, C] with 1, 3 or 4 channels, or a convolution that reads it"
        )
    if len(layer.tensor.shape) != 4:
        raise RequestError(
            f"layer '{layer.tensor.name}' has shape {list(layer.tensor.shape)}: Grad-CAM needs [N, C, h, w]; "
            "name another target_layer"
        )
