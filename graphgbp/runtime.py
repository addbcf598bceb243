"""A converted file run by ONNX Runtime: which device, one session, one run.

It knows what a converted file promises (contract.py) and nothing of how one is made.
"""

import ctypes
import io
import os
import re
import sys
from collections.abc import Collection, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphgbp import contract
from graphgbp.contract import Manifest, dtype_of
from graphgbp.errors import DeviceError, GraphgbpError, ModelFileError, RequestError, TargetError

CUDA_PROVIDER = "CUDAExecutionProvider"
CPU_PROVIDER = "CPUExecutionProvider"
_BFLOAT16, _ONNX_BFLOAT16 = "bfloat16", 16
_FATAL_ONLY = 4  # ONNX Runtime's log severity: what it would log as an error is raised as one too
_INSTALL = "pip install 'graphgbp[cuda]' brings NVIDIA's libraries"


@dataclass(frozen=True)
class Device:
    """Where a session runs: "cpu", or a CUDA device by its number."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"


def parse_device(device: str) -> Device | None:
    """ "cpu", "cuda" (the first) or "cuda:1"; None for "auto". Raises DeviceError for anything else."""
    if device == "auto":
        return None
    if device == "cpu":
        return Device("cpu")
    found = re.fullmatch(r"cuda(?::(\d+))?", device) if isinstance(device, str) else None
    if found is None:
        raise DeviceError(f"device {device!r} is unknown; choose 'auto', 'cpu', 'cuda' or 'cuda:<number>'")
    return Device("cuda", int(found[1] or 0))


_GUARDS = {
    contract.GUARD_NODE: "it must be one class per image, or one for all, from -1 (the predicted class) up to the "
    "number of classes less one",
    contract.GUARD_POSITION: "a position must be one row per image, or one for all, each entry from -1 (all along that "
    "axis) up to the axis's size less one",
    contract.GUARD_MASK: "the mask must have one row per image, or one for all, and the scores' sizes, or 1",
    contract.GUARD_WEIGHTS: "it must have the shape of what is explained",
}


@dataclass(frozen=True)
class Input:
    """One of the model's own inputs. `dtype` is None for what is no tensor of numbers."""

    name: str
    shape: list[int | str | None]
    dtype: np.dtype | None


@dataclass(frozen=True)
class Answer:
    """One run: what graphgbp appended, by role, and the model's own outputs, by name."""

    roles: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


class Session:
    """A converted file, loaded.

    `model` is its path or its bytes; bytes that keep weights in external files need `weights_folder`, the folder of
    those files. `device` is "auto" (CUDA where it loads, else CPU), "cpu", "cuda" or "cuda:<number>"; `threads`
    bounds the CPU threads; `tf32` allows CUDA's faster, coarser float32 products.

    Attributes: `manifest`; `device`, the one taken ("cpu" or "cuda:0"); `device_note`, why "auto" did not take CUDA,
    else None; `inputs`, the model's own by name; `targets`, the shapes of those that say what is explained, by role;
    `output_shapes`, those of the outputs.

    Raises DeviceError where the asked device cannot be had, never falling back to another; ModelFileError where the
    file cannot be loaded or is not converted.
    """

    def __init__(
        self,
        model: bytes | str | os.PathLike[str],
        *,
        weights_folder: str | os.PathLike[str] | None = None,
        device: str = "auto",
        threads: int | None = None,
        tf32: bool = False,
    ) -> None:
        asked = parse_device(device)
        options = _options(weights_folder, threads)
        content = model if isinstance(model, bytes) else os.fspath(model)
        self.device_note: str | None = None
        if asked is None:
            self._session, self._device, self.device_note = _open_best(content, options, tf32)
        else:
            self._session, self._device = open_session(content, options, asked, tf32), asked
        self.device = str(self._device)
        self.manifest = _read_manifest(self._session)
        self._read_signature()

    def _read_signature(self) -> None:
        names = self.manifest.names
        inputs = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        shapes: dict[str, list[int | str | None]] = {value.name: value.shape for value in inputs}
        self._target_names = {role: names[role] for role in contract.TARGET_INPUTS if role in names}
        self.targets = {role: shapes[name] for role, name in self._target_names.items()}
        self.inputs = {
            value.name: Input(value.name, value.shape, _dtype(value.type))
            for value in self._session.get_inputs()
            if value.name not in self._target_names.values()
        }
        self.output_shapes = {value.name: value.shape for value in self._session.get_outputs()}
        public = {name: role for role, name in names.items()}
        results = {value.name: value.type for value in self._session.get_outputs()}
        self._roles = {public[name]: name for name in results if name in public}
        self._outputs = [n for n, kind in results.items() if n not in public and kind.startswith("tensor(")]

    def run(
        self, inputs: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray], roles: Collection[str] | None = None
    ) -> Answer:
        """Run one batch: the model's own inputs by name, and what is explained by role, as `targets` lists them.

        `roles` chooses among what was appended (all of it by default); the model's own tensor outputs always come.
        Arrays in and out are numpy's, wherever the session runs.

        Raises TargetError where one of the file's guards refuses the target, GraphgbpError with ONNX Runtime's words
        for any other failure.
        """
        wanted = {role: name for role, name in self._roles.items() if roles is None or role in roles}
        feeds = {**inputs, **{self._target_names[role]: array for role, array in targets.items()}}
        fetched = self._fetch(feeds, [*wanted.values(), *self._outputs])
        return Answer(
            {role: fetched[name] for role, name in wanted.items()}, {name: fetched[name] for name in self._outputs}
        )

    def _fetch(self, feeds: Mapping[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
        binding = self._session.io_binding()
        arrays = {name: np.asarray(array, order="C") for name, array in feeds.items()}
        try:
            for name, array in arrays.items():
                binding.bind_ortvalue_input(name, _to_runtime(array, self._device))
            for name in names:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            return {name: _from_runtime(value) for name, value in zip(names, binding.get_outputs(), strict=True)}
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise _run_error(error) from error


def _to_runtime(array: np.ndarray, device: Device) -> Any:
    """An array as ONNX Runtime takes it. A bfloat16 one is not copied and must outlive what comes back."""
    from onnxruntime import OrtValue

    if array.dtype.name == _BFLOAT16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array, _ONNX_BFLOAT16)
    return OrtValue.ortvalue_from_numpy(array, device.kind, device.index)


def _from_runtime(value: Any) -> np.ndarray:
    """A tensor on the CPU as numpy's array; bfloat16, which ONNX Runtime does not give numpy, in ml_dtypes' type."""
    if value.data_type() != f"tensor({_BFLOAT16})":
        return value.numpy()
    dtype, shape = dtype_of(_BFLOAT16), value.shape()
    if 0 in shape:
        return np.empty(shape, dtype)
    content = ctypes.string_at(value.data_ptr(), int(np.prod(shape)) * dtype.itemsize)
    return np.frombuffer(content, dtype).reshape(shape).copy()


def cuda_obstacle(index: int = 0) -> str | None:
    """What keeps CUDA device `index` from being used and what to do about it; None where nothing is known to."""
    import onnxruntime

    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return (
            "the installed onnxruntime is built without CUDA; pip uninstall onnxruntime, then "
            "pip install 'graphgbp[cuda]' (x86-64 Linux or Windows)"
        )
    return _driver_obstacle(index) or _library_obstacle()


def _driver_obstacle(index: int) -> str | None:
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return f"no NVIDIA driver ({name}) is found; CUDA needs one, from nvidia.com/drivers"
    count = ctypes.c_int()
    failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if failed:
        return f"the NVIDIA driver finds no usable GPU (CUDA error {failed}); does nvidia-smi list one?"
    if index >= count.value:
        return f"there is no CUDA device {index}: the driver shows {count.value}, numbered from 0"
    return None


def _library_obstacle() -> str | None:
    """The CUDA library that ONNX Runtime's provider links to and the loader cannot find; on Linux it can be named."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(io.StringIO()):  # it prints what it does not find; we say it better
            onnxruntime.preload_dlls()
    provider = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
    if sys.platform != "linux" or not provider.is_file():
        return None
    try:
        ctypes.CDLL(str(provider))
    except OSError as error:
        missing = re.match(r"(\S+): cannot open shared object file", str(error))
        if missing:
            return f"the CUDA library {missing[1]} is not found; {_INSTALL}"
    return None


def _options(weights_folder: str | os.PathLike[str] | None, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL_ONLY
    if threads is not None:
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise RequestError(f"threads={threads!r} is no number of threads; give 1 or more, or leave it out")
        options.intra_op_num_threads = threads
    if weights_folder is not None:
        options.add_session_config_entry(contract.ORT_WEIGHTS_FOLDER, os.path.abspath(weights_folder))
    return options


def _open_best(model: bytes | str, options: Any, tf32: bool) -> tuple[Any, Device, str | None]:
    """A session on CUDA where it can be had, else on the CPU with the reason."""
    note, cuda = cuda_obstacle(), Device("cuda")
    if note is None:
        try:
            return open_session(model, options, cuda, tf32), cuda, None
        except (DeviceError, ModelFileError) as error:
            note = str(error)
    cpu = Device("cpu")
    return open_session(model, options, cpu, tf32), cpu, f"CUDA is not used: {note}"


def open_session(model: bytes | str, options: Any, device: Device, tf32: bool = False) -> Any:
    """An onnxruntime.InferenceSession of any model, on the asked device and no other.

    Raises DeviceError where that cannot be had, ModelFileError where the model cannot be loaded.
    """
    import onnxruntime

    providers: list[Any] = [CPU_PROVIDER]
    if device.kind == "cuda":
        obstacle = cuda_obstacle(device.index)
        if obstacle:
            raise DeviceError(f"device '{device}' cannot be used: {obstacle}")
        providers.insert(0, (CUDA_PROVIDER, {"device_id": str(device.index), "use_tf32": str(int(tf32))}))
    try:
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        where = "the model" if isinstance(model, bytes) else f"'{model}'"
        raise ModelFileError(f"ONNX Runtime cannot load {where} on {device}: {_words(error)}") from error
    session.disable_fallback()
    if device.kind == "cuda" and CUDA_PROVIDER not in session.get_providers():
        raise DeviceError(
            f"device '{device}' cannot be used: ONNX Runtime {onnxruntime.__version__} could not start its CUDA "
            f"provider and says why on stderr; most often CUDA or cuDNN is missing or of another version: {_INSTALL}"
        )
    return session


def _read_manifest(session: Any) -> Manifest:
    text = session.get_modelmeta().custom_metadata_map.get(contract.MANIFEST_KEY)
    if text is None:
        raise ModelFileError("the model is not converted: it holds no manifest; run graphgbp.convert on it first")
    try:
        manifest = Manifest.from_json(text)
    except (ValueError, TypeError) as error:
        raise ModelFileError(f"the manifest in the model cannot be read: {error}; convert its source again") from None
    if manifest.kind != "explanation":
        raise ModelFileError(
            f"the model holds a {manifest.kind} graph and no attribution maps; run graphgbp.convert on its source"
        )
    return manifest


def _dtype(kind: str) -> np.dtype | None:
    """numpy's type for ONNX Runtime's spelling: "tensor(float)"."""
    found = re.fullmatch(r"tensor\((\w+)\)", kind)
    name = {"float": "float32", "double": "float64"}.get(found[1], found[1]) if found else ""
    try:
        return dtype_of(name) if name else None
    except TypeError:
        return None


def _run_error(error: Exception) -> GraphgbpError:
    words = _words(error)
    for guard, advice in _GUARDS.items():
        if guard in words:
            return TargetError(f"the target does not fit: {advice}")
    advice = "; a smaller batch_size needs less memory" if re.search("alloc|out of memory", words, re.I) else ""
    return GraphgbpError(f"ONNX Runtime could not run the model: {words}{advice}")


def _words(error: Exception) -> str:
    """ONNX Runtime's message in one line, without the codes in front."""
    text = " ".join(str(error).split())
    return re.sub(r"^(\[ONNXRuntimeError\] : \d+ : \w+ : |Error in execution: )+", "", text)
