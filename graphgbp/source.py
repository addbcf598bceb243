"""The model a conversion starts from: a copy of our own, at an opset the rules were written for."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from graphgbp import model_file
from graphgbp.errors import ModelFileError, OpsetError, RequestError, UnsupportedError
from graphgbp.forms import MICROSOFT
from graphgbp.functions import all_nodes
from graphgbp.model_file import PathLike
from graphgbp.opset import raise_opset
from graphgbp.weights import external_locations

ModelLike: TypeAlias = PathLike | onnx.ModelProto

NEWEST_OPSET = 26
"""The newest opset whose operators were read, and that ONNX Runtime runs."""

_LAYOUTS = {
    "com.microsoft.nchwc": "ONNX Runtime's blocked layout for one kind of CPU",
    "com.ms.internal.nhwc": "the layout of one of ONNX Runtime's execution providers",
}


@dataclass(frozen=True)
class Source:
    """A model to append to, the folder of its external data, and what the manifest says of where it comes from."""

    model: onnx.ModelProto
    folder: Path | None
    record: Callable[[], dict[str, Any]]


@contextmanager
def open_source(model: ModelLike) -> Iterator[Source]:
    """A copy of a model, or what a path leads to. The digest of the original is taken beside what is done with it."""
    name = "the model" if isinstance(model, onnx.ModelProto) else f"'{model}'"
    given, folder = read(model), weights_folder(model)
    model_file.refuse_converted(given, name)
    locations = external_locations(given)
    with ThreadPoolExecutor(1) as beside:
        fingerprint = beside.submit(model_file.fingerprint, model, locations)
        copy, opset = raised(_copy(given) if given is model else given, folder, in_place=True)
        yield Source(copy, folder, lambda: {"source": fingerprint.result(), "opset": opset})


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def read(model: ModelLike) -> onnx.ModelProto:
    """The model itself, or the one a path leads to."""
    if isinstance(model, onnx.ModelProto):
        return model
    if not isinstance(model, str | os.PathLike):
        raise RequestError(f"a model is a path or an onnx.ModelProto, and this is {type(model).__name__}")
    return model_file.load(model)


def weights_folder(model: ModelLike) -> Path | None:
    """Where the external data of a model lies; None where nothing says."""
    return None if isinstance(model, onnx.ModelProto) else Path(model).parent


def raised(
    model: onnx.ModelProto, folder: Path | None, *, in_place: bool = False
) -> tuple[onnx.ModelProto, dict[str, Any] | None]:
    """The model at opset 16 or newer, and what raising it took; the model itself where it is there already.

    Raises UnsupportedError for a file that ONNX Runtime saved for one machine.
    With `in_place` the model is given away.
    """
    _refuse_bound(model)
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise ModelFileError("the model imports no ai.onnx opset; export it again")
    if versions[0] > NEWEST_OPSET:
        raise OpsetError(
            f"the model has opset {versions[0]}, and operators are known up to opset {NEWEST_OPSET}; "
            f"export it at opset {NEWEST_OPSET} or older"
        )
    return raise_opset(model, folder, in_place=in_place)


def _refuse_bound(model: onnx.ModelProto) -> None:
    """Raise for nodes that only the machine can read for which the file was saved."""
    for node in all_nodes(model.graph.node):
        name = f"node '{node.name or next(filter(None, node.output), '')}' ({node.op_type})"
        if node.domain in _LAYOUTS:
            raise UnsupportedError(
                f"the model was saved in {_LAYOUTS[node.domain]} ({node.domain}, as of {name}), which no gradient can "
                "read; save it with graph_optimization_level ORT_ENABLE_EXTENDED, or convert the model it was made from"
            )
        if (node.domain, node.op_type) == (MICROSOFT, "EPContext"):
            raise UnsupportedError(
                f"{name} holds a part of the model that was compiled for one device, and no operators of it; convert "
                "the model that it was compiled from"
            )
