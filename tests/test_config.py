"""config.json: both kinds, both layouts, and everything that is refused."""

import copy
import json
import math
import re

import pytest
from transformers import Gemma4TextConfig

from g4lens.config import Gemma4Config, TextConfig, VisionConfig
from g4lens.errors import ConfigError
from g4lens.resources import bundled
from tests.parity import checkpoints as made

RAW = made.config(made.E2B).to_dict()


def changed(**text):
    """RAW with other fields in its text_config; None removes one."""
    return part("text", **text)


def part(name, **fields):
    raw = copy.deepcopy(RAW)
    raw[f"{name}_config"].update(fields)
    return raw


def rope(**whole):
    """rope_parameters with other values for the global blocks."""
    parameters = copy.deepcopy(RAW["text_config"]["rope_parameters"])
    parameters["full_attention"].update(whole)
    return parameters


def test_what_follows_from_e2bs_numbers():
    cfg = TextConfig()
    assert cfg.horizon == 14
    sources = {0: 0, 13: 13, 14: 14, 15: 13, 18: 13, 19: 14, 33: 13, 34: 14}
    assert {layer: cfg.kv_source(layer) for layer in sources} == sources
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
        # another architecture, or a variant
        ({"model_type": "gemma3"}, "model_type is 'gemma3', expected 'gemma4' or 'gemma4_text'"),
        ({}, "model_type is None"),
        (changed(enable_moe_block=True), "enable_moe_block is True (mixture of experts)"),
        (changed(num_experts=128), "num_experts is 128"),
        (changed(attention_k_eq_v=True), "attention_k_eq_v is True"),
        (changed(use_bidirectional_attention="vision"), "use_bidirectional_attention is 'vision'"),
        (changed(attention_bias=True), "attention_bias is True"),
        (changed(hidden_size_per_layer_input=0), "hidden_size_per_layer_input is 0"),
        (changed(tie_word_embeddings=False), "tie_word_embeddings is False"),
        ({**RAW, "tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({**RAW, "quantization_config": {"bits": 4}}, "quantization_config"),
        (changed(hidden_activation="relu"), "hidden_activation is 'relu'"),
        (part("vision", standardize=True), "vision_config: standardize is True"),
        (part("vision", num_key_value_heads=2), "vision_config: num_key_value_heads is 2"),
        (part("vision", rope_parameters={"rope_type": "default"}), "rope_type is 'default'"),
        (part("audio", hidden_act="relu"), "audio_config: hidden_act is 'relu'"),
        (changed(rope_parameters=rope(rope_type="yarn")), "rope_type is 'yarn', expected"),
        (changed(rope_parameters=rope(factor=8.0)), "full_attention: factor"),
        # absent
        ({"model_type": "gemma4"}, "text_config is absent"),
        (changed(hidden_size=None), "text_config: hidden_size is absent"),
        (changed(head_dim=None, pad_token_id=None), "head_dim, pad_token_id are absent"),
        (changed(final_logit_softcapping=None), "final_logit_softcapping is absent"),
        (part("vision", hidden_size=None), "vision_config: hidden_size is absent"),
        (part("audio", num_attention_heads=None), "num_attention_heads is absent"),
        (changed(rope_parameters={}), "sliding_attention: rope_theta is absent"),
        (changed(eos_token_id=[]), "eos_token_id is empty"),
        ({**RAW, "image_token_id": None}, "image_token_id is absent, but there is a VisionConfig"),
        # of the wrong type, or no possible number
        (changed(hidden_size="64"), "hidden_size is '64', expected a whole number from 1"),
        (changed(hidden_size=-64), "hidden_size is -64"),
        (changed(hidden_size=64.5), "hidden_size is 64.5"),
        (changed(hidden_size=10**30), f"hidden_size is {10**30}"),
        (changed(intermediate_size=True), "intermediate_size is True"),
        (changed(sliding_window=0), "sliding_window is 0"),
        (changed(num_key_value_heads=0), "num_key_value_heads is 0"),
        (changed(num_kv_shared_layers=-1), "num_kv_shared_layers is -1"),
        (changed(num_kv_shared_layers="5"), "num_kv_shared_layers is '5'"),
        (changed(num_hidden_layers=10**9, layer_types=None), "layer_types is None, expected"),
        (changed(num_hidden_layers="x", layer_types=None), "layer_types is None, expected"),
        (changed(layer_types="full_attention"), "layer_types is 'full_attention', expected a list"),
        (changed(layer_types=[None] * 10), "layer_types is [None, "),
        (changed(layer_types=["other"] * 10), "layer_types is ['other', "),
        (changed(use_double_wide_mlp="yes"), "use_double_wide_mlp is 'yes', expected true or"),
        (changed(rms_norm_eps="tiny"), "rms_norm_eps is 'tiny', expected a number above 0"),
        (changed(final_logit_softcapping=-1), "final_logit_softcapping is -1"),
        (changed(final_logit_softcapping=math.nan), "final_logit_softcapping is nan"),
        (changed(rope_parameters=rope(rope_theta=math.inf)), "rope_theta of full_attention is inf"),
        (changed(rope_parameters=[]), "rope_parameters is a list, expected an object"),
        (changed(rope_parameters={"sliding_attention": 3}), "sliding_attention is a int"),
        (changed(per_layer_config=[]), "per_layer_config is a list"),
        (changed(per_layer_config={"4": 3}), "4 is a int, expected an object"),
        (changed(eos_token_id="</s>"), "eos_token_id </s> is '</s>', expected an id"),
        (part("vision", patch_size=0), "vision_config: patch_size is 0"),
        (part("vision", use_clipped_linears=1), "use_clipped_linears is 1"),
        (part("audio", subsampling_conv_channels=128), "subsampling_conv_channels is 128"),
        (part("audio", subsampling_conv_channels=[128, "x"]), "subsampling_conv_channels is 'x'"),
        (part("audio", attention_invalid_logits_value=1.0), "expected a number below 0"),
        ({**RAW, "vision_config": []}, "vision_config is a list, expected an object"),
        ({**RAW, "text_config": 3}, "text_config is a int, expected an object"),
        # in contradiction to each other
        (changed(num_hidden_layers=9), "layer_types names 10 blocks, num_hidden_layers says 9"),
        (changed(layer_types=[made.LOCAL] * 10), "layer_types ends in ['sliding_attention']"),
        (changed(num_kv_shared_layers=10), "num_kv_shared_layers is 10, expected at most 9"),
        (changed(num_kv_shared_layers=6), "layer_types has no global block whose keys"),
        (changed(num_key_value_heads=3), "num_attention_heads is 4, expected a multiple of 3"),
        (changed(head_dim=7), "head_dim is 7, expected a multiple of 2"),
        (changed(vocab_size_per_layer_input=10), "is 10, but vocab_size is 200"),
        (changed(per_layer_config={"4": {"head_dim": 16}}), "expected one common head_dim"),
        (changed(per_layer_config={"x": {}}), "expected one common head_dim"),
        (
            changed(per_layer_config={"4": {"head_dim": 16}, "9": {"head_dim": 32}}),
            "expected one common head_dim",
        ),
        (changed(rope_parameters=rope(partial_rotary_factor=1.5)), "partial_rotary_factor is 1.5"),
        (changed(pad_token_id=200), "pad_token_id is 200, expected an id below the vocabulary's"),
        (changed(eos_token_id=[1, -1]), "eos_token_id -1 is -1"),
        (part("vision", head_dim=6), "head_dim is 6, expected a multiple of 4"),
        (part("audio", num_attention_heads=5), "hidden_size is 32, expected a multiple of 5"),
        (part("audio", hidden_size=33, num_attention_heads=3), "33, expected a multiple of 2"),
        (part("audio", subsampling_conv_channels=[126, 32]), "mel bands is 126"),
        ({**RAW, "image_token_id": 99_999}, "image_token_id is 99999, expected an id below"),
        ({**RAW, "audio_token_id": made.IMAGE}, "two special tokens have one id"),
        ({**RAW, "image_token_id": 0}, "two special tokens have one id"),
    ],
)
def test_refused(tmp_path, raw, says):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        Gemma4Config.from_json(tmp_path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("heads", [8, 16])
def test_one_width_of_head_for_all_blocks(heads):
    """transformers saves no overrides where the two widths are the same."""
    theirs = made.text_config(made.E2B, head_dim=heads, global_head_dim=heads)
    assert theirs.to_dict()["per_layer_config"] == {}
    cfg = Gemma4Config.from_dict(theirs.to_dict())
    assert cfg.d_head_local == cfg.d_head_global == heads


def test_the_pattern_of_blocks_by_default():
    theirs = Gemma4TextConfig(num_hidden_layers=14, num_kv_shared_layers=4)
    raw = theirs.to_dict() | {"layer_types": None, "final_logit_softcapping": 30.0}
    assert Gemma4Config.from_dict(raw).layer_types == tuple(
        "global" if kind == made.GLOBAL else "local" for kind in theirs.layer_types
    )


def test_ids_that_nothing_needs_may_be_left_at_transformers_defaults():
    raw = RAW | {"video_token_id": 258_884, "boi_token_id": 255_999}
    cfg = Gemma4Config.from_dict(raw)
    assert cfg.video_id is None and cfg.boi_id is None and cfg.image_id == made.IMAGE
    blind = RAW | {"vision_config": None, "image_token_id": 258_880}
    assert Gemma4Config.from_dict(blind).image_id is None


def test_the_text_only_kind_has_no_towers_and_no_placeholders():
    cfg = Gemma4Config.from_dict(made.text_config(made.E4B).to_dict())
    assert (cfg.vision, cfg.audio, cfg.image_id, cfg.audio_id) == (None,) * 4


def test_a_config_made_by_hand_is_checked_too():
    with pytest.raises(ConfigError, match="num_key_value_heads is 0"):
        TextConfig(n_kv_heads=0)
    with pytest.raises(ConfigError, match=r"patch_size is 2\.5"):
        VisionConfig(patch_size=2.5)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_files_that_are_no_config(tmp_path, content):
    with pytest.raises(ConfigError, match="no such file"):
        Gemma4Config.from_json(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        Gemma4Config.from_json(tmp_path)
