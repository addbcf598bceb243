"""CAMs along one, two and three directions, and the mean over layers, against torch and numpy."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

import graphgbp
from graphgbp import contract
from graphgbp.analysis import Analysis
from graphgbp.kernels import missing_kernels
from graphgbp.prepare import prepare
from tests.build import drawn, model, small_cnn
from tests.maps import assert_maps_equal
from tests.oracles import cams_of
from tests.rules.harness import run

LAYOUTS = {1: ("NCW", "NWC"), 2: ("NCHW", "NHWC"), 3: ("NCDHW", "NDHWC")}
SIZES = (9, 11, 7)
LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def network(directions: int, last: bool = False, opset: int = 18, open_sizes: bool = False) -> onnx.ModelProto:
    """Two convolutions and a mean; a network whose channels stand last is transposed first, as TensorFlow's are."""
    sizes = ["N", *(f"S{d}" if open_sizes else SIZES[d] for d in range(directions))]
    shape = [*sizes, 3] if last else [sizes[0], 3, *sizes[1:]]
    perm = [0, directions + 1, *range(1, directions + 1)]
    pads = [1] * (2 * directions)
    nodes = [
        f"t = Transpose<perm={perm}>(x)" if last else "t = Identity(x)",
        f"a = Conv<pads={pads}>(t, w)",
        "r = Relu(a)",
        f"b = Conv<pads={pads}, strides={[2] * directions}>(r, v)",
        "q = Relu(b)",
        "p = GlobalAveragePool(q)",
        "f = Flatten(p)",
        "y = MatMul(f, h)",
    ]
    kernel = [3] * directions
    weights = {
        "w": drawn(4, 3, *kernel, scale=0.4),
        "v": drawn(6, 4, *kernel, seed=1, scale=0.4),
        "h": drawn(6, 5, seed=2),
    }
    return model(nodes, {"x": shape}, ["y"], weights, opset=opset)


def enlarged(got: dict[str, np.ndarray], size: tuple[int, ...], mode: str) -> dict[str, np.ndarray]:
    """The CAM family of the features and gradients that are put out, in torch."""
    cams = cams_of(*(torch.from_numpy(got[name]).double() for name in contract.LAYER_OUTPUTS))
    options = {} if mode == "nearest" else {"align_corners": False}
    return {method: F.interpolate(cam, size, mode=mode, **options).numpy() for method, cam in cams.items()}


@pytest.mark.parametrize("opset", [16, 18])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
@pytest.mark.parametrize("directions", [1, 2, 3])
def test_maps_of_sequences_pictures_and_volumes(directions, last, mode, opset):
    made = network(directions, last, opset)
    assert Analysis(prepare(made)).image.layout == LAYOUTS[directions][last]
    size = SIZES[:directions]
    x = drawn(2, 3, *size, seed=4)
    feeds = {"x": np.moveaxis(x, 1, -1) if last else x, "target": np.array([3, 1])}
    got = run(graphgbp.convert(made, contract.CAMS, interpolate_mode=mode, relu_attributions=False), feeds)
    expected = enlarged(got, size, LINEAR[directions] if mode == "bilinear" else mode)
    for method, cam in expected.items():
        assert got[method].shape == ((2, *size, 1) if last else (2, 1, *size))
        expected[method] = np.moveaxis(cam, 1, -1) if last else cam
    assert_maps_equal(got, expected, f"{directions} {mode}")
    assert (got["gradcam"] < 0).any() and (got["hirescam"] < 0).any()


@pytest.mark.parametrize("provider", ["CPUExecutionProvider", "CUDAExecutionProvider"])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("directions", [1, 2, 3])
def test_what_is_appended_has_kernels(directions, mode, provider):
    source = network(directions, open_sizes=True)
    made = graphgbp.convert(source, contract.CAMS, interpolate_mode=mode)
    assert not missing_kernels(provider, made, list(made.graph.node[len(source.graph.node) :]))


@pytest.mark.parametrize("directions", [1, 3])
def test_open_sizes(directions):
    made = graphgbp.convert(network(directions, open_sizes=True), contract.LAYER_METHODS, relu_attributions=False)
    for size in (SIZES, tuple(2 * size for size in SIZES)):
        got = run(made, {"x": drawn(2, 3, *size[:directions], seed=5), "target": np.array([2])})
        assert_maps_equal(got, enlarged(got, size[:directions], LINEAR[directions]), str(size))
        assert got["guided_gradcam"].shape == (2, 3, *size[:directions])


def test_a_sequence_that_a_network_for_pictures_reads():
    """Keras's Conv1D: an axis of size 1 is put in before the convolution and taken out behind it."""
    weights = {"w": drawn(4, 3, 1, 3, scale=0.4), "h": drawn(4, 5, seed=2), "at": np.array([2]), "axes": np.array([2])}
    nodes = [
        "t = Transpose<perm=[0,2,1]>(x)",
        "u = Unsqueeze(t, at)",
        "a = Conv<pads=[0,1,0,1]>(u, w)",
        "r = Relu(a)",
        "s = Squeeze(r, at)",
        "m = ReduceMean<keepdims=0>(s, axes)",
        "y = MatMul(m, h)",
    ]
    made = model(nodes, {"x": ("N", 9, 3)}, ["y"], weights)
    search = Analysis(prepare(made))
    assert search.image.layout == "NWC" and search.layer("s").layout.sizes == [9]
    feeds = {"x": drawn(2, 9, 3), "target": np.array([1])}
    behind, before = (
        run(graphgbp.convert(made, ["gradcam"], target_layer=layer, relu_attributions=False), feeds)
        for layer in ("s", "r")
    )
    assert behind["gradcam"].shape == (2, 9, 1)
    assert_maps_equal(before, {"gradcam": behind["gradcam"]}, "the axis of size 1 counts for nothing")


def test_an_input_that_is_no_image_has_no_gradcam():
    made = model(["y = MatMul(x, h)"], {"x": ("N", 6, 4)}, ["y"], {"h": drawn(4, 5)})
    with pytest.raises(graphgbp.RequestError, match="no spatial tensor"):
        graphgbp.convert(made, ["gradcam"])


def test_a_layer_along_other_directions_than_the_image_is_refused():
    """A recording read as a picture, its columns then as a sequence."""
    nodes = [
        "a = Conv<pads=[1,1,1,1]>(x, w)",
        "m = ReduceMean<keepdims=0>(a, axes)",
        "s = Conv<pads=[1,1]>(m, v)",
        "p = GlobalAveragePool(s)",
        "f = Flatten(p)",
        "y = MatMul(f, h)",
    ]
    weights = {"w": drawn(4, 3, 3, 3), "v": drawn(6, 4, 3, seed=1), "h": drawn(6, 5, seed=2), "axes": np.array([2])}
    made = model(nodes, {"x": ("N", 3, 8, 8)}, ["y"], weights)
    with pytest.raises(graphgbp.RequestError, match=r"'s' .* along 1 axes, input 'x' .* along 2"):
        graphgbp.convert(made, ["gradcam"])
    graphgbp.convert(made, ["gradcam"], target_layer="a")


def scaled(cams: np.ndarray) -> np.ndarray:
    """Each image's map from 0 to 1, as pytorch-grad-cam scales it."""
    above = cams - cams.min((1, 2, 3), keepdims=True)
    return above / (1e-7 + above.max((1, 2, 3), keepdims=True))


@pytest.mark.parametrize("size", [8, 21])
def test_the_mean_over_layers_is_pytorch_grad_cams(size):
    """Per layer: ReLU, scaled, enlarged; then the mean, scaled again."""
    made, layers = small_cnn(size=size), ["r1", "b", "r2"]
    feeds = {"x": drawn(3, 3, size, size), "target": np.array([1])}
    each = run(graphgbp.convert(made, ["gradcam"], target_layer=layers), feeds)
    enlarged_cams = {method: [] for method in contract.CAMS}
    for layer in layers:
        values = (torch.from_numpy(each[f"{name}/{layer}"]).double() for name in contract.LAYER_OUTPUTS)
        for method, cam in cams_of(*values).items():
            cam = torch.from_numpy(scaled(cam.relu().numpy()))
            cam = F.interpolate(cam, (size, size), mode="bilinear", align_corners=False).numpy()
            enlarged_cams[method].append(cam)
    got = run(graphgbp.convert(made, contract.LAYER_METHODS, target_layer=layers, aggregate="mean"), feeds)
    for method, cams in enlarged_cams.items():
        np.testing.assert_allclose(got[method], scaled(np.mean(cams, axis=0)), atol=1e-5, err_msg=method)
    guided = run(graphgbp.convert(made, ["guided_backprop"]), feeds)["guided_backprop"]
    np.testing.assert_allclose(got["guided_gradcam"], guided * got["gradcam"], rtol=1e-4, atol=1e-6)
