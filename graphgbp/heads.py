"""The attribution maps, from cotangents: a CAM of a layer, laid over an image."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.cams import WEIGHTS
from graphgbp.emit import Emitter, Size
from graphgbp.errors import RequestError
from graphgbp.image import Image
from graphgbp.layers import Layer
from graphgbp.layouts import Layout

# half_pixel with linear is what image libraries call bilinear; asymmetric with floor is torch's "nearest"
INTERPOLATE_MODES = {
    "bilinear": {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    "nearest": {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
}


def cam(g: Emitter, method: str, layer: Layer, gradient: gs.Tensor) -> gs.Tensor:
    """sum_k w_k A_k, float32 [N, 1, *positions]: before ReLU and resize. Tokens are laid out on their grid."""
    layout = layer.layout
    sizes = [g.size(part.tensor, part.axis) for part in layout.positions]
    features, gradient = (_at_positions(g, layout, sizes, g.cast(x, np.float32)) for x in (layer.tensor, gradient))
    weight = WEIGHTS[method](g, features, gradient, layout.position_axes)
    weighted = g.reduce_sum(g.mul(features, weight), [layout.channel_axis])
    weighted = g.transpose(weighted, [layout.batch_axis, layout.channel_axis, *layout.position_axes])
    return g.reshape(weighted, [-1, 1, *sizes]) if layout.folded else weighted


def _at_positions(g: Emitter, layout: Layout, sizes: Sequence[Size], x: gs.Tensor) -> gs.Tensor:
    """x without the tokens in front, which stand for no position."""
    if layout.others is None:
        return x
    last = g.ints([-1])
    for size in sizes:
        last = g.mul(last, g.as_int_vector(size))
    return g.slice(x, last, [np.iinfo(np.int64).max], [layout.others])


def resize_to(g: Emitter, x: gs.Tensor, image: Image, mode: str) -> gs.Tensor:
    """A map [N, 1, *positions] in the image's size and layout, one channel."""
    assert image.layout is not None
    positions = image.position_axes
    surplus = len(x.shape) - len(image.layout)
    x = g.squeeze(x, _single(x)[:surplus]) if surplus else x
    sizes = [g.size(image.tensor, axis) for axis in positions]
    if len(positions) == 1:  # ONNX Runtime interpolates pictures and volumes
        resized = g.squeeze(_resized(g, g.unsqueeze(x, [2]), [1, *sizes], mode), [2])
    else:
        resized = _resized(g, x, sizes, mode)
    made = ["N", "C", *(image.layout[axis] for axis in positions)]
    return g.transpose(resized, [made.index(name) for name in image.layout])


def _single(x: gs.Tensor) -> list[int]:
    """The axes of positions that hold only one."""
    return [axis for axis in range(2, len(x.shape)) if x.shape[axis] == 1]


def _resized(g: Emitter, x: gs.Tensor, sizes: Sequence[Size], mode: str) -> gs.Tensor:
    """x with other sizes behind its first two axes."""
    options = INTERPOLATE_MODES[mode]
    if g.opset >= 18:
        return g.op("Resize", x, None, None, g.join(sizes), axes=list(range(2, len(x.shape))), **options)
    return g.op("Resize", x, None, None, g.join([g.size(x, 0), 1, *sizes]), **options)


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
    """Refuse a CAM where the image's layout is not known or the layer's positions are not the image's."""
    wanted, sizes = len(image.position_axes), layer.sizes
    single = sum(size == 1 for size in sizes)
    if not len(sizes) - single <= wanted <= len(sizes):
        raise RequestError(
            f"layer '{layer.tensor.name}' {list(layer.tensor.shape)} has positions along {len(sizes)} axes, input "
            f"'{image.tensor.name}' {list(image.tensor.shape)} ({image.layout}) along {wanted}: a CAM cannot be "
            "laid over it; name another target_layer"
        )
