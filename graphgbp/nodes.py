"""Reading nodes of an onnx_graphsurgeon graph: their names, their order, what they read, their ONNX form."""

from collections import deque
from collections.abc import Container, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from graphgbp.emit import elem_type
from graphgbp.errors import ModelFileError


def topological_order(graph: gs.Graph) -> list[gs.Node]:
    """The nodes with producers before consumers; nodes that were already in order keep it."""
    producer = {output.name: index for index, node in enumerate(graph.nodes) for output in node.outputs if output.name}
    consumers: list[list[int]] = [[] for _ in graph.nodes]
    waiting = [0] * len(graph.nodes)
    for index, node in enumerate(graph.nodes):
        for source in {producer[name] for name in input_names(node) if name in producer}:
            consumers[source].append(index)
            waiting[index] += 1
    if all(source < index for source, targets in enumerate(consumers) for index in targets):
        return list(graph.nodes)
    ready, order = deque(index for index, count in enumerate(waiting) if not count), []
    while ready:
        index = ready.popleft()
        order.append(graph.nodes[index])
        for target in consumers[index]:
            waiting[target] -= 1
            if not waiting[target]:
                ready.append(target)
    if len(order) < len(waiting):
        stuck = next(node for node, count in zip(graph.nodes, waiting, strict=True) if count)
        raise ModelFileError(f"the graph has a cycle through node '{label(stuck)}'; it cannot be run or explained")
    return order


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Nodes without subgraphs and without a cycle, producers before consumers."""
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waiting = [{maker[name] for name in node.input if name in maker} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, made_by in enumerate(waiting):
        for source in made_by:
            readers[source].append(index)
    ready, order = deque(index for index, made_by in enumerate(waiting) if not made_by), []
    while ready:
        index = ready.popleft()
        order.append(nodes[index])
        for reader in readers[index]:
            waiting[reader].discard(index)
            if not waiting[reader]:
                ready.append(reader)
    return order


def input_names(node: gs.Node) -> set[str]:
    """Every outer tensor a node reads, also from inside its subgraphs."""
    names = {tensor.name for tensor in node.inputs if not tensor.is_empty()}
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            names.update(name for inner in value.nodes for name in input_names(inner))
            names.update(tensor.name for tensor in value.outputs)
    return names


def label(node: gs.Node) -> str:
    """A node's name, or its first output's where it has none."""
    return node.name or next((output.name for output in node.outputs if output.name), node.op)


def free_path(stem: str, taken: Container[str]) -> str:
    """A path for what is inside a call or an If: its name, or the name and a number where that is taken."""
    return next(path for n in count(1) if (path := f"{stem}_{n}" if n > 1 else stem) not in taken)


def permutation(node: gs.Node) -> list[int]:
    """A Transpose's, spelled out."""
    return node.attrs.get("perm") or list(range(len(node.inputs[0].shape)))[::-1]


def axes_of(node: gs.Node, rank: int) -> list[int]:
    """The axes, counted from 0, that an attribute or a known second input names; none where they are left out."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = given.values.reshape(-1).tolist() if isinstance(given, gs.Constant) else node.attrs.get("axes") or []
    return [axis % rank for axis in axes]


def slices(node: gs.Node) -> Iterator[tuple[int, int, float, int]]:
    """(axis, start, end, step) of a Slice whose inputs are known; an end beyond any size is infinite."""
    x = node.inputs[0]
    starts, ends, *rest = ([] if t.is_empty() else t.values.reshape(-1).tolist() for t in node.inputs[1:])
    axes, steps = (*rest, [], [])[:2]
    axes, steps = axes or range(len(starts)), steps or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = x.shape[axis]
        if isinstance(size, int):
            start, end = (bound + size if bound < 0 else min(bound, size) for bound in (start, end))
        yield axis % len(x.shape), start, end if end < np.iinfo(np.int32).max else np.inf, step


def node_proto(node: gs.Node) -> onnx.NodeProto:
    proto = helper.make_node(
        node.op,
        [tensor.name for tensor in node.inputs],
        [tensor.name for tensor in node.outputs],
        node.name,
        domain=node.domain or "",
    )
    proto.attribute.extend(_attribute(key, value) for key, value in sorted(node.attrs.items()) if value is not None)
    return proto


def _attribute(key: str, value: Any) -> onnx.AttributeProto:
    """A list that is empty does not tell its type: it counts as one of integers, as of axes."""
    if isinstance(value, gs.Constant):
        value = numpy_helper.from_array(value.values)
    elif isinstance(value, type):
        value = elem_type(value)
    return helper.make_attribute(key, value, attr_type=onnx.AttributeProto.INTS if value == [] else None)
