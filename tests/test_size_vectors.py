"""Sizes that a model computes, read before running: each is what the model then makes."""

from collections import defaultdict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from graphgbp.prepare import prepare
from tests.build import drawn, model
from tests.networks import export
from tests.transformers import Attention, FlatBlock, MergeByReshape, Swin, ViT
from tests.transformers import drawn as all_drawn

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


def shapes_made(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor when the model runs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(made)
    outputs = {output.name for output in made.graph.output}
    names = [name for node in made.graph.node for name in node.output if name and name not in outputs]
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    values = session.run(None, feeds)
    return {output.name: np.shape(value) for output, value in zip(session.get_outputs(), values, strict=True)}


def assert_sizes_hold(made: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, tuple[int | str, ...]]:
    """Every int is the size made, every symbol stands for one size; gives the shapes that were read."""
    read = {name: tuple(tensor.shape) for name, tensor in prepare(made).tensors.items() if tensor.shape is not None}
    sizes: defaultdict[str, set[int]] = defaultdict(set)
    for name, shape in shapes_made(made, feeds).items():
        for size, actual in zip(read.get(name, ()), shape, strict=name in read):
            assert size == actual or isinstance(size, str), f"'{name}' is read as {read[name]} and made as {shape}"
            if isinstance(size, str):
                sizes[size].add(actual)
    assert all(len(values) == 1 for values in sizes.values()), "a symbol stands for several sizes"
    return read


@pytest.mark.parametrize(
    ("network", "size"),
    [
        (lambda: ViT(Attention), (32, 24)),
        (lambda: ViT(Attention, positions=False), (32, 24)),
        (lambda: Swin(FlatBlock, MergeByReshape), (32, 32)),
    ],
    ids=["vit", "vit of any size", "swin"],
)
def test_sizes_that_torch_computes(network, size):
    images = torch.zeros(3, 3, *size)
    made = export(all_drawn(network()), images, dynamic=("batch",))
    read = assert_sizes_hold(made, {"image": images.numpy()})
    tokens = [shape for name, shape in read.items() if name.endswith("norm1/LayerNormalization_output_0")]
    assert tokens and all(isinstance(size, int) for shape in tokens for size in shape[1:])


WEIGHTS = {
    "k": np.array([-1, 6]), "copy": np.array([0, -1]), "minus": np.array([-1]), "ones": np.array([1, 1]),
    "row": drawn(1, 3), "at0": np.array([0]), "at1": np.array([1]), "c": np.array([2]),
    "end": np.array([np.iinfo(np.int64).max]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        (["z = Reshape(x, k)"], None),
        (["z = Reshape(x, copy)"], ("N", 6)),
        (["s = Shape(x)", "z = Expand(row, s)"], ("N", 2, 3)),
        (["n = Shape<end=1>(x)", "v = Concat<axis=0>(n, minus, c)", "z = Reshape(x, v)"], ("N", 3, 2)),
        (["s = Shape(x)", "n = Gather(s, at0)", "v = Concat<axis=0>(n, c, minus)", "z = Reshape(x, v)"], ("N", 2, 3)),
        (["s = Shape(x)", "n = Slice(s, at0, at1)", "v = Concat<axis=0>(minus, n)", "z = Reshape(x, v)"], None),
        (["s = Shape(x)", "n = Slice(s, minus, end)", "v = Concat<axis=0>(minus, n)", "z = Reshape(x, v)"],
         ("(N*2)", 3)),
        (
            ["n = Shape<end=1>(x)", "v = Concat<axis=0>(n, minus)", "e = Equal(v, minus)", "w = Where(e, ones, v)",
             "z = Expand(row, w)"],
            ("N", 3),
        ),
    ],
)  # fmt: skip
def test_sizes_computed_from_the_input(nodes, shape):
    made = model([*nodes, "y = Identity(z)"], {"x": ("N", 2, 3)}, ["y"], WEIGHTS)
    read = assert_sizes_hold(made, {"x": drawn(4, 2, 3)})
    assert shape is None or read["z"] == shape


def test_behind_a_fused_node():
    """ONNX Runtime writes out every default when it saves a model, and ONNX's inference ends at its operators."""
    nodes = [
        'c = com.microsoft.FusedConv<activation="Relu">(x, w)',
        "s = Shape<start=0, end=2>(c)",
        "t = Concat<axis=0>(s, wanted)",
        'y = Resize<mode="linear", keep_aspect_ratio_policy="stretch">(c, , , t)',
    ]
    weights = {"w": drawn(4, 3, 3, 3), "wanted": np.array([12, 10])}
    made = model(nodes, {"x": ["N", 3, 8, 8]}, ["y"], weights)
    read = assert_sizes_hold(made, {"x": drawn(2, 3, 8, 8)})
    assert read["y"] == ("N", 4, 12, 10)
