"""The code in the documents runs as printed."""

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from tests.build import drawn, model, small_cnn
from tests.scores import per_pixel

DOCS = Path(__file__).parent.parent / "docs"


def detector() -> onnx.ModelProto:
    """Boxes [N, 16, 4] and scores [N, 16, 3] of a grid."""
    nodes = [
        "a = Conv<strides=[2,2], pads=[1,1,1,1]>(x, w)", "r = Relu(a)",
        "b = Conv(r, wb)", "bt = Transpose<perm=[0,2,3,1]>(b)", "boxes = Reshape(bt, four)",
        "s = Conv(r, ws)", "st = Transpose<perm=[0,2,3,1]>(s)", "sr = Reshape(st, three)", "scores = Sigmoid(sr)",
    ]  # fmt: skip
    weights = {"w": drawn(6, 3, 3, 3, seed=1), "wb": drawn(4, 6, 1, 1, seed=2), "ws": drawn(3, 6, 1, 1, seed=3)}
    weights |= {"four": np.array([0, -1, 4]), "three": np.array([0, -1, 3])}
    return model(nodes, {"x": ("N", 3, 8, 8)}, ["boxes", "scores"], weights)


def embedder() -> onnx.ModelProto:
    nodes = ["f = Flatten(x)", "h = MatMul(f, w)", "r = Relu(h)", "embedding = LpNormalization<axis=1>(r)"]
    return model(nodes, {"x": ("N", 3, 8, 8)}, ["embedding"], {"w": drawn(192, 16, scale=0.1)})


def stereo() -> onnx.ModelProto:
    nodes = ["a = Conv(left, w)", "b = Conv(right, w)", "s = Mul(a, b)", "p = GlobalAveragePool(s)", "y = Flatten(p)"]
    inputs = {"left": ("N", 3, 8, 8), "right": ("N", 3, 8, 8)}
    return model(nodes, inputs, ["y"], {"w": drawn(5, 3, 3, 3)})


@pytest.mark.parametrize("name", ["targets.md", "folders.md"])
def test_python_as_printed(name, tmp_path, monkeypatch):
    models = {"classifier": small_cnn(), "segmenter": per_pixel(), "detector": detector(), "embedder": embedder()}
    for stem, proto in {**models, "stereo": stereo()}.items():
        onnx.save(proto, tmp_path / f"{stem}.onnx")
    recipe = {"channels": "RGB", "resize": 8, "crop": 8, "mean": [127] * 3, "std": [128] * 3}
    (tmp_path / "classifier.recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "photos").mkdir()
    for n in range(5):
        Image.new("RGB", (9, 12), (n, 2 * n, 255)).save(tmp_path / "photos" / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    known = {"images": drawn(2, 3, 8, 8, seed=5)}
    pieces = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.S)
    assert pieces
    for piece in pieces:
        exec(compile(piece, name, "exec"), known)
