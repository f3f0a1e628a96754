"""Random checkpoints, made by transformers, in which nothing is left at its default."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)

LOCAL, GLOBAL = "sliding_attention", "full_attention"
VOCABULARY, IMAGE, AUDIO, VIDEO, BOI, EOI, BOA, EOA = 200, 190, 191, 192, 193, 194, 195, 196
NOT_STORED = ("inv_freq", "embed_scale", "softcap", "inv_timescales")

E2B = {
    "num_hidden_layers": 10,
    "layer_types": ([LOCAL] * 4 + [GLOBAL]) * 2,
    "num_kv_shared_layers": 5,
    "num_key_value_heads": 1,
    "use_double_wide_mlp": True,
}
E4B = {
    "num_hidden_layers": 12,
    "layer_types": ([LOCAL] * 5 + [GLOBAL]) * 2,
    "num_kv_shared_layers": 5,
    "num_key_value_heads": 2,
    "use_double_wide_mlp": False,
}
UNEVEN = {
    "num_hidden_layers": 9,
    "layer_types": [LOCAL, GLOBAL, LOCAL, GLOBAL, LOCAL, LOCAL, GLOBAL, LOCAL, GLOBAL],
    "num_kv_shared_layers": 4,
    "num_key_value_heads": 2,
    "use_double_wide_mlp": True,
}
UNSHARED = {**UNEVEN, "num_kv_shared_layers": 0}


def text_config(shape: dict, **changes) -> Gemma4TextConfig:
    """A small decoder of some shape."""
    small = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "head_dim": 8,
        "global_head_dim": 16,
        "sliding_window": 8,
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 1024,
    }
    return Gemma4TextConfig(**{**small, **shape, **changes})


def config(shape: dict, **changes) -> Gemma4Config:
    """The same with two small towers."""
    return Gemma4Config(
        text_config=text_config(shape, **changes),
        vision_config=Gemma4VisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=8,
            position_embedding_size=64,
            use_clipped_linears=True,
        ),
        audio_config=Gemma4AudioConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, output_proj_dims=48
        ),
        image_token_id=IMAGE,
        audio_token_id=AUDIO,
        video_token_id=VIDEO,
        boi_token_id=BOI,
        eoi_token_id=EOI,
        boa_token_id=BOA,
        eoa_token_index=EOA,
    )


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Draw every parameter and buffer: gains, layer scalars, clip bounds and tables too."""
    random = torch.Generator().manual_seed(seed)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, x in tensors.items():
        if name.endswith(NOT_STORED):
            continue
        if name.endswith(("_min", "_max")):
            bound = 1 + torch.rand(x.shape, generator=random)
            x.copy_(bound if name.endswith("_max") else -bound)
        elif "embed_tokens" in name:
            x.copy_(torch.randn(x.shape, generator=random) * x.shape[1] ** -0.5)
        elif x.ndim > 1:
            x.copy_(torch.randn(x.shape, generator=random) * x[0].numel() ** -0.5)
        else:
            x.copy_(torch.rand(x.shape, generator=random) + 0.5)
    return model.requires_grad_(False).eval()


def reference(
    config: Gemma4Config | Gemma4TextConfig, seed: int = 0, attention: str = "eager"
) -> Gemma4ForConditionalGeneration | Gemma4ForCausalLM:
    """A random model of transformers; text-only for a text config."""
    kind = (
        Gemma4ForCausalLM
        if isinstance(config, Gemma4TextConfig)
        else Gemma4ForConditionalGeneration
    )
    return randomise(kind._from_config(config, attn_implementation=attention), seed)


def as_hub(folder: Path, dtype: torch.dtype = torch.float32, n_shards: int = 2) -> None:
    """Rewrite what transformers saved as the hub ships it.

    Shards with an index, `global_head_dim` in the config, keys and values that no block reads.
    """
    raw = json.loads((folder / "config.json").read_text())
    text = raw["text_config"]
    overrides = text.pop("per_layer_config")
    text["global_head_dim"] = next(iter(overrides.values()))["head_dim"]
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    for layer in range(
        text["num_hidden_layers"] - text["num_kv_shared_layers"], text["num_hidden_layers"]
    ):
        at = f"model.language_model.layers.{layer}.self_attn"
        is_global = text["layer_types"][layer] == GLOBAL
        d_head = text["global_head_dim"] if is_global else text["head_dim"]
        for part in ("k_proj", "v_proj"):
            width = d_head * text["num_key_value_heads"]
            tensors[f"{at}.{part}.weight"] = torch.randn(width, text["hidden_size"], dtype=dtype)
        for part in ("k_norm", "v_norm"):
            tensors[f"{at}.{part}.weight"] = torch.randn(d_head, dtype=dtype)
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05}-of-{n_shards:05}.safetensors"
        part = names[i::n_shards]
        save_file({name: tensors[name] for name in part}, folder / shard)
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
