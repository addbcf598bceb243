"""The pipeline: file -> reading view -> seed -> backward passes -> maps -> appended nodes -> file."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from graphgbp import model_file, registry, rules
from graphgbp._version import __version__
from graphgbp.append import append
from graphgbp.backward import RuleFor, backward, is_float
from graphgbp.contract import Manifest, public_names
from graphgbp.emit import Emitter
from graphgbp.errors import ModelFileError, RequestError
from graphgbp.model_file import PathLike
from graphgbp.prepare import View, prepare

ModelLike = PathLike | onnx.ModelProto
__all__ = ["rules", "vjp"]


def vjp(
    model: ModelLike, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None
) -> onnx.ModelProto:
    """Append the vector-Jacobian product: a new input `<output>_grad` per output, a new output `<input>_grad` per input.

    x_grad = sum over outputs of (d output / d x)^T output_grad, in the model's own type; x_grad has x's shape and
    y_grad must have y's. By default every float input and every float output takes part. An input on which no output
    depends gets zeros.

    Raises UnsupportedOperatorError, RequestError for a name that is no float input or output, ModelFileError.
    """
    source, record = open_source(model)
    view = prepare(source)
    g = Emitter(view.graph, view.opset)
    wanted = _choose(inputs, view.graph.inputs, "input")
    targets = _choose(outputs, view.graph.outputs, "output")
    roles = [f"{y.name}_grad" for y in targets] + [f"{x.name}_grad" for x in wanted]
    names = public_names(model_file.taken_names(source), roles)
    seeds = {y.name: gs.Variable(names[f"{y.name}_grad"], y.dtype, y.shape) for y in targets}
    found = backward(g, view, seeds, [x.name for x in wanted], rule_for(view), "vjp")
    results = [
        g.name_output(found.get(x.name) or g.zeros_like(x), names[f"{x.name}_grad"]) for x in wanted
    ]
    append(source, view, g, list(seeds.values()), results)
    model_file.append_metadata(source, Manifest(kind="vjp", graphgbp=__version__, names=names, **record))
    return source


def rule_for(view: View) -> RuleFor:
    """The rule table read through the model's opsets."""
    return partial(registry.lookup, opsets=view.opsets)


def open_source(model: ModelLike) -> tuple[onnx.ModelProto, dict[str, object]]:
    """A model of our own to append to, at opset 16 or newer, and what the manifest says of its source."""
    if isinstance(model, onnx.ModelProto):
        source = onnx.ModelProto()
        source.CopyFrom(model)
        folder, name = None, "the model"
    else:
        source = model_file.load(model)
        folder, name = Path(model).parent, f"'{model}'"
    model_file.refuse_converted(source, name)
    record: dict[str, object] = {"source": model_file.fingerprint(source, folder)}
    return source, record


def _choose(names: Sequence[str] | None, tensors: Sequence[gs.Tensor], kind: str) -> list[gs.Tensor]:
    available = {tensor.name: tensor for tensor in tensors if is_float(tensor)}
    if not available:
        raise ModelFileError(f"the model has no float {kind}: there is nothing to differentiate")
    for name in names or ():
        if name not in available:
            raise RequestError(f"'{name}' is no float {kind} of the model; it has {model_file.describe(available)}")
    return [available[name] for name in names] if names else list(available.values())
