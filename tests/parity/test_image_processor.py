"""Patches equal those of transformers' PIL image processor."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from g4lens.inputs.image import BUDGETS, Image, ImageSettings, patches, target_size

SIZES = [
    (384, 384),
    (100, 37),
    (500, 333),
    (2000, 30),
    (17, 900),
    (48, 48),
    (640, 480),
    (1, 1),
    (1, 3000),
]
THEIRS = {budget: Gemma4ImageProcessorPil(max_soft_tokens=budget) for budget in BUDGETS}


def noise(size, channels=3, seed=0):
    shape = size[1], size[0], channels
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def compare(ours, theirs, budget):
    """Ours and theirs, given to the processor as it likes it."""
    found = patches(Image(ours), ImageSettings(budget))
    expected = THEIRS[budget](theirs, return_tensors="pt")
    n = len(found.pixels)
    torch.testing.assert_close(found.pixels, expected["pixel_values"][0, :n], atol=1e-6, rtol=0)
    assert torch.equal(found.positions, expected["image_position_ids"][0, :n])
    assert (expected["image_position_ids"][0, n:] == -1).all()
    assert found.n_soft_tokens == int(expected["num_soft_tokens_per_image"][0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_sizes(size, budget):
    pixels = noise(size)
    compare(pixels, Pil.fromarray(pixels), budget)


@pytest.mark.parametrize("budget", BUDGETS)
def test_target_sizes(budget):
    """Of many pictures, and of those that fit the budget exactly."""
    from transformers.models.gemma4 import image_processing_pil_gemma4 as oracle

    rng = np.random.default_rng(budget)
    sizes = np.exp(rng.uniform(0, np.log(8000), (2000, 2))).astype(int).tolist()
    sizes += [(48 * k, 48 * (budget // k)) for k in range(1, budget + 1)]
    for width, height in sizes:
        expected = oracle.get_aspect_ratio_preserving_size(height, width, 16, budget * 9, 3)
        assert target_size((width, height), ImageSettings(budget)) == expected[::-1]


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_modes(mode):
    picture = Pil.fromarray(noise((70, 90))).convert("L" if mode in "IF" else "RGB").convert(mode)
    compare(picture, picture, 70)


def test_sixteen_bits(tmp_path):
    """A PIL image and a file: PIL cuts what lies beyond 255 to white."""
    grey = np.random.default_rng(0).integers(0, 600, (90, 70)).astype(np.uint16)
    picture, path = Pil.fromarray(grey), tmp_path / "grey.png"
    picture.save(path)
    compare(picture, picture, 70)
    compare(path, str(path), 70)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa"])
def test_transparent_pictures(mode):
    """A PIL image is put onto white."""
    picture = Pil.fromarray(noise((70, 90), 4))
    picture = picture.convert("P").convert(mode) if mode == "PA" else picture.convert(mode)
    compare(picture, picture, 70)


def test_a_transparent_colour():
    picture = Pil.fromarray(noise((70, 90))).convert("P")
    picture.info["transparency"] = 7
    compare(picture, picture, 70)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_that_lie_on_their_side(tmp_path, orientation):
    """A file is turned upright; a PIL image is taken as it lies."""
    exif = Pil.Exif()
    exif[274] = orientation
    path = tmp_path / "turned.jpg"
    Pil.fromarray(noise((120, 60))).save(path, exif=exif)
    compare(path, str(path), 70)
    compare(path.read_bytes(), str(path), 70)
    with Pil.open(path) as opened:
        compare(opened, opened, 70)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("channels", [3, 4])
def test_files(tmp_path, kind, channels):
    """Transparency in a file is ignored: transformers converts a path to RGB as it loads it."""
    file = io.BytesIO()
    Pil.fromarray(noise((70, 90), channels)).save(file, kind)
    path = tmp_path / "a"
    path.write_bytes(file.getvalue())
    compare(path, str(path), 70)
    compare(file.getvalue(), str(path), 70)


@pytest.mark.parametrize(("patch_size", "pooling"), [(8, 3), (16, 2)])
def test_other_geometry(patch_size, pooling):
    pixels = noise((300, 200))
    theirs = Gemma4ImageProcessorPil(
        max_soft_tokens=70, patch_size=patch_size, pooling_kernel_size=pooling
    )(Pil.fromarray(pixels), return_tensors="pt")
    ours = patches(Image(pixels), ImageSettings(70, patch_size, pooling))
    n = len(ours.pixels)
    torch.testing.assert_close(ours.pixels, theirs["pixel_values"][0, :n], atol=1e-6, rtol=0)
    assert torch.equal(ours.positions, theirs["image_position_ids"][0, :n])
    assert ours.n_soft_tokens == int(theirs["num_soft_tokens_per_image"][0])


def test_settings_files(tmp_path):
    """What transformers saves is read back, alone and under its key."""
    THEIRS[560].save_pretrained(tmp_path)
    assert ImageSettings.from_json(tmp_path) == ImageSettings(560)
