"""Function vectors against heads taken apart by hand, and on a planted head."""

import pytest
import torch

import g4lens
from g4lens import planted
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.patching import activation_patching
from g4lens.analysis.runs import measure
from g4lens.analysis.sites import Unit
from g4lens.analysis.subspaces.function_vectors import function_vector
from g4lens.analysis.vectors import steering
from g4lens.errors import InputError


@pytest.fixture(scope="module")
def tiny():
    return g4lens.load("tiny")


@pytest.fixture(scope="module")
def pairs():
    return g4lens.tasks.pairs("capital", 8)


@pytest.fixture(scope="module")
def found(tiny, pairs):
    return function_vector(tiny, pairs, n_heads=6, progress=False)


def test_heads_are_those_with_the_largest_effect(found):
    effect = found.effects.effect.mean(0)[..., 0]
    named = [float(effect[unit.layer, unit.head]) for unit in found.heads]
    assert named == sorted(named, reverse=True)
    assert named[-1] == pytest.approx(float(effect.flatten().sort().values[-6]))


def test_an_effect_is_that_of_the_mean_over_the_clean_prompts(tiny, pairs, found):
    for layer, head in [(0, 1), (4, 3), (tiny.cfg.horizon, 0), (14, 2)]:
        name = f"blocks.{layer}.attn.hook_z"
        z = [tiny.run_with_cache(pair.clean, name)[1][name][0, -1, head] for pair in pairs]
        mean = torch.stack(z).mean(0)

        def put(x, hook, mean=mean, head=head):
            x[:, -1, head] = mean

        expected = torch.zeros(len(pairs))
        for group in pairs.on(tiny, "log_prob"):
            expected[group.index] = measure(tiny, group, "corrupted", "log_prob", [(name, put)])
        cell = found.effects.per_pair[:, layer, head, 0]
        torch.testing.assert_close(cell, expected, atol=1e-4, rtol=1e-4)
    assert found.effects.about["ablation_value"] == "mean of the clean runs"


def test_prompts_of_unequal_length_have_one_mean(model):
    """Of a single pair it is the pair's own, and the effect that of patching."""
    random = torch.Generator().manual_seed(0)
    sides = [torch.randint(3, 90, (n,), generator=random) for n in (8, 6, 11, 9)]
    pairs = Pairs([Pair(sides[0], sides[1], 5, 6), Pair(sides[2], sides[3], 7, 8)])
    alone = function_vector(model, pairs[:1], 1, logit_diff, progress=False).effects
    patched = activation_patching(
        model, pairs[:1], logit_diff, site="z", positions=["end"], progress=False
    )
    torch.testing.assert_close(alone.per_pair, patched.per_pair, atol=1e-5, rtol=1e-5)
    both = function_vector(model, pairs, 1, logit_diff, progress=False).effects
    name = "blocks.7.attn.hook_z"
    z = [model.run_with_cache(ids[None], name)[1][name][0, -1, 2] for ids in sides[::2]]

    def put(x, hook):
        x[:, -1, 2] = sum(z) / 2

    for i, pair in enumerate(pairs):
        logits = model.run_with_hooks(pair.corrupted[None], fwd_hooks=[(name, put)])[0, -1]
        expected = logits[pair.answer] - logits[pair.foil]
        torch.testing.assert_close(both.per_pair[i, 7, 2, 0], expected, atol=1e-5, rtol=1e-5)


def test_a_forced_metric_counts_both_answers(model):
    random = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(3, 90, (2, 8), generator=random)
    pair = Pair(clean, corrupted, [5, 6, 7], [8, 9])
    found = function_vector(model, pair, 1, "seq_log_prob_diff", progress=False).effects
    patched = activation_patching(
        model, pair, "seq_log_prob_diff", site="z", positions=["end"], progress=False
    )
    torch.testing.assert_close(found.per_pair, patched.per_pair, atol=1e-4, rtol=1e-4)
    with model.hooks([("blocks.2.hook_mlp_out", lambda x, hook: 2 * x)]):
        found = function_vector(model, pair, 1, "seq_log_prob_diff", progress=False).effects
        patched = activation_patching(
            model, pair, "seq_log_prob_diff", site="z", positions=["end"], progress=False
        )
    torch.testing.assert_close(found.per_pair, patched.per_pair, atol=1e-4, rtol=1e-4)


def test_writes_are_the_heads_parts_of_the_stream(tiny, pairs, found):
    n = tiny.cfg.n_layers
    sums = torch.zeros(len(found.heads), tiny.cfg.d_model)
    for pair in pairs:
        _, cache = tiny.run_with_cache(
            pair.clean, lambda name: name.startswith("blocks.") or name == "hook_embed"
        )
        stack, labels = cache.decompose_resid(-1, heads=True)
        rows = [labels.index(f"L{unit.layer}H{unit.head}") for unit in found.heads]
        sums += stack[rows, 0, -1] / len(pairs)
    # what arrives in the final stream, in the units of each block's own
    for layer in (0, tiny.cfg.horizon, n - 1):
        scale = torch.stack([tiny.blocks[i].scalar[0] for i in range(layer, n)]).prod()
        vector = found.at(layer)
        torch.testing.assert_close(vector.vectors[0] * scale, sums.sum(0), atol=1e-4, rtol=1e-3)
        assert vector.site == "resid_pre" and vector.layers == (layer,)


def test_stream_norms(tiny, pairs, found):
    norms = [
        tiny.run_with_cache(pair.clean, "blocks.5.hook_resid_pre")[1]["resid_pre", 5][0, -1].norm()
        for pair in pairs
    ]
    torch.testing.assert_close(found.at(5).stream_norms[0], torch.stack(norms).mean())


def test_a_planted_head_gives_its_answer_where_nobody_asks():
    p = planted.get("window_beyond")
    answer = p.pairs[0].answer
    told = Pairs([pair for pair in p.pairs if pair.answer == answer])
    others = Pairs([pair for pair in p.pairs if pair.answer != answer and pair.foil == answer])
    found = function_vector(p.model, told, 1, logit_diff, progress=False)
    assert {Unit(unit.site, unit.layer, unit.head) for unit in found.heads} == p.circuit
    vector = found.at(4)
    result = steering(p.model, others, logit_diff, vector, [4.0], "clean", "end", progress=False)
    assert (result.base > 1).all()
    assert (result.per_pair[:, 0] < -1).all()  # the foil is what the vector says


def test_bad_input(tiny, pairs, found):
    for n_heads in (0, 61):
        with pytest.raises(InputError, match=f"n_heads is {n_heads}, expected 1 to 60"):
            function_vector(tiny, pairs, n_heads, progress=False)
    with pytest.raises(InputError, match="no block 15"):
        found.at(15)
    with pytest.raises(InputError, match="stopped before its end"):
        function_vector(tiny, pairs, 1, progress=lambda done, total: False)
    assert "FunctionVector(L" in repr(found)
