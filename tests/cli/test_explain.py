import json
import shutil
import signal
import sys
import threading
import weakref
from functools import partial

import numpy as np
import onnx
import pytest
from PIL import Image

from graphgbp import Explainer, Recipe, picture
from graphgbp.ahead import ahead as original_ahead
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


def test_one_photo_that_cannot_be_read_among_many(run, folder):
    """It is named, and what stands before its batch is written whole."""
    photos = many(folder, 9)
    content = photos[5].read_bytes()
    photos[5].write_bytes(content[: len(content) // 2])
    found = explain(run, "photos", "--batch-size", "2", "--methods", "saliency")
    refused(found, 6, f"cannot read the image '{photos[5].relative_to(folder)}'")
    assert written(folder) == {f"{n}.{suffix}" for n in range(4) for suffix in ("png", "npz")}


def many(folder, count):
    """A folder of photos named 0, 1, ..., each different."""
    (folder / "photos").mkdir()
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{n}.png")
    return sorted((folder / "photos").iterdir())


def test_files_do_not_depend_on_the_threads(run, folder, monkeypatch):
    """One after the other, nothing ahead: the same bytes."""
    many(folder, 7)
    found = []
    for out, (limit, threads) in {"behind": (6, 3), "serial": (0, 1)}.items():
        slow = partial(every_ahead, limit=limit, threads=threads)
        monkeypatch.setattr("graphgbp.ahead.ahead", slow)
        monkeypatch.setattr("graphgbp.recipe.ahead", slow)
        options = ("--batch-size", "2", "--methods", "gradcam,saliency", "--top", "2", "--device", "cpu")
        found.append(run("explain", "model.onnx", "photos", *options, "-o", out).stdout.replace(out, "out"))
    names = [path.name for path in sorted((folder / "serial").iterdir())]
    assert len(names) == 2 * 2 * 7 + 1 and found[0] == found[1]
    for name in names:
        assert (folder / "serial" / name).read_bytes() == (folder / "behind" / name).read_bytes(), name


def every_ahead(work, items, *, limit, threads, **given):
    return original_ahead(work, items, limit=limit, threads=threads)


def test_photos_are_read_ahead_and_panels_drawn_behind_the_run(run, folder, monkeypatch):
    """While the model runs the second batch, the third is read and the first is written."""
    many(folder, 6)
    read, drawn_, runs = [threading.Event() for _ in range(6)], [threading.Event() for _ in range(6)], []
    prepare, write, explain_ = Recipe.prepare, picture.Album.write, Explainer.explain

    def noted_prepare(self, photo, spec):
        found = prepare(self, photo, spec)
        read[int(photo.stem)].set()
        return found

    def noted_write(self, page):
        entry = write(self, page)
        drawn_[int(page.name)].set()
        return entry

    def noted_explain(self, images, *rest):
        runs.append(len(images))
        for event in [*read[: 2 * len(runs) + 2], *drawn_[: 2 * len(runs) - 2]]:
            assert event.wait(30), "the run waits for what should be under way"
        return explain_(self, images, *rest)

    monkeypatch.setattr(Recipe, "prepare", noted_prepare)
    monkeypatch.setattr(picture.Album, "write", noted_write)
    monkeypatch.setattr(Explainer, "explain", noted_explain)
    assert explain(run, "photos", "--batch-size", "2", "--methods", "saliency").exit_code == 0
    assert runs == [2, 2, 2]


def test_how_many_images_are_held_does_not_grow(run, folder, monkeypatch):
    many(folder, 60)
    photos, results, most = [], [], {"photos": 0, "results": 0}
    prepare, explain_ = Recipe.prepare, Explainer.explain

    def count():
        for kind, refs in (("photos", photos), ("results", results)):
            most[kind] = max(most[kind], sum(ref() is not None for ref in list(refs)))

    def counted_prepare(self, photo, spec):
        image, seen = prepare(self, photo, spec)
        photos.append(weakref.ref(seen))
        count()
        return image, seen

    def counted_explain(self, images, *rest):
        result = explain_(self, images, *rest)
        results.append(weakref.ref(result))
        count()
        return result

    monkeypatch.setattr(Recipe, "prepare", counted_prepare)
    monkeypatch.setattr(Explainer, "explain", counted_explain)
    assert explain(run, "photos", "--batch-size", "2", "--methods", "saliency").exit_code == 0
    assert len(read_index(folder)["images"]) == len(photos) == 60 and len(results) == 30
    assert most["results"] <= 3 and 3 <= most["photos"] <= 12, most


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_an_interrupt_leaves_whole_files_and_no_thread(run, folder, monkeypatch):
    """Ctrl-C in the second batch: exit code 130, nothing half written, nothing goes on."""
    many(folder, 40)
    explain_, runs = Explainer.explain, []

    def interrupted(self, images, *rest):
        runs.append(len(images))
        if len(runs) == 2:
            signal.raise_signal(signal.SIGINT)
        return explain_(self, images, *rest)

    monkeypatch.setattr(Explainer, "explain", interrupted)
    refused(explain(run, "photos", "--batch-size", "4", "--methods", "saliency"), 130, "interrupted")
    assert len(runs) == 2 and not [t for t in threading.enumerate() if t.name.startswith("graphgbp")]
    assert written(folder) <= {f"{n}.{suffix}" for n in range(4) for suffix in ("png", "npz")}
    for path in (folder / "out").glob("*.png"):
        Image.open(path).load()


def test_a_fixed_batch_is_filled_from_the_folder(run, folder, monkeypatch):
    onnx.save(small_cnn(("y = Softmax<axis=1>(z)",), batch=3), folder / "model.onnx")
    many(folder, 7)
    explain_, runs = Explainer.explain, []
    monkeypatch.setattr(Explainer, "explain", lambda *given: (runs.append(len(given[1])), explain_(*given))[1])
    assert explain(run, "photos", "--batch-size", "2", "--methods", "saliency").exit_code == 0
    assert runs == [3, 3, 1]


@pytest.mark.parametrize(
    ("write", "suffixes", "words"),
    [("panels", {".png"}, "2 panels, and index"), ("arrays", {".npz"}, "the arrays (.npz) of 2 images, and index")],
)
def test_panels_or_arrays_alone(run, folder, write, suffixes, words):
    many(folder, 2)
    result = explain(run, "photos", "--write", write, "--methods", "saliency")
    assert result.exit_code == 0 and words in result.stdout
    assert {path.suffix for path in (folder / "out").iterdir()} == {*suffixes, ".json"}
    entry = read_index(folder)["images"][0]
    assert (entry["panel"], entry["arrays"]) == (("0.png", None) if write == "panels" else (None, "0.npz"))
    assert f"0{suffixes.pop()}" in result.stdout


def test_the_table_shows_the_first_of_many(run, folder, monkeypatch):
    monkeypatch.setattr(sys.modules["graphgbp.cli.explain"], "_PHOTOS_SHOWN", 2)
    many(folder, 5)
    result = explain(run, "photos", "--methods", "saliency", "--top", "2")
    assert "1-top2.png" in result.stdout and "2-top1.png" not in result.stdout
    assert "and 6 more, listed in index.json" in result.stdout and "10 panels" in result.stdout


def test_the_demo(spawn, tmp_path):
    """An espresso is seen in a cup of coffee."""
    models = ROOT / "models"
    done = spawn("explain", f"{models}/efficientnet_lite0.onnx", f"{models}/coffee.png", "-o", f"{tmp_path}/demo")
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "coffee.png" in line)
    assert "967 espresso" in first
    with Image.open(tmp_path / "demo" / "coffee.png") as panel:
        assert panel.width == 2068
