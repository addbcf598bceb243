"""Explain exported models: the backward graph of Guided Backpropagation and Grad-CAM, written into the ONNX file.

Names are imported when first used, so that `import graphgbp` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from graphgbp._version import __version__
from graphgbp.errors import (
    AlreadyConvertedError,
    DeviceError,
    GraphgbpError,
    ImageError,
    MissingWeightsError,
    ModelFileError,
    OpsetError,
    OutputError,
    RequestError,
    TargetError,
    UnsupportedError,
    UnsupportedOperatorError,
    VerificationError,
)

if TYPE_CHECKING:
    from graphgbp.conversion import convert
    from graphgbp.explainer import Explainer, Result
    from graphgbp.inspection import Inspection, inspect
    from graphgbp.jacobian import vjp
    from graphgbp.methods import (
        DeconvNet,
        GradCAM,
        GradCAMPlusPlus,
        GuidedBackprop,
        GuidedGradCAM,
        HiResCAM,
        InputXGradient,
        LayerCAM,
        Saliency,
        XGradCAM,
    )
    from graphgbp.model_file import save
    from graphgbp.operators import Operator, ops
    from graphgbp.recipe import Recipe
    from graphgbp.verification import Verification, verify

_HOME = {
    "convert": "conversion",
    "vjp": "jacobian",
    "save": "model_file",
    "inspect": "inspection",
    "Inspection": "inspection",
    "ops": "operators",
    "Operator": "operators",
    "Recipe": "recipe",
    "Verification": "verification",
    "verify": "verification",
    **dict.fromkeys(("Explainer", "Result"), "explainer"),
    **dict.fromkeys(("Saliency", "InputXGradient", "GuidedBackprop", "DeconvNet", "GuidedGradCAM"), "methods"),
    **dict.fromkeys(("GradCAM", "HiResCAM", "LayerCAM", "GradCAMPlusPlus", "XGradCAM"), "methods"),
}

__all__ = [
    "AlreadyConvertedError",
    "DeconvNet",
    "DeviceError",
    "Explainer",
    "GradCAM",
    "GradCAMPlusPlus",
    "GraphgbpError",
    "GuidedBackprop",
    "GuidedGradCAM",
    "HiResCAM",
    "ImageError",
    "InputXGradient",
    "Inspection",
    "LayerCAM",
    "MissingWeightsError",
    "ModelFileError",
    "Operator",
    "OpsetError",
    "OutputError",
    "Recipe",
    "RequestError",
    "Result",
    "Saliency",
    "TargetError",
    "UnsupportedError",
    "UnsupportedOperatorError",
    "Verification",
    "VerificationError",
    "XGradCAM",
    "__version__",
    "convert",
    "inspect",
    "ops",
    "save",
    "verify",
    "vjp",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphgbp' has no attribute '{name}'")
    value = getattr(import_module(f"graphgbp.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
