"""Every number that defines a Gemma 4 model, in one place.

The fields carry TransformerLens's names; `from_json` reads them from the `config.json` of a
checkpoint (transformers `models/gemma4/configuration_gemma4.py`), of the conditional-generation
kind (text, vision, audio) or the text-only kind. Whatever follows from other numbers is derived.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

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
        if len(self.layer_types) != self.n_layers:
            raise ConfigError(
                f"layer_types names {len(self.layer_types)} blocks, num_hidden_layers says {self.n_layers}"
            )
        if odd := set(self.layer_types) - {"local", "global"}:
            raise ConfigError(f"layer_types holds {odd}, expected only 'local' and 'global'")
        if not 0 <= self.n_kv_shared_layers < self.n_layers:
            raise ConfigError(
                f"num_kv_shared_layers is {self.n_kv_shared_layers}, expected 0 to {self.n_layers - 1}"
            )
        if orphans := set(self.layer_types) - set(self.layer_types[: self.horizon + 1]):
            raise ConfigError(
                f"the last {self.n_kv_shared_layers} blocks read keys and values of {orphans.pop()} "
                f"blocks, but none of the first {self.horizon + 1} is one"
            )
        for d_head in (self.d_head_local, self.d_head_global):
            _require_even("head_dim", d_head)
        _require_divides(
            "num_key_value_heads", self.n_kv_heads, "num_attention_heads", self.n_heads
        )

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
        if self.d_head % 4:
            raise ConfigError(
                f"vision head_dim is {self.d_head}, expected a multiple of 4 (x and y halves)"
            )


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
        _require_divides("audio num_attention_heads", self.n_heads, "hidden_size", self.d_model)
        _require_divides("4 (two stride-2 convolutions)", 4, "mel bands", self.n_mels)


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
        for field in (
            "pad_id",
            "bos_id",
            "boi_id",
            "image_id",
            "eoi_id",
            "boa_id",
            "audio_id",
            "eoa_id",
        ):
            value = getattr(self, field)
            if value is not None and not 0 <= value < self.d_vocab:
                raise ConfigError(
                    f"{field} is {value}, expected an id below the vocabulary's {self.d_vocab}"
                )
        for tower, field in ((self.vision, "image_id"), (self.audio, "audio_id")):
            if tower is not None and getattr(self, field) is None:
                raise ConfigError(
                    f"{type(tower).__name__} is given but no {field} marks its soft tokens"
                )

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
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(
                f"{path}: no such file, expected a checkpoint's config.json"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"{path}: not readable as JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path}: found a {type(raw).__name__}, expected an object")
        try:
            return cls.from_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        except (TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"{path}: a field has the wrong type ({error})") from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "Gemma4Config":
        """The same from the parsed JSON. Raises: ConfigError, as `from_json`."""
        kind = raw.get("model_type")
        if kind == "gemma4_text":
            return cls(**_text_fields(raw))
        if kind != "gemma4":
            raise ConfigError(f"model_type is {kind!r}, expected 'gemma4' or 'gemma4_text'")
        vision, audio = raw.get("vision_config"), raw.get("audio_config")
        return cls(
            **_text_fields(_need(raw, "text_config")),
            vision=None if vision is None else VisionConfig(**_vision_fields(vision)),
            audio=None if audio is None else AudioConfig(**_audio_fields(audio)),
            boi_id=raw.get("boi_token_id", 255_999),
            image_id=raw.get("image_token_id", 258_880),
            eoi_id=raw.get("eoi_token_id", 258_882),
            boa_id=raw.get("boa_token_id", 256_000),
            audio_id=raw.get("audio_token_id", 258_881),
            eoa_id=raw.get("eoa_token_index", raw.get("eoa_token_id", 258_883)),
            video_id=raw.get("video_token_id", 258_884),
        )


# ---- reading config.json: which of its fields become which of ours, and which values are refused

TYPE_NAMES = {"sliding_attention": "local", "full_attention": "global"}


def _text_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_variants(raw)
    n_layers = _need(raw, "num_hidden_layers")
    types = raw.get("layer_types") or ["sliding_attention"] * n_layers
    if raw.get("layer_types") is None:
        types[5::6] = ["full_attention"] * len(types[5::6])
        types[-1] = "full_attention"
    rope = raw.get("rope_parameters") or {}
    local, whole = rope.get("sliding_attention") or {}, rope.get("full_attention") or {}
    _refuse(
        local.get("rope_type", "default") != "default",
        "rope_parameters of sliding_attention",
        local,
    )
    _refuse(
        whole.get("rope_type", "proportional") != "proportional",
        "rope_parameters of full_attention",
        whole,
    )
    eos = raw.get("eos_token_id", 1)
    return {
        "n_layers": n_layers,
        "layer_types": tuple(TYPE_NAMES.get(kind, kind) for kind in types),
        "n_kv_shared_layers": raw.get("num_kv_shared_layers", 0),
        "d_model": _need(raw, "hidden_size"),
        "n_heads": _need(raw, "num_attention_heads"),
        "n_kv_heads": _need(raw, "num_key_value_heads"),
        "d_head_local": _need(raw, "head_dim"),
        "d_head_global": _global_head_dim(raw, types),
        "d_mlp": _need(raw, "intermediate_size"),
        "double_wide_mlp": raw.get("use_double_wide_mlp", False),
        "d_vocab": _need(raw, "vocab_size"),
        "d_ple": _need(raw, "hidden_size_per_layer_input"),
        "sliding_window": raw.get("sliding_window", 512),
        "n_ctx": raw.get("max_position_embeddings", 131_072),
        "rope_base_local": local.get("rope_theta", 10_000.0),
        "rope_base_global": whole.get("rope_theta", 1_000_000.0),
        "rope_fraction_global": whole.get("partial_rotary_factor", 0.25),
        "final_softcap": _need(raw, "final_logit_softcapping"),
        "eps": raw.get("rms_norm_eps", 1e-6),
        "pad_id": raw.get("pad_token_id", 0),
        "bos_id": raw.get("bos_token_id", 2),
        "eos_ids": tuple(eos) if isinstance(eos, list) else (eos,),
    }


def _refuse_variants(raw: Mapping[str, Any]) -> None:
    """The members of the family that compute something else are refused by name."""
    _refuse(raw.get("enable_moe_block"), "enable_moe_block (mixture of experts)", True)
    _refuse(raw.get("num_experts"), "num_experts (mixture of experts)", raw.get("num_experts"))
    _refuse(raw.get("attention_k_eq_v"), "attention_k_eq_v", True)
    for field in ("use_bidirectional_attention", "attention_bias"):
        _refuse(raw.get(field), field, raw.get(field))
    _refuse(not raw.get("tie_word_embeddings", True), "tie_word_embeddings", False)
    if not raw.get("hidden_size_per_layer_input"):
        raise ConfigError(
            "hidden_size_per_layer_input is 0 or absent: the E2B and E4B models have per-layer embeddings"
        )
    activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
    _refuse(activation != "gelu_pytorch_tanh", "hidden_activation", activation)
    vocab, ple_vocab = (
        raw.get("vocab_size"),
        raw.get("vocab_size_per_layer_input", raw.get("vocab_size")),
    )
    if vocab != ple_vocab:
        raise ConfigError(f"vocab_size_per_layer_input is {ple_vocab}, but vocab_size is {vocab}")


def _global_head_dim(raw: Mapping[str, Any], types: list[str]) -> int:
    """The hub writes `global_head_dim`; transformers 5.23 saves it as overrides per layer."""
    per_layer = raw.get("per_layer_config")
    if not per_layer:
        return raw.get("global_head_dim", 512)
    whole = {i for i, kind in enumerate(types) if kind == "full_attention"}
    found = {int(layer): dict(values) for layer, values in per_layer.items()}
    widths = {values.pop("head_dim", None) for values in found.values()}
    kv_heads = {
        values.pop("num_key_value_heads", raw.get("num_key_value_heads"))
        for values in found.values()
    }
    if (
        any(found.values())
        or set(found) != whole
        or len(widths) != 1
        or kv_heads != {raw.get("num_key_value_heads")}
    ):
        raise ConfigError(
            "per_layer_config overrides more than one common head_dim of all full_attention layers: "
            f"found {dict(per_layer)}"
        )
    return widths.pop() or _need(raw, "head_dim")


def _vision_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    _refuse(raw.get("standardize"), "vision standardize", True)
    _refuse(raw.get("attention_bias"), "vision attention_bias", True)
    heads, kv_heads = _need(raw, "num_attention_heads"), raw.get("num_key_value_heads")
    _refuse(kv_heads not in (None, heads), "vision num_key_value_heads", kv_heads)
    activation = raw.get("hidden_activation", "gelu_pytorch_tanh")
    _refuse(activation != "gelu_pytorch_tanh", "vision hidden_activation", activation)
    rope = raw.get("rope_parameters") or {}
    return {
        "n_layers": _need(raw, "num_hidden_layers"),
        "d_model": _need(raw, "hidden_size"),
        "n_heads": heads,
        "d_head": raw.get("head_dim") or raw["hidden_size"] // heads,
        "d_mlp": _need(raw, "intermediate_size"),
        "patch_size": raw.get("patch_size", 16),
        "pooling": raw.get("pooling_kernel_size", 3),
        "n_positions": raw.get("position_embedding_size", 10_240),
        "rope_base": rope.get("rope_theta", 100.0),
        "clipped": raw.get("use_clipped_linears", False),
        "eps": raw.get("rms_norm_eps", 1e-6),
    }


def _audio_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    activation = raw.get("hidden_act", "silu")
    _refuse(activation != "silu", "audio hidden_act", activation)
    first, second = raw.get("subsampling_conv_channels", (128, 32))
    return {
        "n_layers": _need(raw, "num_hidden_layers"),
        "d_model": _need(raw, "hidden_size"),
        "n_heads": _need(raw, "num_attention_heads"),
        "d_out": raw.get("output_proj_dims", 1536),
        # transformers sizes the projection behind the convolutions by the first channel count,
        # so that count is the number of mel bands: Gemma4AudioSubSampleConvProjection
        "n_mels": first,
        "conv_channels": (first, second),
        "conv_kernel": raw.get("conv_kernel_size", 5),
        "chunk": raw.get("attention_chunk_size", 12),
        "n_left": raw.get("attention_context_left", 13),
        "n_right": raw.get("attention_context_right", 0),
        "softcap": raw.get("attention_logit_cap", 50.0),
        "masked_score": raw.get("attention_invalid_logits_value", -1e9),
        "residual_weight": raw.get("residual_weight", 0.5),
        "clamp": raw.get("gradient_clipping", 1e10),
        "clipped": raw.get("use_clipped_linears", True),
        "eps": raw.get("rms_norm_eps", 1e-6),
    }


def _need(raw: Mapping[str, Any], field: str) -> Any:
    if raw.get(field) is None:
        raise ConfigError(f"{field} is absent")
    return raw[field]


def _refuse(found: Any, field: str, value: Any) -> None:
    if found:
        raise ConfigError(
            f"{field} is {value!r}: g4lens computes Gemma 4 E2B and E4B only, not this variant"
        )


def _require_even(field: str, value: int) -> None:
    if value % 2:
        raise ConfigError(f"{field} is {value}, expected an even number (rotation pairs channels)")


def _require_divides(small_name: str, small: int, large_name: str, large: int) -> None:
    if small <= 0 or large % small:
        raise ConfigError(f"{small_name} is {small}, which does not divide {large_name} {large}")
