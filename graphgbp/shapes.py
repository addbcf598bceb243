"""The type of every tensor a node produces: ONNX's own inference, with a symbol for each size it leaves open.

Two sizes that carry the same symbol are equal at run time, which is what lets a residual sum over a dynamic
image be differentiated without asking at run time whether it broadcasts.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from graphgbp import symbols

Dim = symbols.Dim
Shape = tuple[Dim, ...]

_DATA_LIMIT = 1024
_LIKE_FIRST_INPUT = ("GroupNormalization", "MeanVarianceNormalization")  # functions that ONNX's inference leaves shut
_TYPED_AT = {"QuantizeLinear": 23, "DequantizeLinear": 23}  # ONNX Runtime has 16 bits for them at every opset


class TensorType(NamedTuple):
    """Element type as an ONNX enum, and the sizes: an int, or a symbol; None where the rank is unknown."""

    elem_type: int
    shape: Shape | None


def is_static(shape: Shape | None) -> bool:
    return shape is not None and all(isinstance(size, int) for size in shape)


def infer_node(
    node: onnx.NodeProto,
    opset: int,
    types: Mapping[str, TensorType],
    values: Mapping[str, np.ndarray],
    known: Mapping[str, TensorType] | None = None,
    sizes: Mapping[str, np.ndarray] | None = None,
) -> dict[str, TensorType]:
    """Types of `node`'s outputs from the types of its inputs and the values of its small constant ones.

    `known` holds what whole-graph inference found; it fills sizes that the node alone leaves open. `sizes` holds what
    is known of inputs that hold sizes, element by element: an int, a symbol or None.
    """
    if node.op_type in _LIKE_FIRST_INPUT and not node.domain and node.input[0] in types:
        return {node.output[0]: types[node.input[0]]}
    if (node.domain, node.op_type) == ("ai.onnx.ml", "Scaler") and node.input[0] in types:
        return {node.output[0]: TensorType(onnx.TensorProto.FLOAT, types[node.input[0]].shape)}
    opset = max(opset, 0 if node.domain else _TYPED_AT.get(node.op_type, 0))
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    inputs = [name for name in dict.fromkeys(node.input) if name and name in types]
    found = shape_inference.infer_node_outputs(
        schema,
        node,
        {name: _to_proto(types[name]) for name in inputs},
        {name: numpy_helper.from_array(values[name], name) for name in inputs if _is_small(values.get(name))},
        opset_imports=[helper.make_opsetid(node.domain, opset)],
    )
    inferred = {name: from_proto(proto) for name, proto in found.items() if proto.HasField("tensor_type")}
    return {
        name: TensorType(kind.elem_type, _named_sizes(node, name, kind, types, values, known or {}, sizes or values))
        for name, kind in inferred.items()
    }


def from_proto(proto: onnx.TypeProto) -> TensorType:
    tensor = proto.tensor_type
    if not tensor.HasField("shape"):
        return TensorType(tensor.elem_type, None)
    return TensorType(tensor.elem_type, tuple(_size(dim) for dim in tensor.shape.dim))


def _size(dim: onnx.TensorShapeProto.Dimension) -> Dim:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return dim.dim_value
    return dim.dim_param


def _to_proto(kind: TensorType) -> onnx.TypeProto:
    return helper.make_tensor_type_proto(kind.elem_type, kind.shape)


def _is_small(value: np.ndarray | None) -> bool:
    return value is not None and value.size <= _DATA_LIMIT


def _named_sizes(
    node: onnx.NodeProto,
    name: str,
    kind: TensorType,
    types: Mapping[str, TensorType],
    values: Mapping[str, np.ndarray],
    known: Mapping[str, TensorType],
    sizes: Mapping[str, np.ndarray],
) -> Shape | None:
    """The shape of output `name` with every open size filled: from whole-graph inference, else by a symbol."""
    hint = known.get(name)
    hinted = hint.shape if hint and hint.shape is not None else None
    told = _told_sizes(node, types, sizes)
    if kind.shape is None and told is not None and hinted is None:
        return tuple(f"{name}:{axis}" if size is None else size for axis, size in enumerate(told))
    if kind.shape is None:
        return None if hinted is None else tuple(size or f"{name}:{axis}" for axis, size in enumerate(hinted))
    hinted = hinted if hinted is not None and len(hinted) == len(kind.shape) else ("",) * len(kind.shape)
    ours: dict[int, Dim] = {}
    for found in (
        _window_sizes(node, types),
        ((axis, size) for axis, size in enumerate(told or ()) if size is not None),
        _scaled_sizes(node, types, values),
        _transposed_sizes(node, types),
    ):
        ours.update(found)
    return tuple(
        ours[axis]
        if isinstance(ours.get(axis), int)
        else size or (hint if isinstance(hint, int) else ours.get(axis) or hint or f"{name}:{axis}")
        for axis, (size, hint) in enumerate(zip(kind.shape, hinted, strict=True))
    )


def window_count(size: int, span: int, stride: int, pads: tuple[int, int], ceil: bool) -> int:
    """How many windows fit along an axis; with `ceil` also one that overhangs, unless it begins in the end padding.

    That exception is ONNX's from opset 22 on, and ONNX Runtime's at every opset.
    """
    room = size + sum(pads) - span
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - ((count - 1) * stride >= size + pads[0])


def _makes_those_sizes(resize: Mapping[str, Any]) -> bool:
    """Whether a Resize makes the sizes it is given, of all axes."""
    return "axes" not in resize and resize.get("keep_aspect_ratio_policy", b"stretch") == b"stretch"


_TOLD = {"Reshape", "Expand", "ConstantOfShape", "Resize", "Tile", "Concat", "DepthToSpace", "SpaceToDepth"}


def _told_sizes(
    node: onnx.NodeProto, types: Mapping[str, TensorType], sizes: Mapping[str, np.ndarray]
) -> Sequence[symbols.Open] | None:
    """The sizes of the output of a node that takes them as an input, or that multiplies, divides or adds sizes."""
    if node.op_type not in _TOLD:
        return None
    shapes = [types[name].shape if name in types else None for name in node.input]
    given = [sizes[name].reshape(-1).tolist() if name in sizes else None for name in node.input]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    match node.op_type, given:
        case "Reshape", [_, list() as target]:
            return symbols.reshaped(shapes[0], target, bool(attributes.get("allowzero")))
        case "Expand", [_, list() as target]:
            return symbols.expanded(shapes[0], target)
        case "ConstantOfShape", [list() as target]:
            return target
        case "Resize", [_, _, _, list() as target] if _makes_those_sizes(attributes):
            return target
        case "Tile", [_, list() as repeats] if shapes[0] is not None:
            return [symbols.times(size, count) for size, count in zip(shapes[0], repeats, strict=True)]
        case "Concat", _:
            return _joined([shape for shape in shapes if shape], attributes["axis"]) if all(shapes) else None
        case "DepthToSpace" | "SpaceToDepth", _ if shapes[0] is not None and len(shapes[0]) == 4:
            return _blocks(shapes[0], attributes["blocksize"], node.op_type == "DepthToSpace")
    return None


def _joined(shapes: Sequence[Shape], axis: int) -> Sequence[symbols.Open]:
    total: symbols.Open = 0
    for shape in shapes:
        total = symbols.plus(total, shape[axis])
    told: list[symbols.Open] = [None] * len(shapes[0])
    told[axis] = total
    return told


def _blocks(shape: Shape, block: int, to_space: bool) -> Sequence[symbols.Open]:
    channels, rows, columns = shape[1:]
    if to_space:
        return (
            shape[0],
            symbols.over(channels, block * block),
            symbols.times(rows, block),
            symbols.times(columns, block),
        )
    return shape[0], symbols.times(channels, block * block), symbols.over(rows, block), symbols.over(columns, block)


def _window_sizes(node: onnx.NodeProto, types: Mapping[str, TensorType]) -> Iterator[tuple[int, Dim]]:
    """Spatial sizes of a convolution or pooling that ONNX leaves open or, before opset 22, rounds up too far.

    An open size becomes a symbol: equal geometry on equal sizes, equal symbol.
    """
    if node.op_type not in ("Conv", "MaxPool", "AveragePool", "LpPool"):
        return
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    shape = types[node.input[0]].shape if node.input and node.input[0] in types else None
    kernel: Sequence[int] | None = attributes.get("kernel_shape") or _kernel_of_weight(node, types)
    if shape is None or kernel is None:
        return
    rank = len(kernel)
    strides = attributes.get("strides") or [1] * rank
    dilations = attributes.get("dilations") or [1] * rank
    pads = attributes.get("pads") or [0] * (2 * rank)
    same = attributes.get("auto_pad", b"NOTSET") in (b"SAME_UPPER", b"SAME_LOWER")
    for axis, size in enumerate(shape[2:]):
        span = dilations[axis] * (kernel[axis] - 1) + 1
        sides = (pads[axis], pads[axis + rank])
        if isinstance(size, int):
            if attributes.get("ceil_mode") and not same:
                yield axis + 2, window_count(size, span, strides[axis], sides, ceil=True)
            continue
        margin = 0 if same else sum(sides) - span + 1
        if attributes.get("ceil_mode") and not same:
            yield axis + 2, f"ceil(({size}{margin - 1:+d})/{strides[axis]}+1;{pads[axis]})"
        else:
            yield axis + 2, _strided(size, margin, strides[axis])


def _strided(size: str, margin: int, stride: int) -> str:
    """floor((size + margin - 1) / stride) + 1, spelled the same way for the same value."""
    if stride == 1:
        return f"({size}{margin:+d})" if margin else size
    return f"(({size}{margin - 1:+d})//{stride}+1)"


def _scaled_sizes(
    node: onnx.NodeProto, types: Mapping[str, TensorType], values: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, str]]:
    """Open sizes of a Resize by constant scales."""
    shape = types[node.input[0]].shape if node.op_type == "Resize" and node.input[0] in types else None
    scales = values.get(node.input[2]) if len(node.input) > 2 else None
    if shape is None or scales is None or not scales.size:
        return
    axes = next((attribute.ints for attribute in node.attribute if attribute.name == "axes"), range(len(shape)))
    by_axis = {axis % len(shape): scale for axis, scale in zip(axes, scales.tolist(), strict=True)}
    for axis, size in enumerate(shape):
        scale = by_axis.get(axis, 1.0)
        if isinstance(size, str):
            yield axis, _multiple(size, int(scale), 0) if scale.is_integer() else f"floor({size}*{scale})"


def _transposed_sizes(node: onnx.NodeProto, types: Mapping[str, TensorType]) -> Iterator[tuple[int, str]]:
    """Open sizes of a ConvTranspose whose pads are spelled out."""
    if node.op_type != "ConvTranspose":
        return
    shape = types[node.input[0]].shape if node.input[0] in types else None
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    kernel = _kernel_of_weight(node, types)
    if (
        shape is None
        or not kernel
        or attributes.get("output_shape")
        or attributes.get("auto_pad", b"NOTSET") != b"NOTSET"
    ):
        return
    rank = len(kernel)
    strides, dilations = (attributes.get(key) or [1] * rank for key in ("strides", "dilations"))
    pads, beyond = attributes.get("pads") or [0] * (2 * rank), attributes.get("output_padding") or [0] * rank
    for axis, size in enumerate(shape[2:]):
        span = dilations[axis] * (kernel[axis] - 1) + 1
        if isinstance(size, str):
            margin = span + beyond[axis] - strides[axis] - pads[axis] - pads[axis + rank]
            yield axis + 2, _multiple(size, strides[axis], margin)


def _multiple(size: str, factor: int, margin: int) -> str:
    """size factor + margin, spelled the same way for the same value."""
    if factor == 1:
        return f"({size}{margin:+d})" if margin else size
    return f"({size}*{factor}{margin:+d})" if margin else f"({size}*{factor})"


def _kernel_of_weight(node: onnx.NodeProto, types: Mapping[str, TensorType]) -> list[int] | None:
    shape = types[node.input[1]].shape if len(node.input) > 1 and node.input[1] in types else None
    sizes = None if shape is None else [size for size in shape[2:] if isinstance(size, int)]
    return sizes if sizes and shape is not None and len(sizes) == len(shape) - 2 else None
