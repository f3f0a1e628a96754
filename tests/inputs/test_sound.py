"""Sounds from every source, and what is no sound."""

import json

import numpy as np
import pytest
import soundfile
import torch

from g4lens.errors import InputError
from g4lens.inputs.sound import Audio, SoundSettings, mel_frames
from g4lens.resources import bundled

SETTINGS = SoundSettings()


def tone(seconds=0.5, rate=16_000, hz=440.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_files(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    soundfile.write(path, tone(1.0), 16_000)
    found = mel_frames(Audio(path), SETTINGS)
    assert found.seconds == pytest.approx(1.0, abs=0.1)
    exact = mel_frames(Audio(tone(1.0), rate=16_000), SETTINGS)
    n = min(len(found.mel), len(exact.mel)) - 10
    loud = exact.mel[10:n].mean(0).argmax()
    assert found.mel[10:n].mean(0).argmax() == loud
    if kind in ("wav", "flac"):
        assert (found.mel - exact.mel)[exact.mel > -2].abs().max() < 0.05


def test_soft_tokens_and_their_times():
    found = mel_frames(Audio(tone(0.8), rate=16_000), SETTINGS)
    assert found.n_soft_tokens == 20
    assert found.span(0) == (0, 0.04) and found.span(19) == pytest.approx((0.76, 0.8))


def test_channels_are_mixed_and_rates_converted():
    stereo = np.stack([tone(rate=44_100), np.zeros(22_050, np.float32)], axis=1)
    found = mel_frames(Audio(stereo, rate=44_100), SETTINGS)
    half = mel_frames(Audio(tone() / 2, rate=16_000), SETTINGS)
    assert found.mel.shape == half.mel.shape
    assert (found.mel[5:40] - half.mel[5:40]).abs().mean() < 0.1


@pytest.mark.parametrize(("kind", "full"), [(np.int16, 2**15), (np.int32, 2**31)])
def test_integers(kind, full):
    integers = mel_frames(Audio((tone() * full).astype(kind), rate=16_000), SETTINGS)
    plain = mel_frames(Audio(tone(), rate=16_000), SETTINGS)
    assert (integers.mel - plain.mel)[plain.mel > -2].abs().max() < 0.05


def test_thirty_seconds_at_most(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    soundfile.write(path, tone(40, rate=8_000), 8_000)
    read = []
    whole = soundfile.SoundFile.read

    def note(file, frames=-1, **options):
        read.append(frames)
        return whole(file, frames, **options)

    monkeypatch.setattr(soundfile.SoundFile, "read", note)
    with pytest.warns(UserWarning, match="longer than 30 s: the rest is cut off"):
        found = mel_frames(Audio(path), SETTINGS)
    assert read == [30 * 8_000 + 1], "the rest of the file was read"
    assert found.seconds == 30 and found.n_soft_tokens == 750
    with pytest.warns(UserWarning, match="cut off"):
        mel_frames(Audio(tone(31), rate=16_000), SETTINGS)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: Audio("http://example.org/a.wav"), "found a URL"),
        (lambda p: Audio(str(p / "absent.wav")), "absent.wav.*no such file"),
        (lambda p: Audio(p / "text.wav"), "text.wav.*not readable as a sound"),
        (lambda p: Audio(p / "empty.wav"), r"empty.wav.*samples are \(0,\)"),
        (lambda p: Audio(p / "text.wav", rate=16_000), "given for a file"),
        (lambda p: Audio(tone()), "an array needs its rate="),
        (lambda p: Audio(tone(), rate=0), "rate is 0, expected 100"),
        (lambda p: Audio(tone(), rate=-16_000), "rate is -16000"),
        (lambda p: Audio(tone(), rate=float("nan")), "rate is nan"),
        (
            lambda p: Audio(tone(), rate=json.loads('"16000"')),
            "rate is '16000', expected 100 to 1,000,000",
        ),
        (lambda p: Audio(p / "odd.wav"), "odd.wav.*rate is 50, expected 100"),
        (lambda p: Audio(p / "nan.wav"), "nan.wav.*NaN or infinity"),
        (lambda p: Audio(p / "silent.flac"), "silent.flac.*the sound is silent"),
        (lambda p: Audio(p / "short.wav"), "short.wav.*100 samples at 16000 Hz, expected at least"),
        (lambda p: Audio(p), "no such file"),
        (lambda p: Audio("x" * 5000), "no such file"),
        (lambda p: Audio(p / "samples.raw"), "samples.raw.*not readable as a sound"),
        (lambda p: Audio(None), r"Audio\(NoneType, rate=None\): expected a path or an array"),
        (lambda p: Audio(b"RIFF", rate=16_000), "expected a path or an array"),
        (lambda p: Audio(["a"], rate=16_000), "samples are <U1, expected floats, int16 or int32"),
        (lambda p: Audio([0, 30_000] * 999, rate=16_000), "samples are int64, expected floats"),
        (lambda p: Audio(tone() * 32_768, rate=16_000), "samples reach 9830.4, expected floats"),
        (lambda p: Audio(p / "loud.wav"), "loud.wav.*samples reach 1e.38, expected floats from -1"),
        (
            lambda p: Audio(np.stack([tone(), tone()]), rate=16_000),
            r"ndarray \(2, 8000\).*8,000 channels of 2 samples, expected \[sample, channel\]",
        ),
        (
            lambda p: Audio(torch.ones(999, requires_grad=True), rate=16_000),
            "not readable as an array .*requires grad",
        ),
        (lambda p: Audio([[1.0], [1.0, 2.0]], rate=16_000), "not readable as an array"),
        (lambda p: Audio(np.full(400, 1e300), rate=16_000), "NaN or infinity"),
        (lambda p: Audio(np.outer(tone(), [1, -1]), rate=16_000), "the sound is silent"),
        (lambda p: Audio(np.ones(1), rate=200), "80 samples at 16000 Hz, expected at least 161"),
        (
            lambda p: Audio(np.zeros(16_000), rate=16_000),
            "all samples are zero, the sound is silent",
        ),
        (lambda p: Audio(np.zeros(0), rate=16_000), r"samples are \(0,\)"),
        (lambda p: Audio(np.zeros((2, 3, 4)), rate=16_000), r"samples are \(2, 3, 4\)"),
        (lambda p: Audio(np.array(1.0), rate=16_000), r"samples are \(\)"),
        (lambda p: Audio(np.full(16_000, np.nan), rate=16_000), "NaN or infinity"),
        (lambda p: Audio(np.full(16_000, np.inf), rate=16_000), "NaN or infinity"),
        (lambda p: Audio(np.ones(16_000, np.uint8), rate=16_000), "samples are uint8"),
        (
            lambda p: Audio(tone(0.005), rate=16_000),
            "80 samples at 16000 Hz, expected at least 161",
        ),
    ],
)
def test_what_is_no_sound(tmp_path, make, says):
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "samples.raw").write_bytes(bytes(1000))
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "odd.wav", tone(), 50)
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16_000, "FLOAT")
    soundfile.write(tmp_path / "loud.wav", np.full(8000, 1e38, np.float32), 16_000, "FLOAT")
    soundfile.write(tmp_path / "silent.flac", np.zeros(8000), 16_000)
    soundfile.write(tmp_path / "short.wav", tone()[:100], 16_000)
    with pytest.raises(InputError, match=says):
        mel_frames(make(tmp_path), SETTINGS)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_damaged_files(tmp_path, kind):
    """Garbage is our error, or a sound where the decoder makes one of it."""
    path = tmp_path / f"damaged.{kind}"
    soundfile.write(path, tone(), 16_000)
    whole = path.read_bytes()
    for n in (0, 1, 20):
        path.write_bytes(whole[:n])
        with pytest.raises(InputError, match=rf"damaged.{kind}.*not readable as a sound"):
            mel_frames(Audio(path), SETTINGS)
    rng = np.random.default_rng(0)
    for _ in range(20):
        garbage = bytearray(whole)
        for at in rng.integers(0, min(len(whole), 200), 8):
            garbage[at] = rng.integers(256)
        path.write_bytes(garbage)
        try:
            assert mel_frames(Audio(path), SETTINGS).mel.isfinite().all()
        except InputError as error:
            assert path.name in str(error)


def test_times_end_with_the_soft_tokens():
    found = mel_frames(Audio(tone(0.8), rate=16_000), SETTINGS)
    for k in (-1, 20):
        with pytest.raises(InputError, match=f"soft token {k}, expected 0 to 19"):
            found.span(k)


@pytest.mark.parametrize("rate", [8_000, 11_025.0, 22_050, 48_000, 192_000])
def test_a_tone_of_any_rate(rate):
    """The loudest band stays the same, and so does the length."""
    here = mel_frames(Audio(tone(1, rate), rate=rate), SETTINGS)
    plain = mel_frames(Audio(tone(1), rate=16_000), SETTINGS)
    assert here.seconds == pytest.approx(1, abs=1e-3)
    assert torch.equal(here.mel[5:90].argmax(1), plain.mel[5:90].argmax(1))


def test_bundled_settings():
    assert SoundSettings.from_json(bundled("data", "tiny")) == SETTINGS


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("dither", 0.1, "dither is 0.1, g4lens computes 0.0 only"),
        ("preemphasis", 0.97, "preemphasis is 0.97"),
        ("input_scale_factor", 2.0, "input_scale_factor is 2.0"),
        ("per_bin_mean", [0.0] * 128, r"per_bin_mean is \[0.0"),
        ("per_bin_stddev", [1.0] * 128, r"per_bin_stddev is \[1.0"),
        ("fft_overdrive", True, "fft_overdrive is True"),
        ("padding_side", "left", "padding_side is 'left', g4lens computes 'right' only"),
        ("padding_value", 1.0, "padding_value is 1.0"),
        ("frame_length", 512, "frame_length is 512, g4lens computes 320 only"),
        ("fft_length", 1024, "fft_length is 1024, g4lens computes 512 only"),
        ("sampling_rate", 0, "rate is 0, expected a positive integer"),
        ("sampling_rate", "16000", "sampling_rate is '16000', expected a number"),
        ("feature_size", 1.5, "n_mels is 1.5, expected a positive integer"),
        ("max_frequency", 0.0, "mel scale of 0.0 to 0.0 Hz, expected 0 <= low < high"),
        ("mel_floor", 0.0, "floor is 0.0, expected above 0"),
    ],
)
def test_settings_that_are_not_computed(tmp_path, field, value, says):
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"feature_extractor": {field: value}}))
    with pytest.raises(InputError, match=f"processor_config.json.*{says}"):
        SoundSettings.from_json(tmp_path)
