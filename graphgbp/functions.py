"""Local functions seen through: each call stands in the reading view as the nodes of the function's body.

The main graph cannot read tensors inside a function, so what a gradient needs of them is computed again. What the
call gives out it can read: a node of the body that makes an output makes it under the name it has outside.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import onnx
from onnx import helper

from graphgbp.contract import RECOMPUTED
from graphgbp.errors import ModelFileError, OpsetError
from graphgbp.nodes import free_path

_ADVICE = "inline it first: onnx.inliner.inline_local_functions(model, convert_version=True)"

Key = tuple[str, str, str]  # domain, name, overload


class SeenThrough(NamedTuple):
    """A model without local functions, and the first output of each call by the call's path: `outer call/inner call`.

    A node inside a call is named `path/node`, a tensor inside it `graphgbp/recomputed/path/tensor`.
    """

    model: onnx.ModelProto
    calls: dict[str, str]


def see_through_functions(model: onnx.ModelProto) -> SeenThrough:
    """Replace each call of a local function by the function's body; a model without functions is given back itself.

    Raises OpsetError where a function imports an operator set in which its nodes mean something else than in the
    model's, ModelFileError where a function calls itself.
    """
    if not model.functions:
        return SeenThrough(model, {})
    calls = _Calls(model)
    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    del seen.graph.node[:], seen.functions[:]
    seen.graph.node.extend(calls.replaced(model.graph.node, ()))
    return SeenThrough(seen, calls.outputs)


def spell_out_defaults(model: onnx.ModelProto) -> None:
    """Give each call the defaults of the attributes it leaves out, in place: onnx.inliner does not know them."""
    functions = {_key(function.domain, function.name, function.overload): function for function in model.functions}
    bodies = [model.graph.node, *(function.node for function in model.functions)]
    for nodes in bodies:
        for node in all_nodes(nodes):
            function = functions.get(_key(node.domain, node.op_type, node.overload))
            given = {attribute.name for attribute in node.attribute}
            node.attribute.extend(a for a in (function.attribute_proto if function else ()) if a.name not in given)


class _Calls:
    """Replaces the calls in a list of nodes, and in their subgraphs, until there are none."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.outputs: dict[str, str] = {}
        self._opsets = _opsets(model.opset_import)
        self._functions = {
            _key(function.domain, function.name, function.overload): function
            for function in model.functions
            if not self._is_operator(function)
        }

    def _is_operator(self, function: onnx.FunctionProto) -> bool:
        """Whether ONNX has an operator of that name: ONNX Runtime then runs the operator, not the function."""
        opset = self._opsets.get(_domain(function.domain))
        return opset is not None and onnx.defs.has(function.name, opset, _domain(function.domain))

    def replaced(self, nodes: Iterable[onnx.NodeProto], callers: tuple[Key, ...]) -> Iterator[onnx.NodeProto]:
        for node in nodes:
            key = _key(node.domain, node.op_type, node.overload)
            if key not in self._functions:
                yield self._with_subgraphs_replaced(node, callers)
            elif key in callers:
                raise ModelFileError(f"the function '{_spell(key)}' calls itself; the model cannot be run or explained")
            else:
                yield from self.replaced(self._body(node, self._functions[key]), (*callers, key))

    def _with_subgraphs_replaced(self, node: onnx.NodeProto, callers: tuple[Key, ...]) -> onnx.NodeProto:
        if not any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
            return node
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for graph in _subgraphs(copy):
            nodes = list(self.replaced(graph.node, callers))
            del graph.node[:]
            graph.node.extend(nodes)
        return copy

    def _body(self, call: onnx.NodeProto, function: onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
        self._refuse_other_opset(function)
        body = _Body(function, call, self._path(call))
        for node in function.node:
            yield body.node(node)
        yield from body.identities()

    def _path(self, call: onnx.NodeProto) -> str:
        """The call's name, or its first output's, made unique."""
        output = next((name for name in call.output if name), call.op_type)
        path = free_path(call.name or output.removeprefix(f"{RECOMPUTED}/"), self.outputs)
        self.outputs[path] = output
        return path

    def _refuse_other_opset(self, function: onnx.FunctionProto) -> None:
        opsets = _opsets(function.opset_import)
        for node in all_nodes(function.node):
            domain = _domain(node.domain)
            if _key(node.domain, node.op_type, node.overload) in self._functions:
                continue
            ours, theirs = self._opsets.get(domain), opsets.get(domain)
            if ours != theirs and (ours is None or theirs is None or _since(node, ours) != _since(node, theirs)):
                raise OpsetError(
                    f"the local function '{_spell(_key(function.domain, function.name, function.overload))}' imports "
                    f"{domain or 'ai.onnx'} {theirs} and the model {ours}, between which {node.op_type} has changed; "
                    + _ADVICE
                )


class _Body:
    """The nodes of a function as one call has them: its names, its attributes."""

    def __init__(self, function: onnx.FunctionProto, call: onnx.NodeProto, path: str) -> None:
        self.path = path
        self._taken: set[str] = set()
        self._attributes = {attribute.name: attribute for attribute in (*function.attribute_proto, *call.attribute)}
        self._names = dict.fromkeys(function.input, "")
        self._names.update(zip(function.input, call.input, strict=False))
        outputs = {formal: name for formal, name in zip(function.output, call.output, strict=False) if name}
        direct = {
            output for node in function.node if set(node.output) - {""} <= outputs.keys() for output in node.output
        }
        self._names.update((formal, name) for formal, name in outputs.items() if formal in direct)
        self._indirect = {formal: name for formal, name in outputs.items() if formal not in direct}

    def node(self, node: onnx.NodeProto) -> onnx.NodeProto:
        """A node of the function under the names it has in this call."""
        bound = onnx.NodeProto()
        bound.CopyFrom(node)
        self._bind(bound)
        bound.name = free_path(f"{self.path}/{node.name or next(filter(None, node.output), node.op_type)}", self._taken)
        self._taken.add(bound.name)
        return bound

    def identities(self) -> Iterator[onnx.NodeProto]:
        """To the outputs that are inputs handed on, or that a node makes beside inner tensors."""
        for index, (formal, name) in enumerate(self._indirect.items()):
            yield helper.make_node("Identity", [self._name(formal)], [name], f"{self.path}/output_{index}")

    def _name(self, name: str) -> str:
        return self._names.setdefault(name, f"{RECOMPUTED}/{self.path}/{name}") if name else ""

    def _bind(self, node: onnx.NodeProto) -> None:
        node.input[:] = [self._name(name) for name in node.input]
        node.output[:] = [self._name(name) for name in node.output]
        attributes = [bound for attribute in node.attribute if (bound := self._attribute(attribute))]
        del node.attribute[:]
        node.attribute.extend(attributes)

    def _attribute(self, attribute: onnx.AttributeProto) -> onnx.AttributeProto | None:
        """The attribute with what it refers to in its place; None where the call leaves that out."""
        if not attribute.ref_attr_name:
            for graph in _graphs_of(attribute):
                self._bind_graph(graph)
            return attribute
        if attribute.ref_attr_name not in self._attributes:
            return None
        given = onnx.AttributeProto()
        given.CopyFrom(self._attributes[attribute.ref_attr_name])
        given.name = attribute.name
        return given

    def _bind_graph(self, graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.output, *graph.value_info):
            value.name = self._name(value.name)
        for weight in graph.initializer:
            weight.name = self._name(weight.name)
        for tensor in graph.sparse_initializer:
            tensor.values.name = self._name(tensor.values.name)
        for node in graph.node:
            self._bind(node)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from all_nodes(graph.node)


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from _graphs_of(attribute)


def _graphs_of(attribute: onnx.AttributeProto) -> list[onnx.GraphProto]:
    return [attribute.g] if attribute.HasField("g") else list(attribute.graphs)


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {_domain(entry.domain): entry.version for entry in imports}


def _since(node: onnx.NodeProto, opset: int) -> int | None:
    try:
        return onnx.defs.get_schema(node.op_type, opset, _domain(node.domain)).since_version
    except onnx.defs.SchemaError:
        return None


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _key(domain: str, name: str, overload: str) -> Key:
    return _domain(domain), name, overload


def _spell(key: Key) -> str:
    domain, name, overload = key
    return f"{domain}::{name}" + (f":{overload}" if overload else "")
