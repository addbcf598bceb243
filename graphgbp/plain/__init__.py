"""Forms of fused and quantised nodes, one family per file; importing the package fills graphgbp.forms."""

from graphgbp.plain import fused, quantised, quantised_layers, quantised_products

__all__ = ["fused", "quantised", "quantised_layers", "quantised_products"]
