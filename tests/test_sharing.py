"""The weight of a dense layer is read once by all backward passes."""

from collections import Counter

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

import graphgbp
from graphgbp import conversion
from graphgbp.emit import Emitter
from graphgbp.sharing import share_products
from tests.maps import explain, relative_l2
from tests.networks import build, export

METHODS = ["saliency", "guided_backprop", "deconvnet", "gradcam"]


@pytest.mark.parametrize("opset", [16, 18])
def test_every_weight_of_a_head_is_read_once_backward(opset):
    model = export(build("vgg"), torch.zeros(2, 3, 64, 64), dynamic=["batch"], opset=opset)
    weights = {node.input[1] for node in model.graph.node if node.op_type == "Gemm"}
    converted = graphgbp.convert(model, METHODS)
    reads = Counter(node.input[1] for node in converted.graph.node if node.op_type == "Gemm")
    assert len(weights) > 1 and {name: reads[name] for name in weights} == dict.fromkeys(weights, 2)


def test_maps_are_those_of_separate_products(monkeypatch):
    model = export(build("vgg"), torch.zeros(2, 3, 64, 64), dynamic=["batch"])
    images = np.random.default_rng(0).standard_normal((3, 3, 64, 64), dtype=np.float32)
    shared = explain(model, images, np.array([0, 1, 2]), METHODS)
    monkeypatch.setattr(conversion, "share_products", lambda g, outputs: None)
    apart = explain(model, images, np.array([0, 1, 2]), METHODS)
    for name in ("saliency", "guided_backprop", "deconvnet", "gradcam_gradients"):
        assert relative_l2(shared[name], apart[name]) < 1e-6, name


def test_one_pass_joins_nothing():
    model = export(build("vgg"), torch.zeros(2, 3, 64, 64), dynamic=["batch"])
    assert not any("/shared/" in node.name for node in graphgbp.convert(model, ["saliency"]).graph.node)


@pytest.mark.parametrize(("rows", "joined"), [((2, 2), True), (("N", "N"), True), ((1, 2), False), ((1, "N"), False)])
def test_only_products_of_equally_many_rows_are_joined(rows, joined):
    g = Emitter(gs.Graph(), 18)
    weight = g.constant(np.ones((4, 3), np.float32))
    products = []
    for name, count in zip(("guided", "gradient"), rows, strict=True):
        with g.scope(f"{name}/dense"):
            products.append(g.op("Gemm", gs.Variable(f"of_{name}", np.float32, [count, 4]), weight))
    share_products(g, products)
    assert any(node.op == "Split" for node in g.nodes) == joined
