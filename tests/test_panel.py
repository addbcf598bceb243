import io
import warnings

import numpy as np
import pytest
from captum.attr import visualization
from PIL import Image

from graphgbp import contract, panel
from graphgbp.errors import RequestError


def attribution(channels=3, seed=0, scale=1e-3, size=(12, 15)):
    """A guided map as they come: mostly small, a few large, of both signs; [H, W, C]."""
    return (scale * np.random.default_rng(seed).standard_t(6, (*size, channels))).astype(np.float32)


def captums(values, sign):
    """The levels that Captum draws."""
    _, axes = visualization.visualize_image_attr(values, sign=sign, outlier_perc=2, use_pyplot=False)
    return np.asarray(axes.images[0].get_array())


@pytest.mark.parametrize("sign", ["absolute", "positive", "negative", "all"])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_channel_is_captums(sign, channels):
    values = attribution(channels, size=(60, 50))
    levels, scale = panel.one_channel(values, sign)
    captum_sign = "absolute_value" if sign == "absolute" else sign
    np.testing.assert_allclose(levels, captums(values.astype(np.float64), captum_sign), rtol=1e-6)
    assert 0 < scale["scale"] < np.abs(values.sum(-1)).max(), "the largest 2 % lie above"


def test_the_scale_is_where_98_percent_lie():
    few = np.array([[50, 48], [1, 1]], np.float32)[..., None]  # from below: 1, 2, 50, 100 of 100
    assert panel.one_channel(few, "absolute")[1] == {"scale": 50.0}
    many = np.array([3] + [2] * 99, np.float32).reshape(10, 10, 1)  # the 3 is 1.5 % of 201
    levels, scale = panel.one_channel(many, "positive")
    assert scale == {"scale": 2.0} and levels.max() == 1


def test_tiny_attributions_are_scaled_like_any():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum's, about values close to 0
        expected = captums(attribution(scale=1e-9).astype(np.float64), "all")
    np.testing.assert_allclose(panel.one_channel(attribution(scale=1e-9), "all")[0], expected, rtol=1e-6)


def test_colour_has_mean_half_and_deviation_a_tenth():
    values = np.random.default_rng(0).normal(3, 7, (40, 40, 3)).astype(np.float32)
    pixels, scale = panel.colour(values)
    expected = np.clip((values - values.mean()) / values.std() * 0.1 + 0.5, 0, 1)
    np.testing.assert_allclose(pixels, expected, atol=1e-6)
    assert scale == pytest.approx({"mean": values.mean(), "std": values.std()}, rel=1e-5)
    assert pixels.mean() == pytest.approx(0.5, abs=1e-3) and pixels.std() == pytest.approx(0.1, abs=1e-3)


def test_colour_is_clipped():
    values = np.zeros((20, 20, 3), np.float32)
    values[0, 0, 0], values[1, 1, 1] = 1, -1
    pixels, _ = panel.colour(values)
    assert pixels[0, 0, 0] == 1 and pixels[1, 1, 1] == 0


def photo(height=12, width=15):
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), np.uint8)


def tile_of(method, values, **options):
    photo_tile, tile = panel.tiles(photo(), {method: values}, **options)
    np.testing.assert_array_equal(photo_tile.pixels, photo() / 255.0)
    assert photo_tile.heading == "Photo" and tile.method == method
    assert tile.pixels.shape == (12, 15, 3) and tile.pixels.min() >= 0 and tile.pixels.max() <= 1
    return tile


def test_colours_are_in_the_photos_order():
    values = np.zeros((12, 15, 3), np.float32)
    values[3, 4, 0] = 1
    for channels, red_or_blue in (("RGB", 0), ("BGR", 2)):
        pixels = tile_of("guided_backprop", values, channels=channels).pixels
        assert pixels[3, 4].argmax() == red_or_blue


def test_each_cam_has_its_own_maximum_and_its_own_colours():
    cam = np.linspace(0, 1, 180, dtype=np.float32).reshape(12, 15, 1)
    small, large = (tile_of("gradcam", factor * cam) for factor in (1e-3, 10))
    np.testing.assert_allclose(small.pixels, large.pixels, atol=0.01)
    assert small.bar.low == 0 and small.bar.high == pytest.approx(1e-3) and large.scale == {"maximum": 10.0}
    signed = tile_of("gradcam", cam - 0.25)
    assert signed.bar.low == -0.75 and signed.bar.high == 0.75


def test_the_cam_lies_over_the_photo():
    cam = np.zeros((12, 15, 1), np.float32)
    cam[5, 5] = 1
    black, white = (np.full((12, 15, 3), value, np.uint8) for value in (0, 255))
    dark, light = (panel.tiles(below, {"gradcam": cam})[1].pixels for below in (black, white))
    np.testing.assert_allclose(light - dark, 0.4, atol=1e-9)
    assert dark[5, 5].sum() > dark[0, 0].sum()


@pytest.mark.parametrize("style", panel.STYLES)
@pytest.mark.parametrize("method", ["gradcam", "gradcam_plusplus", "input_x_gradient", "guided_backprop"])
def test_an_all_zero_map_says_so_and_is_not_amplified(method, style):
    values = np.zeros((12, 15, 1 if method in contract.CAMS else 3), np.float32)
    tile = tile_of(method, values, style=style)
    assert tile.stamp == panel.ALL_ZERO and tile.bar is None
    assert not any(tile.scale.values())
    if method not in contract.CAMS:
        assert np.ptp(tile.pixels.reshape(-1, 3), axis=0).max() == 0


def test_a_sign_that_is_absent_says_so():
    tile = tile_of("saliency", -np.abs(attribution()), style="positive")
    assert tile.stamp == panel.ALL_ZERO and tile.caption == "no positive values"
    assert tile_of("saliency", -np.abs(attribution()), style="negative").bar.high < 0


def test_what_is_not_finite_says_so():
    values = attribution()
    values[0, 0, 0] = np.nan
    tile = tile_of("saliency", values)
    assert tile.stamp == "not finite" and tile.caption == "0.185 % of its values are not finite"


def test_diverging_colours_are_centred_on_zero():
    values = attribution()
    values[2, 2] = 0
    pixels = tile_of("guided_backprop", values, style="all").pixels
    assert pixels[2, 2].min() > 0.95, "zero is white"
    signs = values.sum(-1)
    top, bottom = (np.unravel_index(place, signs.shape) for place in (signs.argmax(), signs.argmin()))
    assert pixels[top][0] > pixels[top][2] and pixels[bottom][2] > pixels[bottom][0]


def test_styles():
    four = attribution(4)
    assert tile_of("saliency", four).bar is not None
    assert "mean" in tile_of("saliency", attribution(1)).caption
    with pytest.raises(RequestError, match="4 channels are no colours"):
        tile_of("saliency", four, style="colour")
    with pytest.raises(RequestError, match="unknown style 'color'; choose among auto, colour"):
        tile_of("saliency", four, style="color")


def test_the_order_of_a_panel():
    values = attribution()
    maps = {method: values[..., :1] if method in contract.CAMS else values for method in contract.METHODS}
    headings = [tile.heading for tile in panel.tiles(photo(), maps)]
    cams = ["Grad-CAM", "HiResCAM", "LayerCAM", "Grad-CAM++", "XGrad-CAM"]
    guided = ["Guided Backpropagation", "Guided Grad-CAM"]
    assert headings == ["Photo", *cams, *guided, "Saliency", "Input x Gradient", "DeconvNet"]


@pytest.mark.parametrize("size", [(28, 28), (48, 192), (192, 48)])
def test_every_pixel_of_a_panel_is_in_place(size):
    """Tiles lie side by side on white; no text reaches over the edge."""
    blue = np.broadcast_to([0.0, 0.0, 1.0], (*size, 3))
    tiles = [panel.Tile("Photo", blue), panel.Tile("Guided Backpropagation", blue, "std 1", stamp="all zero")]
    content = panel.png(panel.draw(tiles, "W" * 300 + "$x^2$", "a very long file name " * 30))
    picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    is_blue = (picture == [0, 0, 255]).all(-1)
    rows, columns = np.flatnonzero(is_blue.any(1)), np.flatnonzero(is_blue.any(0))
    assert (rows[-1] - rows[0] + 1) / 480 == pytest.approx(size[0] / size[1], rel=0.02)
    assert 2 * 480 <= columns[-1] - columns[0] + 1 <= 2 * 480 + 60
    frame = np.concatenate([picture[:8].reshape(-1, 3), picture[-8:].reshape(-1, 3), picture[:, -8:].reshape(-1, 3)])
    assert (frame == 255).all()
    assert (picture[:100].min(-1) < 128).any(), "the title is there"


def test_drawing_leaves_no_global_state():
    import matplotlib._pylab_helpers as helpers

    tiles = panel.tiles(photo(), {"gradcam": np.ones((12, 15, 1), np.float32)})
    first, second = (panel.png(panel.draw(tiles, "a", "b")) for _ in range(2))
    assert first == second and not helpers.Gcf.figs


def test_letters_the_font_lacks_raise_no_warning():
    panel.png(panel.draw([panel.Tile("Photo", photo() / 255.0)], "猫", "子猫.png"))
