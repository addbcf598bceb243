"""The derivative rules, one family of operators per file. Importing the package fills the registry."""

from graphgbp.rules import (
    activation,
    convolution,
    einsum,
    elementwise,
    indexing,
    linear,
    movement,
    nondifferentiable,
    normalization,
    pooling,
    rearrangement,
    reduction,
    resize,
    scatter,
    standardization,
    trigonometry,
)

__all__ = [
    "activation",
    "convolution",
    "einsum",
    "elementwise",
    "indexing",
    "linear",
    "movement",
    "nondifferentiable",
    "normalization",
    "pooling",
    "rearrangement",
    "reduction",
    "resize",
    "scatter",
    "standardization",
    "trigonometry",
]
