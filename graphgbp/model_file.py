"""Load, check, fingerprint and save model files; external data; the manifest's place in the file."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from graphgbp.contract import MANIFEST_KEY, Manifest
from graphgbp.errors import AlreadyConvertedError, MissingWeightsError, ModelFileError, OutputError
from graphgbp.files import write_whole

PathLike = str | os.PathLike[str]


def load(path: PathLike) -> onnx.ModelProto:
    """Read an ONNX file. Weights kept in external files stay there, and must be there.

    Raises ModelFileError where the file is missing, truncated or not ONNX, MissingWeightsError where external
    data is not found.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"no file '{path}'; check the path") from None
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError:
        raise ModelFileError(f"'{path}' is not an ONNX file, or it is truncated; export or copy it again") from None
    if not model.graph.node or not model.opset_import:
        raise ModelFileError(f"'{path}' is not an ONNX model: it holds no graph; export it again")
    _require_external_data(model, path)
    return model


def _require_external_data(model: onnx.ModelProto, path: Path) -> None:
    missing = [location for location in external_locations(model) if not (path.parent / location).is_file()]
    if missing:
        names = ", ".join(f"'{location}'" for location in missing)
        raise MissingWeightsError(
            f"'{path}' keeps its weights in {names}, not found beside it; put the file there or export the model again"
        )


def external_locations(model: onnx.ModelProto) -> list[str]:
    """The files, relative to the model's folder, that hold its weights; in order of first use."""
    found = {
        entry.value: None
        for tensor in _tensors(model)
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return list(found)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for attribute in _attributes_of(model):
        yield from [attribute.t] if attribute.HasField("t") else attribute.tensors
        for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            yield from inner.initializer


def _attributes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.AttributeProto]:
    """The attributes of nodes and of the nodes inside them."""
    for node in nodes:
        for attribute in node.attribute:
            yield attribute
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _attributes(inner.node)


def with_small_weights(model: onnx.ModelProto, folder: Path | None, limit: int) -> onnx.ModelProto:
    """The model with external weights of up to `limit` elements read in; itself where it has none.

    Raises MissingWeightsError where they cannot be read.
    """
    locations = external_locations(model)
    if not locations:
        return model
    if folder is None:
        raise MissingWeightsError(
            f"the model keeps its weights in {describe(locations)}, and nothing says where that is; give the path of "
            "the model, or read it with onnx.load(path)"
        )
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in _tensors(copy):
        if uses_external_data(tensor) and math.prod(tensor.dims) <= limit:
            try:
                load_external_data_for_tensor(tensor, str(folder))
            except (OSError, ValueError, onnx.checker.ValidationError) as error:
                raise MissingWeightsError(f"weight '{tensor.name}' cannot be read from its file: {error}") from None
            tensor.ClearField("data_location")
            del tensor.external_data[:]
    return copy


def with_readable_text(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with text attributes that are no UTF-8 (serialized settings, say) escaped; itself where all are."""
    if all(_escaped(text) == text for attribute in _attributes_of(model) for text in (attribute.s, *attribute.strings)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for attribute in _attributes_of(copy):
        attribute.s = _escaped(attribute.s)
        attribute.strings[:] = [_escaped(text) for text in attribute.strings]
    return copy


def _attributes_of(model: onnx.ModelProto) -> Iterator[onnx.AttributeProto]:
    for nodes in (model.graph.node, *(function.node for function in model.functions)):
        yield from _attributes(nodes)


def _escaped(text: bytes) -> bytes:
    return text.decode(errors="backslashreplace").encode()


def fingerprint(model: PathLike | onnx.ModelProto, locations: Sequence[str]) -> dict[str, Any]:
    """sha256 of a model and of each file of its external data, as the manifest records them."""
    if isinstance(model, onnx.ModelProto):
        return {"sha256": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()}
    path = Path(model)
    source: dict[str, Any] = {"sha256": _sha256(path)}
    if locations:
        source["external_data"] = {location: _sha256(path.parent / location) for location in locations}
    return source


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(model: onnx.ModelProto) -> Manifest | None:
    """What graphgbp wrote about this model; None for a plain one."""
    for entry in model.metadata_props:
        if entry.key == MANIFEST_KEY:
            try:
                return Manifest.from_json(entry.value)
            except (ValueError, TypeError) as error:
                raise ModelFileError(f"the manifest in the model cannot be read: {error}") from None
    return None


def refuse_converted(model: onnx.ModelProto, name: str) -> None:
    manifest = read_manifest(model)
    if manifest is not None:
        raise AlreadyConvertedError(
            f"{name} was already converted by graphgbp {manifest.graphgbp} "
            f"({', '.join(manifest.methods) or manifest.kind}); convert its source instead"
        )


def verdict(model: onnx.ModelProto) -> str | None:
    """What ONNX's checker says against a model; None where it says nothing."""
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, EncodeError, ValueError) as error:
        return str(error).strip()
    return None


def save(model: onnx.ModelProto, path: PathLike, *, weights_from: PathLike | None = None) -> None:
    """Write a model; the file appears whole or not at all.

    `weights_from` is the folder that holds the model's external data, where it has any: those files are copied
    beside the new one unless they are there already.

    Raises OutputError where the file cannot be written, MissingWeightsError where its weights would be missing.
    """
    path = Path(path)
    _bring_weights(model, path, None if weights_from is None else Path(weights_from))
    write_whole(path, model.SerializeToString(deterministic=True))


def _bring_weights(model: onnx.ModelProto, path: Path, folder: Path | None) -> None:
    for location in external_locations(model):
        wanted = path.parent / location
        if wanted.is_file():
            continue
        if folder is None or not (folder / location).is_file():
            raise MissingWeightsError(
                f"the model keeps its weights in '{location}', which is not in '{path.parent}'; "
                "pass weights_from=<folder that holds it>"
            )
        try:
            wanted.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / location, wanted)
        except OSError as error:
            wanted.unlink(missing_ok=True)
            raise OutputError(f"cannot write '{wanted}': {error.strerror or error}") from None


def tensor_names(model: onnx.ModelProto) -> set[str]:
    """Every tensor name of the model's main graph."""
    graph = model.graph
    groups = (graph.input, graph.output, graph.initializer, graph.value_info)
    names = {value.name for group in groups for value in group}
    for node in graph.node:
        names.update([*node.input, *node.output])
    return names - {""}


def taken_names(model: onnx.ModelProto) -> set[str]:
    """Every tensor and node name of the model's main graph."""
    return tensor_names(model) | {node.name for node in model.graph.node}


def append_metadata(model: onnx.ModelProto, manifest: Manifest) -> None:
    model.metadata_props.add(key=MANIFEST_KEY, value=manifest.to_json())


def describe(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
