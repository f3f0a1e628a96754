"""Pictures from every source, and what is no picture."""

import io
import json
import zlib

import numpy as np
import pytest
import torch
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


def test_a_palette_with_several_transparent_colours():
    """The usual output of PNG optimisers: taken without a warning."""
    file = io.BytesIO()
    picture = Pil.fromarray(noise()).quantize(4)
    picture.save(file, "PNG", transparency=bytes([0, 255, 128, 255]))
    found = patches(Image(file.getvalue()), SETTINGS)
    assert found.pixels.equal(patches(Image(picture.convert("RGB")), SETTINGS).pixels)


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
        ("HTTP://example.org/a.png", "found a URL, expected a path"),
        ("data:image/png;base64,AAAA", "found a URL, expected a path"),
        ("absent.png", "absent.png.*no such file"),
        ("x" * 5000, "no such file"),
        ("a\0b", "no such file"),
        (".", "no such file"),
        (b"", "0 bytes.*not readable as a picture"),
        (b"nonsense", "8 bytes.*not readable as a picture"),
        (png(noise())[:-200], "not readable as a picture"),
        (np.zeros((0, 5, 3), np.uint8), "the picture is empty, 5 x 0"),
        (np.zeros((5, 5, 4), np.uint8), r"expected \[height, width, 3\]"),
        (np.zeros((5, 5, 3), np.int32), "pixels are int32, expected uint8"),
        (np.full((5, 5, 3), 2.0), "pixels from 2.0 to 2.0, expected 0 to 1"),
        (np.full((5, 5, 3), np.nan), "pixels from nan"),
        (torch.zeros(3, 50, 50), r"Image\(Tensor \(3, 50, 50\)\): expected \[height, width, 3\]"),
        (torch.zeros(5, 5, 3, requires_grad=True), "not readable as an array .*requires grad"),
        (torch.zeros(5, 5, 3).bfloat16(), "not readable as an array .*BFloat16"),
        (torch.zeros(5, 5, 3, device="meta"), "not readable as an array .*meta"),
        (Pil.new("RGB", (0, 5)), "the picture is empty, 0 x 5"),
        (17, r"Image\(int\).*expected a path, bytes, a PIL image or an array"),
        (None, r"Image\(NoneType\).*expected a path"),
        (["a.png"], r"Image\(list\).*expected a path"),
    ],
)
def test_what_is_no_picture(source, says):
    with pytest.raises(InputError, match=says):
        patches(Image(source), SETTINGS)


def test_another_kind_of_thing_is_refused_at_once():
    for source in (17, None, ["a.png"], bytearray(5), io.BytesIO(png(noise()))):
        with pytest.raises(InputError, match="expected a path, bytes, a PIL image or an array"):
            Image(source)


# PIL warns of odd TIFF tags and reads on: the picture or the error is what counts.
@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_damaged_files(tmp_path, monkeypatch, kind):
    file = io.BytesIO()
    Pil.fromarray(noise()).save(file, kind)
    whole = file.getvalue()
    assert patches(Image(whole), SETTINGS).size == (90, 60)
    path = tmp_path / "damaged"
    for n in (1, 10, 40, len(whole) // 2):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match=r"damaged'\): not readable as a picture"):
            patches(Image(path), SETTINGS)
    monkeypatch.setattr(module, "MAX_PIXELS", 1_000_000)  # garbage can promise a huge picture
    rng = np.random.default_rng(0)
    for _ in range(30):  # garbage inside: whatever the decoder does, it is our error or a picture
        garbage = bytearray(whole)
        for at in rng.integers(0, 200, 8):
            garbage[at] = rng.integers(256)
        try:
            assert patches(Image(bytes(garbage)), SETTINGS).pixels.isfinite().all()
        except InputError as error:
            assert "bytes)" in str(error)


def test_pixels_are_capped_before_decoding(monkeypatch):
    def decode(*_):
        raise AssertionError("the pixels were decoded")

    monkeypatch.setattr(Pil.Image, "convert", decode)
    monkeypatch.setattr(module, "MAX_PIXELS", 1000)
    for source in (png(noise()), noise(), Pil.fromarray(noise())):
        with pytest.raises(InputError, match="90 x 60 = 5,400 pixels, expected at most 1,000 pix"):
            patches(Image(source), SETTINGS)


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_a_decompression_bomb(tmp_path, side):
    """A header that promises more than there is."""
    small = png(np.zeros((1, 1), np.uint8))
    header = b"IHDR" + side.to_bytes(4) * 2 + small[24:29]
    path = tmp_path / "bomb.png"
    path.write_bytes(small[:12] + header + zlib.crc32(header).to_bytes(4) + small[33:])
    with pytest.raises(InputError, match=f"bomb.png.*at most 178,956,970 pixels .*{side**2}"):
        patches(Image(path), SETTINGS)


def test_boxes_end_with_the_soft_tokens():
    found = patches(Image(noise()), SETTINGS)
    for k in (-1, found.n_soft_tokens):
        with pytest.raises(InputError, match=f"soft token {k}, expected 0 to"):
            found.box(k)


def written(folder, name="processor_config.json", **content):
    (folder / name).write_text(json.dumps(content))


def test_settings_files(tmp_path):
    assert ImageSettings.from_json(tmp_path) == ImageSettings()
    written(tmp_path, "preprocessor_config.json", max_soft_tokens=140)
    assert ImageSettings.from_json(tmp_path).max_soft_tokens == 140
    written(tmp_path, feature_extractor={})
    assert ImageSettings.from_json(tmp_path).max_soft_tokens == 140
    written(tmp_path, image_processor={"max_soft_tokens": 560, "patch_size": None})
    assert ImageSettings.from_json(tmp_path) == ImageSettings(560)


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"do_normalize": True}, "do_normalize is True, g4lens computes False only"),
        ({"do_convert_rgb": False}, "do_convert_rgb is False"),
        ({"resample": 2}, "resample is 2, g4lens computes 3 only"),
        ({"rescale_factor": 1.0}, "rescale_factor is 1.0"),
        ({"max_soft_tokens": 100}, "max_soft_tokens is 100, expected one of"),
        ({"max_soft_tokens": 70.0}, "max_soft_tokens is 70.0, expected a positive integer"),
        ({"patch_size": 0}, "patch_size is 0, expected a positive integer"),
        ({"pooling_kernel_size": "3"}, "pooling is '3', expected a positive integer"),
        ("x", "image_processor is 'x', expected an object"),
    ],
)
def test_settings_that_are_not_computed(tmp_path, section, says):
    written(tmp_path, image_processor=section)
    with pytest.raises(InputError, match=rf"processor_config.json: .*{says}"):
        ImageSettings.from_json(tmp_path)


@pytest.mark.parametrize(("text", "says"), [("[", "not readable as JSON"), ("[]", "found a list")])
def test_what_is_no_settings_file(tmp_path, text, says):
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(InputError, match=says):
        ImageSettings.from_json(tmp_path)


def test_no_picture_starts_another_program():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(InputError, match="not readable as a picture"):
        patches(Image(eps), SETTINGS)
