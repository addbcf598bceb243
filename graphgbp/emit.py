"""Emitter: the verbs that append nodes to the working graph, in the spelling of the model's opset.

It is the only maker of nodes. Equal nodes are made once, so maps that share mathematics share nodes; every new
tensor gets its type from ONNX's own inference, so a malformed node fails where it is made.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias, TypeGuard

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from graphgbp.contract import SCOPE
from graphgbp.shapes import TensorType, infer_node, is_static

Operand: TypeAlias = gs.Tensor | np.ndarray
Size: TypeAlias = int | gs.Tensor  # a size known now, or an int64 tensor of shape [1]

_FOLDED = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Max": np.maximum, "Min": np.minimum}


class Emitter:
    """Appends nodes to `graph` (an onnx_graphsurgeon.Graph whose tensors carry dtype and shape).

    The names of what it makes begin with `scope`.
    """

    def __init__(self, graph: gs.Graph, opset: int, scope: str = SCOPE) -> None:
        self.graph = graph
        self.opset = opset
        self.nodes: list[gs.Node] = []
        self.constants: dict[tuple[Any, ...], gs.Constant] = {}
        self._root = self._scope = scope
        self._counts: dict[str, int] = {}
        self._made: dict[tuple[Any, ...], list[gs.Variable]] = {}
        self._keys: dict[int, tuple[Any, ...]] = {}  # in _made, by the id of what was made

    # -- making nodes ---------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names of nodes made inside begin with `<name>/` behind the scope around it."""
        outer, self._scope = self._scope, f"{self._scope}/{name}"
        try:
            yield
        finally:
            self._scope = outer

    def op(self, op_type: str, *inputs: Operand | None, name: str | None = None, **attributes: Any) -> gs.Tensor:
        """The one output of a standard operator; an equal node made before is used again."""
        return self.ops(op_type, *inputs, outputs=1, name=name, **attributes)[0]

    def ops(
        self, op_type: str, *inputs: Operand | None, outputs: int, name: str | None = None, **attributes: Any
    ) -> list[gs.Tensor]:
        """All `outputs` outputs of a standard operator. None stands for an optional input left out."""
        operands = [self._operand(value) for value in inputs]
        while operands and operands[-1].is_empty():
            operands.pop()
        attributes = {key: value for key, value in attributes.items() if value is not None}
        key = (
            op_type,
            outputs,
            *(tensor.name for tensor in operands),
            *sorted((k, repr(v)) for k, v in attributes.items()),
        )
        if key not in self._made:
            self._made[key] = self._append(op_type, operands, outputs, name, attributes)
            self._keys.update((id(made), key) for made in self._made[key])
        return list(self._made[key])

    def _append(
        self,
        op_type: str,
        operands: list[gs.Tensor],
        outputs: int,
        name: str | None,
        attributes: dict[str, Any],
    ) -> list[gs.Variable]:
        name = name or self._unique(f"{self._scope}/{op_type}")
        names = [name if index == 0 else f"{name}:{index}" for index in range(outputs)]
        proto = helper.make_node(op_type, [tensor.name for tensor in operands], names, name, **attributes)
        types = {tensor.name: type_of(tensor) for tensor in operands if not tensor.is_empty()}
        values = {tensor.name: tensor.values for tensor in operands if _is_small_constant(tensor)}
        inferred = infer_node(proto, self.opset, types, values)
        made = [variable(output, inferred.get(output)) for output in names]
        node = gs.Node(op_type, name, attributes, operands, made)
        self.graph.nodes.append(node)
        self.nodes.append(node)
        return made

    def _unique(self, stem: str) -> str:
        index = self._counts[stem] = self._counts.get(stem, -1) + 1
        return f"{stem}_{index}" if index else stem

    def _operand(self, value: Operand | None) -> gs.Tensor:
        if value is None:
            return gs.Variable.empty()
        return self.constant(value) if isinstance(value, np.ndarray | np.generic) else value

    # -- constants and sizes --------------------------------------------------------------------------------

    def constant(self, value: Any, dtype: Any = None) -> gs.Constant:
        """A constant tensor; equal values share one initializer."""
        array = np.ascontiguousarray(np.asarray(value, dtype)).reshape(np.shape(value))
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = gs.Constant(f"{self._root}/constant/{len(self.constants)}", array)
        return self.constants[key]

    def like(self, x: gs.Tensor, value: Any) -> gs.Constant:
        """A constant of x's element type."""
        return self.constant(np.asarray(value, dtype=x.dtype))

    def ints(self, values: Sequence[int]) -> gs.Constant:
        return self.constant(np.asarray(values, np.int64))

    def size(self, x: gs.Tensor, axis: int) -> Size:
        """Size of one axis: an int where known, else an int64 tensor of shape [1]."""
        if x.shape is not None:
            axis %= len(x.shape)
            if isinstance(x.shape[axis], int):
                return x.shape[axis]
        return self.op("Shape", x, start=axis, end=axis + 1 or None)

    def sizes(self, x: gs.Tensor, axes: Sequence[int] | None = None) -> gs.Tensor:
        """int64 [rank]: x's shape, or that of the given axes; a constant where it is known."""
        if axes is not None:
            return self.join([self.size(x, axis) for axis in axes])
        return self.ints(x.shape) if is_static(x.shape) else self.op("Shape", x)

    def count(self, x: gs.Tensor) -> gs.Tensor:
        """int64 scalar: how many elements x has."""
        return self.constant(np.int64(np.prod(x.shape))) if is_static(x.shape) else self.op("Size", x)

    def join(self, sizes: Sequence[Size]) -> gs.Tensor:
        """int64 [n] from sizes known and unknown."""
        sizes = [int(size.values[0]) if isinstance(size, gs.Constant) else size for size in sizes]
        if all(isinstance(size, int | np.integer) for size in sizes):
            return self.ints([int(size) for size in sizes])
        parts: list[gs.Tensor] = []
        known: list[int] = []
        for size in [*sizes, None]:
            if isinstance(size, int | np.integer):
                known.append(int(size))
                continue
            if known:
                parts.append(self.ints(known))
                known = []
            if size is not None:
                parts.append(self.as_int_vector(size))
        return self.concat(parts, 0)

    def as_int_vector(self, size: Size) -> gs.Tensor:
        return self.ints([int(size)]) if isinstance(size, int | np.integer) else size

    # -- arithmetic -----------------------------------------------------------------------------------------

    def _fold(self, op_type: str, a: Operand, b: Operand) -> gs.Tensor:
        a, b = self._operand(a), self._operand(b)
        if _is_small_constant(a) and _is_small_constant(b):
            return self.constant(_FOLDED[op_type](a.values, b.values))
        return self.op(op_type, a, b)

    def add(self, a: Operand, b: Operand) -> gs.Tensor:
        return self._fold("Add", a, b)

    def sub(self, a: Operand, b: Operand) -> gs.Tensor:
        return self._fold("Sub", a, b)

    def mul(self, a: Operand, b: Operand) -> gs.Tensor:
        return self._rescaled(a, b) or self._rescaled(b, a) or self._fold("Mul", a, b)

    def maximum(self, a: Operand, b: Operand) -> gs.Tensor:
        return self._fold("Max", a, b)

    def minimum(self, a: Operand, b: Operand) -> gs.Tensor:
        return self._fold("Min", a, b)

    def div(self, a: Operand, b: Operand) -> gs.Tensor:
        return self._rescaled(a, b, divide=True) or self.op("Div", a, b)

    def scale(self, x: gs.Tensor, factor: float) -> gs.Tensor:
        return x if factor == 1 else self.mul(x, self.like(x, factor))

    def unscaled(self, x: gs.Tensor) -> tuple[gs.Tensor, float]:
        """What x is a multiple of, and the factor: a rule that multiplies on may apply it once, at its end."""
        if id(x) in self._keys and x.inputs[0].op == "Mul" and x.shape is not None:
            for tensor, factor in (x.inputs[0].inputs, x.inputs[0].inputs[::-1]):
                if _is_number(factor) and tensor.shape is not None and tuple(tensor.shape) == tuple(x.shape):
                    return tensor, float(factor.values.item())
        return x, 1.0

    def _rescaled(self, x: Operand, by: Operand, divide: bool = False) -> gs.Tensor | None:
        """x times a number, or by it, where x is a multiple already: one factor for both, if their type has it."""
        if not isinstance(x, gs.Variable) or not _is_number(by) or not by.values.all():
            return None
        (tensor, factor), number, limits = self.unscaled(x), float(by.values.item()), np.finfo(x.dtype)
        both = factor / number if divide else factor * number
        fits = tensor is not x and float(limits.tiny) <= abs(both) <= float(limits.max)
        return self.op("Mul", tensor, self.like(x, both)) if fits else None

    def sum(self, terms: Sequence[gs.Tensor]) -> gs.Tensor:
        return terms[0] if len(terms) == 1 else self.add(*terms) if len(terms) == 2 else self.op("Sum", *terms)

    def neg(self, x: gs.Tensor) -> gs.Tensor:
        return self.op("Neg", x)

    def relu(self, x: gs.Tensor) -> gs.Tensor:
        return self.op("Relu", x)

    def sqrt(self, x: gs.Tensor) -> gs.Tensor:
        return self.op("Sqrt", x)

    def pow(self, x: gs.Tensor, exponent: float) -> gs.Tensor:
        return self.op("Pow", x, self.like(x, exponent))

    def sigmoid(self, x: gs.Tensor) -> gs.Tensor:
        return self.op("Sigmoid", x)

    def matmul(self, a: gs.Tensor, b: gs.Tensor) -> gs.Tensor:
        return self.op("MatMul", a, b)

    def greater(self, a: gs.Tensor, b: Operand) -> gs.Tensor:
        return self.op("Greater", a, b)

    def less(self, a: gs.Tensor, b: Operand) -> gs.Tensor:
        return self.op("Less", a, b)

    def equal(self, a: gs.Tensor, b: Operand) -> gs.Tensor:
        return self.op("Equal", a, b)

    def where(self, condition: gs.Tensor, a: Operand, b: Operand) -> gs.Tensor:
        return self.op("Where", condition, a, b)

    def cast(self, x: gs.Tensor, dtype: Any) -> gs.Tensor:
        """x in another element type; x itself where it has that type."""
        return x if elem_type(x.dtype) == elem_type(dtype) else self.op("Cast", x, to=elem_type(dtype))

    # -- reductions -----------------------------------------------------------------------------------------

    def reduce_sum(self, x: gs.Tensor, axes: Sequence[int] | gs.Tensor, keepdims: bool = True) -> gs.Tensor:
        """Sum over axes; no axes leaves x as it is."""
        if not isinstance(axes, gs.Tensor):
            if not len(axes):
                return x
            axes = self.ints(axes)
        return self.op("ReduceSum", x, axes, keepdims=int(keepdims), noop_with_empty_axes=1)

    def reduce_mean(self, x: gs.Tensor, axes: Sequence[int], keepdims: bool = True) -> gs.Tensor:
        return self._reduce("ReduceMean", x, axes, keepdims)

    def reduce_max(self, x: gs.Tensor, axes: Sequence[int], keepdims: bool = True) -> gs.Tensor:
        return self._reduce("ReduceMax", x, axes, keepdims)

    def reduce_prod(self, x: gs.Tensor, axes: Sequence[int], keepdims: bool = True) -> gs.Tensor:
        return self._reduce("ReduceProd", x, axes, keepdims)

    def _reduce(self, op_type: str, x: gs.Tensor, axes: Sequence[int], keepdims: bool) -> gs.Tensor:
        if not len(axes):
            return x
        if self.opset >= 18:
            return self.op(op_type, x, self.ints(axes), keepdims=int(keepdims))
        return self.op(op_type, x, axes=list(axes), keepdims=int(keepdims))

    # -- movement -------------------------------------------------------------------------------------------

    def reshape(self, x: gs.Tensor, shape: Sequence[Size] | gs.Tensor) -> gs.Tensor:
        """x in another shape: sizes as ints (-1: the rest), tensors of shape [1], or one int64 tensor."""
        if not isinstance(shape, gs.Tensor):
            if is_static(x.shape) and list(x.shape) == list(shape):
                return x
            shape = self.join(shape)
        return self.op("Reshape", x, shape)

    def reshape_like(self, x: gs.Tensor, like: gs.Tensor) -> gs.Tensor:
        """x in the shape of `like`, which has as many elements."""
        if x.shape is not None and x.shape == like.shape:
            return x
        shape = like.shape
        if shape is None or sum(isinstance(size, str) for size in shape) > 1 or 0 in shape:
            return self.with_shape(self.op("Reshape", x, self.sizes(like)), like)
        sizes = [-1 if isinstance(size, str) else size for size in shape]
        return self.with_shape(self.op("Reshape", x, self.ints(sizes)), like)

    def expand_like(self, x: gs.Tensor, like: gs.Tensor) -> gs.Tensor:
        """x broadcast to the shape of `like`."""
        if x.shape is not None and x.shape == like.shape:
            return x
        return self.with_shape(self.op("Expand", x, self.sizes(like)), like)

    def zeros_like(self, x: gs.Tensor) -> gs.Tensor:
        return self.expand_like(self.like(x, 0), x)

    def with_shape(self, x: gs.Tensor, like: gs.Tensor) -> gs.Tensor:
        """x, known to have the shape of `like`."""
        if isinstance(x, gs.Variable):
            x.shape = like.shape
        return x

    def transpose(self, x: gs.Tensor, perm: Sequence[int]) -> gs.Tensor:
        return x if list(perm) == list(range(len(perm))) else self.op("Transpose", x, perm=list(perm))

    def concat(self, parts: Sequence[Operand], axis: int) -> gs.Tensor:
        operands = [self._operand(part) for part in parts]
        if all(_is_small_constant(part) for part in operands):
            return self.constant(np.concatenate([part.values for part in operands], axis))
        return operands[0] if len(operands) == 1 else self.op("Concat", *operands, axis=axis)

    def squeeze(self, x: gs.Tensor, axes: Sequence[int]) -> gs.Tensor:
        return self.op("Squeeze", x, self.ints(axes))

    def unsqueeze(self, x: gs.Tensor, axes: Sequence[int]) -> gs.Tensor:
        return self.op("Unsqueeze", x, self.ints(axes)) if len(axes) else x

    def slice(
        self,
        x: gs.Tensor,
        starts: Sequence[Size] | gs.Tensor,
        ends: Sequence[Size] | gs.Tensor,
        axes: Sequence[int] | gs.Tensor,
        steps: Sequence[int] | gs.Tensor | None = None,
    ) -> gs.Tensor:
        vector = [v if isinstance(v, gs.Tensor) else self.join(v) for v in (starts, ends, axes)]
        stride = steps if steps is None or isinstance(steps, gs.Tensor) else self.ints(steps)
        return self.op("Slice", x, *vector, stride)

    def flip(self, x: gs.Tensor, axes: Sequence[int]) -> gs.Tensor:
        n = len(axes)
        lowest = np.iinfo(np.int64).min
        return self.slice(x, [-1] * n, [lowest] * n, axes, [-1] * n) if n else x

    def pad(self, x: gs.Tensor, pads: Sequence[Size] | gs.Tensor) -> gs.Tensor:
        """x with zeros around it; pads as ONNX orders them: every begin, then every end."""
        pads = pads if isinstance(pads, gs.Tensor) else self.join(pads)
        if _is_small_constant(pads) and not pads.values.any():
            return x
        return self.op("Pad", x, pads, self.like(x, 0))

    def scatter_add(self, like: gs.Tensor, indices: gs.Tensor, updates: gs.Tensor, axis: int) -> gs.Tensor:
        """Zeros in the shape of `like` with updates added at indices along axis (repeated indices add up)."""
        return self.op("ScatterElements", self.zeros_like(like), indices, updates, axis=axis, reduction="add")

    def discard(self, start: int) -> None:
        """Take back the nodes made since there were `start`."""
        for node in self.nodes[start:]:
            self._forget(node)
            node.inputs.clear()
            node.outputs.clear()
        del self.nodes[start:]

    def substitute(self, x: gs.Tensor, output: gs.Tensor) -> None:
        """Let the node that makes x make `output` instead, for x's readers too."""
        for reader in list(x.outputs):
            for index, tensor in enumerate(reader.inputs):
                if tensor is x:
                    reader.inputs[index] = output
        maker = x.inputs[0]
        self._forget(maker)
        maker.outputs[next(index for index, tensor in enumerate(maker.outputs) if tensor is x)] = output

    def _forget(self, node: gs.Node) -> None:
        """Do not use a node again for an equal one."""
        for made in node.outputs:
            self._made.pop(self._keys.pop(id(made), ()), None)

    def name_output(self, x: gs.Tensor, name: str) -> gs.Tensor:
        """x under a public name, as an output of the graph."""
        (output,) = self._append("Identity", [x], 1, f"{SCOPE}/output/{name}", {})
        output.name = name
        return output


def type_of(tensor: gs.Tensor) -> TensorType:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return TensorType(elem_type(tensor.dtype), shape)


def elem_type(dtype: Any) -> int:
    """ONNX's enum for a numpy dtype (or for an enum, itself)."""
    return int(dtype) if isinstance(dtype, int) else helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def variable(name: str, kind: TensorType | None) -> gs.Variable:
    if kind is None or kind.elem_type == onnx.TensorProto.UNDEFINED:
        return gs.Variable(name)
    return gs.Variable(name, helper.tensor_dtype_to_np_dtype(kind.elem_type), kind.shape)


def _is_number(tensor: Operand) -> TypeGuard[gs.Constant]:
    """Whether this is one real number, which broadcasts to anything."""
    return isinstance(tensor, gs.Constant) and tuple(tensor.shape) in ((), (1,)) and tensor.values.dtype.kind == "f"


def _is_small_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape)) <= 1024
