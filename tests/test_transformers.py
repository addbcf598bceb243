"""Grad-CAM of vision transformers, at the layer that `auto` chooses and at those asked for, equals torch's hooks."""

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import graphgbp
from graphgbp import contract
from graphgbp.analysis import Analysis
from graphgbp.model_file import read_manifest
from graphgbp.prepare import prepare
from tests.maps import assert_maps_equal, explain
from tests.networks import export
from tests.transformers import (
    Attention,
    FlatBlock,
    MergeByReshape,
    Swin,
    TorchAttention,
    ViT,
    drawn,
    enlarged,
    hooked_cams,
)

# torch's tracer warns of every size that a network asks for
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
SIZE, TARGET = (32, 24), 2


def separate(width: int) -> nn.Module:
    return Attention(width, fused=False)


NETWORKS: dict[str, Any] = {
    "vit": (lambda: ViT(Attention), lambda net: net.blocks[-1].norm1, 1, (4, 3)),
    "vit, torch's attention": (lambda: ViT(TorchAttention), lambda net: net.blocks[-1].norm1, 1, (4, 3)),
    "vit, separate queries": (lambda: ViT(separate), lambda net: net.blocks[-1].norm1, 1, (4, 3)),
    "deit": (lambda: ViT(Attention, 2, 2), lambda net: net.blocks[-1].norm1, 2, (4, 3)),
    "vit, registers, pooled": (lambda: ViT(Attention, 4, 0), lambda net: net.blocks[-1].norm1, 4, (4, 3)),
    "vit, patches alone": (lambda: ViT(Attention, 0, 0), lambda net: net.blocks[-1].norm1, 0, (4, 3)),
    "vit, one row": (lambda: ViT(Attention, patches=5), lambda net: net.blocks[-1].norm1, 1, (1, 5)),
    "vit, one column": (lambda: ViT(Attention, 0, 0, patches=4), lambda net: net.blocks[-1].norm1, 0, (4, 1)),
    "swin": (Swin, lambda net: net.stages[-1][-1].norm1, 0, (4, 4)),
    "swin, merged by a reshape": (
        lambda: Swin(FlatBlock, MergeByReshape), lambda net: net.stages[-1][-1].norm1, 0, (4, 4),
    ),
}  # fmt: skip


@cache
def network(name: str) -> nn.Module:
    return drawn(NETWORKS[name][0]())


@cache
def exported(name: str, exporter: str, opset: int) -> onnx.ModelProto:
    return export(network(name), images(name), exporter, opset, dynamic=("batch",))


@cache
def images(name: str) -> torch.Tensor:
    size = {"swin": (32, 32), "vit, one row": (8, 40), "vit, one column": (32, 8)}
    size["swin, merged by a reshape"] = size["swin"]
    return torch.randn(3, 3, *size.get(name, SIZE), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "exporter", "opset"),
    [
        *((name, "torchscript", 18) for name in NETWORKS),
        *((name, "torchscript", 16) for name in ("vit", "vit, separate queries", "swin, merged by a reshape")),
        *((name, "dynamo", 18) for name in ("deit", "vit, torch's attention", "vit, one row", "swin")),
    ],
)
def test_auto_is_the_last_norm_before_attention(name, exporter, opset):
    """pytorch-grad-cam's choice for ViT and Swin; layer normalization is an operator from opset 17 on."""
    _, layer, others, grid = NETWORKS[name]
    model, x = exported(name, exporter, opset), images(name)
    cams = hooked_cams(network(name), layer(network(name)), x, TARGET, others, grid)
    got = explain(model, x.numpy(), np.array([TARGET]), contract.CAMS, relu_attributions=False)
    size = tuple(x.shape[2:])
    expected = {method: nn.functional.interpolate(cam, size, mode="bilinear").numpy() for method, cam in cams.items()}
    divided = {"xgradcam": expected.pop("xgradcam")}
    assert_maps_equal(got, expected, f"{name} {exporter} {opset}")
    assert_maps_equal(got, divided, f"{name} {exporter} {opset}", max(1e-4, 1e-6 * cancelled(got, others)))


def cancelled(got: dict[str, np.ndarray], others: int) -> float:
    """How much larger than its sum over the positions, by which XGrad-CAM divides, a channel is; 1 without signs."""
    features = got["gradcam_features"].astype(np.float64)
    tokens = features.reshape(len(features), -1, features.shape[-1])[:, others:]
    return float((np.abs(tokens).sum(1) / np.abs(tokens.sum(1))).max())


MODULES = {
    "norm1": "norm1/LayerNormalization",
    "attention.query": "attention/query/Add",
    "attention.key": "attention/key/Add",
    "attention.proj": "attention/proj/Add",
    "norm2": "norm2/LayerNormalization",
    "mlp.0": "mlp/mlp.0/Add",
    "mlp.2": "mlp/mlp.2/Add",
}


def positions_matter(net: nn.Module, layer: nn.Module, x: torch.Tensor, others: int) -> bool:
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    score = net(x)[:, TARGET].sum()
    handle.remove()
    (gradient,) = torch.autograd.grad(score, seen[0])
    return bool((gradient[:, others:] != 0).any())


@pytest.mark.parametrize("name", ["vit, separate queries", "deit", "vit, registers, pooled"])
def test_a_layer_is_refused_where_its_positions_have_no_gradient_and_only_there(name):
    """Which ones have none torch says: behind the last attention, where class tokens are scored."""
    net, model, x = network(name), exported(name, "torchscript", 18), images(name)
    others, matter = NETWORKS[name][2], {}
    for block in (0, 1):
        for module, node in MODULES.items():
            layer = net.blocks[block].get_submodule(module)
            if isinstance(layer, nn.Identity):
                continue
            matter[f"/blocks/blocks.{block}/{node}"] = positions_matter(net, layer, x, others)
    matter["/norm/LayerNormalization"] = positions_matter(net, net.norm, x, others)
    search = Analysis(prepare(model))
    listed = {layer.tensor.name.removesuffix("_output_0") for layer in search.layers}
    assert any(matter.values()) and (all(matter.values()) or "pooled" not in name)
    for node, matters in matter.items():
        if matters:
            assert search.layer(node).layout.sizes == [4, 3]
        else:
            assert node not in listed
            with pytest.raises(graphgbp.RequestError, match="only the class token"):
                search.layer(node)
    assert ("/norm/LayerNormalization" in listed) == matter["/norm/LayerNormalization"]


@pytest.mark.parametrize("node", ["norm2", "mlp/mlp.2"])
def test_a_layer_of_tokens_asked_for_by_name(node):
    name, op = "deit", "LayerNormalization" if node == "norm2" else "Add"
    net, x = network(name), images(name)
    cams = hooked_cams(net, net.blocks[0].get_submodule(node.replace("mlp/", "")), x, TARGET, 2, (4, 3))
    model = exported(name, "torchscript", 18)
    layer = f"/blocks/blocks.0/{node}/{op}"
    got = explain(model, x.numpy(), np.array([TARGET]), contract.CAMS, target_layer=layer)
    assert_maps_equal(got, {method: enlarged(cam, SIZE).numpy() for method, cam in cams.items()}, node)


def layers_of(model: onnx.ModelProto) -> list[dict[str, Any]]:
    manifest = read_manifest(model)
    assert manifest is not None
    return manifest.target_layers


def test_the_manifest_tells_what_tokens_stand_for():
    (layer,) = layers_of(graphgbp.convert(exported("deit", "torchscript", 18)))
    assert (layer["shape"], layer["channel_axis"]) == (["batch", 14, 24], 2)
    assert (layer["grid"], layer["prefix_tokens"]) == ([4, 3], 2)
    assert "feeds attention" in layer["reason"] and "4x3" in layer["reason"]
    (layer,) = layers_of(graphgbp.convert(exported("swin", "torchscript", 18)))
    assert (layer["shape"][1:], layer["channel_axis"]) == ([4, 4, 16], 3)
    assert (layer["grid"], layer["prefix_tokens"]) == (None, None)


def test_the_grid_of_an_open_image_size():
    """No position is embedded, so the network takes any size, and the grid is known when it runs."""
    net = drawn(ViT(Attention, positions=False))
    model = export(net, torch.zeros(2, 3, *SIZE), "torchscript")
    for size, grid in (((32, 24), (4, 3)), ((16, 40), (2, 5))):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
        cams = hooked_cams(net, net.blocks[-1].norm1, x, TARGET, 1, grid)
        got = explain(model, x.numpy(), np.array([TARGET]), contract.CAMS)
        assert_maps_equal(got, {method: enlarged(cam, size).numpy() for method, cam in cams.items()}, str(size))


class Shuffled(ViT):
    """Its tokens stand in an order that no feature map has."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)[:, [5, 2, 9, 0, 11, 7, 1, 8, 3, 10, 6, 4]]
        return self.heads[0](self.norm(self.blocks(x)).mean(1))


def test_tokens_whose_grid_is_not_known_are_refused():
    model = export(drawn(Shuffled(Attention, 0, 0)), torch.zeros(2, 3, *SIZE), "torchscript", dynamic=("batch",))
    with pytest.raises(graphgbp.RequestError, match="cannot be traced back to a feature map"):
        graphgbp.convert(model)
    with pytest.raises(graphgbp.RequestError, match="nothing tells which axis"):
        graphgbp.convert(model, target_layer="/blocks/blocks.1/norm1/LayerNormalization")
    graphgbp.convert(model, target_layer="/embed/Conv")


def test_what_stands_in_windows_is_no_layer():
    model = exported("swin", "torchscript", 18)
    search = Analysis(prepare(model))
    inside = [name for name in search.view.tensors if name.endswith("attention/softmax/Softmax_output_0")]
    inside += [name for name in search.view.tensors if "qkv" in name and name.endswith("Add_output_0")]
    assert inside and not {layer.tensor.name for layer in search.layers} & set(inside)
    for name in inside:
        with pytest.raises(graphgbp.RequestError, match="nothing tells which axis"):
            search.layer(name)
