"""sha256 of files, remembered, and of models, as of the file that each would be written to."""

import hashlib
import os
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

_digests: dict[tuple[int, ...], str] = {}
_CHUNK = 2**21  # bytes: each one read may wait for the interpreter, and takes memory
_SECOND = 10**9  # nanoseconds, as the next two
_TICK = _SECOND // 10  # longer than the clock of a file system that writes fractions of a second takes for a tick
_LONGEST_TICK = 2 * _SECOND


# -- of files -------------------------------------------------------------------------------------------------


def of_file(path: Path) -> str:
    """Remembered as long as the file stays as it is; for one that was just written its time does not tell."""
    state = path.stat()
    key = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
    if key not in _digests:
        tick = _TICK if state.st_mtime_ns % _SECOND else _LONGEST_TICK
        settled = time.time_ns() - state.st_mtime_ns > tick
        with path.open("rb", buffering=0) as file:
            digest = _digest(file, state.st_size)
        if not settled:
            return digest
        _digests[key] = digest
    return _digests[key]


def _digest(file: FileIO, size: int) -> str:
    """sha256 of a file; what a sparse one leaves out is not read, but counted as the zeros it stands for."""
    if not hasattr(os, "SEEK_HOLE"):
        return hashlib.file_digest(file, "sha256").hexdigest()
    digest, place = hashlib.sha256(), 0
    zeros, buffer = bytes(min(_CHUNK, size)), memoryview(bytearray(min(_CHUNK, size)))
    while place < size:
        try:
            data = os.lseek(file.fileno(), place, os.SEEK_DATA)
        except OSError:  # nothing but a hole up to the end
            data = size
        while place < data:
            digest.update(zeros[: data - place])
            place += min(_CHUNK, data - place)
        end = os.lseek(file.fileno(), data, os.SEEK_HOLE) if data < size else size
        file.seek(data)
        while place < end and (count := file.readinto(buffer[: end - place])):
            digest.update(buffer[:count])
            place += count
    return digest.hexdigest()


# -- of models ------------------------------------------------------------------------------------------------


def of_model(model: onnx.ModelProto) -> str:
    """sha256 of the bytes that the model is saved as."""
    digest = hashlib.sha256()
    for piece in _serialized(model):
        digest.update(piece)
    return digest.hexdigest()


class _Around(NamedTuple):
    """The bytes of a message before and behind one of its fields, which takes `size` bytes itself."""

    before: bytes
    size: int
    behind: bytes

    @property
    def length(self) -> int:
        return len(self.before) + self.size + len(self.behind)


def _serialized(model: onnx.ModelProto) -> Iterator[bytes]:
    """What SerializeToString(deterministic=True) gives, weight by weight: a copy of them all would take its memory."""
    graph, initializer = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.GraphProto.INITIALIZER_FIELD_NUMBER
    if not model.HasField("graph") or any(map(UnknownFieldSet, (model, model.graph, *model.graph.initializer))):
        yield model.SerializeToString(deterministic=True)
        return
    weights = [_around_values(tensor) for tensor in model.graph.initializer]
    size = sum(len(_head(initializer, weight.length)) + weight.length for weight in weights)
    inner = _Around(*_split(model.graph, initializer, size))
    outer = _Around(*_split(model, graph, inner.length))
    yield from (outer.before, _head(graph, inner.length), inner.before)
    for tensor, weight in zip(model.graph.initializer, weights, strict=True):
        yield from (_head(initializer, weight.length), weight.before)
        if weight.size:
            yield tensor.raw_data
        yield weight.behind
    yield from (inner.behind, outer.behind)


def _around_values(tensor: onnx.TensorProto) -> _Around:
    """`before` has the head of the values."""
    number, size = onnx.TensorProto.RAW_DATA_FIELD_NUMBER, len(tensor.raw_data)
    before, _, behind = _split(tensor, number, size)
    return _Around(before + (_head(number, size) if tensor.HasField("raw_data") else b""), size, behind)


def _split(message: Any, number: int, size: int) -> tuple[bytes, int, bytes]:
    """The field itself is not looked at: to look at a bytes field is to copy it."""
    before, behind = type(message)(), type(message)()
    for field in message.DESCRIPTOR.fields:
        if field.number != number:
            _copy_field(message, before if field.number < number else behind, field.name)
    return before.SerializeToString(deterministic=True), size, behind.SerializeToString(deterministic=True)


def _copy_field(source: Any, target: Any, name: str) -> None:
    value = getattr(source, name)
    if not isinstance(value, Message | str | bytes | int | float):
        getattr(target, name).MergeFrom(value)
    elif source.HasField(name):
        set_field(target, name, value)


def set_field(message: Any, name: str, value: Any) -> None:
    if isinstance(value, str | bytes | int | float):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def _head(number: int, length: int) -> bytes:
    """What protobuf writes before a field of so many bytes: number and kind, then the length."""
    return _varint(number << 3 | 2) + _varint(length)


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have their highest bit set."""
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])
