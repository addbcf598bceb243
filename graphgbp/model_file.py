"""Load, check, fingerprint and save model files; external data; the manifest's place in the file."""

import filecmp
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import onnx
from google.protobuf.message import DecodeError, EncodeError

from graphgbp import digests
from graphgbp.contract import MANIFEST_KEY, Manifest
from graphgbp.errors import AlreadyConvertedError, MissingWeightsError, ModelFileError, OutputError, RequestError
from graphgbp.files import copy_whole, write_whole
from graphgbp.weights import attributes, external_locations, leads_out, locate, require_external_data

PathLike = str | os.PathLike[str]
Weights: TypeAlias = Literal["auto", "reference", "copy"]
WEIGHTS: tuple[Weights, ...] = ("auto", "reference", "copy")

_ORT_FORMAT = b"ORTM"


def load(path: PathLike) -> onnx.ModelProto:
    """Read an ONNX file. Weights kept in external files stay there, and must be there.

    Raises ModelFileError where the file is missing, truncated or not ONNX, or keeps weights outside its folder;
    MissingWeightsError where a file of weights is not found or cut short.
    """
    path = Path(path)
    model = onnx.ModelProto()
    try:
        with _mapped(path) as content:
            if bytes(content[4:8]) == _ORT_FORMAT:
                raise ModelFileError(
                    f"'{path}' is in ONNX Runtime's own format, which holds no ONNX model; convert the .onnx file that "
                    "it was made from, or let ONNX Runtime save it as one (SessionOptions.optimized_model_filepath = "
                    "'model.onnx')"
                )
            model.ParseFromString(content)
    except FileNotFoundError:
        raise ModelFileError(f"no file '{path}'; check the path") from None
    except OSError as error:
        raise ModelFileError(f"cannot read '{path}': {error.strerror}") from None
    except DecodeError:
        raise ModelFileError(f"'{path}' is not an ONNX file, or it is truncated; export or copy it again") from None
    if not model.graph.node or not model.opset_import:
        raise ModelFileError(f"'{path}' is not an ONNX model: it holds no graph; export it again")
    require_external_data(model, path.parent)
    return model


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """The bytes of a file, not read into memory: what protobuf parses, whatever its stubs say."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""  # which cannot be mapped
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            yield view


def with_readable_text(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with text attributes that are no UTF-8 (serialized settings, say) escaped; itself where all are."""
    if all(_escaped(text) == text for attribute in attributes(model) for text in (attribute.s, *attribute.strings)):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for attribute in attributes(copy):
        attribute.s = _escaped(attribute.s)
        attribute.strings[:] = [_escaped(text) for text in attribute.strings]
    return copy


def _escaped(text: bytes) -> bytes:
    return text.decode(errors="backslashreplace").encode()


def fingerprint(model: PathLike | onnx.ModelProto, locations: Sequence[str]) -> dict[str, Any]:
    """sha256 of a model and of each file of its external data, as the manifest records them."""
    if isinstance(model, onnx.ModelProto):
        return {"sha256": digests.of_model(model)}
    path = Path(model)
    source: dict[str, Any] = {"sha256": digests.of_file(path)}
    if locations:
        source["external_data"] = {location: digests.of_file(locate(path.parent, location)) for location in locations}
    return source


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


def save(
    model: onnx.ModelProto, path: PathLike, *, weights_from: PathLike | None = None, weights: Weights = "auto"
) -> None:
    """Write a model; the file appears whole or not at all.

    Args:
        model: what `convert` or `vjp` gave.
        path: where to. A file of that name is replaced.
        weights_from: the folder of the files in which the model keeps its weights, where it does: that of its source.
            By default the folder written to.
        weights: what becomes of those files. "reference": nothing, the new file reads them where they lie; ONNX Runtime
            allows that in the file's own folder and below it alone, so `path` must be in `weights_from`. "copy": they
            are copied beside the new file, which must be in another folder. "auto": the first where it can be, else
            the second. None is ever overwritten: one that is there already must be equal. Weights that are in the
            model itself are written with it.

    Raises OutputError where a file cannot be written or another of that name is in the way, MissingWeightsError where
    weights are not found or cut short, ModelFileError where they are not those of the conversion or lie outside the
    folder, RequestError where `weights` cannot be had.
    """
    path = Path(path)
    if weights not in WEIGHTS:
        raise RequestError(f"weights={weights!r} is unknown; choose {describe(WEIGHTS)}")
    if external_locations(model):
        folder = path.parent if weights_from is None else Path(weights_from)
        try:
            require_external_data(model, folder)
        except MissingWeightsError as error:
            hint = "" if weights_from else "; or pass weights_from=<the folder of the model's source>"
            raise MissingWeightsError(f"{error}{hint}") from None
        _refuse_other_weights(model, folder)
        _bring_weights(model, path, folder, weights)
    write_whole(path, model.SerializeToString(deterministic=True))


def _bring_weights(model: onnx.ModelProto, path: Path, folder: Path, weights: Weights) -> None:
    """See that the files of weights are beside the new one."""
    locations = external_locations(model)
    for location in locations:
        _refuse_unfit_place(path, location, folder)
    for location in locations:
        source, wanted = folder / location, path.parent / location
        if wanted.exists() and wanted.samefile(source):
            if weights == "copy":
                raise RequestError(
                    f"weights='copy' needs another folder: '{wanted}' is where the model's weights lie, and a copy has "
                    "the same name; write to another folder, or use weights='reference'"
                )
        elif weights == "reference":
            raise RequestError(
                f"weights='reference' needs the folder of the weights: ONNX Runtime loads '{source}' for no file "
                f"outside '{folder}'; write to that folder, or use weights='copy'"
            )
        elif not wanted.exists():
            copy_whole(source, wanted)
        elif not (wanted.is_file() and filecmp.cmp(source, wanted, shallow=False)):
            raise OutputError(
                f"'{wanted}' is there already and holds something else than the model's weights '{source}'; move it "
                "away or write to another folder"
            )


def _refuse_unfit_place(path: Path, location: str, folder: Path) -> None:
    """The new model is none of its files of weights, and finds them in its own folder."""
    wanted = path.parent / location
    for file in (wanted, folder / location):
        if path.resolve() == file.resolve() or (path.exists() and file.exists() and path.samefile(file)):
            raise OutputError(
                f"'{path}' is where weights of the model belong ('{file}'); write to a file of another name"
            )
    if leads_out(path.parent, location):
        raise OutputError(
            f"the model's weights belong in '{wanted}', and a link there leads out of '{path.parent}', where ONNX "
            "Runtime does not load them; remove the link or write to another folder"
        )


def _refuse_other_weights(model: onnx.ModelProto, folder: Path) -> None:
    """The files are those that the manifest names: another model's may have the same names and sizes."""
    manifest = read_manifest(model)
    for location, sha256 in (manifest.source if manifest else {}).get("external_data", {}).items():
        if digests.of_file(folder / location) != sha256:
            raise ModelFileError(
                f"'{folder / location}' does not hold the weights that the model was converted with; pass "
                "weights_from=<the folder of its source>, or convert it again"
            )


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
