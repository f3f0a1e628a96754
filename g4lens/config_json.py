"""The fields of a checkpoint's `config.json`, by the names that `config.py` gives them.

Source: transformers' `models/gemma4/configuration_gemma4.py`. Members of the family that compute
something else than E2B and E4B are refused by name.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from g4lens.errors import ConfigError, listed

TEXT_NAMES = {
    "n_layers": "num_hidden_layers",
    "layer_types": "layer_types",
    "n_kv_shared_layers": "num_kv_shared_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head_local": "head_dim",
    "d_mlp": "intermediate_size",
    "double_wide_mlp": "use_double_wide_mlp",
    "d_vocab": "vocab_size",
    "d_ple": "hidden_size_per_layer_input",
    "sliding_window": "sliding_window",
    "n_ctx": "max_position_embeddings",
    "final_softcap": "final_logit_softcapping",
    "eps": "rms_norm_eps",
    "pad_id": "pad_token_id",
    "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id",
}
NESTED_NAMES = {
    "d_head_global": "global_head_dim",
    "rope_base_local": "rope_theta of sliding_attention",
    "rope_base_global": "rope_theta of full_attention",
    "rope_fraction_global": "partial_rotary_factor",
}
VISION_NAMES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "patch_size": "patch_size",
    "pooling": "pooling_kernel_size",
    "n_positions": "position_embedding_size",
    "clipped": "use_clipped_linears",
    "eps": "rms_norm_eps",
}
AUDIO_NAMES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_out": "output_proj_dims",
    "conv_channels": "subsampling_conv_channels",
    "conv_kernel": "conv_kernel_size",
    "chunk": "attention_chunk_size",
    "n_left": "attention_context_left",
    "n_right": "attention_context_right",
    "softcap": "attention_logit_cap",
    "masked_score": "attention_invalid_logits_value",
    "residual_weight": "residual_weight",
    "clamp": "gradient_clipping",
    "clipped": "use_clipped_linears",
    "eps": "rms_norm_eps",
}
ID_NAMES = {
    "boi_id": "boi_token_id",
    "image_id": "image_token_id",
    "eoi_id": "eoi_token_id",
    "boa_id": "boa_token_id",
    "audio_id": "audio_token_id",
    "eoa_id": "eoa_token_index",
    "video_id": "video_token_id",
}

# What transformers takes a field to be that the file leaves out. All others must be there.
TEXT_DEFAULTS = {
    "layer_types": None,
    "n_kv_shared_layers": 0,
    "double_wide_mlp": False,
    "sliding_window": 512,
    "n_ctx": 131_072,
    "eps": 1e-6,
}
VISION_DEFAULTS = {
    "d_head": 64,
    "patch_size": 16,
    "pooling": 3,
    "n_positions": 10_240,
    "clipped": False,
    "eps": 1e-6,
}
AUDIO_DEFAULTS = {
    "d_out": 1536,
    "conv_channels": [128, 32],
    "conv_kernel": 5,
    "chunk": 12,
    "n_left": 13,
    "n_right": 0,
    "softcap": 50.0,
    "masked_score": -1e9,
    "residual_weight": 0.5,
    "clamp": 1e10,
    "clipped": True,
    "eps": 1e-6,
}
# Any of these makes another model of it.
VARIANTS = {
    "enable_moe_block": "mixture of experts",
    "num_experts": "mixture of experts",
    "attention_k_eq_v": "keys that are values",
    "attention_bias": "biases in attention",
    "use_bidirectional_attention": "attention to later positions",
    "standardize": "standardised soft tokens",
    "quantization_config": "quantised weights",
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
TYPES = {LOCAL: "local", GLOBAL: "global"}
DEFAULT_ROPE = {
    LOCAL: {"rope_type": "default", "rope_theta": 10_000.0},
    GLOBAL: {
        "rope_type": "proportional",
        "rope_theta": 1_000_000.0,
        "partial_rotary_factor": 0.25,
    },
}

Fields = dict[str, Any]


def parsed(path: Path) -> Mapping[str, Any]:
    """The object that a JSON file holds. Raises: ConfigError: it is absent, or holds none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file, expected a checkpoint's config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"found a {type(raw).__name__}, expected an object")
    return raw


@contextmanager
def named(what: object) -> Iterator[None]:
    """Say of what file or part an error in this block is."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}") from None


def subconfig(raw: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    """The object in a field; None where there is none. Raises: ConfigError: something else."""
    found = raw.get(field)
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{field} is a {type(found).__name__}, expected an object")
    return found


def refuse_variants(raw: Mapping[str, Any]) -> None:
    """Refuse what g4lens does not compute. Raises: ConfigError: names the field."""
    for field, what in VARIANTS.items():
        if raw.get(field):
            raise _variant(f"{field} is {raw[field]!r} ({what})")
    _expect(raw, "tie_word_embeddings", True)


def text_fields(raw: Mapping[str, Any]) -> Fields:
    """The decoder's, from the text-only kind or the `text_config` of the other."""
    refuse_variants(raw)
    _expect(raw, "hidden_activation", "gelu_pytorch_tanh")
    if raw.get("hidden_size_per_layer_input") == 0:
        raise _variant("hidden_size_per_layer_input is 0 (no per-layer embeddings)")
    found = _read(raw, TEXT_NAMES, TEXT_DEFAULTS)
    d_vocab, rows = found["d_vocab"], raw.get("vocab_size_per_layer_input")
    if rows not in (None, d_vocab):
        raise ConfigError(f"vocab_size_per_layer_input is {rows}, but vocab_size is {d_vocab}")
    found["layer_types"] = _layer_types(found["layer_types"], found["n_layers"])
    local, whole = _rope(raw, LOCAL), _rope(raw, GLOBAL)
    eos = found["eos_ids"]
    return found | {
        "d_head_global": _global_head_dim(raw, found["layer_types"]),
        "rope_base_local": local["rope_theta"],
        "rope_base_global": whole["rope_theta"],
        "rope_fraction_global": whole.get("partial_rotary_factor", 1.0),
        "eos_ids": tuple(eos) if isinstance(eos, list) else (eos,),
    }


def vision_fields(raw: Mapping[str, Any]) -> Fields:
    """The vision tower's."""
    refuse_variants(raw)
    _expect(raw, "hidden_activation", "gelu_pytorch_tanh")
    found = _read(raw, VISION_NAMES, VISION_DEFAULTS)
    _expect(raw, "num_key_value_heads", found["n_heads"])
    rope = subconfig(raw, "rope_parameters") or {}
    _expect(rope, "rope_type", "axial")
    return found | {"rope_base": rope.get("rope_theta", 100.0)}


def audio_fields(raw: Mapping[str, Any]) -> Fields:
    """The audio tower's."""
    refuse_variants(raw)
    _expect(raw, "hidden_act", "silu")
    found = _read(raw, AUDIO_NAMES, AUDIO_DEFAULTS)
    channels = found["conv_channels"]
    if not isinstance(channels, list) or len(channels) != 2:
        raise ConfigError(f"subsampling_conv_channels is {channels!r}, expected a list of two")
    # transformers sizes the projection behind the convolutions by the first channel count, so that
    # count is the number of mel bands: Gemma4AudioSubSampleConvProjection
    return found | {"conv_channels": tuple(channels), "n_mels": channels[0]}


def id_fields(raw: Mapping[str, Any], d_vocab: int) -> Fields:
    """The ids of the tokens around and in place of pictures and sounds; None where absent.

    A config that leaves them at transformers' defaults may name some that a small vocabulary has
    not. They are as good as absent, except those that a tower's soft tokens stand in for.
    """
    ids = {ours: raw.get(theirs) for ours, theirs in ID_NAMES.items()}
    needed = {"image_id": raw.get("vision_config"), "audio_id": raw.get("audio_config")}
    return {
        ours: None if isinstance(id_, int) and id_ >= d_vocab and not needed.get(ours) else id_
        for ours, id_ in ids.items()
    }


# ---- parts of these


def _read(raw: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]) -> Fields:
    given = {ours: raw.get(theirs) for ours, theirs in names.items()}
    absent = [names[ours] for ours, x in given.items() if x is None and ours not in defaults]
    if absent:
        verb = "is" if len(absent) == 1 else "are"
        raise ConfigError(f"{listed(absent)} {verb} absent")
    return {ours: defaults[ours] if x is None else x for ours, x in given.items()}


def _layer_types(types: Any, n_layers: Any) -> tuple[str, ...]:
    """By default every sixth block is global, and the last."""
    if types is None and isinstance(n_layers, int) and 0 < n_layers <= 1000:
        types = [GLOBAL if i % 6 == 5 else LOCAL for i in range(n_layers - 1)] + [GLOBAL]
    if not isinstance(types, list) or any(kind not in (LOCAL, GLOBAL) for kind in types):
        raise ConfigError(f"layer_types is {types!r}, expected a list of {LOCAL!r} and {GLOBAL!r}")
    if types[-1:] != [GLOBAL]:
        raise ConfigError(f"layer_types ends in {types[-1:]}, expected {GLOBAL!r} at its end")
    return tuple(TYPES[kind] for kind in types)


def _rope(raw: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """How one kind of block rotates: its base and, in global ones, the share that turns."""
    given = subconfig(raw, "rope_parameters")
    rope, known = subconfig(DEFAULT_ROPE if given is None else given, kind), DEFAULT_ROPE[kind]
    with named(f"rope_parameters, {kind}"):
        if rope is None or rope.get("rope_theta") is None:
            raise ConfigError("rope_theta is absent")
        _expect(rope, "rope_type", known["rope_type"])
        if odd := sorted(set(rope) - {*known, "partial_rotary_factor"}):
            raise _variant(listed(odd))
    return rope


def _global_head_dim(raw: Mapping[str, Any], layer_types: tuple[str, ...]) -> Any:
    """The hub writes `global_head_dim`; transformers 5.23 saves it as overrides per layer.

    Where both widths are the same it saves no overrides.
    """
    overrides = subconfig(raw, "per_layer_config")
    if overrides is None:
        return raw.get("global_head_dim", 512)
    if not overrides:
        return raw["head_dim"]
    same = {"num_key_value_heads": raw["num_key_value_heads"]}
    found = {
        int(layer) if str(layer).isdecimal() else layer: {
            k: v for k, v in (subconfig(overrides, layer) or {}).items() if same.get(k) != v
        }
        for layer in overrides
    }
    width = next(iter(found.values())).get("head_dim")
    whole = [layer for layer, kind in enumerate(layer_types) if kind == "global"]
    if found != {layer: {"head_dim": width} for layer in whole}:
        raise ConfigError(
            f"per_layer_config is {dict(overrides)}, expected one common head_dim for each "
            f"{GLOBAL} block and nothing else"
        )
    return width


def _expect(raw: Mapping[str, Any], field: str, expected: Any) -> None:
    """A field that is there must say this."""
    if raw.get(field) not in (None, expected):
        raise _variant(f"{field} is {raw[field]!r}, expected {expected!r}")


def _variant(what: str) -> ConfigError:
    return ConfigError(f"{what}: g4lens computes Gemma 4 E2B and E4B, not this variant")
