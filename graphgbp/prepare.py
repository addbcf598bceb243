"""The reading view of a model: what rules, policies and the search for layers look at.

The view is an onnx_graphsurgeon graph of the model in which every tensor has a type and a shape whose sizes are ints
or symbols, every value that is known before running is a Constant, every attribute that has a default is spelled out,
and the nodes come in topological order. Only the view is changed; the model's own nodes stay as they are.
"""

from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, shape_inference
from onnx_graphsurgeon.logger import G_LOGGER

import graphgbp.plain  # noqa: F401  fills the table of forms
from graphgbp import forms
from graphgbp.branches import fixed_names, inline, taken_branch
from graphgbp.contract import RECOMPUTED
from graphgbp.emit import Emitter, elem_type, type_of
from graphgbp.errors import ModelFileError
from graphgbp.functions import see_through_functions
from graphgbp.model_file import tensor_names, with_readable_text, with_small_weights
from graphgbp.nodes import free_path, label, node_proto, topological_order
from graphgbp.plain import units
from graphgbp.plain.quantised import dequantized
from graphgbp.shapes import TensorType, from_proto, infer_node, is_static
from graphgbp.sizes import Sizes
from graphgbp.stored import Stored, show_as_float32
from graphgbp.weights import read_weights_from

READ_AS = {"CastLike": "Cast"}
"""Operators that the view shows as another one."""

_FOLD_LIMIT = 1024
_EVALUATED_AT = {"QuantizeLinear": 21, "DequantizeLinear": 21}  # the oldest opset that onnx.reference has them of
_RANDOM = {
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
}


@dataclass
class View:
    """The model as rules read it. `graph.nodes[:]` is in topological order.

    `recomputed` are nodes that the model does not hold in its main graph (a taken branch of an If, the body of a local
    function, what a fused node stands for), as they compute in the types of the file; `constants` are those they read.
    What a gradient reads of them is computed again, and a tensor in `twins` is read under the name there. `stored`
    tells the type in the file of a tensor that the view shows as float32. `opaque` tells of a node, by its id, why it
    is not seen as plain nodes. `seen_through` holds the name of the first output of a node that is, and of a call, by
    its path; `formed` all outputs of such nodes. `named` is the first output of every node, of those seen through as
    well, by the node's name; `standing_for` the node of the file behind a node, by its id, as (operator, name).
    """

    graph: gs.Graph
    opsets: dict[str, int]
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    recomputed: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    stored: Stored = field(default_factory=dict)
    opaque: dict[int, str] = field(default_factory=dict)
    seen_through: dict[str, str] = field(default_factory=dict)
    formed: set[str] = field(default_factory=set)
    named: dict[str, gs.Tensor] = field(default_factory=dict)
    standing_for: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return self.opsets[""]


def prepare(model: onnx.ModelProto, folder: Path | None = None, *, halves: bool = True) -> View:
    """Build the reading view of a model at opset 16 or newer; the model itself is not changed.

    `folder` holds the model's external data, where it has any. `halves` shows half precision as float32.
    """
    view = flatten(model, folder)
    view.stored = show_as_float32(view.graph, view.opsets, view.formed, halves)
    view.tensors = {tensor.name: tensor for tensor in _tensors(view.graph)}
    view.named = {path: view.tensors[name] for path, name in view.seen_through.items() if name in view.tensors}
    view.named.update({node.name: node.outputs[0] for node in reversed(view.graph.nodes) if node.name and node.outputs})
    return view


def flatten(model: onnx.ModelProto, folder: Path | None = None) -> View:
    """The reading view before anything is shown as float32: its nodes compute what the model computes."""
    model = with_readable_text(with_small_weights(model, folder, _FOLD_LIMIT))
    seen, calls = see_through_functions(model)
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns of what is no tensor
        graph = gs.import_onnx(seen)
    if folder is not None:
        read_weights_from(folder, graph)
    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}
    graph.nodes[:] = topological_order(graph)
    _refuse_undefined(graph)
    view = View(graph, opsets, seen_through=dict(calls))
    _read_constants(graph.nodes)
    chains = _infer(view, model, seen)
    for node in graph.nodes:
        _fill_defaults(node, opsets)
    _recompute(view, tensor_names(model), units.copies(seen), chains)
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
    view.twins |= {name: units.copy_of(name) for name in copies}
    unique = {id(copy): copy for copy in copies.values()}
    protos = [node_proto(node) for node in nodes]
    view.recomputed = [*protos[: len(chains)], *unique.values(), *protos[len(chains) :]]
    for proto in view.recomputed:
        proto.input[:] = [view.twins.get(name, name) for name in proto.input]
        proto.name = proto.name if proto.name.startswith(f"{RECOMPUTED}/") else f"{RECOMPUTED}/{proto.name}"
    for node in chains:
        node.inputs.clear()
        node.outputs.clear()


def skeleton(model: onnx.ModelProto, limit: int = _FOLD_LIMIT) -> onnx.ModelProto:
    """The model with every large weight replaced by an input of its type: small, and of the same shapes."""
    small = onnx.ModelProto(ir_version=max(model.ir_version, 4), producer_name=model.producer_name)
    small.opset_import.extend(model.opset_import)
    small.functions.extend(model.functions)
    graph = small.graph
    graph.name = model.graph.name or "graph"
    graph.node.extend(model.graph.node)
    graph.output.extend(model.graph.output)
    initializers = {tensor.name for tensor in model.graph.initializer}
    graph.input.extend(value for value in model.graph.input if value.name not in initializers)
    for tensor in model.graph.initializer:
        if np.prod(tensor.dims) > limit:
            graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    return small


def _refuse_undefined(graph: gs.Graph) -> None:
    defined = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Variable) and tensor.name and not tensor.inputs and tensor.name not in defined:
                raise ModelFileError(
                    f"node '{label(node)}' ({node.op}) reads '{tensor.name}', which nothing makes; "
                    "export the model again"
                )


def _read_constants(nodes: Iterable[gs.Node]) -> None:
    for node in nodes:
        if node.op == "Constant" and node.domain in (None, "", "ai.onnx"):
            value = _constant_value(node)
            if value is not None:
                _fix(node.outputs[0], value)


def _constant_value(node: gs.Node) -> np.ndarray | None:
    if "value" in node.attrs:
        value = node.attrs["value"]
        return value.values if isinstance(value, gs.Constant) else np.asarray(value)
    for key, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if key in node.attrs:
            return np.asarray(node.attrs[key], dtype)
    return None


def _fix(tensor: gs.Tensor, value: np.ndarray | np.generic) -> None:
    """Make a tensor known: every consumer sees a Constant."""
    tensor.inputs.clear()
    tensor.to_constant(np.asarray(value))


def _infer(view: View, model: onnx.ModelProto, seen: onnx.ModelProto) -> list[gs.Node]:
    """Type every tensor in order and fold what depends on constants alone. Only inputs' declared shapes count.

    An If that this settles is replaced by its branch, a fused or quantised node by what it stands for. What comes back
    are nodes that make dequantised tensors again, for those who must not read the model's own.
    """
    known = _whole_graph_types(seen)
    for tensor in view.graph.inputs:
        if tensor.shape is not None:
            tensor.shape = _sizes_as_declared(tensor)
    outer, fixed, there = tensor_names(seen), fixed_names(model), tensor_names(model)
    waiting, done = deque(view.graph.nodes), []
    g, sizes = Emitter(view.graph, view.opset, RECOMPUTED), Sizes()
    chains: list[gs.Node] = []
    while waiting:
        node = waiting.popleft()
        branch = taken_branch(node, fixed)
        if branch is not None:
            path = _see_through(view, node)
            inlined = inline(node, branch, outer, path)
            _read_constants(inlined)
            waiting.extendleft(reversed(inlined))
        elif (stands_for := _as_plain_nodes(view, g, node)) is not None:
            waiting.extendleft(reversed(stands_for))
        else:
            done.append(node)
            _settle_cast(node)
            _type_outputs(node, view.opsets, known, sizes)
            _fold(node, view.opsets, sizes)
            if node.op == "DequantizeLinear" and node.outputs and node.outputs[0].name in there:
                chains += _dequantised_again(view, g, node)
    view.graph.nodes[:] = done
    return chains


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
    path, origin = free_path(label(node), view.seen_through), (node.op, label(node))
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


def _dequantised_again(view: View, g: Emitter, node: gs.Node) -> list[gs.Node]:
    """Nodes that make a dequantised tensor under another name; none where the view need not tell the two apart."""
    q, scale, zero_point = (*node.inputs, None)[:3]
    y, start = node.outputs[0], len(g.nodes)
    if not isinstance(y, gs.Variable) or node.attrs.get("block_size") or q.dtype is None or isinstance(q.dtype, int):
        return []
    with g.scope(y.name):
        twin = dequantized(g, q, scale, zero_point, axis=node.attrs.get("axis", 1))
        view.twins[y.name] = g.cast(twin, y.dtype).name
    return g.nodes[start:]


def _settle_cast(node: gs.Node) -> None:
    """A CastLike reads nothing of its second input but its type: a Cast."""
    if node.op in READ_AS and node.domain in (None, "", "ai.onnx") and node.inputs[1].dtype is not None:
        node.op, node.attrs["to"] = READ_AS[node.op], elem_type(node.inputs.pop().dtype)


def _type_outputs(node: gs.Node, opsets: dict[str, int], known: dict[str, TensorType], sizes: Sizes) -> None:
    outputs = [tensor for tensor in node.outputs if tensor.name and isinstance(tensor, gs.Variable)]
    types = _node_types(node, opsets, known, sizes) if outputs else {}
    for tensor in outputs:
        kind = types.get(tensor.name) or known.get(tensor.name)
        if kind is not None:
            tensor.dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if kind is not None and kind.shape is not None:
            tensor.shape = tuple(kind.shape)
        elif tensor.shape is not None:
            tensor.shape = _sizes_as_declared(tensor)


def _sizes_as_declared(tensor: gs.Tensor) -> tuple[int | str, ...]:
    return tuple(
        size if (isinstance(size, str) and size) or (isinstance(size, int) and size >= 0) else f"{tensor.name}:{axis}"
        for axis, size in enumerate(tensor.shape)
    )


def _whole_graph_types(model: onnx.ModelProto) -> dict[str, TensorType]:
    bare = skeleton(model)
    for output in bare.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    try:
        inferred = shape_inference.infer_shapes(bare, data_prop=True)
    except shape_inference.InferenceError as error:
        raise ModelFileError(
            f"ONNX finds the model's shapes inconsistent: {error}; repair the file or its export"
        ) from None
    graph = inferred.graph
    return {
        value.name: _with_symbols(value.name, from_proto(value.type))
        for value in [*graph.value_info, *graph.output]
        if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type
    }


def _with_symbols(name: str, kind: TensorType) -> TensorType:
    if kind.shape is None:
        return kind
    return TensorType(
        kind.elem_type,
        tuple(size if size != "" else f"{name}:{axis}" for axis, size in enumerate(kind.shape)),
    )


def _node_types(
    node: gs.Node, opsets: dict[str, int], known: dict[str, TensorType], sizes: Sizes
) -> dict[str, TensorType]:
    """Types by inference of the node alone, whose symbols are finer than the whole graph's."""
    domain = node.domain or ""
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if _has_graph(node) or domain not in opsets or any(tensor.dtype is None for tensor in inputs):
        return {}
    types = {tensor.name: type_of(tensor) for tensor in inputs}
    values = {tensor.name: tensor.values for tensor in inputs if _is_small(tensor)}
    try:
        held = {tensor.name: value for tensor in inputs if (value := sizes.of(tensor)) is not None}
        return infer_node(node_proto(node), opsets[domain], types, values, known, held)
    except (onnx.defs.SchemaError, onnx.checker.ValidationError):  # not for this opset, or not as ONNX would have it
        return {}
    except shape_inference.InferenceError as error:
        raise ModelFileError(
            f"node '{label(node)}' ({node.op}) does not fit its inputs: {str(error).strip()}; "
            "repair the file or its export"
        ) from None


def _is_small(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape)) <= _FOLD_LIMIT


def _fold(node: gs.Node, opsets: dict[str, int], sizes: Sizes) -> None:
    """Replace the outputs of a small node whose value is known before running by that value."""
    if node.domain not in (None, "", "ai.onnx") or node.op in _RANDOM or len(node.outputs) != 1:
        return
    (output,) = node.outputs
    if not is_static(output.shape) or int(np.prod(output.shape)) > _FOLD_LIMIT:
        return
    sizes.follow(node)
    if (value := sizes.known(output)) is not None:
        _fix(output, value)
    elif node.inputs and all(tensor.is_empty() or _is_small(tensor) for tensor in node.inputs) and not _has_graph(node):
        _fix(output, _evaluate(node, opsets))


def _has_graph(node: gs.Node) -> bool:
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def _evaluate(node: gs.Node, opsets: dict[str, int]) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    feeds = {tensor.name: tensor.values for tensor in node.inputs if not tensor.is_empty()}
    graph = helper.make_graph(
        [node_proto(node)],
        "constant",
        [helper.make_tensor_value_info(name, elem_type(value.dtype), value.shape) for name, value in feeds.items()],
        [helper.make_tensor_value_info(node.outputs[0].name, elem_type(node.outputs[0].dtype), None)],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", max(opsets[""], _EVALUATED_AT.get(node.op, 0)))]
    )
    return np.asarray(next(iter(ReferenceEvaluator(model).run(None, feeds))))


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
