"""The vector-Jacobian product of any outputs by any inputs, appended to a model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphgbp import model_file
from graphgbp._version import __version__
from graphgbp.analysis import table_of
from graphgbp.append import append_checked
from graphgbp.backward import backward, is_float
from graphgbp.contract import Manifest, public_names
from graphgbp.errors import ModelFileError, RequestError
from graphgbp.lowerings import lowered
from graphgbp.order import just_in_time
from graphgbp.parts import PartwiseEmitter
from graphgbp.prepare import prepare
from graphgbp.source import ModelLike, Source, open_source
from graphgbp.view import View


def vjp(model: ModelLike, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """Append the vector-Jacobian product: an input `<output>_grad` per output, an output `<input>_grad` per input.

    x_grad = sum over outputs of (d output / d x)^T output_grad; x_grad has x's shape and type, and y_grad must have
    y's. Between them half precision is float32. By default every float input and every float output takes part. An
    input on which no output depends gets zeros.

    Raises UnsupportedOperatorError, RequestError for a name that is no float input or output, ModelFileError.
    """
    with open_source(model) as source:
        return append_vjp(source, inputs, outputs)


def append_vjp(source: Source, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> onnx.ModelProto:
    """`vjp` of a model of our own, which is changed."""
    model, view = source.model, prepare(source.model, source.folder)
    g = PartwiseEmitter(view.graph, view.opset)
    wanted = _choose(inputs, view.graph.inputs, "input")
    seeded = _choose(outputs, view.graph.outputs, "output")
    roles = [f"{y.name}_grad" for y in seeded] + [f"{x.name}_grad" for x in wanted]
    names = public_names(model_file.taken_names(model), roles)
    given = {y.name: gs.Variable(names[f"{y.name}_grad"], _own_type(view, y), y.shape) for y in seeded}
    seeds = {y.name: g.cast(given[y.name], y.dtype) for y in seeded}
    names_wanted = [x.name for x in wanted]
    found = backward(g, view, seeds, names_wanted, lowered(view, table_of(view), names_wanted), "vjp")
    gradients = {x.name: g.cast(found.get(x.name) or g.zeros_like(x), _own_type(view, x)) for x in wanted}
    results = [g.name_output(gradient, names[f"{name}_grad"]) for name, gradient in gradients.items()]
    just_in_time(g, seeds.values())
    append_checked(model, view, g, list(given.values()), results)
    model_file.append_metadata(model, Manifest(kind="vjp", graphgbp=__version__, names=names, **source.record()))
    return model


def _own_type(view: View, tensor: gs.Tensor) -> np.dtype[Any]:
    """The type of a tensor's cotangent: its own in the file, or float32 where that is an integer."""
    stored = view.stored.get(tensor.name, tensor.dtype)
    return tensor.dtype if stored.kind in "iu" else stored


def _choose(names: Sequence[str] | None, tensors: Sequence[gs.Tensor], kind: str) -> list[gs.Tensor]:
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names or ()))
    available = {tensor.name: tensor for tensor in tensors if is_float(tensor)}
    if not available:
        raise ModelFileError(f"the model has no float {kind}: there is nothing to differentiate")
    for name in names:
        if name not in available:
            raise RequestError(f"'{name}' is no float {kind} of the model; it has {model_file.describe(available)}")
    return [available[name] for name in names] if names else list(available.values())
