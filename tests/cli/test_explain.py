import json
import shutil
import sys

import numpy as np
import onnx
import pytest
from PIL import Image

from graphgbp import Explainer, Recipe
from graphgbp.panel import STYLES
from graphgbp.recipe import PRESETS, ImageInput
from tests.build import drawn, model, small_cnn
from tests.cli.conftest import CLASSES, ROOT, refused

SPEC = ImageInput.from_shape("x", ["N", 3, 8, 8])


def explain(run, *arguments):
    return run("explain", "model.onnx", *arguments, "--device", "cpu", "-o", "out")


def read_index(folder):
    return json.loads((folder / "out" / "index.json").read_text(encoding="utf-8"))


def written(folder):
    return {path.name for path in (folder / "out").iterdir()}


def test_explains_the_predicted_class(run, folder):
    result = explain(run, "photo.png")
    assert result.exit_code == 0 and result.stderr == ""
    assert written(folder) == {"photo.png", "photo.npz", "index.json"}
    array, _ = Recipe.load("model.recipe.json").prepare("photo.png", SPEC)
    expected = Explainer("model.onnx", device="cpu").explain(array)
    with np.load(folder / "out" / "photo.npz") as arrays:
        for method, values in expected.maps.items():
            np.testing.assert_array_equal(arrays[method], values[0])
    (entry,) = read_index(folder)["images"]
    best = int(expected.target_class[0])
    assert (entry["class"], entry["class_name"], entry["file"]) == (best, CLASSES[best], "photo.png")
    first = next(line for line in result.stdout.splitlines() if "photo.png" in line)
    assert f"{best} {CLASSES[best]}" in first and f"{expected.outputs['y'].max():.3f}" in first
    for words in ("probability", "1 panel with arrays (.npz)", "index.json, in out", "model.recipe.json", "cpu"):
        assert words in result.stdout


@pytest.mark.parametrize(("given", "index"), [("2", 2), ("Tench", 0), ("-1", None)])
def test_a_class_by_index_or_name(run, folder, given, index):
    explain(run, "photo.png", "--class", given)
    (entry,) = read_index(folder)["images"]
    assert entry["class"] == (entry["top"][0]["class"] if index is None else index)


def test_the_highest_classes(run, folder):
    shutil.copy("photo.png", "other.png")
    result = explain(run, "photo.png", "other.png", "--top", "2", "--methods", "saliency")
    assert result.exit_code == 0
    entries = read_index(folder)["images"]
    assert [entry["name"] for entry in entries] == ["photo-top1", "photo-top2", "other-top1", "other-top2"]
    array, _ = Recipe.load("model.recipe.json").prepare("photo.png", SPEC)
    explainer = Explainer("model.onnx", ["saliency"], device="cpu")
    ranking = [ranked.class_index for ranked in explainer.explain(array).top(2)[0]]
    assert [entry["class"] for entry in entries] == ranking * 2
    for rank, index in enumerate(ranking, start=1):
        with np.load(folder / "out" / f"other-top{rank}.npz") as arrays:
            np.testing.assert_array_equal(arrays["saliency"], explainer.explain(array, index).saliency[0])
    assert [line.split()[-1] for line in result.stdout.splitlines() if "-top" in line] == [
        "photo-top1.png",
        "photo-top2.png",
        "other-top1.png",
        "other-top2.png",
    ]


def test_more_classes_than_there_are(run, folder):
    found = run("explain", "model.onnx", "photo.png", "--top", "9", "--methods", "saliency", "-o", "out")
    refused(found, 5, "--top 9", "has: 5")
    assert not (folder / "out").exists()


def test_a_folder_in_batches_with_names_of_their_own(run, folder):
    (folder / "photos").mkdir()
    for name in ("b.jpg", "a.png", "a.bmp"):
        Image.open("photo.png").convert("RGB").save(folder / "photos" / name)
    (folder / "photos" / "notes.txt").touch()
    result = explain(run, "photos", "photo.png", "photo.png", "--batch-size", "2", "--methods", "saliency")
    assert result.exit_code == 0, result.stderr
    entries = read_index(folder)["images"]
    assert [entry["name"] for entry in entries] == ["a", "a-2", "b", "photo"]
    assert entries[0]["file"].endswith("a.bmp") and entries[1]["file"].endswith("a.png")


def test_json_is_one_document(run, folder):
    result = explain(run, "photo.png", "--json")
    document = json.loads(result.stdout)
    assert document["images"] == read_index(folder)["images"] and document["device"] == "cpu"
    assert document["preprocessing"] == "model.recipe.json" and result.stderr == ""


def test_preprocessing(run, folder):
    images = {}
    for preprocess in (*PRESETS, "model.recipe.json"):
        assert explain(run, "photo.png", "--preprocess", preprocess, "--force").exit_code == 0
        with np.load(folder / "out" / "photo.npz") as arrays:
            images[preprocess] = arrays["outputs/y"].tolist()
        assert read_index(folder)["images"][0]["class_name"] in CLASSES, "names come from the recipe beside the model"
    assert len({tuple(values) for values in images.values()}) >= len(PRESETS)


def test_without_a_recipe_a_warning(run, folder):
    (folder / "model.recipe.json").unlink()
    result = explain(run, "photo.png")
    assert result.exit_code == 0
    assert result.stderr.startswith("warning: nothing says how photos become the input of 'model.onnx'")
    assert "'unit'" in result.stderr and "--preprocess imagenet|unit" in result.stderr
    assert read_index(folder)["images"][0]["class_name"] is None
    result = explain(run, "photo.png", "--force", "--json", "--classes", "names.txt")
    assert json.loads(result.stdout)["preprocessing"] == "unit" and result.stderr.startswith("warning")
    assert json.loads(result.stdout)["images"][0]["class_name"] in CLASSES


def test_a_converted_model_finds_its_recipe(run, folder):
    run("convert", "model.onnx", "-o", "model.explained.onnx", "--methods", "gradcam")
    result = run("explain", "model.explained.onnx", "photo.png", "-o", "out", "--device", "cpu")
    assert result.exit_code == 0 and result.stderr == "" and "model.recipe.json" in result.stdout
    assert read_index(folder)["methods"] == ["gradcam"]


def test_the_words_in_the_options_are_the_librarys():
    command = sys.modules["graphgbp.cli.explain"]
    assert (command.STYLES, command.PRESETS) == (STYLES, PRESETS)


def test_an_existing_output_needs_force(run, folder):
    explain(run, "photo.png")
    before = (folder / "out" / "photo.png").stat().st_mtime_ns
    refused(explain(run, "photo.png"), 8, "already exist", "--force")
    assert (folder / "out" / "photo.png").stat().st_mtime_ns == before
    assert explain(run, "photo.png", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.png"], 6, ["no photo 'none.png'"]),
        (["names.txt"], 6, ["'names.txt' is not an image"]),
        (["photo.png", "names.txt"], 6, ["'names.txt' is not an image"]),
        (["empty"], 6, ["no photo in the folder 'empty'"]),
        (["photo.png", "--class", "crane"], 5, ["may be class 1 and 3"]),
        (["photo.png", "--class", "dog"], 5, ["no class is named 'dog'"]),
        (["photo.png", "--class", "5"], 5, ["5"]),
        (["photo.png", "--class", "-2"], 5, ["-2"]),
        (["photo.png", "--layer", "r3"], 5, ["r3"]),
        (["photo.png", "--methods", "smoothgrad"], 5, ["smoothgrad"]),
        (["photo.png", "--device", "tpu"], 7, ["tpu"]),
        (["photo.png", "--preprocess", "none.json"], 5, ["no recipe file 'none.json'", "imagenet"]),
        (["photo.png", "--preprocess", "names.txt"], 5, ["'names.txt' is not JSON"]),
        (["photo.png", "--preprocess", "large.json"], 6, ["8 x 8", "'photo.png' 4 x 4"]),
        (["photo.png", "--preprocess", "grey.json"], 6, ["3 channel(s)", "makes 1 (L)"]),
        (["photo.png", "--classes", "few.txt"], 5, ["'few.txt' names 1 classes, and the model has 5"]),
        (["photo.png", "--classes", "none.txt"], 5, ["none.txt"]),
    ],
)
def test_refused_with_one_line_and_nothing_written(run, folder, arguments, code, words):
    (folder / "empty").mkdir()
    (folder / "few.txt").write_text("one")
    (folder / "large.json").write_text('{"channels": "RGB", "resize": [4, 4], "mean": [0, 0, 0], "std": [1, 1, 1]}')
    (folder / "grey.json").write_text('{"channels": "L", "resize": [8, 8], "mean": [0], "std": [1]}')
    device = [] if "--device" in arguments else ["--device", "cpu"]
    refused(run("explain", "model.onnx", *arguments, *device, "-o", "out"), code, *words)
    assert not (folder / "out").exists()


def test_a_layout_that_only_the_operators_tell(run, folder):
    onnx.save(small_cnn(size=3), folder / "model.onnx")
    assert explain(run, "photo.png", "--preprocess", "unit").exit_code == 0


def test_a_model_that_takes_no_photo_is_refused(run, folder):
    nodes = ["y = Gemm(x, w)"]
    onnx.save(model(nodes, {"x": ["N", 12]}, ["y"], {"w": drawn(12, 3)}), folder / "model.onnx")
    refused(explain(run, "photo.png", "--methods", "saliency"), 6, "'x'", "[N, 12]", "no batch of images")
    nodes = ["r = Relu(x)", "f = Flatten(r)", "y = MatMul(f, w)"]
    onnx.save(model(nodes, {"x": ["N", 3, 8, 3]}, ["y"], {"w": drawn(72, 2)}), folder / "model.onnx")
    refused(explain(run, "photo.png", "--methods", "saliency"), 6, "[N, 3, 8, 3]", "could be channels")


def test_class_and_top_exclude_each_other(run, folder):
    result = explain(run, "photo.png", "--class", "1", "--top", "2")
    assert result.exit_code == 2 and "exclude each other" in result.stderr


def test_an_output_that_is_a_file(run, folder):
    (folder / "out").touch()
    refused(explain(run, "photo.png"), 8, "'out' is a file")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions")
def test_a_folder_closed_to_us(run, folder, monkeypatch):
    def closed(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", closed)
    refused(explain(run, "photo.png"), 8, "cannot write 'out/photo.png': Permission denied")
    assert not list((folder / "out").iterdir())


def test_the_demo(spawn, tmp_path):
    """An espresso is seen in a cup of coffee."""
    models = ROOT / "models"
    done = spawn("explain", f"{models}/efficientnet_lite0.onnx", f"{models}/coffee.png", "-o", f"{tmp_path}/demo")
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "coffee.png" in line)
    assert "967 espresso" in first
    with Image.open(tmp_path / "demo" / "coffee.png") as panel:
        assert panel.width == 2067
