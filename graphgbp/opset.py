"""Raising a model older than opset 16 to opset 16, and the proof that it still computes the same.

ONNX's version converter rewrites the nodes, and only its nodes are taken over: inputs, outputs, weights, documentation
and metadata stay the model's own. Nodes it is known to get wrong are set aside before it runs, under a domain it does
not touch, and come back written for opset 16:

    Upsample-7, Upsample-9, Resize-10   sample at i / scale; the converter makes that (i + 0.5) / scale - 0.5
    Hardmax-1, Hardmax-11               the maximum over all axes from `axis` on; the converter takes that axis alone
    Scatter-9                           right, but the converter renames its output
    what has no schema then             LayerNormalization and its like, which ONNX Runtime writes at any opset
    local functions                     inlined, because the converter drops them

Old and new are then run on the same random input and must agree.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, shape_inference, version_converter
from onnx.external_data_helper import uses_external_data

from graphgbp.contract import SCOPE
from graphgbp.equivalence import Feeds, RunError, difference, one_line, run, run_on_random_input
from graphgbp.errors import OpsetError
from graphgbp.functions import spell_out_defaults
from graphgbp.inference import large_weights, skeleton
from graphgbp.weights import dense, not_kept, read_in, values

RAISED_TO = 16
TOLERANCE = 1e-5  # relative to the output's largest value

_ASIDE = f"{SCOPE}.aside"
_RAISED = f"{SCOPE}/raised"
_ADVICE = f"export the model again at opset {RAISED_TO} or newer"

Constants = Mapping[str, np.ndarray]
Mend = Callable[[onnx.NodeProto, Constants], tuple[list[onnx.NodeProto], str]]


def raise_opset(
    model: onnx.ModelProto, folder: Path | None, *, in_place: bool = False
) -> tuple[onnx.ModelProto, dict[str, Any] | None]:
    """The model at opset 16 and what the manifest says about it; a newer model as it is, and None.

    `folder` holds the model's external data, where it has any. The record gives the `source` opset, `raised_to`, the
    `mended` nodes, and the input shapes old and new were `compared_on`. The given model is not changed, unless
    `in_place` gives it away: then no copy of its weights is made.

    Raises OpsetError where the converter refuses, the original does not run in ONNX Runtime, or an output differs by
    more than 1e-5 of its largest value; MissingWeightsError where external data is not found.
    """
    source = next((entry.version for entry in model.opset_import if _is_standard(entry.domain)), None)
    if source is None or source >= RAISED_TO:
        return model, None
    bare, weights = _without_weights(model, folder)
    spell_out_defaults(bare)
    mended = [f"function '{function.domain}::{function.name}': inlined" for function in bare.functions]
    try:
        inlined = inliner.inline_local_functions(bare, convert_version=True) if bare.functions else bare
        converted = version_converter.convert_version(_prepared(inlined, source), RAISED_TO)
    except (RuntimeError, version_converter.ConvertError, shape_inference.InferenceError) as error:
        raise OpsetError(
            f"the model has opset {source}, and ONNX's converter cannot raise it to {RAISED_TO}: {one_line(error)}; "
            f"{_ADVICE}"
        ) from None
    nodes = list(_raised_nodes(inlined.graph, converted.graph, {}, mended, folder))
    constants = [node for node in model.graph.node if not weights.keys().isdisjoint(node.output)]
    with not_kept(weights.values()):
        shapes = _prove(bare, _with_nodes(_copy(bare), nodes), weights, folder, source)
    raised = _with_nodes(model if in_place else _copy(model), [*constants, *nodes])
    return raised, {"source": source, "raised_to": RAISED_TO, "mended": mended, "compared_on": shapes}


# -- the converter ------------------------------------------------------------------------------------------


def _without_weights(model: onnx.ModelProto, folder: Path | None) -> tuple[onnx.ModelProto, Feeds]:
    """The model with its large and sparse weights as inputs, and those weights: no copy of them, no 2 GB limit."""
    bare = skeleton(model)
    for tensor in filter(uses_external_data, bare.graph.initializer):
        read_in(tensor, folder)
    weights = {name: values(tensor, folder) for name, tensor in large_weights(model).items()}
    weights.update((tensor.values.name, dense(tensor, folder)) for tensor in model.graph.sparse_initializer)
    return bare, weights


def _prepared(model: onnx.ModelProto, source: int) -> onnx.ModelProto:
    """A copy to convert: shapes inferred, declared ones (which may be wrong) forgotten, faulty nodes set aside."""
    copy = _copy(model)
    for output in copy.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    copy = shape_inference.infer_shapes(copy)
    copy.opset_import.add(domain=_ASIDE, version=1)
    for graph in _graphs(copy.graph):
        for node in graph.node:
            faulty = source in _MENDS.get(node.op_type, ((),))[0]
            if _is_standard(node.domain) and (faulty or not onnx.defs.has(node.op_type, source)):
                node.domain = _ASIDE
    return copy


def _raised_nodes(
    old: onnx.GraphProto, new: onnx.GraphProto, outer: Constants, mended: list[str], folder: Path | None
) -> Iterator[onnx.NodeProto]:
    """The converter's nodes, with those set aside mended; what it should not have touched is the original's."""
    kept = {tensor.name for tensor in old.initializer}
    for tensor in new.initializer:
        if tensor.name not in kept:
            yield helper.make_node("Constant", [], [tensor.name], value=tensor)
    constants = {**outer, **_constants(old, folder)}
    originals = {_output(node): node for node in old.node}
    for node in new.node:
        original = originals.get(_output(node))
        if original is None or (node.domain != _ASIDE and node.op_type != original.op_type):
            yield node
        elif node.domain == _ASIDE and node.op_type in _MENDS:
            replacement, what = _MENDS[node.op_type][1](original, constants)
            replacement[-1].name, replacement[-1].doc_string = original.name, original.doc_string
            replacement[-1].metadata_props.extend(original.metadata_props)
            mended.append(f"{node.op_type} '{original.name or _output(original)}': {what}")
            yield from replacement
        elif node.domain == _ASIDE or node.op_type == "Constant":
            yield original
        else:
            _keep_subgraphs(original, node, constants, mended, folder)
            node.metadata_props.extend(original.metadata_props)
            yield node


def _keep_subgraphs(
    old: onnx.NodeProto, new: onnx.NodeProto, constants: Constants, mended: list[str], folder: Path | None
) -> None:
    originals = {attribute.name: attribute.g for attribute in old.attribute if attribute.HasField("g")}
    for attribute in new.attribute:
        if attribute.HasField("g"):
            nodes = list(_raised_nodes(originals[attribute.name], attribute.g, constants, mended, folder))
            attribute.g.CopyFrom(originals[attribute.name])
            del attribute.g.node[:]
            attribute.g.node.extend(nodes)


def _with_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
    """The model, changed to have these nodes."""
    del model.graph.node[:], model.functions[:]
    model.graph.node.extend(nodes)
    for entry in model.opset_import:
        if _is_standard(entry.domain):
            entry.version = RAISED_TO
    return model


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


# -- the mends ----------------------------------------------------------------------------------------------


def _mend_upsample(node: onnx.NodeProto, constants: Constants) -> tuple[list[onnx.NodeProto], str]:
    """Scales of 1 or more: attribute up to opset 8, then input."""
    attributes, output = _attributes(node), _output(node)
    mode = attributes.get("mode", b"nearest").decode()
    if "scales" not in attributes:
        return [_resize(node.input[0], node.input[1], output, mode)], f"{mode}, asymmetric"
    scales = f"{_RAISED}/{output}/scales"
    value = helper.make_node("Constant", [], [scales], value_floats=attributes["scales"])
    return [value, _resize(node.input[0], scales, output, mode)], f"{mode}, asymmetric"


def _mend_resize(node: onnx.NodeProto, constants: Constants) -> tuple[list[onnx.NodeProto], str]:
    """Nearest rounds down where it enlarges, up where it shrinks: scales unknown or of both kinds take a node each."""
    x, scales = node.input[:2]
    mode, output = _attributes(node).get("mode", b"nearest").decode(), _output(node)
    value = constants.get(scales)
    if mode != "nearest" or (value is not None and (value >= 1).all()):
        return [_resize(x, scales, output, mode)], f"{mode}, asymmetric"
    if value is not None and (value <= 1).all():
        return [_resize(x, scales, output, mode, "ceil")], "nearest, asymmetric, rounding up"
    one, up, down, enlarged = (f"{_RAISED}/{output}/{part}" for part in ("one", "up", "down", "enlarged"))
    nodes = [
        helper.make_node("Constant", [], [one], value_floats=[1.0]),
        helper.make_node("Max", [scales, one], [up]),
        helper.make_node("Min", [scales, one], [down]),
        _resize(x, up, enlarged, mode),
        _resize(enlarged, down, output, mode, "ceil"),
    ]
    return nodes, "nearest, asymmetric, enlarged rounding down, then shrunk rounding up"


def _resize(x: str, scales: str, output: str, mode: str, nearest_mode: str = "floor") -> onnx.NodeProto:
    rounding = {"nearest_mode": nearest_mode} if mode == "nearest" else {}
    return helper.make_node(
        "Resize", [x, "", scales], [output], mode=mode, coordinate_transformation_mode="asymmetric", **rounding
    )


def _mend_hardmax(node: onnx.NodeProto, constants: Constants) -> tuple[list[onnx.NodeProto], str]:
    axis, x = _attributes(node).get("axis", 1), node.input[0]
    shape, flat, hard = (f"{_RAISED}/{_output(node)}/{part}" for part in ("shape", "flat", "hard"))
    nodes = [
        helper.make_node("Shape", [x], [shape]),
        helper.make_node("Flatten", [x], [flat], axis=axis),
        helper.make_node("Hardmax", [flat], [hard], axis=-1),
        helper.make_node("Reshape", [hard, shape], [_output(node)], allowzero=1),
    ]
    return nodes, f"over all axes from {axis} on"


def _mend_scatter(node: onnx.NodeProto, constants: Constants) -> tuple[list[onnx.NodeProto], str]:
    axis = _attributes(node).get("axis", 0)
    return [
        helper.make_node("ScatterElements", node.input, node.output, axis=axis)
    ], "ScatterElements, its output's name kept"


_MENDS: dict[str, tuple[range, Mend]] = {  # the opsets from which the converter is wrong, and the mend
    "Upsample": (range(7, 10), _mend_upsample),
    "Resize": (range(10, 11), _mend_resize),
    "Hardmax": (range(1, 13), _mend_hardmax),
    "Scatter": (range(9, 11), _mend_scatter),
}


# -- the proof ----------------------------------------------------------------------------------------------


def _prove(
    old: onnx.ModelProto, new: onnx.ModelProto, weights: Feeds, folder: Path | None, source: int
) -> dict[str, list[int]]:
    """Run both on the same random input; the input shapes they agree on."""
    feeds, outputs, failures = run_on_random_input(old, weights, folder)
    if outputs is None:
        raise OpsetError(
            f"the model has opset {source}; to be raised to {RAISED_TO} it must run in ONNX Runtime first, and it does "
            f"not: {'; '.join(failures)}; {_ADVICE}"
        )
    shapes = {name: list(value.shape) for name, value in feeds.items()}
    raised = f"raised from opset {source} to {RAISED_TO} and run on random input of shape {shapes}, the model"
    try:
        found = run(new, {**feeds, **weights}, folder)
    except RunError as error:
        raise OpsetError(f"{raised} fails: {error}; {_ADVICE}") from None
    for output, expected, value in zip(old.graph.output, outputs, found, strict=True):
        what = difference(expected, value, TOLERANCE)
        if what:
            raise OpsetError(f"{raised} no longer computes the same: output '{output.name}' {what}; {_ADVICE}")
    return shapes


# -- reading protos -----------------------------------------------------------------------------------------


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every graph inside it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _constants(graph: onnx.GraphProto, folder: Path | None) -> Constants:
    """The values of a graph's small initializers and Constant nodes."""
    nodes = [node for node in graph.node if node.op_type == "Constant" and _is_standard(node.domain)]
    tensors = {_output(node): _attributes(node).get("value") for node in nodes}
    tensors.update((tensor.name, tensor) for tensor in graph.initializer)
    return {name: values(tensor, folder) for name, tensor in tensors.items() if tensor is not None}


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _output(node: onnx.NodeProto) -> str:
    return next(name for name in node.output if name)


def _is_standard(domain: str) -> bool:
    return domain in ("", "ai.onnx")
