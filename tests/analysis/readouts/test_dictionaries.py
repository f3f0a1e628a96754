"""Dictionaries against their formulas written out, and hooks against plain runs."""

import math

import jaxtyping
import pytest
import torch

import g4lens
from g4lens.analysis.readouts.dictionaries import Dictionary
from g4lens.analysis.readouts.feature_examples import feature_examples
from g4lens.analysis.readouts.loss_recovered import loss_recovered
from g4lens.errors import HookError, HookNameError, InputError
from g4lens.model.gemma4 import Gemma4
from tests.conftest import randomised

from .shared import IN, KINDS, OUT, random_dictionary


def rows(n: int = 7, d: int = 32) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(1))


def identity(d: int, point: str = IN, k: int | None = None) -> Dictionary:
    """Two features a channel, one for each sign: it reconstructs everything."""
    eye = torch.eye(d)
    W_enc = torch.cat([eye, -eye], 1)
    zeros = torch.zeros(2 * d), torch.zeros(d)
    return Dictionary(W_enc, zeros[0], W_enc.T.clone(), zeros[1], point, point, k=k)


# ---- what it computes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transcoder", [False, True])
def test_features_by_hand(kind, transcoder):
    d, x = random_dictionary(kind, transcoder, skip=transcoder), rows()
    found = d.encode(x)
    for i, row in enumerate(x):
        pre = (row if transcoder else row - d.b_dec) @ d.W_enc + d.b_enc
        limit = torch.zeros(40)
        if d.k is not None:
            limit = limit + max(0.0, float(pre.sort().values[-d.k - 1]))
        if d.threshold is not None:
            limit = d.threshold
        expected = torch.where(pre > limit, pre, 0.0).clamp(min=0)
        torch.testing.assert_close(found[i], expected)
    skip = x @ d.W_skip.T if d.W_skip is not None else 0
    torch.testing.assert_close(d.reconstruct(x), found @ d.W_dec + d.b_dec + skip)
    torch.testing.assert_close(d.decode(found), found @ d.W_dec + d.b_dec)


def test_another_dtype():
    d = random_dictionary("topk").to(torch.float64)
    assert d.reconstruct(rows()).dtype == torch.float64


@pytest.mark.parametrize("k", [0, 41])
def test_a_k_that_cannot_be(k):
    d = random_dictionary("relu")
    with pytest.raises(InputError, match=f"k is {k}: expected 1 to 40"):
        Dictionary(d.W_enc, d.b_enc, d.W_dec, d.b_dec, IN, IN, k=k)


def test_a_transcoder_does_not_subtract_its_outputs_bias():
    d = random_dictionary("relu")
    with pytest.raises(InputError, match="centred=False"):
        Dictionary(d.W_enc, d.b_enc, d.W_dec, d.b_dec, IN, OUT)


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip"])
def test_a_matrix_the_wrong_way_round_is_named(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    d = random_dictionary("jumprelu", transcoder=True, skip=True)
    x = getattr(d, name)
    wrong = x.T if name in ("W_enc", "W_dec") else x[:-1]
    with pytest.raises(InputError, match=r"is \(\d+.*\), expected \("):
        Dictionary(**{**vars(d), name: wrong})


def test_an_autoencoder_gives_what_it_gets():
    d = random_dictionary("relu")
    with pytest.raises(InputError, match=r"b_dec is \(31,\), expected \(32,\)"):
        Dictionary(d.W_enc, d.b_enc, d.W_dec[:, :-1], d.b_dec[:-1], IN, IN)


# ---- in a model


def stream(model, tokens, fwd_hooks, point: str = IN) -> torch.Tensor:
    with model.hooks(fwd_hooks):
        return model.run_with_cache(tokens, point)[1][point]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reconstruction_takes_the_place(model, tokens, kind):
    d = random_dictionary(kind)
    before = stream(model, tokens, [])
    after = stream(model, tokens, d.hooks(model))
    torch.testing.assert_close(after, d.reconstruct(before))


def test_a_transcoder_reads_one_point_and_writes_another(model, tokens):
    d = random_dictionary("relu", transcoder=True, skip=True)
    d = Dictionary(**{**vars(d), "hook_in": "blocks.3.ln2.hook_normalized", "hook_out": OUT})
    read = stream(model, tokens, [], "blocks.3.ln2.hook_normalized")
    after = stream(model, tokens, d.hooks(model), OUT)
    torch.testing.assert_close(after, d.reconstruct(read))


@pytest.mark.parametrize("transcoder", [False, True])
def test_with_the_error_term_and_no_edit_nothing_changes(model, tokens, transcoder):
    d = random_dictionary("topk", transcoder)
    d = Dictionary(**{**vars(d), "hook_in": "blocks.3.hook_resid_mid"}) if transcoder else d
    edited = model.run_with_hooks(tokens, fwd_hooks=d.hooks(model, error=True))
    torch.testing.assert_close(edited, model(tokens), atol=1e-6, rtol=0)


def test_ablating_a_feature_takes_its_vector_away(model, tokens):
    d = random_dictionary("topk")
    before = stream(model, tokens, [])
    features = d.encode(before)
    feature = int(features.sum((0, 1)).argmax())
    after = stream(model, tokens, d.hooks(model, error=True, ablate=[feature]))
    torch.testing.assert_close(
        after, before - features[..., feature, None] * d.W_dec[feature], atol=1e-5, rtol=1e-5
    )
    bare = stream(model, tokens, d.hooks(model, ablate=[feature]))
    torch.testing.assert_close(
        bare, d.decode(features.index_fill(-1, torch.tensor(feature), 0.0)), atol=1e-5, rtol=1e-5
    )


def test_an_edit_sees_features_and_where_they_are(model, tokens):
    d = random_dictionary("relu")

    def double(features, hook):
        features[hook.at(4)] *= 2

    before = stream(model, tokens, [])
    after = stream(model, tokens, d.hooks(model, error=True, edit=double))
    shift = d.encode(before[:, 4]) @ d.W_dec
    torch.testing.assert_close(after[:, 4], before[:, 4] + shift, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(after[:, 5:], before[:, 5:])


@pytest.mark.parametrize("positions", [-1, [2, 5], slice(1, None)])
def test_only_at_some_positions(model, tokens, positions):
    d = random_dictionary("topk")
    before, after = (
        stream(model, tokens, []),
        stream(model, tokens, d.hooks(model, positions=positions)),
    )
    expected = before.clone()
    expected[:, positions] = d.reconstruct(before[:, positions])
    torch.testing.assert_close(after, expected)


def test_heads_lie_side_by_side(model, tokens):
    point = "blocks.3.attn.hook_z"
    after = model.run_with_hooks(tokens, fwd_hooks=identity(32, point).hooks(model))
    torch.testing.assert_close(after, model(tokens), atol=1e-5, rtol=0)


def test_chunks_and_reads_are_as_a_whole_run(model, tokens):
    hooks = random_dictionary("topk").hooks(model)
    whole = model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks, chunk=5), whole)
    last = model.run_with_hooks(tokens, fwd_hooks=hooks, read=-1)
    torch.testing.assert_close(last[:, 0], whole[:, -1])


def test_rows_that_were_taken_away_in_between(model, tokens):
    d = random_dictionary("relu", transcoder=True)
    horizon = model.cfg.horizon
    names = {
        "hook_in": f"blocks.{horizon}.hook_resid_pre",
        "hook_out": f"blocks.{horizon}.hook_mlp_out",
    }
    hooks = Dictionary(**{**vars(d), **names}).hooks(model)
    with pytest.raises(HookError, match=r"holds 1 rows, .* held 23"):
        model.run_with_hooks(tokens, fwd_hooks=hooks, read=-1)
    assert not any(point.is_hung for point in model.hook_points.values())


# ---- what does not fit


def test_another_width_names_both(model):
    with pytest.raises(InputError, match=f"{IN} of this model is 32 wide, .* there 24"):
        random_dictionary("relu", d=24).hooks(model)


def test_a_hook_point_that_is_none(model):
    d = identity(32, "blocks.3.hook_residpost")
    with pytest.raises(HookNameError, match=r"Did you mean 'blocks\.3\.hook_resid_post'"):
        d.hooks(model)


@pytest.mark.parametrize("point", ["blocks.3.attn.hook_pattern", "blocks.3.attn.hook_rot_k"])
def test_a_point_without_rows_for_positions(model, point):
    with pytest.raises(InputError, match="a row for each position"):
        identity(32, point).hooks(model)


def test_no_examples_asked_for(model):
    with pytest.raises(InputError, match="top is 0"):
        feature_examples(model, identity(32), [torch.arange(3, 8)], 0, top=0)


def test_a_feature_that_is_none(model):
    with pytest.raises(InputError, match="no feature 40, expected 0 to 39"):
        random_dictionary("relu").hooks(model, ablate=[40])


# ---- how good it is


def test_loss_recovered_by_hand(model):
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(5))
    d = random_dictionary("topk")
    zero = [(IN, lambda x, hook: 0 * x)]
    losses = []
    for hooks in ([], d.hooks(model), zero):
        logits = model.run_with_hooks(ids, fwd_hooks=hooks)[:, :-1].log_softmax(-1)
        losses.append(-float(logits.gather(-1, ids[:, 1:, None]).mean()))
    found = loss_recovered(model, d, list(ids))
    assert (found.loss, found.with_dictionary, found.with_zero) == pytest.approx(losses, abs=1e-5)
    assert found.recovered == pytest.approx((losses[2] - losses[1]) / (losses[2] - losses[0]), 1e-3)
    before = stream(model, ids, []).flatten(0, 1)
    variance = (before - before.mean(0)).square().sum()
    missed = (before - d.reconstruct(before)).square().sum()
    assert found.explained == pytest.approx(float(1 - missed / variance), abs=1e-4)
    active = d.encode(before) > 0
    assert found.active == pytest.approx(float(active.sum(1).float().mean()))
    assert found.alive == pytest.approx(float(active.any(0).float().mean()))
    assert found.n_tokens == 33


def test_what_reconstructs_everything_recovers_everything(model):
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(5))
    found = loss_recovered(model, identity(32), [ids[0], ids[1, :6]], read=[2, -2])
    assert found.recovered == pytest.approx(1, abs=1e-5)
    assert found.explained == pytest.approx(1, abs=1e-5)
    assert found.n_tokens == 4


def test_where_zeros_cost_nothing_there_is_nothing_to_recover(cfg):
    silent = randomised(Gemma4(cfg))
    with torch.no_grad():
        silent.blocks[3].ln2_post.weight.zero_()
    d = identity(32, "blocks.3.hook_mlp_out")
    found = loss_recovered(silent, d, [torch.arange(3, 12)])
    assert math.isnan(found.recovered) and math.isnan(found.explained)
    assert found.loss == found.with_zero and "nan%" in repr(found)


def test_a_position_without_a_next_token(model):
    with pytest.raises(InputError, match="read is -1: the last of 5 positions has no next token"):
        loss_recovered(model, identity(32), [torch.arange(3, 8)], read=-1)


@pytest.mark.parametrize("prompts", ["one text", []])
def test_no_list_of_prompts(model, prompts):
    with pytest.raises(InputError, match="expected a list of prompts"):
        loss_recovered(model, identity(32), prompts)


def test_examples_are_the_largest(model):
    random = torch.Generator().manual_seed(6)
    prompts = [torch.randint(3, 90, (n,), generator=random) for n in (9, 12, 9)]
    d = random_dictionary("topk")
    feature = 7
    values = [d.encode(stream(model, ids[None], [])[0])[:, feature] for ids in prompts]
    found = feature_examples(model, d, prompts, [3, feature], top=4)
    top = torch.cat(values).topk(4).values
    torch.testing.assert_close(found.values[1], top, atol=1e-5, rtol=1e-5)
    assert found.frequency[1] == pytest.approx(float((torch.cat(values) > 0).float().mean()))
    for value, prompt, position, token, (_, text, _) in zip(
        found.values[1].tolist(),
        found.prompts[1].tolist(),
        found.positions[1].tolist(),
        found.tokens[1].tolist(),
        found.texts[1],
        strict=True,
    ):
        if value > 0:
            assert float(values[prompt][position]) == pytest.approx(value, abs=1e-5)
            assert token == int(prompts[prompt][position])
            assert text == f"#{token}"


def test_the_bundled_dictionary():
    model = g4lens.load("tiny", device="cpu")
    pairs = g4lens.tasks.pairs("capital", 12)
    d = bundled()
    assert (len(d), d.k, d.hook_in) == (512, 8, "blocks.8.hook_resid_post")
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(512))
    prompts = [str(pair.clean) + str(pair.answer) for pair in pairs]
    found = loss_recovered(model, d, prompts, read=-2)
    assert found.recovered > 0.99
    assert found.explained > 0.9
    shown = feature_examples(model, d, prompts, [437, 0], top=3).to_frame()
    assert set(shown.feature) == {437}, "0 is silent here"
    assert shown.value.is_monotonic_decreasing
    for row in shown.itertuples():
        around = row.before + row.token + row.behind
        assert around in "<bos>" + prompts[row.prompt]


def bundled() -> Dictionary:
    from g4lens.analysis.readouts.dictionary_files import load_dictionary

    return load_dictionary(g4lens.sample("tiny_sae"))
