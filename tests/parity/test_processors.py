"""Patches and mel frames equal those of transformers' processors."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image as Pil
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

from g4lens.inputs.image import BUDGETS, Image, ImageSettings, patches
from g4lens.inputs.sound import Audio, SoundSettings, mel_frames

SIZES = [(384, 384), (100, 37), (500, 333), (2000, 30), (17, 900), (48, 48), (640, 480)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_patches(size, budget):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    theirs = Gemma4ImageProcessorPil(max_soft_tokens=budget)(
        Pil.fromarray(pixels), return_tensors="pt"
    )
    ours = patches(Image(pixels), ImageSettings(budget))
    n = len(ours.pixels)
    torch.testing.assert_close(ours.pixels, theirs["pixel_values"][0, :n], atol=1e-6, rtol=0)
    assert torch.equal(ours.positions, theirs["image_position_ids"][0, :n])
    assert (theirs["image_position_ids"][0, n:] == -1).all()
    assert ours.n_soft_tokens == int(theirs["num_soft_tokens_per_image"][0])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_modes(mode):
    picture = Pil.fromarray(np.random.default_rng(1).integers(0, 256, (90, 70, 3), dtype=np.uint8))
    picture = picture.convert(mode)
    theirs = Gemma4ImageProcessorPil(max_soft_tokens=70)(picture, return_tensors="pt")
    ours = patches(Image(picture), ImageSettings(70))
    shared = theirs["pixel_values"][0, : len(ours.pixels)]
    torch.testing.assert_close(ours.pixels, shared, atol=1e-6, rtol=0)


@pytest.mark.parametrize("n", [161, 200, 320, 321, 1000, 12_800, 16_001, 47_999, 480_000, 500_000])
def test_mel_frames(n):
    wave = np.random.default_rng(n).normal(0, 0.1, n).astype(np.float32)
    theirs = Gemma4AudioFeatureExtractor()([wave], return_tensors="pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Audio.*is longer than 30 s", UserWarning)
        ours = mel_frames(Audio(wave, rate=16_000), SoundSettings())
    torch.testing.assert_close(ours.mel, theirs["input_features"][0], atol=1e-5, rtol=0)
    assert torch.equal(ours.mask, theirs["input_features_mask"][0].bool())
