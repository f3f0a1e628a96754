"""Sounds from every source, and what is no sound."""

import numpy as np
import pytest
import soundfile

from g4lens.errors import InputError
from g4lens.inputs.sound import Audio, SoundSettings, mel_frames

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
    integers = mel_frames(Audio((tone() * 32768).astype(np.int16), rate=16_000), SETTINGS)
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
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 16_000)
    with pytest.raises(InputError, match=says):
        mel_frames(make(tmp_path), SETTINGS)


def test_settings_that_are_not_computed(tmp_path):
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": {"dither": 0.1}}')
    with pytest.raises(InputError, match=r"dither is 0.1, g4lens computes 0.0 only"):
        SoundSettings.from_json(tmp_path)
