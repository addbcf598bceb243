"""The one-liners: a class for each method, which explains by that method alone."""

from typing import Any, ClassVar

import numpy as np

from graphgbp import contract
from graphgbp.explainer import Explainer
from graphgbp.source import ModelLike


class _OneMethod:
    """One method of one model: `explain(images, labels)` gives its map, or its maps by role where they are several.

    `model` and `options` are those of `Explainer`.
    """

    method: ClassVar[str]

    def __init__(self, model: ModelLike, **options: Any) -> None:
        self.explainer = Explainer(model, (self.method,), **options)

    def explain(self, images: Any, labels: Any = None, **options: Any) -> np.ndarray | dict[str, np.ndarray]:
        """The maps of a batch, float32; images, labels, options and errors are those of `Explainer.explain`."""
        maps = self.explainer.explain(images, labels, **options).maps
        own = {role: array for role, array in maps.items() if contract.method_of(role) == self.method}
        return next(iter(own.values())) if len(own) == 1 else own


class Saliency(_OneMethod):
    """The gradient of the score by the image, signed, in the image's shape."""

    method = contract.SALIENCY


class InputXGradient(_OneMethod):
    """The image times the gradient of the score by it (Shrikumar et al. 2016, arXiv 1605.01713), in its shape."""

    method = contract.INPUT_X_GRADIENT


class GuidedBackprop(_OneMethod):
    """Guided Backpropagation (Springenberg et al. 2014, arXiv 1412.6806), signed, in the image's shape."""

    method = contract.GUIDED_BACKPROP


class DeconvNet(_OneMethod):
    """DeconvNet (Zeiler & Fergus 2014, arXiv 1311.2901), signed, in the image's shape."""

    method = contract.DECONVNET


class GradCAM(_OneMethod):
    """Grad-CAM (Selvaraju et al. 2017, arXiv 1610.02391), one channel in the image's size, not normalised."""

    method = contract.GRADCAM


class HiResCAM(_OneMethod):
    """HiResCAM (Draelos & Carin 2020, arXiv 2011.08891), one channel in the image's size, not normalised."""

    method = contract.HIRESCAM


class LayerCAM(_OneMethod):
    """LayerCAM (Jiang et al. 2021, IEEE TIP 30), one channel in the image's size, not normalised."""

    method = contract.LAYERCAM


class GradCAMPlusPlus(_OneMethod):
    """Grad-CAM++ (Chattopadhay et al. 2018, arXiv 1710.11063), one channel in the image's size, not normalised."""

    method = contract.GRADCAM_PLUSPLUS


class XGradCAM(_OneMethod):
    """XGrad-CAM (Fu et al. 2020, arXiv 2008.02312), one channel in the image's size, not normalised."""

    method = contract.XGRADCAM


class GuidedGradCAM(_OneMethod):
    """Guided Grad-CAM (Selvaraju et al. 2017): Guided Backpropagation times Grad-CAM, in the image's shape."""

    method = contract.GUIDED_GRADCAM
