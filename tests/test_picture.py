"""Results on disk: panels, arrays, the index; all or nothing."""

import errno
import json
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageShow

from graphgbp import Explainer, picture
from graphgbp.contract import Manifest
from graphgbp.errors import ImageError, OutputError, RequestError
from tests.build import drawn, model, small_cnn

NAMES = ["a", "b", "c"]
CLASSES = ["ant", "bee", "cat", "dog", "elk"]


@pytest.fixture(scope="module")
def result(source):
    return Explainer(source, device="cpu").explain(drawn(3, 3, 8, 8, seed=11), [0, 1, -1])


def photos():
    return list(np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8))


def read_index(folder):
    return json.loads((folder / "index.json").read_text(encoding="utf-8"))


def test_what_is_written(tmp_path, result):
    index = picture.save_result(result, tmp_path / "new" / "maps", photos=photos(), names=NAMES, class_names=CLASSES)
    folder = tmp_path / "new" / "maps"
    assert index == folder / "index.json"
    files = {f"{name}.{suffix}" for name in NAMES for suffix in ("png", "npz")} | {"index.json"}
    assert {path.name for path in folder.iterdir()} == files
    for name in NAMES:
        with Image.open(folder / f"{name}.png") as panel:
            assert panel.width == 2068, "four tiles"


def test_arrays_are_the_maps(tmp_path, result):
    picture.save_result(result, tmp_path, names=NAMES)
    for n, name in enumerate(NAMES):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            assert set(arrays) == {*result.maps, "target_class", "target_score", "outputs/y"}
            for method, values in result.maps.items():
                np.testing.assert_array_equal(arrays[method], values[n])
            np.testing.assert_array_equal(arrays["outputs/y"], result.outputs["y"][n])
            assert arrays["target_class"] == result.target_class[n]
            assert arrays["target_score"] == result.target_score[n]


def test_the_index(tmp_path, result):
    picture.save_result(result, tmp_path, names=NAMES, class_names=CLASSES)
    index = read_index(tmp_path)
    assert index["model"] == result.manifest.source and len(index["model"]["sha256"]) == 64
    assert index["methods"] == ["guided_backprop", "gradcam", "guided_gradcam"]
    y = result.outputs["y"]
    for n, entry in enumerate(index["images"]):
        assert (entry["name"], entry["panel"], entry["arrays"]) == (NAMES[n], f"{NAMES[n]}.png", f"{NAMES[n]}.npz")
        explained = int(result.target_class[n])
        assert (entry["class"], entry["class_name"]) == (explained, CLASSES[explained])
        assert entry["score"] == pytest.approx(result.target_score[n])
        assert entry["probability"] == pytest.approx(y[n, explained])
        order = np.argsort(-y[n]).tolist()
        assert [row["class"] for row in entry["top"]] == order
        assert [row["class_name"] for row in entry["top"]] == [CLASSES[index] for index in order]
        assert [row["probability"] for row in entry["top"]] == pytest.approx(np.sort(y[n])[::-1].tolist())
        assert entry["scales"]["gradcam"]["maximum"] == pytest.approx(result.gradcam[n].max())
        guided = entry["scales"]["guided_backprop"]
        assert guided["std"] == pytest.approx(result.guided_backprop[n].std(), rel=1e-4)


def test_titles(result):
    named = picture.facts(result, CLASSES)[1]
    assert named.title == "bee" and named.subtitle == f"class 1 · probability {result.outputs['y'][1, 1]:.3f}"
    nameless = picture.facts(result)[0]
    assert nameless.title == "class 0" and nameless.subtitle.startswith("probability 0.")


def test_a_model_without_probabilities_gets_a_score():
    found = Explainer(small_cnn(), ["saliency"], device="cpu").explain(drawn(1, 3, 8, 8), 2)
    fact = picture.facts(found, CLASSES)[0]
    assert fact.probability is None and fact.top[0].keys() == {"class", "class_name", "score"}
    assert fact.subtitle.startswith("class 2 · score ")


def test_a_class_that_is_not_among_the_highest_has_its_probability():
    nodes = ["r = Conv(x, w)", "h = Relu(r)", "p = GlobalAveragePool(h)", "f = Flatten(p)", "z = MatMul(f, v)"]
    weights = {"w": drawn(4, 3, 3, 3), "v": drawn(4, 9, seed=1)}
    proto = model([*nodes, "y = Softmax<axis=1>(z)"], {"x": ["N", 3, 8, 8]}, ["y"], weights)
    explainer, images = Explainer(proto, ["saliency"], device="cpu"), drawn(2, 3, 8, 8, seed=2)
    y = explainer.explain(images).outputs["y"]
    first, second = picture.facts(explainer.explain(images, [int(y[0].argmin()), int(y[1].argmax())]))
    assert (first.probability, second.probability) == (pytest.approx(y[0].min()), pytest.approx(y[1].max()))
    assert len(first.top) == len(second.top) == 5


def test_weights_explain_no_single_class():
    found = Explainer(small_cnn(), ["saliency"], device="cpu").explain(drawn(1, 3, 8, 8), [[1, -1, 0, 0, 0.5]])
    fact = picture.facts(found)[0]
    assert fact.title == "no single class" and fact.to_dict()["class"] is None


def made(images, layout, **maps):
    """A result as simple as can be."""
    manifest = Manifest(
        kind="explanation",
        graphgbp="0",
        source={},
        names={},
        inputs=[{"name": "x", "layout": layout}],
        score={"class_axis": 1, "two_classes_in_one": False},
    )

    def top(k):
        raise RequestError("no table")

    ones = np.ones(len(images))
    return SimpleNamespace(
        images=images,
        target_class=ones.astype(int),
        target_score=ones,
        outputs={},
        maps=maps,
        manifest=manifest,
        top=top,
    )


def panel_pixels(folder, name, tile):
    """The pixels of one tile of a saved panel, by the layout of every panel: 3 in wide, 0.16 in apart, 160 dpi."""
    left = round((0.22 + tile * 3.16) * 160)
    with Image.open(folder / f"{name}.png") as panel:
        image = np.asarray(panel.convert("RGB"))
    return image[round(1.22 * 160) + 4 : round(4.22 * 160) - 4, left + 4 : left + 476]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_layouts_and_channel_orders_give_the_same_picture(tmp_path, layout):
    """A map that is positive in the model's red channel is drawn red, whatever the layout and the order."""
    values = np.zeros((1, 8, 8, 3), np.float32)
    values[0, :4, :, 0] = 1
    image = np.linspace(-2, 2, 192, dtype=np.float32).reshape(1, 8, 8, 3)
    drawn_panels = {}
    for channels in ("RGB", "BGR"):
        ordered = [array if channels == "RGB" else array[..., ::-1] for array in (image, values)]
        if layout == "NCHW":
            ordered = [array.transpose(0, 3, 1, 2) for array in ordered]
        found = made(ordered[0], layout, saliency=ordered[1])
        picture.save_result(found, tmp_path / channels, channels=channels)
        drawn_panels[channels] = panel_pixels(tmp_path / channels, "image_0", 1)
        np.testing.assert_array_equal(panel_pixels(tmp_path / channels, "image_0", 0)[0, 0], [0, 1, 3])
    np.testing.assert_array_equal(drawn_panels["RGB"], drawn_panels["BGR"])
    upper, lower = drawn_panels["RGB"][10, 10], drawn_panels["RGB"][-10, 10]
    assert upper[0] > upper[1] == upper[2] and lower[0] == lower[1] == lower[2]


def test_maps_that_are_no_images_are_saved_as_arrays(tmp_path):
    picture.save_result(made(np.ones((2, 7)), None, saliency=np.ones((2, 7))), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"image_0.npz", "image_1.npz", "index.json"}
    entry = read_index(tmp_path)["images"][0]
    assert entry["panel"] is None and entry["top"] == [] and entry["scales"] == {}


def test_what_is_not_finite_is_null_in_the_index(tmp_path):
    found = made(np.ones((1, 3, 8, 8)), "NCHW", saliency=np.full((1, 3, 8, 8), np.nan))
    found.target_score = np.array([np.inf])
    picture.save_result(found, tmp_path)
    assert read_index(tmp_path)["images"][0]["score"] is None


def test_nothing_is_replaced_unasked(tmp_path, result):
    picture.save_result(result, tmp_path, names=NAMES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(OutputError, match=r"a.png', .* and 2 more already exist; .* force=True"):
        picture.save_result(result, tmp_path, names=NAMES)
    with pytest.raises(OutputError, match=r"index.json' already exists"):
        picture.save_result(result, tmp_path, names=["d", "e", "f"])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    picture.save_result(result, tmp_path, names=NAMES, force=True)
    assert (tmp_path / "a.png").stat().st_mtime_ns > before[tmp_path / "a.png"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": ["a", "b"]}, RequestError, "2 names for 3 images"),
        ({"names": ["a", "b", "A"]}, RequestError, "'a' comes twice"),
        ({"names": ["a", "../b", "c"]}, RequestError, "'../b' is no file name"),
        ({"names": ["a", "", "c"]}, RequestError, "'' is no file name"),
        ({"photos": []}, RequestError, "0 photos for 3 images"),
        ({"photos": [np.zeros((9, 8, 3), np.uint8)] * 3}, ImageError, "uint8 [8, 8, 3]"),
        ({"photos": [np.zeros((8, 8, 3), np.float32)] * 3}, ImageError, "type float32"),
        ({"style": "color"}, RequestError, "unknown style 'color'"),
    ],
)
def test_what_cannot_be_saved(tmp_path, result, options, error, message):
    with pytest.raises(error) as caught:
        picture.save_result(result, tmp_path / "maps", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "maps").exists() or not list((tmp_path / "maps").iterdir())


def test_a_file_in_the_folders_place(tmp_path, result):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file' is a file; name a folder"):
        picture.save_result(result, tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot make the folder .*Not a directory"):
        picture.save_result(result, tmp_path / "file" / "maps")


@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk_leaves_no_half_written_file(tmp_path, result, monkeypatch, step):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write_until_full(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        full()

    if step == "rename":
        monkeypatch.setattr("os.replace", full)
    else:
        monkeypatch.setattr("pathlib.Path.write_bytes", write_until_full)
    with pytest.raises(OutputError, match=r"cannot write '.*a.png': No space left on device"):
        picture.save_result(result, tmp_path, names=NAMES)
    assert not list(tmp_path.iterdir())


def test_an_album_fills_batch_by_batch_and_keeps_the_order(tmp_path, result):
    album = picture.Album(tmp_path, ["x", "a", "b", "c"])
    album.add(result, NAMES, sources=["photos/a.jpg", "photos/b.jpg", "photos/c.jpg"])
    with pytest.raises(RequestError, match="'z' is not among the names"):
        album.add(result, ["z", "y", "x"])
    album.add(Explainer(small_cnn(), device="cpu").explain(drawn(1, 3, 8, 8)), ["x"])
    album.finish()
    images = read_index(tmp_path)["images"]
    assert [entry["name"] for entry in images] == ["x", "a", "b", "c"]
    assert [entry["file"] for entry in images] == [None, "photos/a.jpg", "photos/b.jpg", "photos/c.jpg"]


def test_show_opens_every_panel(result, monkeypatch):
    shown = []
    monkeypatch.setattr(ImageShow, "show", lambda image, title: shown.append(image.size) or True)
    result.show()
    assert len(shown) == 3 and shown[0][0] == 2068
    monkeypatch.setattr(ImageShow, "show", lambda image, title: False)
    with pytest.raises(OutputError, match="no image viewer"):
        result.show()


def test_show_in_a_notebook(result, monkeypatch):
    shown = []
    notebook = SimpleNamespace(get_ipython=object, display=SimpleNamespace(display=shown.append))
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    result.show(class_names=CLASSES)
    assert len(shown) == 3
