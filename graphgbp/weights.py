"""Weights in external files: where each lies, and its values mapped from there instead of read into memory.

A location is relative to the model's folder and may not lead out of it, neither by its words nor by a symbolic link:
ONNX Runtime loads no such file, and a model from elsewhere could name any file of this machine.
"""

import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from graphgbp.errors import MissingWeightsError, ModelFileError

_BITS = {
    code: bits
    for bits, names in (
        (6, ("FLOAT6E2M3", "FLOAT6E3M2")),
        (4, ("INT4", "UINT4", "FLOAT4E2M1")),
        (2, ("INT2", "UINT2")),
    )
    for name, code in onnx.TensorProto.DataType.items()
    if name in names
}
"""The types of which several elements share a byte."""


_LET_GO_EVERY = 0.003  # seconds, in which a runtime looks at some 50 MB


# -- where they are ---------------------------------------------------------------------------------------------------


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model holds: initializers, dense and sparse, and attributes, at any depth."""
    for graph in _main_graphs(model):
        yield from _initializers(graph)
    for attribute in attributes(model):
        yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
        for sparse in [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else attribute.sparse_tensors:
            yield from (sparse.values, sparse.indices)
        for graph in _subgraphs(attribute):
            yield from _initializers(graph)


def attributes(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    """Every attribute of a model's nodes and local functions, at any depth."""
    for graph in _main_graphs(model):
        yield from _attributes_of_nodes(graph.node)
    for function in model.functions:
        yield from _attributes_of_nodes(function.node)
        yield from _within(function.attribute_proto)


def _attributes_of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    for node in nodes:
        yield from _within(node.attribute)


def _within(attributes: Iterable[onnx.AttributeProto]) -> Iterator[onnx.AttributeProto]:
    for attribute in attributes:
        yield attribute
        for graph in _subgraphs(attribute):
            yield from _attributes_of_nodes(graph.node)


def _main_graphs(model: onnx.ModelProto) -> list[onnx.GraphProto]:
    training = (graph for info in model.training_info for graph in (info.initialization, info.algorithm))
    return [model.graph, *training]


def _subgraphs(attribute: onnx.AttributeProto) -> Iterable[onnx.GraphProto]:
    return [attribute.g] if attribute.HasField("g") else attribute.graphs


def _initializers(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)


def external_tensors(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [tensor for tensor in tensors(model) if uses_external_data(tensor)]


def external_locations(model: onnx.ModelProto) -> list[str]:
    """The files, relative to the model's folder, that hold its weights; in order of first use, each in one spelling."""
    found: dict[PurePath, str] = {}
    for tensor in external_tensors(model):
        location = _location(tensor)
        found.setdefault(PurePath(location), location)
    return list(found.values())


def _location(tensor: onnx.TensorProto) -> str:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    if len(entries) < len(tensor.external_data):
        raise ModelFileError(
            f"weight '{tensor.name}' says more than once where it lies ({', '.join(entries)}), and ONNX Runtime loads "
            "no such model; export it again"
        )
    return entries.get("location", "")


def leads_out(folder: Path, location: str) -> bool:
    """Whether a location is outside the folder: by its words, or by a symbolic link."""
    return os.path.isabs(location) or not (folder / location).resolve().is_relative_to(folder.resolve())


def place(folder: Path, location: str) -> Path:
    """The path of a file of weights, which need not exist.

    Raises ModelFileError where the location is absolute or leads out of the folder, by `..` or by a symbolic link, or
    is no path at all.
    """
    path = folder / location
    if "\0" in location:
        raise ModelFileError(f"the model keeps weights in {location!r}, which no file can be named; export it again")
    if not leads_out(folder, location):
        return path
    if os.path.isabs(location) or os.path.normpath(location).startswith(os.pardir):
        raise ModelFileError(
            f"the model keeps weights in '{location}', which leads out of its folder '{folder}', and no such file is "
            "read; put model and weights into one folder and save the model with that location"
        )
    raise ModelFileError(
        f"'{path}', where the model keeps weights, is a link that leads out of its folder '{folder}', and ONNX Runtime "
        "would load no file that is written there; copy the folder with its links followed (cp -rL), and use the copy"
    )


def locate(folder: Path, location: str) -> Path:
    """The path of a file of weights that is there; MissingWeightsError where it is not, and as `place` does."""
    path = place(folder, location)
    if not path.is_file():
        raise MissingWeightsError(
            f"the model keeps weights in '{location}', which is not in '{folder}'; put the file there or export the "
            "model again"
        )
    return path


def require_external_data(model: onnx.ModelProto, folder: Path) -> None:
    """Every file of weights is in the model's folder, and as long as its weights need.

    Raises MissingWeightsError where one is missing or cut short, ModelFileError where a location leads out of the
    folder or a weight's description contradicts itself.
    """
    sizes: dict[str, int] = {}
    for tensor in external_tensors(model):
        location = _location(tensor)
        if location not in sizes:
            sizes[location] = locate(folder, location).stat().st_size
        offset, length = _span(tensor)
        if offset + length > sizes[location]:
            raise MissingWeightsError(
                f"'{folder / location}' has {sizes[location]} bytes, and weight '{tensor.name}' lies in bytes {offset} "
                f"to {offset + length}: the file is cut short, or another model's; copy or export it again"
            )


def _span(tensor: onnx.TensorProto) -> tuple[int, int]:
    """Where in its file a weight lies: its first byte, and how many."""
    needed = size(tensor)
    try:
        info = ExternalDataInfo(tensor)
    except ValueError as error:
        raise ModelFileError(
            f"where weight '{tensor.name}' lies cannot be read: {error}; export the model again"
        ) from None
    offset, length = int(info.offset or 0), int(info.length or needed)
    if length != needed:
        raise ModelFileError(
            f"weight '{tensor.name}' of shape {list(tensor.dims)} needs {needed} bytes, and the model says that it has "
            f"{length}; export the model again"
        )
    return offset, needed


def size(tensor: onnx.TensorProto) -> int:
    """How many bytes a tensor's values take, as ONNX stores them; ModelFileError for a type that is not known."""
    if tensor.data_type == onnx.TensorProto.STRING and not uses_external_data(tensor):
        return sum(map(len, tensor.string_data))
    if tensor.data_type not in helper.get_all_tensor_dtypes() or tensor.data_type == onnx.TensorProto.STRING:
        raise ModelFileError(
            f"weight '{tensor.name}' has type {tensor.data_type}, of which no size is known; export the model again"
        )
    bits = _BITS.get(tensor.data_type) or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-prod(tensor.dims) * bits // 8)


# -- their values -----------------------------------------------------------------------------------------------------


def values(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray:
    """The values of a tensor; those of an external one are mapped from its file, read-only, and take no memory.

    `folder` is that of the model. Raises MissingWeightsError where the file is missing or cut short, or where nothing
    says which folder it is in; ModelFileError as `place` does.
    """
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    if folder is None:
        raise MissingWeightsError(
            f"weight '{tensor.name}' is kept in the external file '{_location(tensor)}', and nothing says where that "
            "is; pass the path of the model's file instead of the model, or read it with onnx.load(path)"
        )
    path = locate(folder, _location(tensor))
    offset, length = _span(tensor)
    try:
        stored = np.memmap(path, np.uint8, "r", offset, (length,)) if length else np.empty(0, np.uint8)
    except (OSError, ValueError) as error:
        raise MissingWeightsError(f"weight '{tensor.name}' cannot be read from '{path}': {error}") from None
    if tensor.data_type in _BITS:
        packed = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=stored.tobytes())
        return numpy_helper.to_array(packed)
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type).newbyteorder("<")
    return np.require(np.asarray(stored).view(dtype), requirements="A").reshape(tuple(tensor.dims))


@contextmanager
def not_kept(arrays: Iterable[np.ndarray]) -> Iterator[None]:
    """What is looked at of mapped weights meanwhile is let go again at once, and does not add up in memory.

    The pages stay in the system's cache, from where they come back if they are looked at again. Without effect where
    the system knows no MADV_DONTNEED (Windows).
    """
    mappings = list({id(found): found for array in arrays if (found := _mapping(array)) is not None}.values())
    if not mappings or not hasattr(mmap, "MADV_DONTNEED"):
        yield
        return
    done = threading.Event()

    def let_go() -> None:
        while not done.wait(_LET_GO_EVERY):
            for mapping in mappings:
                mapping.madvise(mmap.MADV_DONTNEED)

    thread = threading.Thread(target=let_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _mapping(array: Any) -> mmap.mmap | None:
    """The mapped file that an array is a view of; None for one with memory of its own."""
    while array is not None and not isinstance(array, mmap.mmap):
        array = array.obj if isinstance(array, memoryview) else getattr(array, "base", None)
    return array


def with_small_weights(model: onnx.ModelProto, folder: Path | None, limit: int) -> onnx.ModelProto:
    """The model with external weights of up to `limit` elements read in; itself where it has none.

    Raises MissingWeightsError where they cannot be read.
    """
    if not external_tensors(model):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in external_tensors(copy):
        if folder is None or prod(tensor.dims) <= limit:
            read_in(tensor, folder)
    return copy


def read_in(tensor: onnx.TensorProto, folder: Path | None) -> None:
    """Replace the description of where an external tensor lies by its values; MissingWeightsError as `values`."""
    name, found = tensor.name, numpy_helper.from_array(values(tensor, folder))
    tensor.CopyFrom(found)
    tensor.name = name


def dense(sparse: onnx.SparseTensorProto, folder: Path | None) -> np.ndarray:
    """The values of a sparse tensor in their places, zero elsewhere; raises as `values`, and ModelFileError.

    Its indices, of shape [count] or [count, rank], count through the tensor or along each of its axes.
    """
    stored, indices, shape = values(sparse.values, folder), values(sparse.indices, folder), tuple(sparse.dims)
    limits = np.asarray(shape if indices.ndim == 2 else prod(shape))
    fits = len(indices) == stored.size and indices.shape[1:] in ((), (len(shape),))
    if not fits or (indices < 0).any() or (indices >= limits).any():
        raise ModelFileError(
            f"the indices of sparse weight '{sparse.values.name}' do not fit its shape {list(shape)}; export the model "
            "again"
        )
    found = np.zeros(shape, stored.dtype)
    places = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, shape)
    found[places] = stored.reshape(-1)
    return found


def with_dense_constants(model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
    """The model with sparse Constant nodes made dense ones; itself where it has none. Raises as `dense`."""
    if not any(attribute.name == "sparse_value" for attribute in attributes(model)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for attribute in attributes(copy):
        if attribute.name == "sparse_value" and attribute.HasField("sparse_tensor"):
            value = numpy_helper.from_array(dense(attribute.sparse_tensor, folder))
            attribute.CopyFrom(helper.make_attribute("value", value))
    return copy


class _Values(LazyValues):
    """The values of a weight when they are asked for: mapped from the model's folder, or a view of the model's own."""

    def __init__(self, tensor: onnx.TensorProto | onnx.SparseTensorProto, folder: Path | None) -> None:
        super().__init__(tensor)
        self._folder = folder

    def load(self) -> np.ndarray:
        if isinstance(self.tensor, onnx.SparseTensorProto):
            return dense(self.tensor, self._folder)
        return values(self.tensor, self._folder)


def read_weights_from(folder: Path | None, graph: gs.Graph) -> None:
    """Let every weight of a graph be read from the model's folder and not from the current one."""
    for node in graph.nodes:
        for held in (*node.inputs, *node.attrs.values()):
            if isinstance(held, gs.Graph):
                read_weights_from(folder, held)
            elif isinstance(held, gs.Constant) and type(held._values) in (LazyValues, SparseValues):
                held._values = _Values(held._values.tensor, folder)


def type_bfloat16(graph: gs.Graph) -> None:
    """Give bfloat16 tensors numpy's type for it, from ml_dtypes as ONNX has it, where gs leaves ONNX's enum."""
    tensors = [*graph.inputs, *graph.outputs]
    for node in graph.nodes:
        tensors += [*node.inputs, *node.outputs, *(x for x in node.attrs.values() if isinstance(x, gs.Tensor))]
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                type_bfloat16(value)
    for tensor in tensors:
        holder = tensor._values if isinstance(tensor, gs.Constant) else tensor
        if isinstance(holder.dtype, int) and holder.dtype == onnx.TensorProto.BFLOAT16:
            holder.dtype = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)
