"""Forms of fused and quantised nodes, one family per file; importing the package fills graphgbp.forms."""

from graphgbp.plain import fused, quantised

__all__ = ["fused", "quantised"]
