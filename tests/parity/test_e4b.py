"""E4B: its full geometry without memory, its plans, and its pattern at a small width.

The small model has E4B's 42 blocks, five local and one global in turn, the last 18 of which read
keys and values of earlier ones, eight query heads on two key heads, and one width of MLP.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from transformers import Gemma4ForConditionalGeneration

import g4lens
from g4lens.cli.plan import geometry
from g4lens.inputs.batch import Batch
from g4lens.plan import RELEASED, Options, fitting, plan
from g4lens.weights import INDEX, matched
from tests.benchmarks import make_e2b
from tests.parity import checkpoints as made
from tests.parity.test_model import Their, distance, inputs_of

pytestmark = pytest.mark.unchecked

E4B = RELEASED["E4B"]
NAME = "google/gemma-4-E4B-it"
SMALL = make_e2b.SIZES["E4B"] | {"hidden_size": 64, "intermediate_size": 96}
ALL = inputs_of([(3, 2), (1, 2)], [37], "isi")
WORDS = {"input_ids": torch.randint(3, 190, (2, 40), generator=torch.Generator().manual_seed(9))}
IDS = ("boi", "image", "eoi", "boa", "audio", "eoa", "video")


@pytest.fixture(scope="module")
def full():
    """The released geometry in transformers' numbers, and here on the meta device."""
    config = make_e2b.config("E4B")
    with torch.device("meta"):
        model = g4lens.Gemma4(E4B)
    return config, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model in the hub's layout."""
    folder = tmp_path_factory.mktemp("e4b")
    theirs = made.reference(made.config(SMALL, num_attention_heads=8))
    for name, gain in theirs.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            gain.mul_(0.3)  # or 42 blocks of random heads make the most of a rounding error
    theirs.save_pretrained(folder)
    made.as_hub(folder, n_shards=3)
    return folder


@pytest.fixture(scope="module")
def pair(folder):
    """The same files in transformers and here."""
    theirs = Gemma4ForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return g4lens.load(folder, device="cpu"), theirs.requires_grad_(False).eval()


# ---- the full geometry


def test_the_config_is_read_as_the_released_one(full):
    """All but the ids of special tokens, which the config takes from the bundled tokenizer."""
    config, _ = full
    read = g4lens.Gemma4Config.from_dict(config.to_dict())
    ids = {f"{name}_id": getattr(E4B, f"{name}_id") for name in IDS}
    assert replace(read, **ids, eos_ids=E4B.eos_ids) == E4B
    assert E4B.horizon == 23 and E4B.is_global(23) and not E4B.is_global(22)
    assert E4B.readers(23) == (23, 29, 35, 41) and E4B.readers(22)[:3] == (22, 24, 25)
    assert {E4B.d_mlp_at(layer) for layer in range(42)} == {10_240}


def test_as_many_parameters_as_in_transformers(full):
    config, model = full
    with torch.device("meta"):
        theirs = Gemma4ForConditionalGeneration(config)
    n = sum(x.numel() for x in model.parameters())
    assert n == sum(x.numel() for x in theirs.parameters())
    assert 7.9e9 < n < 8.0e9
    assert sum(x.numel() for x in model.embed.ple_tokens.parameters()) == 262_144 * 42 * 256


def test_names_and_shapes_are_those_of_a_checkpoint(full):
    """Strictly both ways; the keys and values of 18 readers are there and not used."""
    config, model = full
    files = SimpleNamespace(folder="E4B", shapes=make_e2b.shapes(config))
    names, unused = matched(model, files)
    assert len(unused) == 18 * 3 and len(names) + len(unused) == len(files.shapes)


def test_shapes_of_activations(full):
    _, model = full
    shapes = {}
    note = [("blocks.*", lambda x, hook: shapes.setdefault(hook.name, tuple(x.shape)) and None)]
    batch = Batch(torch.zeros(1, 6, dtype=torch.int64), torch.arange(6)[None])
    assert model.run_with_hooks(batch, fwd_hooks=note).shape == (1, 6, 262_144)
    for layer, point, shape in (
        (0, "attn.hook_rot_k", (1, 6, 2, 256)),
        (5, "attn.hook_norm_v", (1, 6, 2, 512)),
        (41, "attn.hook_rot_k", (1, 6, 2, 512)),
        (22, "attn.hook_z", (1, 6, 8, 256)),
        (41, "attn.hook_pattern", (1, 8, 6, 6)),
        (41, "mlp.hook_post", (1, 6, 10_240)),
        (30, "hook_resid_post", (1, 6, 2560)),
    ):
        assert shapes[f"blocks.{layer}.{point}"] == shape


# ---- plans


@pytest.mark.parametrize(
    ("context", "chunk"), [(1024, None), (65_536, None), (131_072, None), (131_072, 4096)]
)
def test_plans(full, context, chunk):
    _, model = full
    told = plan(E4B, Options(context=context, chunk=chunk))
    assert told.total == sum(told.parts.values())
    assert told.weights == 2 * sum(x.numel() for x in model.state_dict().values())
    local, wide = 2 * 2 * 256 * 2, 2 * 2 * 512 * 2  # bytes of a position's keys and values
    last = context if chunk is None else min(chunk, context)
    kept = min(context, last + 511)
    assert told.parts["keys and values"] == 20 * kept * local + 4 * context * wide
    assert told.parts["activations"] > 0 and told.parts["cached"] == 0


def test_what_makes_it_fit():
    """By the name on the hub, without a network: the table of per-layer embeddings on disk."""
    cfg, options = geometry(NAME), Options(context=1024, quantize="int4")
    assert cfg == E4B
    whole, table = plan(cfg, options), 2 * 262_144 * 42 * 256
    assert 2.4e9 < whole.parts["decoder"] < 2.6e9 and whole.parts["PLE table"] == table
    small = fitting(cfg, options, whole.total - 1)
    assert small.options.ple == "disk" and small.total == whole.total - table


# ---- parity of the small model


def test_it_is_written_as_on_the_hub(folder):
    """Sharded, and nothing in it at a default that could hide a mistake."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) == 3
    assert "global_head_dim" in json.loads((folder / "config.json").read_text())["text_config"]
    for name, shard in index.items():
        with safe_open(folder / shard, framework="pt") as file:
            x = file.get_tensor(name)
        assert x.numel() == 1 or x.unique().numel() > 1, name
        assert not (x == 1).all() and not (x == 0).all() and x.isfinite().all(), name


@pytest.mark.parametrize("inputs", [WORDS, ALL], ids=["words", "pictures and a sound"])
def test_logits_and_streams(pair, inputs):
    """The whole run, whose rounding errors add up over 42 blocks."""
    model, theirs = pair
    ref = Their(theirs, **inputs)
    streams = [f"blocks.{i}.hook_resid_post" for i in range(42)]
    logits, cache = model.run_with_cache(inputs, streams)
    assert distance(logits, ref.logits) < 1e-3
    for name in streams:
        assert distance(cache[name], ref.kept[name]) < 1e-3, name


def test_each_block_by_itself(pair):
    """Given what transformers gave it: the stream of words, soft tokens of pictures and sound."""
    model, theirs = pair
    ref = Their(theirs, **ALL)
    given = [(f"blocks.{i}.hook_resid_pre", lambda x, hook: ref.kept[hook.name]) for i in range(42)]
    names = [name for name in ref.kept if not name.endswith("resid_pre")]
    with model.hooks(given):
        _, cache = model.run_with_cache(ALL, names)
    for name in names:
        theirs_out = ref.kept[name]
        if name.startswith("audio"):  # padded there
            theirs_out = theirs_out[ALL["input_features_mask"][:, ::2][:, ::2]]
        assert distance(cache[name], theirs_out) < 1e-4, name


def test_greedy_generation(pair):
    model, theirs = pair
    n = ALL["input_ids"].shape[1]
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(**ALL, **options)[0, n:].tolist()
    assert list(model.generate(ALL, max_new_tokens=12, stop_tokens=[]).tokens) == expected


@pytest.mark.parametrize("head", [0, 1])
def test_both_key_heads_are_read(pair, head):
    """A key head serves four query heads and no other."""
    model, _ = pair

    def silenced(x, hook):
        x[:, :, head] = 0
        return x

    _, before = model.run_with_cache(ALL, "blocks.23.attn.hook_z")
    with model.hooks([("blocks.23.attn.hook_norm_v", silenced)]):
        _, after = model.run_with_cache(ALL, "blocks.23.attn.hook_z")
    changed = (before["z", 23] != after["z", 23]).flatten(0, 1).any(-1).any(0)
    assert changed.tolist() == [i // 4 == head for i in range(8)]
