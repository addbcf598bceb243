"""Forms of fused and quantised nodes, one family per file; importing the package fills graphgbp.forms."""

from graphgbp.plain import (
    attention,
    contributed,
    fused,
    gelus,
    normalization,
    quantised,
    quantised_layers,
    quantised_products,
    quantised_weights,
)

__all__ = [
    "attention",
    "contributed",
    "fused",
    "gelus",
    "normalization",
    "quantised",
    "quantised_layers",
    "quantised_products",
    "quantised_weights",
]
