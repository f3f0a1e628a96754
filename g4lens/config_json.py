"""The fields of a checkpoint's `config.json`, by the names that `config.py` gives them.

Source: transformers' `models/gemma4/configuration_gemma4.py`. Members of the family that compute
something else than E2B and E4B are refused by name.
"""

import json
from collections.abc import Mapping
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
        raise ConfigError(f"{path}: no such file, expected a checkpoint's config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: found a {type(raw).__name__}, expected an object")
    return raw


def text_fields(raw: Mapping[str, Any]) -> Fields:
    """The decoder's, from the text-only kind or the `text_config` of the other."""
    _refuse_variants(raw)
    found = _read(raw, TEXT_NAMES, TEXT_DEFAULTS)
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
    _refuse_if(raw, "standardize", "attention_bias")
    _expect(raw, "num_key_value_heads", raw.get("num_attention_heads"))
    _expect(raw, "hidden_activation", "gelu_pytorch_tanh")
    rope = _object(raw, "rope_parameters") or {}
    _expect(rope, "rope_type", "axial")
    return _read(raw, VISION_NAMES, VISION_DEFAULTS) | {"rope_base": rope.get("rope_theta", 100.0)}


def audio_fields(raw: Mapping[str, Any]) -> Fields:
    """The audio tower's."""
    _expect(raw, "hidden_act", "silu")
    found = _read(raw, AUDIO_NAMES, AUDIO_DEFAULTS)
    channels = found["conv_channels"]
    if not isinstance(channels, list) or len(channels) != 2:
        raise ConfigError(f"subsampling_conv_channels is {channels!r}, expected two numbers")
    # transformers sizes the projection behind the convolutions by the first channel count, so that
    # count is the number of mel bands: Gemma4AudioSubSampleConvProjection
    return found | {"conv_channels": tuple(channels), "n_mels": channels[0]}


def id_fields(raw: Mapping[str, Any]) -> Fields:
    """The ids of the tokens around and in place of pictures and sounds; None where absent."""
    return {ours: raw.get(theirs) for ours, theirs in ID_NAMES.items()}


def part(raw: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    """The config of one part of the model; None for a tower that it has not.

    Raises: ConfigError: it is no object, or asks for what g4lens does not compute.
    """
    _refuse_untied(raw)
    return _object(raw, field)


# ---- reading


def _read(raw: Mapping[str, Any], names: Mapping[str, str], defaults: Mapping[str, Any]) -> Fields:
    found = {ours: raw.get(theirs) for ours, theirs in names.items()}
    found = {name: defaults.get(name) if x is None else x for name, x in found.items()}
    absent = [names[ours] for ours, x in found.items() if x is None and ours not in defaults]
    if absent:
        raise ConfigError(f"{listed(absent)} absent, expected a value")
    return found


def _object(raw: Mapping[str, Any], field: str) -> Mapping[str, Any] | None:
    found = raw.get(field)
    if found is not None and not isinstance(found, Mapping):
        raise ConfigError(f"{field} is a {type(found).__name__}, expected an object")
    return found


def _layer_types(types: Any, n_layers: Any) -> tuple[str, ...]:
    if types is None and isinstance(n_layers, int) and 0 < n_layers <= 10_000:
        types = [LOCAL if (i + 1) % 6 else GLOBAL for i in range(n_layers - 1)] + [GLOBAL]
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise ConfigError(f"layer_types is {types!r}, expected a list of {LOCAL!r} and {GLOBAL!r}")
    if types[-1:] != [GLOBAL]:
        raise ConfigError(f"layer_types ends in {types[-1:]}, expected {GLOBAL!r} as its last")
    return tuple(TYPES.get(kind, kind) for kind in types)


def _rope(raw: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """The rotation of one kind of block: its base, and for global ones the share that turns."""
    given = _object(raw, "rope_parameters")
    rope = _object(DEFAULT_ROPE if given is None else given, kind)
    if rope is None or rope.get("rope_theta") is None:
        raise ConfigError(f"rope_parameters has no rope_theta for {kind}")
    _expect(rope, "rope_type", DEFAULT_ROPE[kind]["rope_type"], f"rope_parameters of {kind}: ")
    if odd := set(rope) - set(DEFAULT_ROPE[kind]):
        raise _variant(f"rope_parameters of {kind}: {listed(sorted(odd))}")
    return rope


def _global_head_dim(raw: Mapping[str, Any], layer_types: tuple[str, ...]) -> Any:
    """The hub writes `global_head_dim`; transformers 5.23 saves it as overrides per layer.

    Where both widths are the same it saves no override at all.
    """
    overrides = _object(raw, "per_layer_config")
    if overrides is None:
        return raw.get("global_head_dim", 512)
    if not overrides:
        return raw["head_dim"]
    kv_heads = raw.get("num_key_value_heads")
    width = _object(overrides, next(iter(overrides)))["head_dim"]  # type: ignore
    raise NotImplementedError((kv_heads, width, layer_types))
