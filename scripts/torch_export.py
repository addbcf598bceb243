"""A torch network as an ONNX file, by either of torch's exporters, and the command that writes its explained twin."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from vision_networks import calibrate, draw

import graphgbp

EXPORTERS = ("dynamo", "torchscript")
INPUT = "image"
OPSET = 18


class ExportError(Exception):
    """The exporter gave no model; its own words are the text."""


def export(
    module: nn.Module,
    images: torch.Tensor,
    outputs: Sequence[str],
    exporter: str,
    *,
    opset: int = OPSET,
    dynamic_batch: bool = True,
) -> onnx.ModelProto:
    """The network as ONNX: input `image` [batch, 3, H, W], outputs named as given. Raises ExportError."""
    make = _by_dynamo if exporter == "dynamo" else _by_torchscript
    names = {"input_names": [INPUT], "output_names": list(outputs)}
    with _quietly(), _without_fused_attention():
        try:
            return make(module, images, opset, dynamic_batch, names)
        except Exception as error:  # an exporter raises whatever its passes raise
            raise ExportError(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error


def _by_dynamo(
    module: nn.Module, images: torch.Tensor, opset: int, dynamic_batch: bool, names: dict[str, Any]
) -> onnx.ModelProto:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    program = torch.onnx.export(
        module, (images,), dynamo=True, opset_version=opset, dynamic_shapes=shapes, verbose=False, **names
    )
    assert program is not None
    return program.model_proto


def _by_torchscript(
    module: nn.Module, images: torch.Tensor, opset: int, dynamic_batch: bool, names: dict[str, Any]
) -> onnx.ModelProto:
    everything = (*names["input_names"], *names["output_names"])
    axes = {name: {0: "batch"} for name in everything} if dynamic_batch else None
    file = io.BytesIO()
    target: Any = file  # declared as a path only
    torch.onnx.export(module, (images,), target, dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
    return onnx.load_from_string(file.getvalue())


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _without_fused_attention() -> Iterator[None]:
    """nn.MultiheadAttention written out: the older exporter does not know the fused operator of inference."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def main(library: str, build: Callable[..., nn.Module]) -> None:
    """The command line of the export scripts: OUT.onnx and OUT.explained.onnx of the network that `build` makes."""
    arguments = _arguments(library)
    torch.manual_seed(arguments.seed)
    try:
        module = build(arguments.name, **({"num_classes": arguments.classes} if arguments.classes else {}))
    except (ValueError, RuntimeError) as error:  # what the libraries raise for a name they do not know
        raise SystemExit(f"{library} makes no '{arguments.name}': {error}") from error
    images = torch.randn(2, 3, arguments.size, arguments.size)
    if arguments.checkpoint:
        module.load_state_dict(torch.load(arguments.checkpoint, weights_only=True))
    else:
        draw(module)
        calibrate(module, images)
    try:
        model = export(
            module.eval(), images, ["scores"], arguments.exporter,
            opset=arguments.opset, dynamic_batch=not arguments.static,
        )  # fmt: skip
        explained = graphgbp.convert(model, arguments.explain, target_layer=arguments.target_layer)
        for proto, path in ((model, f"{arguments.out}.onnx"), (explained, f"{arguments.out}.explained.onnx")):
            graphgbp.save(proto, path)
            print(f"wrote {path} ({len(proto.graph.node)} nodes)")
    except (ExportError, graphgbp.GraphgbpError) as error:
        raise SystemExit(str(error)) from error


def _arguments(library: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=f"Export a {library} network to ONNX and write its explanation into it."
    )
    parser.add_argument("name", help=f"as {library} calls it, e.g. resnet18")
    parser.add_argument("-o", "--out", type=Path, required=True, help="OUT.onnx and OUT.explained.onnx are written")
    parser.add_argument("--exporter", choices=EXPORTERS, default=EXPORTERS[0])
    parser.add_argument("--checkpoint", type=Path, help="a state dict; without one, weights are drawn")
    parser.add_argument("--classes", type=int, help="how many, where they are not the library's")
    parser.add_argument("--seed", type=int, default=0, help="for drawn weights (default 0)")
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels (default 224)")
    parser.add_argument("--opset", type=int, default=OPSET, help=f"default {OPSET}")
    parser.add_argument("--static", action="store_true", help="a batch of two, not of any size")
    parser.add_argument("--explain", nargs="+", metavar="METHOD", help="default: what graphgbp.convert writes")
    parser.add_argument("--target-layer", default="auto", help="where Grad-CAM is taken (default: auto)")
    return parser.parse_args()
