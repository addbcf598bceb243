"""A small network with every kind of node that a verification looks at; and ways to damage a converted file."""

import json
from collections.abc import Callable

import numpy as np
import onnx

from graphgbp import contract
from tests.build import drawn, model

ALL = list(contract.METHODS)


def network(opset: int = 18) -> onnx.ModelProto:
    """Relu, Clip, a max pooling, a residual sum, groups, strides, a SiLU that is written out, a Softmax."""
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w1, b1)",
        "r1 = Relu(a)",
        "m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)",
        "b = Conv<pads=[1,1,1,1]>(m, w2)",
        "r2 = Clip(b, zero, bound)",
        "c = Conv<pads=[1,1,1,1], group=2>(r2, w3)",
        "s = Add(c, m)",
        "r3 = Relu(s)",
        "d = Conv<strides=[2,2], pads=[1,1,1,1]>(r3, w4)",
        "gate = Sigmoid(d)",
        "h = Mul(d, gate)",
        "p = GlobalAveragePool(h)",
        "f = Flatten(p)",
        "z = Gemm<transB=1>(f, w5)",
        "y = Softmax<axis=1>(z)",
    ]
    weights = {
        "w1": drawn(6, 3, 3, 3, seed=1, scale=0.4),
        "b1": drawn(6, seed=2, scale=0.1),
        "w2": drawn(8, 6, 3, 3, seed=3, scale=0.3),
        "w3": drawn(6, 4, 3, 3, seed=4, scale=0.3),
        "w4": drawn(8, 6, 3, 3, seed=5, scale=0.3),
        "w5": drawn(5, 8, seed=6),
        "zero": np.float32(0),
        "bound": np.float32(1.5),
    }
    return model(nodes, {"x": ["N", 3, 16, 16]}, ["y"], weights, opset=opset)


def with_functions(source: onnx.ModelProto) -> onnx.ModelProto:
    """The network, its first block (a, r1, m) and its residual block (b to r3) as local functions."""
    made = onnx.ModelProto()
    made.CopyFrom(source)
    del made.graph.node[:], made.graph.value_info[:]
    made.opset_import.add(domain="net", version=1)
    nodes = list(source.graph.node)
    blocks = {
        "stem": (nodes[:3], ["x", "w1", "b1"], ["m"]),
        "block": (nodes[3:8], ["m", "w2", "zero", "bound", "w3"], ["r3"]),
    }
    for name, (inside, inputs, outputs) in blocks.items():
        made.functions.append(onnx.helper.make_function("net", name, inputs, outputs, inside, source.opset_import))
        made.graph.node.append(onnx.helper.make_node(name, inputs, outputs, f"call {name}", domain="net"))
    made.graph.node.extend(nodes[8:])
    return made


def with_branches(source: onnx.ModelProto) -> onnx.ModelProto:
    """The network, its third ReLU in the branch of an If whose condition is known."""
    made = onnx.ModelProto()
    made.CopyFrom(source)
    branches = {}
    for name, op in (("then_branch", "Relu"), ("else_branch", "Neg")):
        inner = [
            onnx.helper.make_node(op, ["s"], ["inner"], "inside"),
            onnx.helper.make_node("Identity", ["inner"], ["out"]),
        ]
        output = onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
        branches[name] = onnx.helper.make_graph(inner, name, [], [output])
    choice = onnx.helper.make_node("If", ["condition"], ["r3"], "choice", **branches)
    index = next(i for i, n in enumerate(made.graph.node) if "r3" in n.output)
    made.graph.node[index].CopyFrom(choice)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(True), "condition"))
    return made


def node(converted: onnx.ModelProto, begins: str, *, op: str | None = None) -> onnx.NodeProto:
    """The first node whose name begins so."""
    return next(n for n in converted.graph.node if n.name.startswith(begins) and op in (None, n.op_type))


def behind(converted: onnx.ModelProto, tensor: str, op: str, constant: float | None = None) -> None:
    """Put a node between a tensor and its readers."""
    made = f"{contract.SCOPE}/damage/{tensor}"
    index = next(i for i, n in enumerate(converted.graph.node) if tensor in n.output)
    damaged = converted.graph.node[index]
    damaged.output[:] = [made if output == tensor else output for output in damaged.output]
    inputs = [made]
    if constant is not None:
        inputs.append(f"{contract.SCOPE}/damage/constant")
        value = np.asarray(constant, np.float32)
        converted.graph.initializer.append(onnx.numpy_helper.from_array(value, inputs[1]))
    added = onnx.helper.make_node(op, inputs, [tensor], f"{contract.SCOPE}/damage/{op}")
    converted.graph.node.insert(index + 1, added)


def edit_manifest(converted: onnx.ModelProto, edit: Callable[[dict], None]) -> None:
    entry = next(entry for entry in converted.metadata_props if entry.key == contract.MANIFEST_KEY)
    manifest = json.loads(entry.value)
    edit(manifest)
    entry.value = json.dumps(manifest, sort_keys=True)
