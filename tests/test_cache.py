"""The cache: names, positions, patterns on demand, and parts that sum to the stream."""

import pytest
import torch

from g4lens.errors import CacheError, HookNameError, InputError

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def cached(model):
    tokens = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(5))
    return model.run_with_cache(tokens)


def test_default_names(model, cached):
    _, cache = cached
    names = set(cache.keys())
    assert not any("pattern" in name or "scores" in name or "vision" in name for name in names)
    for layer in range(10):
        assert (
            f"blocks.{layer}.hook_resid_post" in cache
            and f"blocks.{layer}.attn.hook_rot_k" in cache
        )
    assert all(torch.equal(value, cache[name]) for name, value in cache.items())
    assert len(cache) == len(names) == len(list(cache))
    readers_alias = cache["rot_k", 8].data_ptr() == cache["rot_k", 5].data_ptr()
    assert readers_alias, "an unedited reader's keys are the owner's own memory"


def test_names_of_every_kind(model, seen_and_heard):
    _, cache = model.run_with_cache(seen_and_heard, "*")
    assert cache["pattern", 5] is cache["blocks.5.attn.hook_pattern"]
    assert cache["vision", "pattern", 1] is cache["vision.blocks.1.attn.hook_pattern"]
    assert cache["audio", "ffn1_out", 0] is cache["audio.blocks.0.hook_ffn1_out"]
    assert cache["mlp.post", 2] is cache["post", 2] is cache["blocks.2.mlp.hook_post"]
    assert cache["ple.post", 2] is cache["blocks.2.ple.hook_post"]
    assert cache["ln1.scale", 2] is cache["blocks.2.ln1.hook_scale"]
    assert cache["embed"] is cache["hook_embed"]
    for name, x in cache.items():
        axes = model.hook_points[name].axes
        assert x.ndim == len(axes), name
        rows = next(
            (i for i, axis in enumerate(axes) if axis in ("pos", "query_pos", "key_pos")), None
        )
        if rows is not None and "chunk" not in axes:
            assert cache.positions(name).shape == (x.shape[0], x.shape[rows]), name


def test_wrong_names(cached):
    _, cache = cached
    with pytest.raises(HookNameError, match=r"Did you mean 'blocks\.3\.hook_resid_post'"):
        cache["resid_pst", 3]
    with pytest.raises(HookNameError, match="Block 8 reads block 5's keys and values"):
        cache["k", 8]
    with pytest.raises(CacheError, match=r"blocks\.3\.mlp\.hook_post was not cached in this run"):
        cache["post", 3]
    assert cache.get("blocks.99.hook_resid_post") is None


def test_patterns_are_rebuilt(model, cached):
    _, cache = cached
    tokens = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(5))
    names = ["blocks.*.attn.hook_pattern", "blocks.*.attn.hook_rot_?"]
    _, explicit = model.run_with_cache(tokens, names)
    _, without = model.run_with_cache(tokens, "blocks.*.attn.hook_rot_?")
    for layer in range(10):
        torch.testing.assert_close(
            without.pattern(layer), explicit["pattern", layer], atol=1e-4, rtol=0
        )
        assert torch.equal(cache["pattern", layer], cache.pattern(layer))
        some = cache.pattern(layer, heads=[2, 0], queries=slice(-4, None))
        torch.testing.assert_close(some, cache.pattern(layer)[:, [2, 0], -4:], **CLOSE)
        one = explicit.pattern(layer, heads=3, queries=-1)
        assert torch.equal(one, explicit["pattern", layer][:, 3:4, -1:])
        torch.testing.assert_close(cache.pattern(layer).sum(-1), torch.ones(2, 4, 23))


def test_a_pattern_that_a_hook_changed_is_kept_as_it_was_used(model, tokens):
    def uniform(x, hook):
        x[:] = 1 / x.shape[-1]

    with model.hooks([("blocks.3.attn.hook_pattern", uniform)]):
        _, cache = model.run_with_cache(tokens)
    assert "blocks.3.attn.hook_pattern" in cache
    kept = cache["pattern", 3]
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 23).item()}
    with model.hooks([("blocks.4.attn.hook_attn_scores", lambda x, hook: x * 0)]):
        _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(cache["pattern", 4][0, 0, 9, :10], torch.full((10,), 0.1))
    assert (cache["pattern", 4][0, 0, 9, 10:] == 0).all(), "zeroed scores must not open the future"


@pytest.mark.parametrize("layer", [0, 1, 4, 7, 9, -1])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("read", [None, [-1, 3]])
def test_parts_sum_to_the_stream(model, tokens, layer, heads, read):
    _, cache = model.run_with_cache(tokens, read=read)
    stack, labels = cache.decompose_resid(layer, heads=heads)
    n = 10 if layer == -1 else layer
    assert len(labels) == len(stack) == 1 + n * (2 + (4 if heads else 1))
    assert labels[0] == "embed" and labels[1:2] in ([], ["L0H0"] if heads else ["0_attn_out"])
    whole = cache["resid_post", 9] if layer == -1 else cache["resid_pre", layer]
    torch.testing.assert_close(stack.sum(0), whole, **CLOSE)


def test_edits_of_the_stream_are_a_part(model, tokens):
    with model.hooks([("blocks.2.hook_resid_mid", lambda x, hook: x + 1)]):
        _, cache = model.run_with_cache(tokens)
    stack, labels = cache.decompose_resid(5)
    assert labels[-1] == "edit"
    torch.testing.assert_close(stack.sum(0), cache["resid_pre", 5], **CLOSE)
    assert stack[-1].abs().min() > 0.01
    assert "edit" not in cache.decompose_resid(2)[1]


def test_identity_of_every_block(model, cached):
    _, cache = cached
    for layer in range(10):
        written = sum(
            cache[name, layer] for name in ("resid_pre", "attn_out", "mlp_out", "ple_out")
        )
        torch.testing.assert_close(
            model.blocks[layer].scalar * written, cache["resid_post", layer], **CLOSE
        )
    halves = cache["hook_ple_token"] + cache["hook_ple_context"]
    torch.testing.assert_close(halves, cache["hook_ple"], **CLOSE)


def test_heads_sum_to_the_attention_output(model, tokens):
    _, cache = model.run_with_cache(tokens, ["blocks.*.attn.hook_z", "blocks.*.attn.hook_out"])
    for layer in range(10):
        results = cache.head_results(layer)
        assert results.shape == (2, 23, 4, 32)
        torch.testing.assert_close(results.sum(2), cache[f"blocks.{layer}.attn.hook_out"], **CLOSE)


@pytest.mark.parametrize("read", [None, -1])
def test_attributions_sum_to_the_logit(model, tokens, read):
    _, pre_cap = model.run_with_cache(tokens, "hook_logits_pre_cap", read=read)
    _, cache = model.run_with_cache(tokens, read=read)
    logits = pre_cap["hook_logits_pre_cap"]
    stack, _ = cache.decompose_resid(-1, heads=True)
    torch.testing.assert_close(
        cache.logit_attrs(stack, 7).sum(0), logits[..., 7], atol=1e-4, rtol=0
    )
    by_row = cache.logit_attrs(
        stack, torch.tensor([7, 8]), incorrect_tokens=torch.tensor([9, 7])
    ).sum(0)
    expected = torch.stack([logits[0, :, 7] - logits[0, :, 9], logits[1, :, 8] - logits[1, :, 7]])
    torch.testing.assert_close(by_row, expected, atol=1e-4, rtol=0)
    with pytest.raises(CacheError, match=r"stack is \(\d+, 2, \d+\), expected \[part, 2"):
        cache.logit_attrs(stack[..., 0], 7)


def test_positions_of_padded_and_read_runs(model, tokens):
    _, cache = model.run_with_cache([tokens[0], tokens[1, :9]], read=[-1, 0])
    assert cache.positions("blocks.0.hook_resid_post")[1].tolist() == [-1] * 14 + list(range(9))
    assert cache.positions("blocks.9.hook_resid_post").tolist() == [[22, 0], [8, 0]]
    assert cache.positions("blocks.9.attn.hook_rot_k").shape == (2, 23)
    stack, _ = cache.decompose_resid(-1)
    torch.testing.assert_close(stack.sum(0), cache["resid_post", 9], **CLOSE)
    with pytest.raises(
        InputError, match="position 5 of prompt 0 is not among the 2 positions held"
    ):
        cache.pattern(9, queries=5)
    with pytest.raises(InputError, match="position 40 is outside a prompt of 23 tokens"):
        cache.pattern(2, queries=40)


def test_chunks_leave_one_tensor(model, tokens):
    names = ["blocks.*", "hook_*"]
    whole_logits, whole = model.run_with_cache(tokens, names)
    logits, cache = model.run_with_cache(tokens, names, chunk=6)
    torch.testing.assert_close(logits, whole_logits, atol=1e-3, rtol=0)
    for name, x in whole.items():
        assert cache[name].shape == x.shape, name
        assert torch.equal(cache.positions(name), whole.positions(name)), name
        torch.testing.assert_close(cache[name], x, atol=2e-3, rtol=0, msg=name)


def test_patterns_are_rebuilt_from_chunks(model, tokens):
    _, whole = model.run_with_cache(tokens)
    _, cache = model.run_with_cache(tokens, chunk=5)
    for layer in range(10):
        torch.testing.assert_close(cache.pattern(layer), whole.pattern(layer), atol=1e-3, rtol=0)


@pytest.mark.parametrize("layer", range(11))
def test_entering_at_any_block_equals_the_full_run(model, tokens, layer):
    logits, cache = model.run_with_cache(tokens)
    for state in (
        cache.state(layer),
        model(tokens, stop=layer),
        model(tokens, stop=layer, chunk=5),
    ):
        torch.testing.assert_close(model(state=state), logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            model(state=state, read=[-1, 2]), logits[:, [22, 2]], atol=1e-4, rtol=0
        )


def test_moving_each_activation_as_it_is_made(model, tokens):
    _, cache = model.run_with_cache(tokens, "blocks.*.hook_resid_post", device="meta")
    assert {x.device.type for x in cache.values()} == {"meta"}


def test_stack(model, cached):
    _, cache = cached
    stack = cache.stack("resid_post", layers=[1, 4])
    assert torch.equal(stack[1], cache["resid_post", 4])
    assert cache.stack("attn_out").shape == (10, 2, 23, 32)
