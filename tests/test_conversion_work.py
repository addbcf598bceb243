"""What a conversion costs: work that grows with the network and no faster; nothing in the file is for nothing."""

import cProfile
import pstats
from collections import Counter

import numpy as np
import onnx
import pytest

import graphgbp
from tests.build import drawn, model, small_cnn
from tests.deep_networks import KINDS


def calls(network: onnx.ModelProto) -> int:
    """How many functions a conversion calls."""
    with cProfile.Profile() as profile:
        graphgbp.convert(network, "guided_gradcam")
    return int(pstats.Stats(profile).total_calls)


@pytest.mark.parametrize("kind", KINDS)
def test_twice_the_nodes_take_twice_the_work(kind):
    graphgbp.convert(KINDS[kind](60), "guided_gradcam")
    first, second, third = (calls(KINDS[kind](count)) for count in (60, 120, 240))
    assert third - second < 2.1 * (second - first)


def appended(network: onnx.ModelProto, *methods: str) -> list[onnx.NodeProto]:
    return list(graphgbp.convert(network, methods).graph.node[len(network.graph.node) :])


NETWORKS = {
    "cnn": small_cnn(["y = Softmax(z)"]),
    "cnn of one size": small_cnn(batch=2),
    **{kind: make(60) for kind, make in KINDS.items()},
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("method", ["saliency", "guided_gradcam", "gradcam_plusplus", "xgradcam"])
def test_every_node_is_needed(network, method):
    converted = graphgbp.convert(network, method)
    needed = {output.name for output in converted.graph.output}
    for node in reversed(converted.graph.node):
        ours = node.name.startswith("graphgbp/")
        assert not ours or needed.intersection(node.output), f"nothing needs {node.name}"
        needed.update(node.input)
    weights = {tensor.name for tensor in converted.graph.initializer} - {x.name for x in network.graph.initializer}
    assert weights <= needed


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_nothing_is_computed_twice(network):
    """Equal nodes, two Casts or Transposes or Reshapes in a row, a Sum of one: none of them is there."""
    nodes = appended(network, *graphgbp.contract.METHODS)
    spelled = [(node.op_type, *node.input, *sorted(str(attribute) for attribute in node.attribute)) for node in nodes]
    public = [spelling for spelling in spelled if spelling[0] != "Identity"]
    assert [spelling for spelling, count in Counter(public).items() if count > 1] == []
    made_by = {name: node for node in nodes for name in node.output}
    for node in nodes:
        before = made_by.get(node.input[0]) if node.input else None
        if node.op_type in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Relu"):
            assert before is None or before.op_type != node.op_type, f"{before.name} and {node.name}"
        assert node.op_type != "Sum" or len(node.input) > 1


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_what_is_known_is_not_computed(network):
    """Arithmetic on numbers is done when converting; on weights it is left to the runtime: they would grow the file."""
    known = {tensor.name for tensor in network.graph.initializer if np.prod(tensor.dims) <= 1}
    converted = graphgbp.convert(network, graphgbp.contract.METHODS)
    known |= {tensor.name for tensor in converted.graph.initializer if tensor.name.startswith("graphgbp/")}
    for node in converted.graph.node[len(network.graph.node) :]:
        repeats = node.op_type == "Expand"  # of one number: written out it would take more room
        assert repeats or not known.issuperset(filter(None, node.input)), f"{node.name} computes a constant"


def test_no_shape_is_read_where_sizes_are_known():
    nodes = appended(small_cnn(batch=2), *graphgbp.contract.METHODS)
    made_of_target = {"target"}
    for node in nodes:
        if made_of_target.intersection(node.input):
            made_of_target.update(node.output)
    shapes = [node.name for node in nodes if node.op_type in ("Shape", "Size") and node.input[0] not in made_of_target]
    assert shapes == []


def test_the_gradient_of_a_cam_ends_at_its_layer():
    """Nodes that stand for layers before the target layer are only those of the map that goes on to the image."""
    network = KINDS["residual"](60)
    at = [node.output[0] for node in network.graph.node].index("s9")
    before = {node.output[0] for node in network.graph.node[: at + 1]}
    made = graphgbp.convert(network, "gradcam", target_layer="s9").graph.node[len(network.graph.node) :]
    assert {name for node in made for name in node.input} & before == {"s9"}


def test_maps_share_what_is_the_same():
    """Above the last ReLU the guided and the plain gradient are equal."""
    network = small_cnn()
    head = {"MatMul", "Gemm"}
    products = [node for node in appended(network, "guided_backprop", "saliency", "gradcam") if node.op_type in head]
    assert len(products) == 1


def test_weights_are_not_copied():
    weight = drawn(64, 64, 3, 3)
    network = model(
        ["a = Conv<pads=[1, 1, 1, 1]>(x, w)", "r = Relu(a)", "p = GlobalAveragePool(r)", "y = Flatten(p)"],
        {"x": ("N", 64, 8, 8)},
        ["y"],
        {"w": weight},
    )
    grown = graphgbp.convert(network, "guided_backprop").ByteSize() - network.ByteSize()
    assert grown < weight.nbytes / 8
