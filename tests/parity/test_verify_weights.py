"""`g4lens verify-weights` on random checkpoints: it passes, and names the block that differs."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import Gemma4Config, Gemma4ForConditionalGeneration

import g4lens
from g4lens.cli import main, verify_weights
from g4lens.errors import ConfigError, InputError, WeightsError
from g4lens.resources import bundled
from tests.parity import checkpoints as made

BESIDE = ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "processor_config.json")


def random(config):
    """A random model whose heads, in half precision too, look where numbers say, not rounding."""
    model = made.reference(config)
    for name, gain in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            gain.mul_(0.3)
    return model


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """The bundled geometry and tokenizer with random weights: text, a picture and a sound."""
    folder, tiny = tmp_path_factory.mktemp("seeing"), bundled("data", "tiny")
    random(Gemma4Config.from_pretrained(tiny)).save_pretrained(folder)
    for name in BESIDE:
        shutil.copyfile(tiny / name, folder / name)
    return folder


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_text_picture_and_sound(seeing, dtype, capsys):
    command = ["verify-weights", str(seeing), "--json"]
    assert main(command if dtype is None else [*command, "--dtype", dtype]) == 0
    told = json.loads(capsys.readouterr().out)
    places = {row["what"] for row in told["rows"]}
    assert {"vision.hook_image_tokens", "audio.hook_audio_tokens", "logits"} < places
    parts = ("attn_out", "mlp_out", "ple_out", "resid_post")
    blocks = {f"blocks.{i}.hook_{part}" for i in range(15) for part in parts}
    assert len(places) == len(told["rows"]) == len(blocks) + 4 and blocks | {"hook_embed"} < places
    assert told["compared"] == ["text", "picture", "sound"]
    cfg = g4lens.Gemma4Config.from_json(seeing)
    assert {cfg.image_id, cfg.audio_id} < set(told["tokens"])
    assert told["sha256"] == g4lens.load(seeing).source.hashes
    assert told["dtype"] == (dtype or "float32") and told["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("config", [made.text_config(made.E2B), made.config(made.E4B)])
def test_without_a_tokenizer(tmp_path, config, capfd):
    """Words alone are compared, and the report says so; transformers' own bars stay silent."""
    made.reference(config).save_pretrained(tmp_path)
    capfd.readouterr()
    assert main(["verify-weights", str(tmp_path)]) == 0
    printed, silent = capfd.readouterr()
    assert "32 tokens of text, beside transformers" in printed and printed.count("sha256") == 1
    assert "passed" in printed and "DIFFERS" not in printed and silent == ""
    assert main(["verify-weights", str(tmp_path), "--quiet"]) == 0
    assert capfd.readouterr() == ("", "")


def test_as_the_hub_ships_it(tmp_path, capfd):
    """Shards, one tower, and keys and values that no block reads."""
    config = made.config(made.E4B)
    config.audio_config = None
    random(config).save_pretrained(tmp_path)
    made.as_hub(tmp_path, dtype=torch.bfloat16)
    capfd.readouterr()
    assert main(["verify-weights", str(tmp_path), "--json"]) == 0
    printed, silent = capfd.readouterr()
    told = json.loads(printed)
    assert told["dtype"] == "bfloat16" and len(told["sha256"]) == 2 and silent == ""


def test_float64(seeing, capsys):
    """Without a sound: transformers' tower mixes float32 into it, and fails."""
    assert main(["verify-weights", str(seeing), "--dtype", "float64", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["dtype"] == "float64" and told["compared"] == ["text", "picture"]


def test_the_block_that_differs_is_named(seeing, monkeypatch, capsys):
    load = verify_weights.load

    def shortsighted(*args, **options):
        model = load(*args, **options)
        model.blocks[3].attn.window = 2
        return model

    monkeypatch.setattr(verify_weights, "load", shortsighted)
    assert main(["verify-weights", str(seeing)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED, first at blocks.3.hook_attn_out" in lines[0]
    assert differing(lines) == ["blocks.3", "logits"]


def changed(folder, copy, name, change):
    """A copy of a checkpoint in which one tensor is another."""
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def differing(lines):
    """The places that a report calls different."""
    return [line.split()[0] for line in lines if "DIFFERS" in line]


@pytest.mark.parametrize(
    ("name", "places"),
    [
        ("language_model.layers.5.mlp.up_proj.weight", ["blocks.5", "logits"]),
        ("language_model.layers.7.layer_scalar", ["blocks.7", "logits"]),
        # blocks 10 to 13 read the keys of block 8
        (
            "language_model.layers.8.self_attn.k_norm.weight",
            [*(f"blocks.{i}" for i in (8, 10, 11, 12, 13)), "logits"],
        ),
        ("embed_vision.embedding_projection.weight", ["vision.hook_image_tokens", "hook_embed"]),
        ("embed_audio.embedding_projection.weight", ["audio.hook_audio_tokens", "hook_embed"]),
        ("language_model.norm.weight", ["logits"]),
    ],
)
def test_a_weight_that_only_transformers_has(seeing, tmp_path, monkeypatch, capsys, name, places):
    """What a tensor of theirs is off by is told where that tensor is used."""
    other = changed(seeing, tmp_path / "other", f"model.{name}", lambda x: 1.5 * x.flip(0))
    read = Gemma4ForConditionalGeneration.from_pretrained
    astray = staticmethod(lambda folder, **options: read(other, **options))
    monkeypatch.setattr(Gemma4ForConditionalGeneration, "from_pretrained", astray)
    assert main(["verify-weights", str(seeing)]) == 1
    found = differing(capsys.readouterr().out.splitlines())
    assert found[: len(places)] == places and found[-1] == "logits"


def test_a_weight_that_is_no_number(seeing, tmp_path, capsys):
    """Both read the same file, and neither can be told right: that fails, as valid JSON too."""

    def holed(x):
        x[3, 4] = torch.nan
        return x

    name = "model.language_model.layers.5.mlp.up_proj.weight"
    broken = changed(seeing, tmp_path / "broken", name, holed)
    assert main(["verify-weights", str(broken)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "FAILED, first at blocks.5.hook_mlp_out" in lines[0]
    assert any(line.split()[:2] == ["blocks.5", "nan"] for line in lines)
    assert main(["verify-weights", str(broken), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    far = {row["what"]: row["distance"] for row in rows}
    assert far["blocks.5.hook_attn_out"] is not None and far["blocks.5.hook_mlp_out"] is None


def test_a_changed_weight_changes_the_hash(seeing, tmp_path, capsys):
    name = "model.language_model.layers.5.mlp.up_proj.weight"
    other = changed(seeing, tmp_path / "other", name, lambda x: 1.5 * x)
    hashes = []
    for folder in (seeing, other):
        assert main(["verify-weights", str(folder), "--json"]) == 0
        hashes.append(json.loads(capsys.readouterr().out)["sha256"]["model.safetensors"])
    assert hashes[0] != hashes[1]


def test_equal_zeros_are_equal(seeing, tmp_path, capsys):
    """A block whose output is nothing in both."""
    name = "model.language_model.layers.5.post_per_layer_input_norm.weight"
    folder = changed(seeing, tmp_path / "zero", name, torch.zeros_like)
    assert main(["verify-weights", str(folder), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert next(r for r in rows if r["what"] == "blocks.5.hook_ple_out")["distance"] == 0


# ---- what cannot be compared


def test_without_transformers(seeing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify-weights", str(seeing)]) == 2
    assert "transformers, which is not installed" in capsys.readouterr().err
    with pytest.raises(InputError, match="transformers, which is not installed"):
        verify_weights.verify_weights(str(seeing))


def test_a_transformers_without_gemma_4(seeing, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.9"))
    assert main(["verify-weights", str(seeing)]) == 2
    assert "transformers 4.9 has no Gemma4ForConditionalGeneration" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "what"), [("from_pretrained", "load {}"), ("forward", "run {} in float32")]
)
def test_a_transformers_that_fails(seeing, monkeypatch, capsys, method, what):
    def fails(*_, **__):
        raise OSError("no such tensor\nand more")

    monkeypatch.setattr(Gemma4ForConditionalGeneration, method, fails)
    assert main(["verify-weights", str(seeing)]) == 2
    error = capsys.readouterr().err
    assert f"transformers {transformers.__version__} cannot {what.format(seeing)}" in error
    assert "(OSError: no such tensor)" in error and "and more" not in error


def test_too_little_memory(seeing, monkeypatch, capsys):
    """Told before anything is loaded; as stored, transformers maps the weights too."""
    monkeypatch.setattr(verify_weights, "free_memory", lambda device: 10**6)
    assert main(["verify-weights", str(seeing), "--dtype", "bfloat16"]) == 2
    told = capsys.readouterr()
    assert "for the weights in bfloat16, but 0.0 GB of memory are free" in told.err
    assert "without --dtype they are mapped as stored" in told.err and told.out == ""
    assert main(["verify-weights", str(seeing), "--dtype", "float32", "--quiet"]) == 0


def test_wrong_names(tmp_path, capsys):
    assert main(["verify-weights", str(tmp_path / "none")]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert main(["verify-weights", "tiny", "--dtype", "float8"]) == 2
    assert "expected one of float64, float32" in capsys.readouterr().err
    assert main(["verify-weights", "tiny", "--revision", "main"]) == 2
    assert "is for models on the hub" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_no_gemma_4(tmp_path, dtype):
    with pytest.raises((ConfigError, WeightsError)):
        verify_weights.verify_weights(str(tmp_path), dtype=dtype)
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}')
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="model_type is 'gemma3', expected 'gemma4'"):
        verify_weights.verify_weights(str(tmp_path), dtype=dtype)
