"""Pictures from every source, and what is no picture."""

import io

import numpy as np
import pytest
from PIL import Image as Pil

from g4lens.errors import InputError
from g4lens.inputs import image as module
from g4lens.inputs.image import BUDGETS, Image, ImageSettings, patches

SETTINGS = ImageSettings(70)


def noise(height=60, width=90):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    Pil.fromarray(array).save(file, "PNG")
    return file.getvalue()


def test_every_source_gives_the_same(tmp_path):
    array = noise()
    path = tmp_path / "a.png"
    path.write_bytes(png(array))
    expected = patches(Image(array), SETTINGS).pixels
    for source in (path, str(path), png(array), Pil.fromarray(array), array / 255):
        assert patches(Image(source), SETTINGS).pixels.equal(expected)


def test_boxes_tile_the_original():
    found = patches(Image(noise(60, 90)), SETTINGS)
    rows, columns = found.grid
    assert found.n_soft_tokens == rows * columns == len(found.pixels) // 9 <= 70
    boxes = [found.box(k) for k in range(found.n_soft_tokens)]
    assert boxes[0][:2] == (0, 0) and boxes[-1][2:] == pytest.approx((90, 60))
    assert boxes[1][0] == pytest.approx(90 / columns)
    assert sum((r - x) * (b - y) for x, y, r, b in boxes) == pytest.approx(90 * 60)


def test_upright_and_rgb(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Pil.Exif()
    exif[274] = 6  # stored lying on its side
    Pil.fromarray(noise(40, 80)).save(path, exif=exif)
    assert patches(Image(path), SETTINGS).size == (40, 80)
    for mode in ("L", "P", "RGBA", "1", "LA", "I;16", "CMYK"):
        grey = Pil.fromarray(noise()[..., 0]).convert("L")
        picture = grey.convert(mode) if mode != "I;16" else Pil.new("I;16", (50, 50), 300)
        assert patches(Image(picture), SETTINGS).pixels.shape[1] == 768


@pytest.mark.parametrize("budget", [1, 71, 0, None, "70"])
def test_other_budgets(budget):
    with pytest.raises(InputError, match=r"max_soft_tokens is .*, expected one of \(70, 140, 280"):
        ImageSettings(budget)


@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000), (1, 100_000)])
def test_any_aspect(size):
    for budget in BUDGETS:
        width, height = module.target_size(size, ImageSettings(budget))
        assert width % 48 == height % 48 == 0
        assert 0 < width * height // 48**2 <= budget


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("https://example.org/a.png", "found a URL, expected a path"),
        ("absent.png", "absent.png.*no such file"),
        (b"", "0 bytes.*not readable as a picture"),
        (b"nonsense", "8 bytes.*not readable as a picture"),
        (png(noise())[:-200], "not readable as a picture"),
        (np.zeros((0, 5, 3), np.uint8), "at least one pixel"),
        (np.zeros((5, 5, 4), np.uint8), r"expected \[height, width, 3\]"),
        (np.zeros((5, 5, 3), np.int32), "pixels are int32, expected uint8"),
        (np.full((5, 5, 3), 2.0), "beyond 0 to 1"),
        (np.full((5, 5, 3), np.nan), "are NaN"),
        (Pil.new("RGB", (0, 5)), "the picture is empty, 0 x 5"),
        (17, "not readable as a picture"),
        (None, "not readable as a picture"),
    ],
)
def test_what_is_no_picture(source, says):
    with pytest.raises(InputError, match=says):
        patches(Image(source), SETTINGS)


def test_pixels_are_capped_before_decoding(monkeypatch):
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    for source in (png(noise()), noise()):
        with pytest.raises(InputError, match="expected at most 1,000 pixels"):
            patches(Image(source), SETTINGS)


def test_a_decompression_bomb():
    header = png(np.zeros((1, 1), np.uint8))
    huge = header[:16] + (60_000).to_bytes(4) + (60_000).to_bytes(4) + header[24:]
    with pytest.raises(InputError):
        patches(Image(huge), SETTINGS)


def test_settings_files(tmp_path):
    assert ImageSettings.from_json(tmp_path) == ImageSettings()
    (tmp_path / "preprocessor_config.json").write_text('{"max_soft_tokens": 140}')
    assert ImageSettings.from_json(tmp_path).max_soft_tokens == 140
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"max_soft_tokens": 560}}')
    assert ImageSettings.from_json(tmp_path).max_soft_tokens == 560
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"do_normalize": true}}')
    with pytest.raises(InputError, match="do_normalize is True, g4lens computes False only"):
        ImageSettings.from_json(tmp_path)
    (tmp_path / "processor_config.json").write_text("[")
    with pytest.raises(InputError, match="not readable as a JSON object"):
        ImageSettings.from_json(tmp_path)
