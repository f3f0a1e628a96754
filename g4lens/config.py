"""Every number that defines a Gemma 4 model, in one place.

The fields carry TransformerLens's names; `from_json` reads them from the `config.json` of a
checkpoint (transformers `models/gemma4/configuration_gemma4.py`), of the conditional-generation
kind (text, vision, audio) or the text-only kind. Whatever follows from other numbers is derived.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from g4lens import config_json
from g4lens.errors import ConfigError

E2B_LAYERS = ("local", "local", "local", "local", "global") * 7


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text decoder. Defaults are the released E2B checkpoint.

    Args:
        layer_types: "local" or "global" for each block.
        n_kv_shared_layers: so many last blocks read the keys and values of earlier ones.
        d_ple: width of each block's own embedding of the token.
        double_wide_mlp: reader blocks have an MLP of twice `d_mlp`.
        n_ctx: longest prompt, in tokens.
        rope_fraction_global: share of a global head's channel pairs that rotate.
    """

    n_layers: int = 35
    layer_types: tuple[str, ...] = E2B_LAYERS
    n_kv_shared_layers: int = 20
    d_model: int = 1536
    n_heads: int = 8
    n_kv_heads: int = 1
    d_head_local: int = 256
    d_head_global: int = 512
    d_mlp: int = 6144
    double_wide_mlp: bool = True
    d_vocab: int = 262_144
    d_ple: int = 256
    sliding_window: int = 512
    n_ctx: int = 131_072
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_fraction_global: float = 0.25
    final_softcap: float = 30.0
    eps: float = 1e-6
    pad_id: int = 0
    bos_id: int = 2
    eos_ids: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            ConfigError: naming the fields, what they say and what would agree.
        """
        _check_numbers(self, config_json.TEXT_NAMES | config_json.NESTED_NAMES)
        if len(self.layer_types) != self.n_layers:
            raise ConfigError(
                f"layer_types names {len(self.layer_types)} blocks, num_hidden_layers says "
                f"{self.n_layers}"
            )
        if odd := set(self.layer_types) - {"local", "global"}:
            raise ConfigError(f"layer_types holds {odd}, expected only 'local' and 'global'")
        if self.n_kv_shared_layers >= self.n_layers:
            raise ConfigError(
                f"num_kv_shared_layers is {self.n_kv_shared_layers}, expected at most "
                f"{self.n_layers - 1}: the first block owns its keys and values"
            )
        if orphans := set(self.layer_types) - set(self.layer_types[: self.horizon + 1]):
            raise ConfigError(
                f"num_kv_shared_layers is {self.n_kv_shared_layers}, but layer_types has no "
                f"{orphans.pop()} block whose keys and values they could read"
            )
        _check_multiple("head_dim", self.d_head_local, 2, "rotation pairs channels")
        _check_multiple("global_head_dim", self.d_head_global, 2, "rotation pairs channels")
        _check_multiple("num_attention_heads", self.n_heads, self.n_kv_heads, "num_key_value_heads")
        if self.rope_fraction_global > 1:
            raise ConfigError(
                f"partial_rotary_factor is {self.rope_fraction_global}, expected at most 1"
            )
        if not self.eos_ids:
            raise ConfigError("eos_token_id is empty, expected at least one id")
        ids = {"pad_token_id": self.pad_id, "bos_token_id": self.bos_id}
        _check_ids(self.d_vocab, ids | {f"eos_token_id {id_}": id_ for id_ in self.eos_ids})

    def is_global(self, layer: int) -> bool:
        """Does this block attend to every earlier position, not only to the window?"""
        return self.layer_types[layer] == "global"

    def window(self, layer: int) -> int:
        """How many keys a query of this block can reach, its own included."""
        return self.n_ctx if self.is_global(layer) else self.sliding_window

    def d_head(self, layer: int) -> int:
        """Width of one attention head of this block."""
        return self.d_head_global if self.is_global(layer) else self.d_head_local

    def d_mlp_at(self, layer: int) -> int:
        """Width of this block's MLP: readers spend what they save on keys and values on it."""
        return 2 * self.d_mlp if self.double_wide_mlp and not self.owns_kv(layer) else self.d_mlp

    @property
    def horizon(self) -> int:
        """The last block that owns keys and values; after it positions exchange nothing new."""
        return self.n_layers - self.n_kv_shared_layers - 1

    def owns_kv(self, layer: int) -> bool:
        """Does this block compute its own keys and values?"""
        return layer <= self.horizon

    def kv_source(self, layer: int) -> int:
        """The block whose keys and values this one reads: itself, or the last owner of its type."""
        return layer if self.owns_kv(layer) else self._last_owner[self.layer_types[layer]]

    def readers(self, layer: int) -> tuple[int, ...]:
        """The blocks, itself included, that attend to the keys and values of this block."""
        return tuple(i for i in range(self.n_layers) if self.kv_source(i) == layer)

    @cached_property
    def _last_owner(self) -> dict[str, int]:
        return {self.layer_types[i]: i for i in range(self.horizon + 1)}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision tower. Defaults are the released E2B checkpoint."""

    n_layers: int = 16
    d_model: int = 768
    n_heads: int = 12
    d_head: int = 64
    d_mlp: int = 3072
    patch_size: int = 16
    pooling: int = 3  # a soft token is the mean of pooling x pooling patches
    n_positions: int = 10_240  # rows of the table of x (and of y) positions
    rope_base: float = 100.0
    clipped: bool = True
    eps: float = 1e-6

    @property
    def d_patch(self) -> int:
        """Numbers in one flattened patch: row, column, channel."""
        return 3 * self.patch_size**2

    def __post_init__(self) -> None:
        _check_numbers(self, config_json.VISION_NAMES)
        _check_multiple("head_dim", self.d_head, 4, "pairs of channels turn by x and by y")


@dataclass(frozen=True, kw_only=True)
class AudioConfig:
    """The audio tower. Defaults are the released E2B checkpoint."""

    n_layers: int = 12
    d_model: int = 1024
    n_heads: int = 8
    d_out: int = 1536
    n_mels: int = 128
    conv_channels: tuple[int, int] = (128, 32)
    conv_kernel: int = 5
    chunk: int = 12
    n_left: int = 13  # a query reaches n_left - 1 keys, its own included
    n_right: int = 0
    softcap: float = 50.0
    masked_score: float = -1e9
    residual_weight: float = 0.5
    clamp: float = 1e10
    clipped: bool = True
    eps: float = 1e-6

    @property
    def d_head(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    @property
    def n_keys(self) -> int:
        """Keys in the context of one chunk of queries."""
        return self.chunk + self.n_left - 1 + self.n_right

    def __post_init__(self) -> None:
        _check_numbers(self, config_json.AUDIO_NAMES)
        for channels in self.conv_channels:
            _check_size("subsampling_conv_channels", channels)
        _check_multiple("hidden_size", self.d_model, self.n_heads, "num_attention_heads")
        _check_multiple("hidden_size", self.d_model, 2, "distances are sines and cosines")
        _check_multiple("the number of mel bands", self.n_mels, 4, "two convolutions of stride 2")


@dataclass(frozen=True, kw_only=True)
class Gemma4Config(TextConfig):
    """A whole model: the decoder's numbers at the root, the towers' under `vision` and `audio`.

    The ids of special tokens come from here and from the tokenizer, none from code. A text-only
    checkpoint has no towers and no such ids.
    """

    vision: VisionConfig | None = None
    audio: AudioConfig | None = None
    boi_id: int | None = None
    image_id: int | None = None
    eoi_id: int | None = None
    boa_id: int | None = None
    audio_id: int | None = None
    eoa_id: int | None = None
    video_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = {name: getattr(self, ours) for ours, name in config_json.ID_NAMES.items()}
        ids = {name: id_ for name, id_ in ids.items() if id_ is not None}
        _check_ids(self.d_vocab, ids)
        apart = {*ids.values(), self.pad_id}
        if len(apart) <= len(ids):
            raise ConfigError(f"two special tokens have one id: {ids}, pad_token_id {self.pad_id}")
        for tower, needed in ((self.vision, "image_token_id"), (self.audio, "audio_token_id")):
            if tower is not None and needed not in ids:
                raise ConfigError(f"{needed} is absent, but there is a {type(tower).__name__}")

    @classmethod
    def from_json(cls, path: str | Path) -> "Gemma4Config":
        """Read a checkpoint's `config.json`.

        Args:
            path: the file, or the folder that holds it.

        Raises:
            ConfigError: the file is absent or no JSON, of another architecture, asks for a variant
                that g4lens does not compute, or contradicts itself.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        with config_json.named(path):
            return cls.from_dict(config_json.parsed(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Gemma4Config":
        """The same from the parsed JSON. Raises: ConfigError, as `from_json`."""
        kind = raw.get("model_type")
        if kind == "gemma4_text":
            return cls(**config_json.text_fields(raw))
        if kind != "gemma4":
            raise ConfigError(f"model_type is {kind!r}, expected 'gemma4' or 'gemma4_text'")
        config_json.refuse_variants(raw)
        text, vision, audio = (
            config_json.subconfig(raw, f"{part}_config") for part in ("text", "vision", "audio")
        )
        if text is None:
            raise ConfigError("text_config is absent")
        with config_json.named("text_config"):
            decoder = config_json.text_fields(text)
            d_vocab = TextConfig(**decoder).d_vocab
        with config_json.named("vision_config"):
            eye = None if vision is None else VisionConfig(**config_json.vision_fields(vision))
        with config_json.named("audio_config"):
            ear = None if audio is None else AudioConfig(**config_json.audio_fields(audio))
        ids = config_json.id_fields(raw, d_vocab)
        return cls(**decoder, vision=eye, audio=ear, **ids)


# ---- checks

LARGEST = 2**24  # of any one number: beyond all models, and a table of such sides can be described
MAY_BE_ZERO = ("n_kv_shared_layers", "n_right", "pad_id", "bos_id")
BELOW_ZERO = ("masked_score",)


def _check_numbers(cfg: Any, names: Mapping[str, str]) -> None:
    """Refuse a field of the wrong type or outside its range, under its name in config.json."""
    for field in fields(cfg):
        value, name = getattr(cfg, field.name), names.get(field.name, field.name)
        if field.type is int:
            _check_size(name, value, least=0 if field.name in MAY_BE_ZERO else 1)
        elif field.type is bool and not isinstance(value, bool):
            raise ConfigError(f"{name} is {value!r}, expected true or false")
        elif field.type is float:
            sign, side = (-1, "below") if field.name in BELOW_ZERO else (1, "above")
            if type(value) not in (int, float) or not 0 < sign * value < math.inf:
                raise ConfigError(f"{name} is {value!r}, expected a number {side} 0")


def _check_size(name: str, value: Any, least: int = 1) -> None:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ConfigError(
            f"{name} is {value!r}, expected a whole number from {least} to {LARGEST:,}"
        )


def _check_ids(d_vocab: int, ids: Mapping[str, Any]) -> None:
    for name, id_ in ids.items():
        if type(id_) is not int or not 0 <= id_ < d_vocab:
            raise ConfigError(f"{name} is {id_!r}, expected an id below the vocabulary's {d_vocab}")


def _check_multiple(name: str, value: int, of: int, why: str) -> None:
    if value % of:
        raise ConfigError(f"{name} is {value}, expected a multiple of {of} ({why})")
