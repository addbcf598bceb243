"""The nine ImageNet architectures that the onnx package ships, with weights that can tell right from wrong.

    name           input          shape               parameters, millions
    bvlc_alexnet   data_0         [1, 3, 224, 224]     61.0
    densenet121    data_0         [1, 3, 224, 224]      8.1
    inception_v1   data_0         [1, 3, 224, 224]      7.0
    inception_v2   data_0         [1, 3, 224, 224]     11.2
    resnet50       gpu_0/data_0   [1, 3, 224, 224]     25.6
    shufflenet     gpu_0/data_0   [1, 3, 224, 224]      1.4
    squeezenet     data_0         [1, 3, 224, 224]      1.2
    vgg19          data_0         [1, 3, 224, 224]    143.7
    zfnet512       gpu_0/data_0   [1, 3, 224, 224]     87.3

Each has one output, of shape [1, 1000] or [1, 1000, 1, 1]: probabilities, but for densenet121, which ends in scores.
"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

LIGHT_MODELS = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)
INPUT_SHAPE = (1, 3, 224, 224)

_FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
_PASSED_ON = ("Reshape", "Unsqueeze")


def light_model(name: str, seed: int = 0) -> onnx.ModelProto:
    """A light model with every weight drawn: initializers, listed as inputs too, as IR 3 wants it; opset 9.

    Convolutions and Gemms are He-normal, biases N(0, 0.1), scales uniform in [0.5, 1.5]; a BatchNormalization has
    the mean and variance of what it meets, and the last layer gives scores of standard deviation 1: activations
    neither vanish nor explode, and no Softmax saturates.
    """
    rng = np.random.default_rng(seed)
    model = onnx.load(_FOLDER / f"light_{name}.onnx")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    shapes = {
        node.output[0]: values.pop(node.input[0]) for node in model.graph.node if node.op_type == "ConstantOfShape"
    }
    values.update((weight, np.zeros(shape, np.float32)) for weight, shape in shapes.items())
    nodes = [node for node in model.graph.node if node.op_type != "ConstantOfShape"]
    x = input_name(model)
    for node in nodes:
        for position, weight in enumerate(node.input):
            if weight in values and values[weight].dtype == np.float32:
                values[weight] = _draw(rng, values[weight].shape, *_role(nodes, node, position))
    _calibrate(nodes, values, {x: rng.standard_normal(INPUT_SHAPE).astype(np.float32)})
    _store(model, nodes, values)
    return model


def light_input(seed: int = 0) -> np.ndarray:
    """A random image for a light model: float32 [1, 3, 224, 224], standard normal."""
    return np.random.default_rng(seed).standard_normal(INPUT_SHAPE).astype(np.float32)


def input_name(model: onnx.ModelProto) -> str:
    """The one input of a light model that is no weight."""
    weights = {tensor.name for tensor in model.graph.initializer}
    (name,) = (value.name for value in model.graph.input if value.name not in weights)
    return name


def _role(nodes: list[onnx.NodeProto], node: onnx.NodeProto, position: int) -> tuple[onnx.NodeProto, int]:
    """The node that computes with a weight, and as which of its inputs; movement on the way is passed."""
    while node.op_type in _PASSED_ON and position == 0:
        moved = node.output[0]
        node = next(consumer for consumer in nodes if moved in consumer.input)
        position = list(node.input).index(moved)
    return node, position


def _draw(rng: np.random.Generator, shape: tuple[int, ...], node: onnx.NodeProto, position: int) -> np.ndarray:
    role = node.op_type, position
    if role in (("Conv", 1), ("Gemm", 1)):
        flipped = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        fan_in = np.prod(shape[1:]) if node.op_type == "Conv" else shape[-1 if flipped else -2]
        drawn = rng.standard_normal(shape, np.float32) * np.float32(np.sqrt(2 / fan_in))
    elif role in (("BatchNormalization", 1), ("BatchNormalization", 4)) or node.op_type == "Mul":
        drawn = rng.uniform(0.5, 1.5, shape)
    elif (
        role in (("Conv", 2), ("Gemm", 2), ("BatchNormalization", 2), ("BatchNormalization", 3))
        or node.op_type == "Add"
    ):
        drawn = rng.normal(0, 0.1, shape)
    else:
        raise AssertionError(f"no weight is expected as input {position} of {node.op_type}")
    return drawn.astype(np.float32)


def _calibrate(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], values: dict[str, np.ndarray]) -> None:
    """Run node by node, setting every BatchNormalization's mean and variance and the scores' scale on the way."""
    last_use = {name: index for index, node in enumerate(nodes) for name in node.input}
    head = max(index for index, node in enumerate(nodes) if node.op_type in ("Conv", "Gemm"))
    for index, node in enumerate(nodes):
        if node.op_type == "BatchNormalization":
            x = values[node.input[0]]
            variance = x.var((0, 2, 3))
            weights[node.input[3]] = x.mean((0, 2, 3))
            weights[node.input[4]] = variance + np.float32(0.1) * variance.mean()
        feeds = {name: values[name] if name in values else weights[name] for name in node.input}
        y = _run_node(node, feeds)
        if index == head:
            weights[_source(nodes, node.input[1])] /= y.std()
            y = _run_node(node, {**feeds, node.input[1]: feeds[node.input[1]] / y.std()})
        values[node.output[0]] = y
        for name in node.input:
            if last_use[name] == index:
                values.pop(name, None)


def _source(nodes: list[onnx.NodeProto], name: str) -> str:
    """The weight that a tensor was moved from."""
    producers = {node.output[0]: node for node in nodes if node.op_type in _PASSED_ON}
    while name in producers:
        name = producers[name].input[0]
    return name


def _run_node(node: onnx.NodeProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
        for name, x in feeds.items()
    ]
    output = helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "node", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0]


def _store(model: onnx.ModelProto, nodes: list[onnx.NodeProto], values: dict[str, np.ndarray]) -> None:
    graph, image = model.graph, input_name(model)
    infos = [value for value in graph.input if value.name == image]
    infos += [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in values.items()
    ]
    for field, content in (
        (graph.node, nodes),
        (graph.input, infos),
        (graph.initializer, [numpy_helper.from_array(value, name) for name, value in values.items()]),
    ):
        kept = [type(item).FromString(item.SerializeToString()) for item in content]
        del field[:]
        field.extend(kept)
