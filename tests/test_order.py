"""What a backward pass reads of the forward pass is made just before it is used: seen in ONNX Runtime's profile."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

import graphgbp
from graphgbp import conversion
from tests.networks import build, export
from tests.test_transformers import exported

MASK = ("HardSigmoid", "Exp")
"""Masks of a rectifier and slopes of a GELU."""


def order_in_time(model: onnx.ModelProto, folder: Path) -> list[str]:
    """The names of the nodes in the order in which ONNX Runtime runs them."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"target": np.array([0])}
    for value in session.get_inputs():
        if value.name not in feeds:
            shape = [size if isinstance(size, int) else 1 for size in value.shape]
            feeds[value.name] = np.ones(shape, np.float32)
    session.run(None, feeds)
    with open(session.end_profiling()) as file:
        events = [event for event in json.load(file) if event["name"].endswith("_kernel_time")]
    return [event["name"].removesuffix("_kernel_time") for event in sorted(events, key=lambda event: event["ts"])]


def waits(model: onnx.ModelProto, folder: Path) -> list[int]:
    """Of each mask or slope of the backward pass: how many nodes run between it and the first one that reads it."""
    time = {name: index for index, name in enumerate(order_in_time(model, folder))}
    found = []
    for node in model.graph.node:
        if node.op_type in MASK and node.name in time and node.name.startswith("graphgbp/guided/"):
            readers = [time[other.name] for other in model.graph.node if node.output[0] in other.input]
            found.append(min(readers) - time[node.name] - 1)
    return found


NETWORKS = {
    "mobilenet": lambda: export(build("mobilenet"), torch.zeros(2, 3, 64, 64), dynamic=["batch"]),
    "vit": lambda: exported("vit", "dynamo", 18),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_wait_for_no_other_layer(name, tmp_path, monkeypatch):
    model = NETWORKS[name]()
    ordered = waits(graphgbp.convert(model, ["guided_backprop"]), tmp_path)
    assert len(ordered) > 1 and max(ordered) <= 2
    monkeypatch.setattr(conversion, "just_in_time", lambda g, cotangents: None)
    assert max(waits(graphgbp.convert(model, ["guided_backprop"]), tmp_path)) > 2
