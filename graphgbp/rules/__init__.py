"""The derivative rules, one family of operators per file. Importing the package fills the registry."""

from graphgbp.rules import (
    activation,
    convolution,
    elementwise,
    indexing,
    linear,
    movement,
    nondifferentiable,
    normalization,
    pooling,
    reduction,
    resize,
    standardization,
    trigonometry,
)

__all__ = [
    "activation",
    "convolution",
    "elementwise",
    "indexing",
    "linear",
    "movement",
    "nondifferentiable",
    "normalization",
    "pooling",
    "reduction",
    "resize",
    "standardization",
    "trigonometry",
]
