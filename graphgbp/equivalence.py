"""Do two models compute the same? Both are run by ONNX Runtime, as they are written, on the same random input."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from graphgbp.contract import ORT_WEIGHTS_FOLDER

Feeds = dict[str, np.ndarray]
Size = int | str | None  # known, the symbol of an open one, or open without a symbol

_GUESSES = ((2, 64), (2, 224), (1, 64), (1, 224))  # batch, every other open size
_CHANNELS = 3


class RunError(Exception):
    """ONNX Runtime cannot load or run the model; the text is its own, on one line."""


def run(model: onnx.ModelProto, feeds: Feeds, folder: Path | None = None) -> list[Any]:
    """The model's outputs on the CPU, with no optimisation; raises RunError. `folder` holds its external data."""
    return Session(model, folder).run(feeds)


def outputs_of(
    model: onnx.ModelProto, feeds: Feeds, folder: Path | None = None, *, optimised: bool = False
) -> dict[str, Any]:
    """The model's outputs by name; feeds it has no input for are left out. Raises RunError."""
    return Session(model, folder, optimised=optimised).outputs_of(feeds)


def run_on_random_input(
    model: onnx.ModelProto, weights: Feeds, folder: Path | None = None
) -> tuple[Feeds, list[Any] | None, list[str]]:
    """Input on which the model runs, its outputs, and what was tried in vain before.

    `weights` are inputs with a given value, `folder` holds the external data of the others. An open batch size is 2,
    any other open size 64, else 224, else both with a batch of 1. Outputs are None where it runs on none.
    """
    inputs = [value for value in model.graph.input if value.name not in weights]
    guesses = _GUESSES if any(_is_open(value) for value in inputs) else _GUESSES[:1]
    feeds: Feeds = {}
    failures: list[str] = []
    try:
        session = Session(model, folder)
        weights = {name: value for name, value in weights.items() if name in session.takes}
        for batch, size in guesses:
            feeds = _random_feeds(inputs, batch, size)
            shapes = {name: list(value.shape) for name, value in feeds.items()}
            try:
                return feeds, session.run({**feeds, **weights}), failures
            except RunError as error:
                failures.append(f"on shape {shapes}: {error}")
    except RunError as error:
        failures.append(str(error))
    return feeds, None, failures


def difference(expected: Any, found: Any, tolerance: float) -> str | None:
    """How an output differs, as the end of a sentence; None where it agrees.

    Floats agree within `tolerance` of the largest expected value; anything else agrees where it is equal.
    """
    pairs = list(zip(_arrays(expected), _arrays(found), strict=False))
    if len(pairs) < max(len(list(_arrays(expected))), len(list(_arrays(found)))):
        return "has another number of elements"
    return next((what for a, b in pairs if (what := _array_difference(a, b, tolerance))), None)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class Session:
    """A model in ONNX Runtime, on the CPU. Raises RunError.

    It is run with no optimisation and no copy of its weights, or `optimised` as the runtime does by default.
    """

    def __init__(self, model: onnx.ModelProto, folder: Path | None = None, *, optimised: bool = False) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if folder is not None:
            options.add_session_config_entry(ORT_WEIGHTS_FOLDER, str(folder.absolute()))
        if not optimised:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4  # what it reports, it also raises
        content = model.SerializeToString()
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise RunError(one_line(error)) from None

    @property
    def takes(self) -> set[str]:
        """What can be fed: before IR version 4 no initializer, even where it is listed as an input."""
        values = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        return {value.name for value in values}

    def outputs_of(self, feeds: Feeds) -> dict[str, Any]:
        """The outputs by name; feeds the model has no input for are left out."""
        takes = self.takes
        values = self.run({name: x for name, x in feeds.items() if name in takes})
        return dict(zip((output.name for output in self._session.get_outputs()), values, strict=True))

    def run(self, feeds: Feeds) -> list[Any]:
        try:
            return list(self._session.run(None, feeds))
        except Exception as error:
            raise RunError(one_line(error)) from None


def _random_feeds(inputs: Sequence[onnx.ValueInfoProto], batch: int, size: int) -> Feeds:
    """Normal floats, bytes of every value, other integers 0 or 1; equal symbols get equal sizes."""
    rng = np.random.default_rng(0)
    symbols: dict[str, int] = {}
    return {value.name: _random(rng, value, _shape(_sizes(value), batch, size, symbols)) for value in inputs}


def _random(rng: np.random.Generator, value: onnx.ValueInfoProto, shape: list[int]) -> np.ndarray:
    elem_type = value.type.tensor_type.elem_type
    if elem_type in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING):
        raise RunError(f"its input '{value.name}' is no tensor of numbers, so no random input can be made for it")
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))
    if dtype.kind in "iub":
        return rng.integers(0, 256 if dtype in (np.int8, np.uint8) else 2, shape).astype(dtype)
    return np.asarray(rng.standard_normal(shape)).astype(dtype)


def _shape(sizes: list[Size], batch: int, size: int, symbols: dict[str, int]) -> list[int]:
    guesses = [batch, _CHANNELS if len(sizes) == 4 else size, *[size] * len(sizes)]
    return [
        known if isinstance(known, int) else symbols.setdefault(known, guess) if known else guess
        for known, guess in zip(sizes, guesses, strict=False)
    ]


def _sizes(value: onnx.ValueInfoProto) -> list[Size]:
    """The declared sizes; those of a batch of images where not even the rank is declared."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return [None] * 4
    return [dim.dim_value if dim.dim_value > 0 else dim.dim_param or None for dim in tensor.shape.dim]


def _is_open(value: onnx.ValueInfoProto) -> bool:
    return not all(isinstance(size, int) for size in _sizes(value))


def _arrays(output: Any) -> Iterator[np.ndarray]:
    """The arrays of a tensor, or of a sequence or map of them."""
    if isinstance(output, dict):
        output = [output[key] for key in sorted(output)]
    if isinstance(output, list):
        for item in output:
            yield from _arrays(item)
    else:
        yield np.asarray(output)


def _array_difference(expected: np.ndarray, found: np.ndarray, tolerance: float) -> str | None:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"is {found.dtype}{list(found.shape)} instead of {expected.dtype}{list(expected.shape)}"
    if expected.dtype.kind not in "fV" or not expected.size:
        return None if np.array_equal(expected, found) else "has other values"
    a, b = expected.astype(np.float64), found.astype(np.float64)
    finite = np.isfinite(a)
    if not finite.any():
        return "is nowhere finite, so nothing can be compared"
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return "is infinite or no number at other places"
    largest, worst = np.abs(a[finite]).max(), np.abs(a[finite] - b[finite]).max()
    if worst <= tolerance * largest:
        return None
    return f"differs by up to {worst:.3g} (its largest value is {largest:.3g}, the tolerance {tolerance:g} of that)"
