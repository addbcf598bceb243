"""Models whose weights are in external files, wherever a model can hold a tensor."""

from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

from tests.build import model, small_cnn

DATA = "model.onnx.data"


def external(values: np.ndarray, name: str = "w", **description: object) -> TensorProto:
    """A tensor without values that says where they lie."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": DATA, "offset": 0, "length": values.nbytes, **description}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def adding(
    tensor: TensorProto, nodes: list[onnx.NodeProto] | None = None, functions=(), name: str = "w"
) -> onnx.ModelProto:
    """y = x + w, w an initializer, or made by the nodes."""
    made = model([f"y = Add(x, {name})"], {"x": (1, 4), name: (4,)}, ["y"])
    del made.graph.input[1]
    if nodes is None:
        made.graph.initializer.append(tensor)
    for node in reversed(nodes or []):
        made.graph.node.insert(0, node)
    made.functions.extend(functions)
    return made


def in_constant(tensor: TensorProto) -> onnx.ModelProto:
    return adding(tensor, [helper.make_node("Constant", [], ["w"], value=tensor)])


def in_branches(tensor: TensorProto) -> onnx.ModelProto:
    """As an initializer of one branch and a Constant of the other."""
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])
    then = helper.make_graph([], "then", [], [value], [tensor])
    other = helper.make_graph([helper.make_node("Constant", [], ["w"], value=tensor)], "else", [], [value])
    condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    return adding(
        tensor, [condition, helper.make_node("If", ["c"], ["s"], then_branch=then, else_branch=other)], name="s"
    )


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["v"], value=tensor)]
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function("own", "Weight", [], ["v"], body, imports)
    made = adding(tensor, [helper.make_node("Weight", [], ["w"], domain="own")], [function])
    made.opset_import.add(domain="own", version=1)
    return made


def in_default(tensor: TensorProto) -> onnx.ModelProto:
    """As the default of a function's attribute."""
    constant = helper.make_node("Constant", [], ["v"])
    constant.attribute.add(name="value", ref_attr_name="weight", type=onnx.AttributeProto.TENSOR)
    imports = [helper.make_opsetid("", 18)]
    default = helper.make_attribute("weight", tensor)
    function = helper.make_function("own", "Weight", [], ["v"], [constant], imports, attribute_protos=[default])
    made = adding(tensor, [helper.make_node("Weight", [], ["w"], domain="own")], [function])
    made.opset_import.add(domain="own", version=1)
    return made


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.arange(4), "indices"), [4])


def in_sparse(tensor: TensorProto) -> onnx.ModelProto:
    made = adding(tensor, [])
    made.graph.sparse_initializer.append(sparse(tensor))
    return made


def in_sparse_constant(tensor: TensorProto) -> onnx.ModelProto:
    return adding(tensor, [helper.make_node("Constant", [], ["w"], sparse_value=sparse(tensor))])


HOLDERS = [adding, in_constant, in_branches, in_function, in_default, in_sparse, in_sparse_constant]


def written(made: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def external_cnn(folder: Path, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    made = small_cnn(("y = Softmax<axis=1>(z)",), **options)
    onnx.save(made, folder / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=0)
    return folder / "model.onnx"


# -- where they are ---------------------------------------------------------------------------------------------------


def messages(message: Message):
    """Every tensor of a protobuf message, found by its fields."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                yield from messages(inner)
