import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graphgbp.errors import ImageError, RequestError
from graphgbp.photo import read_photo
from graphgbp.recipe import ImageInput, Recipe, preset, read_class_names, recipe_beside, usual_preset

MODELS = Path(__file__).parents[1] / "models"
COFFEE = MODELS / "coffee.png"
SQUARE = ImageInput.from_shape("x", ["n", 3, 224, 224])
GREY = ImageInput.from_shape("x", ["n", 1, 28, 28])


def write(path, **changes):
    recipe = {"channels": "RGB", "mean": [0, 0, 0], "std": [1, 1, 1]} | changes
    path.write_text(json.dumps({key: value for key, value in recipe.items() if value != "left out"}))
    return path


def by_hand(path, short, crop, filter):
    """Resize and centre crop as torchvision defines them."""
    image = Image.open(path).convert("RGB")
    width, height = image.size
    size = (short, int(short * height / width)) if width < height else (int(short * width / height), short)
    image = image.resize(size, filter)
    top, left = round((size[1] - crop) / 2.0), round((size[0] - crop) / 2.0)
    return np.asarray(image)[top : top + crop, left : left + crop]


@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "astronaut.png"])
def test_imagenet_is_torchvisions(name):
    array, photo = preset("imagenet", SQUARE).prepare(MODELS / name, SQUARE)
    pixels = by_hand(MODELS / name, 256, 224, Image.Resampling.BILINEAR)
    expected = (pixels / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_array_equal(photo, pixels)
    np.testing.assert_allclose(array, expected.transpose(2, 0, 1), atol=1e-6)
    assert array.dtype == np.float32 and array.flags.c_contiguous


def test_the_demo_recipe():
    recipe = Recipe.load(MODELS / "efficientnet_lite0.recipe.json")
    array, photo = recipe.prepare(COFFEE, SQUARE)
    pixels = by_hand(COFFEE, 256, 224, Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(photo, pixels)
    np.testing.assert_allclose(array, (pixels.transpose(2, 0, 1) - 127.0) / 128.0, atol=1e-6)
    names = recipe.read_class_names()
    assert names is not None and len(names) == 1000 and names[967] == "espresso"


@pytest.mark.parametrize(("name", "low", "high"), [("unit", 0.0, 1.0), ("symmetric", -1.0, 1.0)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_ranges(name, low, high, mode):
    spec = SQUARE if mode == "RGB" else GREY
    for value, expected in ((0, low), (255, high)):
        photo = Image.new("RGB", (60, 40), (value,) * 3)
        array, _ = preset(name, spec).prepare(photo, spec)
        np.testing.assert_allclose(array, np.full((len(mode), spec.height, spec.width), expected), atol=1e-6)


def test_pixels_for_an_input_of_integers():
    spec = ImageInput.from_shape("x", [None, 8, 8, 3], np.uint8)
    photo = Image.new("RGB", (8, 8), (1, 128, 255))
    array, _ = preset(usual_preset(spec)[0], spec).prepare(photo, spec)
    assert array.dtype == np.uint8 and array[0, 0].tolist() == [1, 128, 255]
    with pytest.raises(ImageError, match=r"takes uint8.*--preprocess pixels"):
        preset("unit", spec).prepare(photo, spec)


def test_caffe_is_bgr_and_channels_last():
    spec = ImageInput.from_shape("x", [None, 8, 8, 3], np.float64)
    array, photo = preset("caffe", spec).prepare(Image.new("RGB", (8, 8), (1, 2, 3)), spec)
    np.testing.assert_allclose(array[0, 0], [3 - 103.939, 2 - 116.779, 1 - 123.68], atol=1e-4)
    assert array.shape == (8, 8, 3) and array.dtype == np.float64
    np.testing.assert_array_equal(photo[0, 0], [1, 2, 3])


def test_preset_sizes_come_from_the_model():
    def shapes(*shape):
        spec = ImageInput.from_shape("x", shape)
        return [preset(name, spec).prepare(COFFEE, spec)[0].shape for name in ("imagenet", "unit")]

    assert shapes(1, 3, 64, 64) == [(3, 64, 64)] * 2
    assert shapes(1, 3, 48, 192) == [(3, 48, 192)] * 2
    assert shapes("n", 3, "h", "w") == [(3, 224, 224)] * 2
    assert shapes("n", 96, None, 3) == [(96, 96, 3)] * 2
    assert preset("imagenet", ImageInput.from_shape("x", (1, 3, 299, 299))).resize == 342


def test_layout():
    assert ImageInput.from_shape("x", [None, 3, "h", "w"]).layout == "NCHW"
    assert ImageInput.from_shape("x", [0, 32, 100, 1]) == ImageInput("x", 32, 100, 1, "NHWC", np.dtype("float32"))
    assert ImageInput.from_shape("x", ["n", "c", 8, 8], layout="NCHW").channels is None
    for shape in ([1, 3, 32, 3], ["n", "c", "h", "w"]):
        with pytest.raises(ImageError, match="last axis could be channels"):
            ImageInput.from_shape("x", shape)
    with pytest.raises(ImageError, match="4 axes"):
        ImageInput.from_shape("x", ["n", 768])


def test_what_does_not_fit_the_model_is_refused():
    with pytest.raises(ImageError, match=r"1 channel\(s\), but the preprocessing makes 3"):
        preset("imagenet", GREY).prepare(COFFEE, GREY)
    four = ImageInput.from_shape("x", [1, 4, 32, 32])
    with pytest.raises(ImageError, match=r"4 channel\(s\)"):
        preset("unit", four).prepare(COFFEE, four)
    with pytest.raises(ImageError, match=r"is 224 x 224 .* but the recipe makes .*coffee.png' 200 x 200"):
        Recipe(resize=256, crop=200).prepare(COFFEE, SQUARE)
    with pytest.raises(ImageError, match=r"224 x 224 .* 400 x 600"):
        Recipe().prepare(COFFEE, SQUARE)
    with pytest.raises(ImageError, match=r"crop of 224 x 224 .* does not fit into .*coffee.png., 200 x 300"):
        Recipe(resize=200, crop=224).prepare(COFFEE, SQUARE)


def test_height_and_width_are_not_confused():
    recipe = Recipe(resize=(40, 60), crop=(30, 50))
    array, photo = recipe.prepare(COFFEE, ImageInput.from_shape("x", [1, 3, 30, 50]))
    assert array.shape == (3, 30, 50) and photo.shape == (30, 50, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sclae": 1}, "unknown 'sclae'"),
        ({"mean": [0, 0]}, "mean must hold 3"),
        ({"mean": 0}, "mean must be a list"),
        ({"mean": "left out"}, "'mean' missing"),
        ({"std": [1, 0, 1]}, "std holds a 0"),
        ({"std": [1, None, 1]}, "std must hold 3 number"),
        ({"channels": "RGBA"}, "channels is 'RGBA'; use 'RGB', 'BGR' or 'L'"),
        ({"channels": ["RGB"]}, "channels is"),
        ({"channels": "L"}, "mean must hold 1"),
        ({"filter": "cubic"}, "filter is 'cubic'"),
        ({"resize": 0}, "resize must be"),
        ({"resize": [1, 2, 3]}, "resize must be"),
        ({"crop": 224.0}, "crop must be"),
        ({"scale": 0}, "scale must be"),
        ({"scale": "1/255"}, "scale must be"),
        ({"class_names": 3}, "class_names must be"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path, changes, message):
    path = write(tmp_path / "wrong.json", **changes)
    with pytest.raises(RequestError, match="wrong") as caught:
        Recipe.load(path)
    assert message in str(caught.value)


def test_a_recipe_that_cannot_be_read(tmp_path):
    (tmp_path / "text").write_text("resize: 256")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in (("none", "No such file"), ("text", "not JSON"), ("list", "object"), ("binary", "JSON")):
        with pytest.raises(RequestError, match=message):
            Recipe.load(tmp_path / name)
    with pytest.raises(RequestError, match="no preset 'torch'; use 'imagenet'"):
        preset("torch", SQUARE)


def test_recipe_beside_the_model(tmp_path):
    assert recipe_beside(tmp_path / "a.onnx") is None
    path = write(tmp_path / "a.recipe.json")
    assert recipe_beside(tmp_path / "a.onnx") == recipe_beside(tmp_path / "a.explained.onnx") == path
    assert recipe_beside(tmp_path / "b.onnx") is None


def test_class_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("tench\r\n goldfish\n\n", encoding="utf-8-sig")
    assert read_class_names(path) == ["tench", "goldfish"]
    path.write_text("tench\n\ngoldfish\n")
    with pytest.raises(RequestError, match="line 2 is empty"):
        read_class_names(path)
    path.write_text("")
    with pytest.raises(RequestError, match="it is empty"):
        read_class_names(path)
    with pytest.raises(RequestError, match="No such file"):
        read_class_names(tmp_path / "none")
    recipe = Recipe.load(write(tmp_path / "r.json", class_names="names.txt"))
    assert recipe.class_names == path


def gradient():
    return np.arange(12 * 10 * 3, dtype=np.uint8).reshape(12, 10, 3)


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the pixels rotated by 90 degrees clockwise
    Image.fromarray(gradient()).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(np.asarray(read_photo(tmp_path / "turned.png")), np.rot90(gradient(), -1))


def test_transparency_is_laid_on_white():
    layers = np.dstack([gradient(), np.full((12, 10), 64, np.uint8)])
    expected = gradient() * (64 / 255) + 255 * (191 / 255)
    assert np.abs(np.asarray(read_photo(Image.fromarray(layers))) - expected).max() <= 1
    hidden = Image.new("LA", (2, 2), (10, 0))
    assert np.asarray(read_photo(hidden)).min() == 255


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits(tmp_path, suffix):
    values = np.linspace(0, 0xFFFF, 120).astype(np.uint16).reshape(12, 10)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    found = np.asarray(read_photo(tmp_path / f"deep.{suffix}"))
    assert found.shape == (12, 10, 3)
    np.testing.assert_allclose(found[..., 0], values / 257, atol=0.51)


def test_grey_and_other_modes_become_what_is_asked():
    grey = Image.fromarray(gradient()[..., 0])
    np.testing.assert_array_equal(np.asarray(read_photo(grey)), gradient()[..., :1].repeat(3, axis=2))
    np.testing.assert_array_equal(np.asarray(read_photo(grey, "L")), gradient()[..., 0])
    for mode in ("1", "P", "CMYK", "YCbCr", "HSV"):
        assert read_photo(Image.fromarray(gradient()).convert(mode)).mode == "RGB"


def test_what_is_no_photo_is_refused_by_name(tmp_path):
    content = COFFEE.read_bytes()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.png").touch()
    for name in ("text.png", "cut.png", "empty.png", "missing.png", "."):
        with pytest.raises(ImageError) as caught:
            read_photo(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(ImageError, match="no known range"):
        read_photo(Image.fromarray(np.full((4, 4), 0.5, np.float32)))


def test_a_batch_holds_each_photo_as_prepare_makes_it():
    recipe = Recipe.load("models/efficientnet_lite0.recipe.json")
    told = {"name": "image", "shape": ["batch", 3, 224, 224], "dtype": "float32", "layout": "NCHW"}
    photos = ["models/coffee.png", "models/chelsea.png"]
    images, seen = recipe.batch(photos, told)
    assert images.shape == (2, 3, 224, 224) and images.dtype == np.float32
    for photo, image, view in zip(photos, images, seen, strict=True):
        array, expected = recipe.prepare(photo, ImageInput.of(told))
        np.testing.assert_array_equal(image, array)
        np.testing.assert_array_equal(view, expected)


def test_photos_of_several_sizes_make_no_batch():
    recipe = Recipe(channels="RGB", mean=(0, 0, 0), std=(1, 1, 1), resize=64)
    told = {"name": "image", "shape": ["batch", 3, "h", "w"], "dtype": "float32", "layout": "NCHW"}
    with pytest.raises(ImageError, match="2 sizes"):
        recipe.batch(["models/coffee.png", "models/astronaut.png"], told)


# -- a stream of photos -------------------------------------------------------------------------------------------


def test_batches_are_those_of_batch(tmp_path):
    image_input = {"name": "x", "shape": ["N", 3, "H", "W"], "dtype": "float32", "layout": "NCHW"}
    sizes = [(6, 8)] * 5 + [(6, 9)] * 2 + [(6, 8)]
    photos = [
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (*s, 3), np.uint8)) for n, s in enumerate(sizes)
    ]
    recipe = Recipe(mean=(1, 2, 3), std=(4, 5, 6))
    found = list(recipe.batches(iter(photos), image_input, 2))
    assert [len(images) for images, _ in found] == [2, 2, 1, 2, 1]
    start = 0
    for images, seen in found:
        expected, shown = recipe.batch(photos[start : start + len(images)], image_input)
        np.testing.assert_array_equal(images, expected)
        np.testing.assert_array_equal(seen, shown)
        start += len(images)
    with pytest.raises(RequestError, match="batch_size=0"):
        next(recipe.batches(photos, image_input, 0))
