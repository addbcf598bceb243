"""Who runs in docs/bench.md: ONNX Runtime with the source file and the converted ones, Captum in torch, onnx-ad.

Each contestant explains class TARGET of the same images; a run of it is a function without arguments.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_networks
import numpy as np
import onnx

from graphgbp import runtime

Run = Callable[[], Any]

CONTESTANTS = {
    "forward": "ONNX Runtime, forward",
    "explained": "explained",
    "saliency": "saliency",
    "captum": "Captum",
    "compiled": "Captum, torch.compile",
    "onnx_ad": "onnx-ad",
}
METHODS = {"explained": ["guided_gradcam"], "saliency": ["saliency"]}
SINGLE = ("compiled", "onnx_ad")
"""Slow to make or to run, and hence measured for one image only; compiling also at one number of threads only."""
TARGET = 1
RECOMPILATIONS = 64
"""torch.compile gives up at 8, fewer than Captum's hooks make of a network of many blocks."""


@dataclass(frozen=True)
class Place:
    """Where something runs: graphgbp's name of a device, and how many threads of the CPU."""

    device: str
    threads: int

    def open(self, model: bytes | str) -> Any:
        """An InferenceSession of a file or of a model's bytes. Raises DeviceError, ModelFileError."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = 4
        device = runtime.parse_device(self.device)
        if device is None:
            raise ValueError("a benchmark says where it runs: 'cpu', 'cuda' or 'cuda:<number>'")
        return runtime.open_session(model, options, device)


def images(batch: int, size: int = bench_networks.SIZE) -> np.ndarray:
    """Standard normal images, float32 [batch, 3, size, size]."""
    return np.random.default_rng(0).standard_normal((batch, 3, size, size), np.float32)


def feeds_of(session: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    """The images and, where the file asks for it, what is explained: `target`, or onnx-ad's cotangent of the scores."""
    feeds = {}
    for value in session.get_inputs():
        if value.name == "image":
            feeds[value.name] = x
        elif value.name == "target":
            feeds[value.name] = np.array([TARGET])
        else:
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            feeds[value.name] = np.zeros(shape, np.float32)
            feeds[value.name][:, TARGET] = 1
    return feeds


def of_session(session: Any, x: np.ndarray, place: Place) -> Run:
    """All outputs of a session; on CUDA inputs and outputs stay there, and a run ends when the device is done."""
    feeds = feeds_of(session, x)
    if place.device == "cpu":
        return lambda: session.run(None, feeds)
    import onnxruntime

    device = runtime.parse_device(place.device)
    assert device is not None
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device.kind, device.index))
    for value in session.get_outputs():
        binding.bind_output(value.name, device.kind, device.index)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


# -- onnx-ad ----------------------------------------------------------------------------------------------------------


def rewritten(name: str, cache: Path) -> Path:
    """The network with onnx-ad's VJP of its scores."""
    path = cache / f"{name}.onnx_ad.onnx"
    if not path.exists():
        model, _ = rewrite(name, cache)
        onnx.save(model, path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return path


def rewrite(name: str, cache: Path) -> tuple[onnx.ModelProto, float]:
    """That model, made anew, and the seconds it took."""
    import onnx_ad

    source = onnx.load(bench_networks.exported(name, cache, static=True))
    start = time.perf_counter()
    model = onnx_ad.reverse(source, inputs=["image"], outputs=["scores"], layout="onnx")
    return model, time.perf_counter() - start


# -- Captum -----------------------------------------------------------------------------------------------------------


@dataclass
class Captum:
    """Captum's Guided Grad-CAM of a network in torch, at one of its modules; its Guided Backpropagation without one."""

    network: Any
    layer: str | None
    place: Place

    def __post_init__(self) -> None:
        self.network.to(self.place.device)

    def run(self, batch: int, *, compiled: bool = False) -> Run:
        """Guided Grad-CAM, or Guided Backpropagation, of a batch."""
        import torch

        torch.set_num_threads(self.place.threads)
        attribute = attribution(self.network, self.layer)
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = RECOMPILATIONS
            attribute = torch.compile(attribute)
        x = torch.from_numpy(images(batch)).to(self.place.device)

        def one() -> Any:
            found = attribute(x).detach()
            if self.place.device != "cpu":
                torch.cuda.synchronize(self.place.device)
            return found

        return one


def captum_layer(network: Any, features: np.ndarray) -> str | None:
    """The module whose output for `images` is graphgbp's target layer; None where Captum's Guided Grad-CAM cannot
    work there: it takes the layer's output for an image, and tokens are none.
    """
    import torch
    from torch_reference import OutOfPlace, Recorder, place

    if features.ndim != 4:
        return None
    with OutOfPlace(), Recorder(network, features.size) as recorder:
        network(torch.from_numpy(images(len(features))).requires_grad_())
    return place(recorder.made, features)[0]


def attribution(network: Any, layer: str | None) -> Callable[[Any], Any]:
    """Captum's map of class TARGET as a function of the images."""
    from captum.attr import GuidedBackprop, GuidedGradCam

    warnings.filterwarnings("ignore", message="(Setting (forward, )?backward hooks|Input Tensor 0 did not)")
    method = GuidedBackprop(network) if layer is None else GuidedGradCam(network, network.get_submodule(layer))
    return lambda x: method.attribute(x, target=TARGET)
