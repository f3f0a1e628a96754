"""config.json: both kinds, both layouts, and everything that is refused."""

import copy
import json

import pytest

from g4lens.config import Gemma4Config, TextConfig
from g4lens.errors import ConfigError
from g4lens.resources import bundled
from tests.parity import checkpoints as made

RAW = made.config(made.E2B).to_dict()


def changed(**text):
    raw = copy.deepcopy(RAW)
    raw["text_config"].update(text)
    return raw


def test_what_follows_from_e2bs_numbers():
    cfg = TextConfig()
    assert cfg.horizon == 14
    assert [cfg.kv_source(i) for i in (0, 13, 14, 15, 18, 19, 33, 34)] == [
        0,
        13,
        14,
        13,
        13,
        14,
        13,
        14,
    ]
    assert len(cfg.readers(13)) == 17 and len(cfg.readers(14)) == 5 and cfg.readers(12) == (12,)
    assert [i for i in range(35) if cfg.is_global(i)] == [4, 9, 14, 19, 24, 29, 34]
    assert (cfg.d_head(4), cfg.d_head(5), cfg.window(5)) == (512, 256, 512)
    assert (cfg.d_mlp_at(14), cfg.d_mlp_at(15)) == (6144, 12_288)


@pytest.mark.parametrize("shape", [made.E2B, made.E4B, made.UNEVEN, made.UNSHARED])
def test_the_same_as_transformers_reads(shape):
    theirs = made.text_config(shape)
    cfg = Gemma4Config.from_dict(theirs.to_dict())
    for layer in range(cfg.n_layers):
        assert cfg.is_global(layer) == (theirs.layer_types[layer] == made.GLOBAL)
        assert cfg.d_head(layer) == theirs.per_layer_config[layer].head_dim
        assert cfg.owns_kv(layer) == (theirs.kv_sharing_modes[layer] != "reuse")


def test_the_hubs_layout_and_the_saved_one_agree(tmp_path):
    hub = changed(global_head_dim=16)
    del hub["text_config"]["per_layer_config"]
    (tmp_path / "config.json").write_text(json.dumps(hub))
    assert Gemma4Config.from_json(tmp_path) == Gemma4Config.from_dict(RAW)
    assert Gemma4Config.from_json(tmp_path / "config.json").vision is not None


def test_the_bundled_model_has_every_structural_case():
    cfg = Gemma4Config.from_json(bundled("data", "tiny"))
    assert cfg.n_layers == 15 and cfg.sliding_window == 16 and cfg.horizon == 9
    assert [i for i in range(15) if cfg.is_global(i)] == [4, 9, 14]
    assert cfg.double_wide_mlp and cfg.vision.clipped and cfg.audio.clipped


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"model_type": "gemma3"}, "model_type is 'gemma3', expected 'gemma4' or 'gemma4_text'"),
        ({}, "model_type is None"),
        ({"model_type": "gemma4"}, "text_config is absent"),
        (changed(enable_moe_block=True), "enable_moe_block"),
        (changed(num_experts=128), "num_experts"),
        (changed(attention_k_eq_v=True), "attention_k_eq_v is True"),
        (changed(use_bidirectional_attention="vision"), "use_bidirectional_attention is 'vision'"),
        (changed(attention_bias=True), "attention_bias"),
        (changed(hidden_size_per_layer_input=0), "per-layer embeddings"),
        (changed(tie_word_embeddings=False), "tie_word_embeddings"),
        (changed(hidden_activation="relu"), "hidden_activation is 'relu'"),
        (changed(final_logit_softcapping=None), "final_logit_softcapping is absent"),
        (changed(hidden_size=None), "hidden_size is absent"),
        (changed(num_hidden_layers=9), "layer_types names 10 blocks, num_hidden_layers says 9"),
        (changed(layer_types=["other"] * 10, per_layer_config=None), "layer_types holds"),
        (changed(num_kv_shared_layers=10), "num_kv_shared_layers is 10, expected 0 to 9"),
        (changed(num_kv_shared_layers=-1), "num_kv_shared_layers is -1"),
        (changed(num_kv_shared_layers=6), "read keys and values of global blocks, but none"),
        (changed(num_key_value_heads=3), "num_key_value_heads is 3, which does not divide"),
        (changed(num_key_value_heads=0), "num_key_value_heads is 0"),
        (changed(head_dim=7), "head_dim is 7, expected an even number"),
        (changed(vocab_size=10, vocab_size_per_layer_input=10), "id below the vocabulary's 10"),
        (
            changed(vocab_size_per_layer_input=10),
            "vocab_size_per_layer_input is 10, but vocab_size is 200",
        ),
        (changed(hidden_size="64"), "hidden_size is '64', expected"),
        (changed(hidden_size=-64), "hidden_size is -64, expected"),
        (changed(hidden_size=64.5), "hidden_size is 64.5, expected"),
        (changed(sliding_window=0), "sliding_window is 0, expected"),
        (changed(intermediate_size=True), "intermediate_size is True, expected"),
        (changed(rms_norm_eps="tiny"), "rms_norm_eps is 'tiny', expected"),
        (changed(final_logit_softcapping=-1), "final_logit_softcapping is -1, expected"),
        (changed(per_layer_config={"4": {"head_dim": 16}}), "per_layer_config overrides more than"),
        (changed(per_layer_config={"x": {}}), "a field has the wrong type|per_layer_config"),
        (changed(rope_parameters={"full_attention": {"rope_type": "yarn"}}), "rope_parameters"),
        ({**RAW, "vision_config": {**RAW["vision_config"], "standardize": True}}, "standardize"),
        ({**RAW, "vision_config": {**RAW["vision_config"], "head_dim": 6}}, "multiple of 4"),
        ({**RAW, "vision_config": {**RAW["vision_config"], "patch_size": 0}}, "patch_size is 0"),
        ({**RAW, "vision_config": []}, "vision_config is a list"),
        (
            {**RAW, "audio_config": {**RAW["audio_config"], "num_attention_heads": 5}},
            "does not divide",
        ),
        ({**RAW, "audio_config": {**RAW["audio_config"], "hidden_act": "relu"}}, "hidden_act"),
        ({**RAW, "text_config": 3}, "text_config is a int"),
        ({**RAW, "image_token_id": None}, "VisionConfig is given but no image_id"),
        ({**RAW, "image_token_id": 99_999}, "image_id is 99999"),
    ],
)
def test_refused(tmp_path, raw, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=says) as error:
        Gemma4Config.from_json(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null"])
def test_files_that_are_no_config(tmp_path, content):
    with pytest.raises(ConfigError, match="no such file"):
        Gemma4Config.from_json(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Gemma4Config.from_json(tmp_path)
