"""docs/large.md: models of 3 GB inspected, converted, run and verified, each step in a process of its own.

    python scripts/large_model.py [--folder FOLDER] [--only KIND ...]

The networks have no names in the world: convolutions and two dense layers, as VGG has them, wide enough for 3 GB. A
sparse file holds zeros and takes no room on the disk; the one with drawn weights takes 3 GB. Linux only: memory is
read from /proc.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "large.md"
LIMIT = 500 * 2**20  # RLIMIT_DATA, bytes
_DRAWN = 3_000_017  # a prime: no row of a weight is another's


@dataclass(frozen=True)
class Kind:
    """A model: `width` channels in `depth` convolutions of 3 x 3, then two dense layers of `dense` units."""

    name: str
    words: str
    opset: int
    drawn: bool
    external: bool = True
    width: int = 2048
    depth: int = 18
    dense: int = 12288
    steps: tuple[str, ...] = ("convert", "run")


KINDS = (
    Kind("opset18", "opset 18, external data, a sparse file", 18, False, steps=("inspect", "convert")),
    Kind("opset12", "opset 12 (raised), external data, a sparse file", 12, False, steps=("inspect", "convert")),
    Kind("drawn", "opset 12 (raised), external data, drawn weights", 12, True),
    Kind("inline", "opset 18, weights in the file itself", 18, True, external=False, depth=8, dense=512),
)


# -- the models -------------------------------------------------------------------------------------------------------


def build(kind: Kind, path: Path) -> int:
    """Write the model; how many bytes of weights it has."""
    shapes = dict(_shapes(kind))
    nodes = list(_nodes(kind))
    graph = helper.make_graph(
        nodes,
        kind.name,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 1000])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", kind.opset)], ir_version=8)
    rng = np.random.default_rng(0)
    data, offset = path.with_suffix(".data"), 0
    with data.open("wb") as file:
        for name, shape in shapes.items():
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
            size = 4 * int(np.prod(shape))
            values = _draw(rng, shape) if kind.drawn else None
            if not kind.external and values is not None:
                tensor.CopyFrom(numpy_helper.from_array(values, name))
            else:
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", offset), ("length", size)):
                    tensor.external_data.add(key=key, value=str(value))
                if values is not None:
                    file.write(values.tobytes())
            model.graph.initializer.append(tensor)
            offset += size
        if kind.external:
            file.truncate(offset)
    if not kind.external:
        data.unlink()
    path.write_bytes(model.SerializeToString())
    return offset


def _shapes(kind: Kind) -> Iterator[tuple[str, list[int]]]:
    channels = 3
    for index in range(kind.depth):
        yield f"conv{index}.weight", [kind.width, channels, 3, 3]
        yield f"conv{index}.bias", [kind.width]
        channels = kind.width
    yield "dense.weight", [kind.dense, kind.width * 4]
    yield "dense.bias", [kind.dense]
    yield "head.weight", [1000, kind.dense]
    yield "head.bias", [1000]


def _nodes(kind: Kind) -> Iterator[onnx.NodeProto]:
    x = "image"
    for index in range(kind.depth):
        weights = [f"conv{index}.weight", f"conv{index}.bias"]
        strides = [2, 2] if index < 2 else [1, 1]
        yield helper.make_node("Conv", [x, *weights], [f"c{index}"], f"conv{index}", pads=[1] * 4, strides=strides)
        yield helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}")
        x = f"r{index}"
    yield helper.make_node("MaxPool", [x], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2])
    yield helper.make_node("Flatten", ["pooled"], ["flat"], "flatten")
    yield helper.make_node("Gemm", ["flat", "dense.weight", "dense.bias"], ["d"], "dense", transB=1)
    yield helper.make_node("Relu", ["d"], ["rd"], "dense_relu")
    yield helper.make_node("Gemm", ["rd", "head.weight", "head.bias"], ["logits"], "head", transB=1)


def _draw(rng: np.random.Generator, shape: list[int]) -> np.ndarray:
    """Normal values, a few million of them repeated: all of 3 GB would take minutes."""
    scale = np.sqrt(2 / int(np.prod(shape[1:]))) if len(shape) > 1 else 0.01
    return np.resize(rng.standard_normal(_DRAWN, np.float32) * np.float32(scale), shape)


# -- the steps, each in a process of its own --------------------------------------------------------------------------


def inspect(source: Path, out: Path) -> dict[str, Any]:
    import graphgbp

    found = graphgbp.inspect(source)
    return {"layer": next(layer["tensor"] for layer in found.layers if layer["chosen"])}


def convert(source: Path, out: Path) -> dict[str, Any]:
    import graphgbp

    model = graphgbp.convert(source, ["guided_gradcam", "gradcam", "saliency"])
    graphgbp.save(model, out, weights_from=source.parent)
    return {"growth": out.stat().st_size - source.stat().st_size}


def run(source: Path, out: Path) -> dict[str, Any]:
    """The converted file beside its source, by ONNX Runtime alone: equal outputs, and maps."""
    image = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
    (expected,) = _outputs(source, ["logits"], {"image": image})
    names = ["logits", "gradcam", "guided_gradcam", "saliency"]
    logits, *maps = _outputs(out, names, {"image": image, "target": np.array([-1])})
    if not np.allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()):
        raise SystemExit("the converted model gives other outputs than its source")
    return {"nonzero": float(np.mean([np.mean(array != 0) for array in maps]))}


def _outputs(path: Path, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")  # which copies the weights
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(names, feeds)


def work(step: str, source: Path, out: Path, limited: bool) -> None:
    """Run one step and print what it took, as JSON."""
    if limited:
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    watch = _Watch()
    found = {"inspect": inspect, "convert": convert, "run": run}[step](source, out)
    print(json.dumps({**found, "own": watch.stop(), "resident": _memory("VmHWM")}))


class _Watch:
    """The largest anonymous memory this process had, looked at every 2 ms."""

    def __init__(self) -> None:
        self._peak, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.002):
            self._peak = max(self._peak, _memory("RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._peak, _memory("RssAnon"))


def _memory(kind: str) -> int:
    """Bytes of this process; its ru_maxrss would count the parent's as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def measure(step: str, source: Path, out: Path, limited: bool = False) -> dict[str, Any] | str:
    """What a step took in a fresh process; its last words where it failed."""
    command = [sys.executable, __file__, "--work", step, str(source), str(out), *(["--limited"] if limited else [])]
    start = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"ended by signal {-done.returncode}"])[-1]
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


# -- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Large models

Weights in external files stay there: they are neither read into memory nor copied, unless the converted file goes to
another folder. Figures of models that were made for the purpose (convolutions and two dense layers), each step in a
process of its own, interpreter and imports included.

Made by `python scripts/large_model.py`, with {versions}, on {cores} cores.

| model | weights | step | s | own memory | resident | under 500 MB of data |
|---|---|---|---|---|---|---|
"""
FOOT = """
*own memory*: the peak of what the process itself allocated (anonymous pages). *resident*: the peak of all its pages,
those of mapped files included. *under 500 MB of data*: the step done again under `RLIMIT_DATA` = 500 MB, where an
allocation beyond fails.

- *convert* is `graphgbp.convert` and `graphgbp.save` beside the model: Guided Grad-CAM, Grad-CAM and saliency. Most of
  its time goes into the sha256 of the weights, which the manifest records.
- Below opset 16 the old model and the raised one are run on the same input and compared. That run looks at every
  weight, through mapped pages, which are let go as fast as they are looked at.
- A model whose weights are in the file itself is read once and written once; protobuf holds it whole for either.
- *run*: source and converted file one after the other in ONNX Runtime, on one image of 16 x 16, equal outputs required.
"""


def page(kinds: list[Kind], folder: Path) -> str:
    from importlib.metadata import version

    versions = ", ".join(f"{name} {version(name)}" for name in ("onnx", "onnxruntime-gpu", "protobuf"))
    rows = [row for kind in kinds for row in _rows(kind, folder)]
    return HEAD.format(versions=versions, cores=os.cpu_count()) + "\n".join(rows) + "\n" + FOOT


def _rows(kind: Kind, folder: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{kind.name}-") as home:
        source, out = Path(home) / "model.onnx", Path(home) / "model.explained.onnx"
        size = build(kind, source)
        words, weights = kind.words, f"{size / 1e9:.2f} GB"
        for step in kind.steps:
            row = f"| {words} | {weights} | {step} | {_figures(kind, step, source, out)} |"
            print(row, flush=True)
            yield row
            words = weights = ""


def _figures(kind: Kind, step: str, source: Path, out: Path) -> str:
    found = measure(step, source, out)
    if isinstance(found, str):
        return f"failed: {found} | | |"
    tried = kind.external and step in ("inspect", "convert")
    limited = measure(step, source, out, limited=True) if tried else None
    verdict = "" if limited is None else "done" if not isinstance(limited, str) else f"fails ({limited})"
    return f"{found['seconds']:.1f} | {_mb(found['own'])} | {_mb(found['resident'])} | {verdict}"


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--only", nargs="*", choices=[kind.name for kind in KINDS], help="print, and write no page")
    parser.add_argument("--work", nargs=3, metavar=("STEP", "SOURCE", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("--limited", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        step, source, out = given.work
        work(step, Path(source), Path(out), given.limited)
        return
    text = page([kind for kind in KINDS if not given.only or kind.name in given.only], given.folder)
    if not given.only:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
