"""Mel frames and counts of soft tokens equal those of transformers."""

import json
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.audio_utils import mel_filter_bank
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor

from g4lens.inputs.sound import Audio, SoundSettings, mel_bands, mel_frames

LENGTHS = [*range(161, 3000, 97), 320, 321, 12_800, 16_001, 47_999, 479_999, 480_000]
EXTRACTOR = Gemma4AudioFeatureExtractor()


def wave(n, kind="noise"):
    rng = np.random.default_rng(n)
    if kind == "noise":
        return rng.normal(0, 0.1, n).astype(np.float32)
    t = np.arange(n) / 16_000
    return (0.9 * np.sin(2 * np.pi * (200 + 3000 * t) * t)).astype(np.float32)


def theirs(samples, extractor=EXTRACTOR):
    found = extractor([samples], return_tensors="pt")
    return found["input_features"][0], found["input_features_mask"][0].bool()


def processor_count(**inputs):
    """How many soft tokens transformers' processor makes room for, by each of its two ways."""
    stand_in: Any = SimpleNamespace(
        boa_token="", eoa_token="", audio_token="x", audio_seq_length=750,
        feature_extractor=EXTRACTOR,
    )  # fmt: skip
    if "mask" in inputs:
        given = {"input_features_mask": [inputs["mask"].numpy()]}
        return len(Gemma4Processor.replace_audio_token(stand_in, given, 0))
    return Gemma4Processor._compute_audio_num_tokens(stand_in, inputs["samples"], 16_000)


@pytest.mark.parametrize("kind", ["noise", "sweep"])
@pytest.mark.parametrize("n", LENGTHS)
def test_mel_frames(n, kind):
    samples = wave(n, kind)
    mel, mask = theirs(samples)
    ours = mel_frames(Audio(samples, rate=16_000), SoundSettings())
    torch.testing.assert_close(ours.mel, mel, atol=1e-5, rtol=0)
    assert torch.equal(ours.mask, mask)
    assert ours.n_soft_tokens == processor_count(mask=mask) == processor_count(samples=samples)
    assert ours.span(ours.n_soft_tokens - 1)[1] <= ours.seconds == pytest.approx(n / 16_000)


def test_a_long_sound_is_cut_where_theirs_is():
    samples = wave(500_000)
    with pytest.warns(UserWarning, match="longer than 30 s"):
        ours = mel_frames(Audio(samples, rate=16_000), SoundSettings())
    mel, mask = theirs(samples)
    torch.testing.assert_close(ours.mel, mel, atol=1e-5, rtol=0)
    assert torch.equal(ours.mask, mask) and ours.n_soft_tokens == 750


def test_double_precision_samples():
    samples = wave(5000).astype(np.float64)
    ours = mel_frames(Audio(samples, rate=16_000), SoundSettings())
    torch.testing.assert_close(ours.mel, theirs(samples)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_rate": 8_000, "max_frequency": 4_000.0},
        {"feature_size": 40, "min_frequency": 100.0},
        {"frame_length_ms": 32.0, "hop_length_ms": 12.5, "mel_floor": 1e-5},
    ],
)
def test_other_settings(tmp_path, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extractor = Gemma4AudioFeatureExtractor(**options)
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"feature_extractor": options}))
    settings = SoundSettings.from_json(tmp_path)
    samples = wave(9001)
    ours = mel_frames(Audio(samples, rate=settings.rate), settings)
    mel, mask = theirs(samples, extractor)
    torch.testing.assert_close(ours.mel, mel, atol=1e-5, rtol=0)
    assert torch.equal(ours.mask, mask)


def test_bands():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the highest bands lie between two frequencies
        expected = mel_filter_bank(257, 128, 0.0, 8_000.0, 16_000, norm=None, mel_scale="htk")
    np.testing.assert_allclose(mel_bands(SoundSettings()), expected, atol=1e-12)


def test_settings_files(tmp_path):
    """What transformers saves is read back."""
    EXTRACTOR.save_pretrained(tmp_path)
    assert SoundSettings.from_json(tmp_path) == SoundSettings()
