"""Scores per pixel: which pixels count, by default and by a mask."""

import numpy as np
import pytest
import torch
from torch import nn

import graphgbp
from graphgbp.model_file import read_manifest
from tests.build import drawn, model
from tests.maps import assert_maps_equal, explain
from tests.networks import export
from tests.rules.harness import run
from tests.scores import per_pixel

IMAGES = drawn(3, 3, 8, 8, seed=9)


def torch_scores(proto, x):
    """The scores of `per_pixel` by torch."""
    w1, w2 = (torch.from_numpy(np.array(graph_tensor(proto, name))) for name in ("w1", "w2"))
    return torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, w1, padding=1).relu(), w2)


def graph_tensor(proto, name):
    from onnx import numpy_helper

    return numpy_helper.to_array(next(tensor for tensor in proto.graph.initializer if tensor.name == name))


def expected(proto, targets, weights_of):
    """Saliency and S, where weights_of(z) gives each image's [N, H, W] weights of its target."""
    x = torch.from_numpy(IMAGES).requires_grad_()
    z = torch_scores(proto, x)
    own = z.argmax(1)
    chosen = torch.stack([own[n] if t == -1 else torch.full_like(own[n], t) for n, t in enumerate(targets)])
    terms = z.gather(1, chosen[:, None])[:, 0] * weights_of(own, chosen)
    score = terms.sum((1, 2))
    score.sum().backward()
    return x.grad.numpy(), score.detach().numpy()


@pytest.mark.parametrize("size", [8, "S"])
@pytest.mark.parametrize("targets", [[0, 1, -1], [1, 1, 1]])
def test_by_default_the_pixels_predicted_as_the_class_count(size, targets):
    proto = per_pixel(size)
    saliency, score = expected(proto, targets, lambda own, chosen: (own == chosen).float())
    explainer = graphgbp.Explainer(proto, ["saliency"], device="cpu")
    got = explainer.explain(IMAGES, targets)
    np.testing.assert_allclose(got.saliency, saliency, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.target_score, score, rtol=1e-5)
    assert got.target_class.tolist() == targets
    raw = {"x": IMAGES, "target": np.array(targets), "target_mask": np.full((1, 1, 1), -1, np.float32)}
    np.testing.assert_array_equal(run(graphgbp.convert(proto, ["saliency"]), raw)["saliency"], got.saliency)
    optional = run(graphgbp.convert(proto, ["saliency"], target="optional"), {"x": IMAGES})
    assert (optional["target_class"] == -1).all()


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 8), (1, 8, 8), (1, 1), (3, 1, 8)])
def test_a_mask_says_which_pixels_count(shape):
    proto = per_pixel()
    mask = np.abs(drawn(*shape, seed=3))
    whole = torch.from_numpy(np.broadcast_to(mask, (3, 8, 8)).copy())
    saliency, score = expected(proto, [0, 1, -1], lambda own, chosen: whole)
    got = graphgbp.Explainer(proto, ["saliency"], device="cpu", batch_size=2).explain(IMAGES, [0, 1, -1], mask=mask)
    np.testing.assert_allclose(got.saliency, saliency, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.target_score, score, rtol=1e-4)


def test_a_mask_may_leave_pixels_to_the_prediction():
    proto = per_pixel()
    mask = np.zeros((8, 8), np.float32)
    mask[:4] = -1
    upper = torch.zeros(8, 8)
    upper[:4] = 1
    saliency, _ = expected(proto, [1, 1, 0], lambda own, chosen: (own == chosen).float() * upper)
    got = graphgbp.Explainer(proto, ["saliency"], device="cpu").explain(IMAGES, [1, 1, 0], mask=mask)
    np.testing.assert_allclose(got.saliency, saliency, rtol=1e-4, atol=1e-6)
    assert np.abs(saliency).max() > 0.01


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((7, 8)), r"shape \[1, 7, 8\]; give \[3, 8, 8\]"),
        (np.ones((2, 8, 8)), r"shape \[2, 8, 8\]"),
        (np.full((8, 8), -2), "negative weight"),
        (np.full((8, 8), np.nan), "NaN"),
        ("mask", "must be an array of numbers"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, words):
    with pytest.raises(graphgbp.TargetError, match=words):
        graphgbp.Explainer(per_pixel(), ["saliency"], device="cpu").explain(IMAGES, 1, mask=mask)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 7, 8), (3, 8, 4)])
def test_a_mask_of_another_size_fails_in_the_file_itself(shape):
    explained = graphgbp.convert(per_pixel("S"), ["saliency"])
    with pytest.raises(Exception, match=r"mask_of_other_size|[Bb]roadcast"):
        run(explained, {"x": IMAGES, "target": np.array([1]), "target_mask": np.ones(shape, np.float32)})


def test_a_model_without_pixels_takes_no_mask():
    classifier = model(["f = Flatten(x)", "y = MatMul(f, w)"], {"x": ("N", 3, 8, 8)}, ["y"], {"w": drawn(192, 4)})
    with pytest.raises(graphgbp.RequestError, match="the file takes none"):
        graphgbp.Explainer(classifier, ["saliency"], device="cpu").explain(IMAGES, 1, mask=np.ones((8, 8)))


@pytest.mark.parametrize("tail", ["y = Sigmoid(z)", "y = Identity(z)"])
@pytest.mark.parametrize("target", [0, 1, -1])
def test_foreground_and_background_in_one_score(tail, target):
    weights = {"w": drawn(1, 3, 1, 1, seed=5)}
    proto = model(["z = Conv(x, w)", tail], {"x": ("N", 3, 8, 8)}, ["y"], weights)
    got = graphgbp.Explainer(proto, ["saliency"], device="cpu").explain(IMAGES, target)
    x = torch.from_numpy(IMAGES).requires_grad_()
    z = torch.nn.functional.conv2d(x, torch.from_numpy(weights["w"]))
    both = torch.cat([-z, z], 1)
    own = both.argmax(1)
    chosen = own if target == -1 else torch.full_like(own, target)
    terms = both.gather(1, chosen[:, None])[:, 0] * (own == chosen)
    terms.sum().backward()
    np.testing.assert_allclose(got.saliency, x.grad.numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.target_score, terms.sum((1, 2)).detach().numpy(), rtol=1e-4)


def test_channels_last_with_a_softmax():
    nodes = ["t = Transpose<perm=[0,3,1,2]>(x)", "c = Conv(t, w)", "z = Transpose<perm=[0,2,3,1]>(c)"]
    weights = {"w": drawn(4, 3, 1, 1, seed=5)}
    images = IMAGES.transpose(0, 2, 3, 1)
    for tail in ("y = Softmax<axis=-1>(z)", "y = Identity(z)"):
        proto = model([*nodes, tail], {"x": ("N", 8, 8, 3)}, ["y"], weights)
        got = graphgbp.Explainer(proto, ["saliency"], device="cpu").explain(images, 2, mask=np.ones((8, 8)))
        expected = np.broadcast_to(weights["w"][2, :, 0, 0], images.shape)
        np.testing.assert_allclose(got.saliency, expected, rtol=1e-5)


def test_guided_maps_and_gradcam_of_a_segmentation():
    """Against own hooks: the guided rule at the one ReLU, and Grad-CAM at its output."""
    proto = per_pixel()
    got = graphgbp.Explainer(proto, device="cpu").explain(IMAGES, 1)
    x = torch.from_numpy(IMAGES).requires_grad_()
    w1, w2 = (torch.from_numpy(np.array(graph_tensor(proto, name))) for name in ("w1", "w2"))
    a = torch.nn.functional.conv2d(x, w1, padding=1)
    r = a.relu()
    z = torch.nn.functional.conv2d(r, w2)
    (z[:, 1] * (z.argmax(1) == 1)).sum().backward(retain_graph=True, inputs=[x])
    (dr,) = torch.autograd.grad((z[:, 1] * (z.argmax(1) == 1)).sum(), r, retain_graph=True)
    (guided,) = torch.autograd.grad(a, x, dr.relu() * (a > 0))
    cam = (dr.mean((2, 3), keepdim=True) * r).sum(1, keepdim=True).relu()
    np.testing.assert_allclose(got.guided_backprop, guided.numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.gradcam, cam.detach().numpy(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.guided_gradcam, (guided * cam).detach().numpy(), rtol=1e-4, atol=1e-6)
    assert got.gradcam.max() > 0


class Segmenter(nn.Module):
    """Features, a score for each class by a convolution of 1x1, and what brings them to the image's size."""

    def __init__(self, classes, tail):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Sequential(nn.Dropout(), nn.Conv2d(8, classes, 1))
        self.tail = tail
        self.up = nn.ConvTranspose2d(classes, classes, 4, 2, 1, groups=classes)

    def forward(self, x):
        return self.tail(self.head(self.body(x)), self.up)


def larger(z, up):
    return torch.nn.functional.interpolate(z, scale_factor=2.0, mode="bilinear")


TAILS = {
    "as in FCN and DeepLab": (4, larger),
    "channels last": (4, lambda z, up: larger(z, up).permute(0, 2, 3, 1)),
    "transposed convolution of each class": (4, lambda z, up: up(z)),
    "one score for two classes": (1, larger),
    "pooled, as in SqueezeNet": (4, lambda z, up: z.relu().mean((2, 3))),
}


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
@pytest.mark.parametrize("tail", TAILS)
def test_auto_goes_behind_the_scores_themselves(tail, exporter):
    """Against torch's hooks at the features; at the scores Grad-CAM is theirs and no more."""
    torch.manual_seed(2)
    classes, finish = TAILS[tail]
    net, x, target = Segmenter(classes, finish).eval(), torch.from_numpy(IMAGES), 1
    softened = nn.Sequential(net, nn.Softmax(-1)).eval() if tail == "channels last" else net
    seen = []
    net.body.register_forward_hook(lambda module, inputs, output: seen.append(output))
    z = net(x)
    scores = z[..., target] if tail == "channels last" else z[:, target % classes]
    (gradient,) = torch.autograd.grad(scores.sum(), seen[0])
    cam = (gradient.mean((2, 3), keepdim=True) * seen[0]).sum(1, keepdim=True)
    expected = torch.nn.functional.interpolate(cam.relu(), (8, 8), mode="bilinear").detach()
    proto = export(softened, x, exporter, dynamic=("batch",))
    got = explain(proto, IMAGES, np.array([target]), ["gradcam"])
    assert_maps_equal(got, {"gradcam": expected.numpy()}, tail)
    (layer,) = read_manifest(graphgbp.convert(proto, ["gradcam"])).target_layers
    assert layer["op"] == "Relu" and "behind it the channels are the classes" in layer["reason"]
