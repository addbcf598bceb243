"""ai.onnx.ml, around a network of scikit-learn: the scaling of its features, and trees, which have no gradient."""

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp.emit import Emitter
from graphgbp.registry import unsupported, vjp

DOMAIN = "ai.onnx.ml"


def _several_scales_of_no_table(node: gs.Node) -> str | None:
    (x,) = node.inputs
    if len(node.attrs.get("scale", [1.0])) == 1 or (x.shape is not None and len(x.shape) <= 2):
        return None
    return f"it scales each feature, and its input '{x.name}' is not known to be a row or a table of features"


@vjp("Scaler", versions=(1,), refuse=_several_scales_of_no_table, domain=DOMAIN)
def scaler(g: Emitter, node: gs.Node, dy: gs.Tensor) -> list[gs.Tensor]:
    """y = (x - offset) scale by feature: dx = dy scale"""
    (x,) = node.inputs
    scale = node.attrs.get("scale", [1.0])
    factor = scale[0] if len(scale) == 1 else scale
    return [g.cast(g.mul(dy, g.constant(factor, np.float32)), x.dtype)]


def _constant_between_thresholds(node: gs.Node) -> str:
    return (
        "a tree is constant between its thresholds, so its gradient is zero and explains nothing; "
        "trees have explanations of their own, such as SHAP's"
    )


unsupported("TreeEnsemble", (5,), _constant_between_thresholds, DOMAIN)
unsupported("TreeEnsembleClassifier", (1, 3, 5), _constant_between_thresholds, DOMAIN)
unsupported("TreeEnsembleRegressor", (1, 3, 5), _constant_between_thresholds, DOMAIN)
