"""The reading view of a model: what rules, policies and the search for layers look at.

The view is an onnx_graphsurgeon graph of the model in which every tensor has a type and a shape whose sizes are ints
or symbols, every value that is known before running is a Constant, every attribute that has a default is spelled out,
and the nodes come in topological order. Only the view is changed; the model's own nodes stay as they are.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs
from onnx import helper
from onnx_graphsurgeon.logger import G_LOGGER

import graphgbp.plain  # noqa: F401  fills the table of forms
from graphgbp import forms
from graphgbp.branches import fixed_names, inline, taken_branch
from graphgbp.contract import RECOMPUTED
from graphgbp.emit import Emitter, elem_type
from graphgbp.errors import ModelFileError
from graphgbp.folding import FOLD_LIMIT, fold, read_constants
from graphgbp.functions import see_through_functions
from graphgbp.inference import sizes_as_declared, type_outputs, whole_graph_types
from graphgbp.model_file import tensor_names, with_readable_text
from graphgbp.nodes import free_path, in_order, label, node_proto, topological_order
from graphgbp.plain import units
from graphgbp.plain.chains import Chains
from graphgbp.sizes import Sizes
from graphgbp.stored import show_as_float32
from graphgbp.view import View
from graphgbp.weights import read_weights_from, type_bfloat16, with_dense_constants, with_small_weights

READ_AS = {"CastLike": "Cast"}
"""Operators that the view shows as another one."""


def prepare(model: onnx.ModelProto, folder: Path | None = None) -> View:
    """Build the reading view of a model at opset 16 or newer; the model itself is not changed.

    `folder` holds the model's external data, where it has any.
    """
    view = flatten(model, folder)
    view.stored = show_as_float32(view.graph, view.opsets, view.formed)
    view.tensors = {tensor.name: tensor for tensor in _tensors(view.graph)}
    view.named = {path: view.tensors[name] for path, name in view.seen_through.items() if name in view.tensors}
    view.named.update({node.name: node.outputs[0] for node in reversed(view.graph.nodes) if node.name and node.outputs})
    return view


def flatten(model: onnx.ModelProto, folder: Path | None = None) -> View:
    """The reading view before anything is shown as float32: its nodes compute what the model computes."""
    model = with_dense_constants(with_readable_text(with_small_weights(model, folder, FOLD_LIMIT)), folder)
    seen, calls = see_through_functions(model)
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns of what is no tensor
        graph = gs.import_onnx(seen)
        read_weights_from(folder, graph)
        type_bfloat16(graph)
    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
    graph.nodes[:] = topological_order(graph)
    _refuse_undefined(graph)
    view = View(graph, opsets, seen_through=dict(calls))
    read_constants(graph.nodes)
    copies = units.copies(seen)
    chains = _infer(view, model, seen, copies)
    for node in graph.nodes:
        _fill_defaults(node, opsets)
    _recompute(view, tensor_names(model), copies.nodes, chains)
    return view


def _recompute(
    view: View, there: Collection[str], copies: Mapping[str, onnx.NodeProto], chains: Sequence[gs.Node]
) -> None:
    """Set down the nodes that make what the main graph does not show, or what is not to be read from it."""
    hidden = [node for node in view.graph.nodes if any(y.name and y.name not in there for y in node.outputs)]
    nodes = [*chains, *hidden]
    view.constants = {
        x.name: x.values for node in nodes for x in node.inputs if isinstance(x, gs.Constant) and x.name not in there
    }
    view.twins |= {name: units.copy_of(name) for name in copies if name not in view.twins}
    unique = {id(copy): copy for name, copy in copies.items() if view.twins[name] in copy.output}
    protos = [*map(node_proto, nodes), *unique.values()]
    for proto in protos:
        proto.input[:] = [view.twins.get(name, name) for name in proto.input]
        proto.name = proto.name if proto.name.startswith(f"{RECOMPUTED}/") else f"{RECOMPUTED}/{proto.name}"
    view.recomputed = in_order(protos)
    for node in chains:
        node.inputs.clear()
        node.outputs.clear()


def _refuse_undefined(graph: gs.Graph) -> None:
    defined = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Variable) and tensor.name and not tensor.inputs and tensor.name not in defined:
                raise ModelFileError(
                    f"node '{label(node)}' ({node.op}) reads '{tensor.name}', which nothing makes; "
                    "export the model again"
                )


def _infer(view: View, model: onnx.ModelProto, seen: onnx.ModelProto, copies: units.Copies) -> list[gs.Node]:
    """Type every tensor in order and fold what depends on constants alone. Only inputs' declared shapes count.

    An If that this settles is replaced by its branch, a fused or quantised node by what it stands for. What comes back
    are the nodes of `graphgbp.plain.chains`.
    """
    known = whole_graph_types(seen)
    for tensor in view.graph.inputs:
        if tensor.shape is not None:
            tensor.shape = sizes_as_declared(tensor)
    outer, fixed, there = tensor_names(seen), fixed_names(model), tensor_names(model)
    waiting, done = deque(view.graph.nodes), []
    g, sizes = Emitter(view.graph, view.opset, RECOMPUTED), Sizes()
    chains = Chains(view.graph, view.opset, there, copies)
    while waiting:
        node = waiting.popleft()
        branch = taken_branch(node, fixed)
        if branch is not None:
            path = _see_through(view, node)
            inlined = inline(node, branch, outer, path)
            read_constants(inlined)
            waiting.extendleft(reversed(inlined))
        elif (stands_for := _as_plain_nodes(view, g, node)) is not None:
            waiting.extendleft(reversed(stands_for))
        else:
            done.append(node)
            _settle_cast(node)
            type_outputs(node, view.opsets, known, sizes)
            first = node.outputs[0] if node.outputs else None
            fold(node, view.opsets, sizes)
            chains.follow(node, first)
    view.graph.nodes[:] = done
    view.twins |= chains.twins
    return chains.nodes


def _see_through(view: View, node: gs.Node) -> str:
    """A path for the nodes that a node is replaced by."""
    path = free_path(label(node), view.seen_through)
    view.seen_through[path] = next(y.name for y in node.outputs if y.name)
    return path


def _as_plain_nodes(view: View, g: Emitter, node: gs.Node) -> list[gs.Node] | None:
    """What a fused or quantised node stands for; None where it is plain already, or cannot be seen so."""
    entry = forms.lookup(node, view.opsets)
    if entry is None or id(node) in view.opaque:
        return None
    outputs = [y.name for y in node.outputs]
    path, origin = free_path(label(node), view.seen_through), view.standing_for.get(id(node), (node.op, label(node)))
    try:
        with g.scope(path):
            nodes = forms.expand(g, node, entry)
    except forms.NotPlainError as error:
        view.opaque[id(node)] = str(error)
        return None
    if nodes is None:
        return None
    view.formed.update(set(outputs) - {y.name for y in node.outputs})
    view.seen_through[path] = next(filter(None, outputs))
    for made in nodes:
        made.name = made.name.removeprefix(f"{RECOMPUTED}/")
        view.standing_for[id(made)] = origin
    return nodes


def _settle_cast(node: gs.Node) -> None:
    """A CastLike reads nothing of its second input but its type: a Cast."""
    if node.op in READ_AS and node.domain in (None, "", "ai.onnx") and node.inputs[1].dtype is not None:
        node.op, node.attrs["to"] = READ_AS[node.op], elem_type(node.inputs.pop().dtype)


@cache
def _defaults(domain: str, op: str, opset: int) -> dict[str, Any]:
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    return {
        name: helper.get_attribute_value(attribute.default_value)
        for name, attribute in schema.attributes.items()
        if attribute.default_value.type
    }


def _fill_defaults(node: gs.Node, opsets: dict[str, int]) -> None:
    for key, value in _defaults(node.domain or "", node.op, opsets.get(node.domain or "", 0)).items():
        node.attrs.setdefault(key, value.decode() if isinstance(value, bytes) else value)


def _tensors(graph: gs.Graph) -> list[gs.Tensor]:
    found: dict[str, gs.Tensor] = {tensor.name: tensor for tensor in graph.inputs}
    for node in graph.nodes:
        found.update((tensor.name, tensor) for tensor in [*node.inputs, *node.outputs] if tensor.name)
    return list(found.values())
