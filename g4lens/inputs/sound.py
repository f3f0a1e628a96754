"""Sounds: decoded, mixed to mono, resampled, cut at 30 s, and turned into log-mel frames.

Equal to `Gemma4AudioFeatureExtractor` of transformers'
`models/gemma4/feature_extraction_gemma4.py`.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from g4lens.errors import InputError
from g4lens.inputs.image import refuse_others, settings_of

MAX_SECONDS = 30
PAD_TO = 128  # the extractor pads the samples to a multiple of this


class Audio:
    """A sound for a prompt.

    Args:
        source: a path (wav, flac, ogg, mp3), or an array `[sample]` or `[sample, channel]` of
            floats from -1 to 1 or of integers.
        rate: samples a second of an array; a file knows its own.
    """

    def __init__(self, source: Any, rate: float | None = None):
        self.source = Path(source) if isinstance(source, str) else source
        self.rate = rate
        if isinstance(source, str) and "://" in source:
            raise InputError(
                f"Audio({source!r}): found a URL, expected a path (g4lens fetches no media)"
            )
        if isinstance(self.source, Path):
            if rate is not None:
                raise InputError(f"{self}: rate={rate} given for a file, which knows its own")
        elif rate is None:
            raise InputError(f"{self}: an array needs its rate=, in samples a second")
        elif not (np.isfinite(rate) and 100 <= rate <= 1_000_000):
            raise InputError(f"{self}: rate is {rate}, expected 100 to 1,000,000 samples a second")

    def __repr__(self) -> str:
        if isinstance(self.source, Path):
            return f"Audio({str(self.source)!r})"
        shape = getattr(self.source, "shape", "")
        return f"Audio({type(self.source).__name__} {shape}, rate={self.rate})"


@dataclass(frozen=True)
class SoundSettings:
    """How sounds are turned into frames.

    Attributes:
        rate: samples a second.
        n_mels: bands of the mel scale.
        frame, hop: samples in a frame, and from one to the next.
        low, high: ends of the mel scale, in Hz.
        floor: added before the logarithm.
    """

    rate: int = 16_000
    n_mels: int = 128
    frame: int = 320
    hop: int = 160
    low: float = 0.0
    high: float = 8_000.0
    floor: float = 1e-3

    @property
    def n_fft(self) -> int:
        """Length of the Fourier transform: the power of two that holds a frame."""
        return 1 << (self.frame - 1).bit_length()

    @classmethod
    def from_json(cls, folder: str | Path) -> "SoundSettings":
        """Read `processor_config.json` or `preprocessor_config.json`, or else take the defaults.

        Raises: InputError: settings that ask for something else than Gemma 4's preprocessing.
        """
        raw, path = settings_of(folder, "feature_extractor")
        plain = {
            "dither": 0.0,
            "preemphasis": 0.0,
            "input_scale_factor": 1.0,
            "per_bin_mean": None,
            "per_bin_stddev": None,
            "fft_overdrive": False,
        }
        refuse_others(raw, plain, path)
        rate = raw.get("sampling_rate", 16_000)
        return cls(
            rate,
            raw.get("feature_size", 128),
            raw.get("frame_length") or round(rate * raw.get("frame_length_ms", 20.0) / 1000),
            raw.get("hop_length") or round(rate * raw.get("hop_length_ms", 10.0) / 1000),
            raw.get("min_frequency", 0.0),
            raw.get("max_frequency", 8_000.0),
            raw.get("mel_floor", 1e-3),
        )


@dataclass(frozen=True, eq=False)
class MelFrames:
    """A sound as the audio tower reads it.

    Attributes:
        mel: log-mel frames, zero where padded.
        mask: the frames that hold nothing but sound.
        seconds: how long the sound is, at most 30.
        frame_seconds: from one frame to the next.
    """

    mel: Float[Tensor, "frame mel"]
    mask: Bool[Tensor, "frame"]
    seconds: float
    frame_seconds: float = 0.01

    @property
    def n_soft_tokens(self) -> int:
        """How many soft tokens it becomes: two convolutions of stride 2 leave a fourth."""
        return int(self.mask[::2][::2].sum())

    def span(self, k: int) -> tuple[float, float]:
        """Start and end of the k-th soft token, in seconds."""
        width = 4 * self.frame_seconds
        return k * width, min((k + 1) * width, self.seconds)


def mel_frames(sound: Audio, settings: SoundSettings) -> MelFrames:
    """Decode a sound and compute its frames.

    Raises:
        InputError: a sound that cannot be decoded, is empty, silent, shorter than a frame, or not
            finite.
    """
    wave = _samples(sound, settings.rate)
    n = len(wave)
    padded = np.pad(wave, (settings.frame // 2, -n % PAD_TO))
    # A frame counts as sound if its window, and the one sample behind it, lies within the samples.
    starts = np.arange(0, len(padded) - settings.frame, settings.hop)
    mask = starts + settings.frame < n + settings.frame // 2
    if not mask.any():
        need = settings.frame // 2 + 1
        raise InputError(f"{sound}: {n} samples at {settings.rate} Hz, expected at least {need}")
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(settings.frame) / settings.frame)).astype(
        np.float32
    )
    frames = np.lib.stride_tricks.sliding_window_view(padded, settings.frame)[starts] * window
    magnitude = np.abs(np.fft.rfft(frames, n=settings.n_fft, axis=-1))
    mel = np.log(magnitude @ mel_bands(settings) + settings.floor).astype(np.float32)
    return MelFrames(
        torch.from_numpy(mel * mask[:, None]),
        torch.from_numpy(mask),
        n / settings.rate,
        settings.hop / settings.rate,
    )


@lru_cache(maxsize=8)
def mel_bands(settings: SoundSettings) -> np.ndarray:
    """Triangular bands `[frequency, mel]`, even on HTK's mel scale 2595 log10(1 + f / 700)."""
    low, high = (2595 * np.log10(1 + hz / 700) for hz in (settings.low, settings.high))
    edges = 700 * (10 ** (np.linspace(low, high, settings.n_mels + 2) / 2595) - 1)
    bins = np.linspace(0, settings.rate // 2, settings.n_fft // 2 + 1)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def _samples(sound: Audio, rate: int) -> np.ndarray:
    """Mono samples at the rate, float32, at most 30 s of them."""
    wave, found_rate, is_longer = _read(sound)
    if wave.ndim not in (1, 2) or 0 in wave.shape:
        raise InputError(
            f"{sound}: samples are {wave.shape}, expected [sample] or [sample, channel], not empty"
        )
    if not np.isfinite(wave).all():
        raise InputError(f"{sound}: the samples hold NaN or infinity")
    if not wave.any():
        raise InputError(f"{sound}: all samples are zero, the sound is silent")
    if is_longer:
        warnings.warn(f"{sound} is longer than {MAX_SECONDS} s: the rest is cut off", stacklevel=2)
    mono = wave if wave.ndim == 1 else wave.mean(axis=1)
    if found_rate != rate:
        import soxr

        mono = soxr.resample(mono, found_rate, rate)
    return mono[: MAX_SECONDS * rate].astype(np.float32)


def _read(sound: Audio) -> tuple[np.ndarray, float, bool]:
    """The first 30 s of samples as floats, their rate, and whether there were more."""
    if sound.rate is not None:
        samples = np.asarray(sound.source)
        if np.issubdtype(samples.dtype, np.signedinteger):
            samples = samples / -float(np.iinfo(samples.dtype).min)
        elif not np.issubdtype(samples.dtype, np.floating):
            raise InputError(
                f"{sound}: samples are {samples.dtype}, expected floats or signed integers"
            )
        most = round(MAX_SECONDS * sound.rate)
        if samples.ndim == 0:
            return samples, sound.rate, False
        return samples[:most], sound.rate, len(samples) > most
    import soundfile

    if not sound.source.is_file():
        raise InputError(f"{sound}: no such file")
    try:
        with soundfile.SoundFile(sound.source) as file:
            most = MAX_SECONDS * file.samplerate
            samples = file.read(most + 1, dtype="float32")
            return samples[:most], file.samplerate, len(samples) > most
    except (soundfile.SoundFileError, OSError, ValueError) as error:
        raise InputError(f"{sound}: not readable as a sound ({error})") from None
