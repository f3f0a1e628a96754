"""The model computes what transformers computes: whole tensors, with nothing at its default.

The distance of two tensors is the largest difference, in standard deviations of the reference.
"""

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
)

import g4lens
from g4lens.inputs.batch import Batch
from tests.conftest import pictures, sounds
from tests.parity import checkpoints as made

SHAPES = {"E2B": made.E2B, "E4B": made.E4B, "uneven": made.UNEVEN, "unshared": made.UNSHARED}
PER_BLOCK = 1e-4
AFTER_ALL = 2e-3


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tmp_path_factory):
    """The same random checkpoint in transformers (eager) and here, through a saved folder."""
    return _pair(made.config(SHAPES[request.param]), tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def e2b(tmp_path_factory):
    return _pair(made.config(made.E2B), tmp_path_factory.mktemp("e2b"))


def _pair(config, folder, **options):
    theirs = made.reference(config)
    theirs.save_pretrained(folder)
    return g4lens.load(folder, device="cpu", **options), theirs


def distance(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.std()).item()


def random_ids(batch, n, seed=0):
    return torch.randint(3, 190, (batch, n), generator=torch.Generator().manual_seed(seed))


def inputs_of(images=(), clips=(), order="is", seed=1):
    """Mapping with pictures and sounds between words, as transformers' processor lays them out."""
    random = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(3, 190, (n,), generator=random).tolist()

    ids = [2, *words(3)]
    queues = {
        "i": [[made.BOI, *[made.IMAGE] * (c * r), made.EOI] for c, r in images],
        "s": [[made.BOA, *[made.AUDIO] * -(-n // 4), made.EOA] for n in clips],
    }
    for kind in order:
        ids += queues[kind].pop(0) + words(4)
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs |= pictures(*images, patch=16)
    if clips:
        inputs |= sounds(*clips, n_mels=128)
    return inputs


MEDIA = {
    "picture, sound, text": inputs_of([(3, 2)], [37], "is"),
    "two pictures": inputs_of([(2, 2), (4, 1)], [], "ii"),
    "sound, picture, sound": inputs_of([(1, 3)], [61, 22], "sis"),
}


class Their:
    """What transformers' modules put out in one run, by our names."""

    def __init__(self, model, **inputs):
        self.kept: dict[str, torch.Tensor] = {}
        text = model.model.language_model
        hung = []
        for i, layer in enumerate(text.layers):
            for ours, module in {
                "attn_out": layer.post_attention_layernorm,
                "mlp_out": layer.post_feedforward_layernorm,
                "ple_out": layer.post_per_layer_input_norm,
            }.items():
                hung.append(module.register_forward_hook(self._keep(f"blocks.{i}.hook_{ours}")))
            hung.append(
                layer.register_forward_pre_hook(self._keep_input(f"blocks.{i}.hook_resid_pre"))
            )
            hung.append(layer.register_forward_hook(self._keep(f"blocks.{i}.hook_resid_post")))
            hung.append(layer.self_attn.register_forward_hook(self._keep_pattern(i)))
        for ours, module in {
            "vision.hook_image_tokens": model.model.embed_vision,
            "audio.hook_audio_tokens": model.model.embed_audio,
        }.items():
            hung.append(module.register_forward_hook(self._keep(ours)))
        self.logits = model(**inputs, use_cache=False).logits
        for handle in hung:
            handle.remove()

    def _keep(self, name):
        def hook(module, args, output):
            self.kept[name] = output.detach().clone()  # layers scale their output in place

        return hook

    def _keep_input(self, name):
        def hook(module, args):
            self.kept[name] = args[0].detach().clone()

        return hook

    def _keep_pattern(self, layer):
        def hook(module, args, output):
            self.kept[f"blocks.{layer}.attn.hook_pattern"] = output[1].detach().clone()

        return hook


def compare(model, theirs, inputs, relative=None):
    """Every block given what transformers gives it, then the whole run."""
    ref = Their(theirs, **inputs)
    names = [
        n
        for n in ref.kept
        if n in model.hook_points and ("hook_image" not in n or "pixel_values" in inputs)
    ]
    names = [n for n in names if "hook_audio" not in n or "input_features" in inputs]
    logits, cache = model.run_with_cache(inputs, names)
    found = {name: distance(cache[name], _packed(ref.kept[name], name, inputs)) for name in names}
    assert distance(logits, ref.logits) < (relative or AFTER_ALL)
    for name, far in found.items():
        assert far < (relative or AFTER_ALL), (name, far)
    return found


def _packed(tensor, name, inputs):
    """The audio tower of transformers returns padded soft tokens."""
    if name != "audio.hook_audio_tokens":
        return tensor
    return tensor[inputs["input_features_mask"][:, ::2][:, ::2]]


def test_text(pair):
    model, theirs = pair
    compare(model, theirs, {"input_ids": random_ids(2, 40)})


@pytest.mark.parametrize("media", MEDIA)
def test_pictures_and_sounds(e2b, media):
    model, theirs = e2b
    found = compare(model, theirs, MEDIA[media])
    for name in ("vision.hook_image_tokens", "audio.hook_audio_tokens"):
        assert found.get(name, 0) < PER_BLOCK


def test_each_block_by_itself(pair):
    """Enter each block with the very state that transformers had there: one block's error only."""
    model, theirs = pair
    ids = random_ids(2, 30, seed=4)
    ref = Their(theirs, input_ids=ids)
    for layer in range(model.cfg.n_layers):
        points = ("hook_attn_out", "hook_mlp_out", "hook_ple_out", "hook_resid_post")
        names = [f"blocks.{layer}.{point}" for point in (*points, "attn.hook_pattern")]
        given = [
            (f"blocks.{block}.hook_resid_pre", lambda x, hook: ref.kept[hook.name])
            for block in {model.cfg.kv_source(layer), layer}
        ]
        with model.hooks(given):
            _, run = model.run_with_cache(ids, names)
        for name in names:
            assert distance(run[name], ref.kept[name]) < PER_BLOCK, name


def test_left_padded_batch(pair):
    model, theirs = pair
    ids, mask = random_ids(3, 34, seed=2), torch.ones(3, 34, dtype=torch.long)
    mask[1, :9] = mask[2, :25] = 0
    logits = model({"input_ids": ids, "attention_mask": mask})
    expected = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.isfinite().all()
    assert distance(logits[mask.bool()], expected[mask.bool()]) < AFTER_ALL
    listed = model([row[keep.bool()] for row, keep in zip(ids, mask, strict=True)], read=-1)
    assert distance(listed[:, 0], expected[:, -1]) < AFTER_ALL


@pytest.mark.parametrize(
    "inputs", [{"input_ids": random_ids(1, 40, seed=3)}, MEDIA["picture, sound, text"]]
)
def test_explicit_start_read_and_chunk_equal_the_fused_full_run(e2b, inputs):
    model, _ = e2b
    full = model(inputs)
    n = full.shape[1]
    explicit, _ = model.run_with_cache(inputs, "blocks.*.attn.hook_pattern")
    assert distance(explicit, full) < AFTER_ALL
    assert distance(model(inputs, read=[-1, 3, n // 2]), full[:, [n - 1, 3, n // 2]]) < PER_BLOCK
    assert distance(model(inputs, chunk=7), full) < AFTER_ALL
    for layer in range(model.cfg.n_layers + 1):
        assert distance(model(state=model(inputs, stop=layer)), full) < PER_BLOCK


@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_generation_of_64_tokens(e2b, use_cache):
    model, theirs = e2b
    ids = random_ids(1, 20, seed=6)
    expected = theirs.generate(
        input_ids=ids,
        max_new_tokens=64,
        min_new_tokens=64,
        do_sample=False,
        use_cache=use_cache,
        eos_token_id=None,
        pad_token_id=0,
    )[0, 20:].tolist()
    assert list(model.generate(ids, max_new_tokens=64, stop_tokens=[]).tokens) == expected
    text = ids
    for _ in range(64):  # and by full runs, without keys and values kept
        batch = Batch(text, torch.arange(text.shape[1])[None])
        text = torch.cat([text, model(batch, read=-1)[:, 0].argmax(-1, keepdim=True)], dim=1)
    assert text[0, 20:].tolist() == expected


def test_generation_about_a_picture_and_a_sound(e2b):
    model, theirs = e2b
    inputs = MEDIA["picture, sound, text"]
    expected = theirs.generate(
        **inputs, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, inputs["input_ids"].shape[1] :].tolist()
    assert list(model.generate(inputs, max_new_tokens=20, stop_tokens=[]).tokens) == expected


def test_keys_and_values_are_those_of_transformers(e2b):
    model, theirs = e2b
    ids = random_ids(1, 30, seed=7)
    kept = DynamicCache()
    theirs(input_ids=ids, past_key_values=kept, use_cache=True)
    kv = model(ids, stop=model.cfg.n_layers).kv
    assert sorted(kv.keys) == list(range(len(kept.layers)))
    for owner, layer in enumerate(kept.layers):
        assert distance(kv.keys[owner], layer.keys.transpose(1, 2)) < AFTER_ALL
        assert distance(kv.values[owner], layer.values.transpose(1, 2)) < AFTER_ALL


def test_as_the_hub_ships_it(tmp_path):
    theirs = made.reference(made.config(made.E2B))
    theirs.save_pretrained(tmp_path)
    made.as_hub(tmp_path, n_shards=3)
    model = g4lens.load(tmp_path, device="cpu")
    assert len(model.source.unused) == 20 and "layers.7.self_attn.k_proj" in " ".join(
        model.source.unused
    )
    ids = random_ids(1, 30)
    assert distance(model(ids), theirs(input_ids=ids).logits) < AFTER_ALL


def test_text_only_checkpoint(tmp_path):
    theirs = made.reference(made.text_config(made.E2B))
    theirs.save_pretrained(tmp_path)
    model = g4lens.load(tmp_path, device="cpu")
    assert model.vision is None and model.audio is None
    ids = random_ids(2, 30)
    assert distance(model(ids), theirs(input_ids=ids).logits) < AFTER_ALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(tmp_path, dtype):
    """Rounding compounds over ten random blocks; the mean error tells a wrong formula from it."""
    theirs = made.reference(made.config(made.E2B)).to(dtype)
    theirs.save_pretrained(tmp_path)
    model = g4lens.load(tmp_path, device="cpu")
    assert model(random_ids(1, 4)).dtype == dtype
    ids = random_ids(2, 30)
    ref = Their(theirs, input_ids=ids)
    _, cache = model.run_with_cache(ids, ["blocks.0.hook_*", "hook_embed", "hook_logits"])
    limit = 0.1 if dtype == torch.bfloat16 else 0.02
    for name in ("attn_out", "mlp_out", "ple_out", "resid_post"):
        ours, other = cache[name, 0].float(), ref.kept[f"blocks.0.hook_{name}"].float()
        assert (ours - other).abs().mean() / other.std() < limit / 10, name
    assert torch.equal(cache["embed"], ref.kept["blocks.0.hook_resid_pre"])


def test_float64(tmp_path, monkeypatch):
    """transformers narrows norms and softmax to float32; held at float64 it agrees to 1e-9."""
    narrow = torch.Tensor.float
    monkeypatch.setattr(
        torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else narrow(x)
    )
    theirs = made.reference(made.text_config(made.E2B), attention="sdpa")
    theirs.save_pretrained(tmp_path)
    theirs, model = theirs.double(), g4lens.load(tmp_path, device="cpu", dtype="float64")
    ids = random_ids(2, 30)
    logits = model(ids)
    assert logits.dtype == torch.float64
    assert distance(logits, theirs(input_ids=ids).logits) < 1e-9


def test_the_full_geometry_on_the_meta_device():
    """E2B's 5.1 billion parameters and the shapes of all activations, without any memory."""
    cfg = g4lens.Gemma4Config(
        vision=g4lens.config.VisionConfig(),
        audio=g4lens.config.AudioConfig(),
        boi_id=255_999,
        image_id=258_880,
        eoi_id=258_882,
        boa_id=256_000,
        audio_id=258_881,
        eoa_id=258_883,
    )
    layers = [made.GLOBAL if cfg.is_global(i) else made.LOCAL for i in range(cfg.n_layers)]
    text = Gemma4TextConfig(
        hidden_size=1536,
        intermediate_size=6144,
        num_hidden_layers=35,
        num_key_value_heads=1,
        num_kv_shared_layers=20,
        use_double_wide_mlp=True,
        layer_types=layers,
        final_logit_softcapping=30.0,
    )
    config = Gemma4Config(
        text_config=text,
        vision_config=Gemma4VisionConfig(use_clipped_linears=True),
        audio_config=Gemma4AudioConfig(),
    )
    assert g4lens.Gemma4Config.from_dict(config.to_dict()).n_layers == 35
    with torch.device("meta"):
        model, theirs = g4lens.Gemma4(cfg), Gemma4ForConditionalGeneration(config)
    n = sum(p.numel() for p in model.parameters())
    assert n == sum(p.numel() for p in theirs.parameters())
    assert 5.05e9 < n < 5.15e9
    assert cfg.horizon == 14 and cfg.readers(14) == (14, 19, 24, 29, 34)
    shapes = {}
    note = [("blocks.*", lambda x, hook: shapes.setdefault(hook.name, tuple(x.shape)) and None)]
    rows = torch.zeros(1, 6, dtype=torch.int64)
    logits = model.run_with_hooks(Batch(rows, torch.arange(6)[None]), fwd_hooks=note)
    assert logits.shape == (1, 6, 262_144)
    assert shapes["blocks.4.attn.hook_rot_k"] == (1, 6, 1, 512)
    assert shapes["blocks.20.mlp.hook_post"] == (1, 6, 12_288)
    assert shapes["blocks.14.mlp.hook_post"] == (1, 6, 6_144)
    assert shapes["blocks.34.attn.hook_pattern"] == (1, 8, 6, 6)
