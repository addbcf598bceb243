"""Can a tensor be negative? What a quantiser cuts off below zero is a ReLU only where it can."""

import numpy as np
import onnx_graphsurgeon as gs

_NEVER_NEGATIVE = {
    "Abs", "ArgMax", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt", "ThresholdedRelu",
}  # fmt: skip
_AS_ITS_INPUTS = {
    "Add", "AveragePool", "Cast", "Concat", "DepthToSpace", "Div", "Dropout", "Expand", "Flatten", "Gather",
    "GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "Min", "Mul", "Pad", "Pow", "ReduceMax", "ReduceMean",
    "ReduceMin", "ReduceSum", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sum", "Tile", "Transpose",
    "Unsqueeze",
}  # fmt: skip  # not negative where no real input is
_MOVES = {
    "Add", "Cast", "DepthToSpace", "DequantizeLinear", "Div", "Flatten", "Identity", "Mul", "Pad", "QuantizeLinear",
    "Reshape", "Slice", "SpaceToDepth", "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
_NO_RELU_FOLLOWS = {
    "AveragePool", "Celu", "Elu", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSwish", "LeakyRelu", "MaxPool",
    "Mish", "PRelu", "ReduceMean", "Resize", "Selu", "Softsign", "Swish", "Tanh",
}  # fmt: skip
_REARRANGES = {"Cast", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}
_SMALL = 4096  # a larger constant is a weight and not looked into


def may_be_negative(tensor: gs.Tensor) -> bool:
    """False only where no value of the tensor can be below zero."""
    waiting, seen = [tensor], set()
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, gs.Constant):
            if x.values.dtype.kind not in "fiu" or int(np.prod(x.shape)) > _SMALL or (x.values < 0).any():
                return True
            continue
        read = _signs_read(x)
        if read is None:
            return True
        waiting.extend(read)
    return False


def _signs_read(x: gs.Tensor) -> list[gs.Tensor] | None:
    """The tensors of which none may be negative lest x is; None where x may be whatever they are."""
    node = x.inputs[0] if x.inputs else None
    if node is None or node.domain not in (None, "", "ai.onnx"):
        return None
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if node.op in _NEVER_NEGATIVE or _is_stored_above_zero(node):
        return []
    if node.op in ("Clip", "Max"):
        floors = inputs[1:2] if node.op == "Clip" else inputs
        above = any(isinstance(t, gs.Constant) and t.values.size and (t.values >= 0).all() for t in floors)
        return [] if above else inputs[:1] if node.op == "Clip" else inputs
    if node.op == "Where":
        return inputs[1:]
    if node.op == "Resize":
        return inputs[:1] if node.attrs.get("mode", "nearest") in ("nearest", "linear") else None
    if node.op not in _AS_ITS_INPUTS:
        return None
    return [t for t in inputs if t.dtype is None or np.dtype(t.dtype) != np.int64]


def _is_stored_above_zero(node: gs.Node) -> bool:
    """Whether a node gives q - z where z is the least q: what a quantised tensor without negative values stands for."""
    if node.op == "DequantizeLinear":
        q, zero_point = node.inputs[0], node.inputs[2] if len(node.inputs) > 2 else None
    elif node.op == "Cast":
        q, zero_point = node.inputs[0], None
    elif node.op == "Sub" and node.inputs[0].inputs and node.inputs[0].inputs[0].op == "Cast":
        q, zero_point = node.inputs[0].inputs[0].inputs[0], node.inputs[1]
    else:
        return False
    if q.dtype is None or isinstance(q.dtype, int) or np.dtype(q.dtype).kind not in "iu":
        return False
    if zero_point is not None and not isinstance(zero_point, gs.Constant):
        return False
    least = np.iinfo(q.dtype).min
    return least == 0 if zero_point is None else bool((zero_point.values == least).all())


def may_be_followed_by_relu(tensor: gs.Tensor) -> bool:
    """Whether networks have a ReLU there: not behind another activation, a pooling or a mean.

    Quantised with the least zero point, those were just never negative in calibration.
    """
    while tensor.inputs and tensor.inputs[0].op in _REARRANGES:
        tensor = tensor.inputs[0].inputs[0]
    return not tensor.inputs or tensor.inputs[0].op not in _NO_RELU_FOLLOWS


def is_models_own(tensor: gs.Tensor) -> bool:
    """Whether a tensor is an input of the model, at most moved, shifted or scaled by constants."""
    while not isinstance(tensor, gs.Constant):
        if not tensor.inputs:
            return True
        node = tensor.inputs[0]
        varied = [x for x in node.inputs if not x.is_empty() and not isinstance(x, gs.Constant)]
        if node.op not in _MOVES or len(varied) != 1:
            return False
        (tensor,) = varied
    return False
