"""Training on rows that are made of known features; activations and the untrained control."""

from itertools import repeat

import pytest
import torch

import g4lens
from g4lens.analysis.readouts.activations import activations
from g4lens.analysis.readouts.train_dictionary import Learner, shuffled, train_dictionary
from g4lens.analysis.readouts.untrained import untrained
from g4lens.errors import HookNameError, InputError
from g4lens.quantize import Packed

from .shared import IN


def made_of_features(n: int = 4000, d: int = 16, width: int = 24, scale: float = 5.0):
    """Rows that are sums of two of `width` random directions, and those directions."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(width, d, generator=random)
    directions /= directions.norm(dim=1, keepdim=True)
    features = torch.zeros(n, width)
    chosen = torch.rand(n, width, generator=random).topk(2).indices
    features.scatter_(1, chosen, 1 + torch.rand(n, 2, generator=random))
    return scale * features @ directions + 3, directions


def test_it_finds_the_features_that_are_there():
    rows, directions = made_of_features()
    d = train_dictionary(repeat(rows), 32, 2, IN, 800, batch=256, progress=False)
    missed = (rows - d.reconstruct(rows)).square().sum() / (rows - rows.mean(0)).square().sum()
    assert missed < 0.05
    likeness = (directions @ d.W_dec.T).amax(1)
    assert (likeness > 0.95).float().mean() > 0.9
    torch.testing.assert_close(d.W_dec.norm(dim=1), torch.ones(32))
    assert (d.encode(rows) > 0).sum(1).max() <= 2


def test_the_same_seed_gives_the_same_and_another_another():
    rows, _ = made_of_features(600)
    first, second, third = (
        train_dictionary(repeat(rows), 8, 2, IN, 20, batch=64, seed=seed, progress=False).W_dec
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, third)


def test_the_scale_of_the_rows_is_folded_in():
    rows, _ = made_of_features(600)
    small, large = (
        train_dictionary(repeat(factor * rows), 8, 2, IN, 30, batch=64, progress=False)
        for factor in (1, 64)
    )
    torch.testing.assert_close(64 * small.reconstruct(rows), large.reconstruct(64 * rows))


@pytest.mark.parametrize(("dead_after", "comes_back"), [(500, True), (10**9, False)])
def test_dead_features_come_back(dead_after, comes_back):
    rows, _ = made_of_features(2000)
    learner = Learner(rows, 64, 2, 2e-3, torch.Generator().manual_seed(0))
    weak = slice(8, None)  # never among the two largest
    with torch.no_grad():
        learner.W_enc[:, weak] *= 0.01
    for batch in rows.repeat(10, 1).split(100):
        learner.learn(batch, 2e-3, dead_after)
    alive = (learner.dictionary(IN).encode(rows)[:, weak] > 0).any(0).sum()
    assert (alive > 10) == comes_back


def test_batches_hold_each_row_once():
    rows = torch.arange(700.0)[:, None]
    batches = list(shuffled(iter(rows.split(90)), 10, torch.Generator().manual_seed(0)))
    assert all(len(batch) == 10 for batch in batches)
    assert sorted(torch.cat(batches).flatten().tolist()) == rows.flatten().tolist()
    assert torch.cat(batches)[:300].max() > 310, "rows that come late are among the first"


def test_an_iterator_that_ends_early():
    with pytest.raises(InputError, match="ended after 3 of 10 batches of 32 rows"):
        train_dictionary([torch.randn(100, 4)], 8, 2, IN, 10, batch=32, progress=False)
    with pytest.raises(InputError, match="before there was a batch"):
        train_dictionary([torch.randn(10, 4)], 8, 2, IN, 10, batch=32, progress=False)


@pytest.mark.parametrize(("width", "k", "steps"), [(4, 5, 1), (4, 0, 1), (4, 2, 0)])
def test_numbers_that_cannot_be(width, k, steps):
    with pytest.raises(InputError, match="expected 1 <= k <= width"):
        train_dictionary([torch.randn(9, 4)], width, k, IN, steps, progress=False)


def test_rows_of_unequal_width():
    rows = iter([torch.randn(50, 4), torch.randn(50, 5)])
    with pytest.raises(InputError, match=r"shape \(50, 5\), expected \[rows, 4\]"):
        train_dictionary(rows, 8, 2, IN, 10, batch=32, progress=False)


# ---- activations


@pytest.mark.parametrize(
    "point", [IN, "blocks.3.attn.hook_z", "blocks.8.hook_resid_post", "hook_embed"]
)
def test_activations_are_those_of_a_plain_run(model, point):
    random = torch.Generator().manual_seed(6)
    prompts = [torch.randint(3, 90, (n,), generator=random) for n in (9, 12, 9)]
    seen = set()
    for part in activations(model, prompts, point, positions=slice(1, None)):
        for value, prompt, position, token in zip(*part, strict=True):
            cache = model.run_with_cache(prompts[prompt][None], point)[1]
            torch.testing.assert_close(
                value, cache[point][0, position].flatten(), atol=1e-4, rtol=1e-4
            )
            assert token == prompts[prompt][position]
            seen.add((int(prompt), int(position)))
    assert seen == {(i, p) for i, ids in enumerate(prompts) for p in range(1, len(ids))}


def test_activations_of_no_hook_point(model):
    with pytest.raises(HookNameError, match="no hook point is called"):
        next(activations(model, [torch.arange(3, 9)], "blocks.3.resid"))
    with pytest.raises(InputError, match="a row for each position"):
        next(activations(model, [torch.arange(3, 9)], "vision.blocks.0.hook_resid_post"))


# ---- untrained


def test_an_untrained_model_keeps_sizes_and_knows_nothing(model, tokens):
    before = model(tokens)
    other = untrained(model)
    assert torch.equal(model(tokens), before)
    assert torch.isfinite(other(tokens)).all()
    assert not torch.allclose(other(tokens), before)
    for (name, was), (_, now) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        if was.ndim == 1:
            assert torch.equal(was.sort().values, now.sort().values), name
        else:
            torch.testing.assert_close(now.std(), was.std(), rtol=0.3, atol=0.01)
    assert torch.equal(untrained(model)(tokens), other(tokens))


def test_nothing_is_left_of_the_bundled_model():
    """Nor of what it was initialised with, by a generator of the same seed."""
    tiny = g4lens.load("tiny", device="cpu")
    assert likeness(tiny, untrained(tiny)) < 0.2


def likeness(one, other) -> float:
    """The largest correlation of a large matrix with its counterpart."""
    both = zip(one.parameters(), other.parameters(), strict=True)
    large = [(a.flatten(), b.flatten()) for a, b in both if a.ndim > 1 and a.numel() > 1000]
    return max(abs(float(torch.corrcoef(torch.stack(pair))[0, 1])) for pair in large)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_nothing_is_left_of_weights_in_few_bits(kind):
    tiny = g4lens.load("tiny", device="cpu", quantize=kind)
    other, again = untrained(tiny), untrained(tiny)
    for name, part in tiny.named_modules():
        if isinstance(part, Packed):
            was, now = part.weight, other.get_submodule(name).weight
            assert type(other.get_submodule(name)) is type(part)
            torch.testing.assert_close(now.std(), was.std(), rtol=0.3, atol=0.01)
            if was.numel() > 1000:
                assert torch.corrcoef(torch.stack([was.flatten(), now.flatten()]))[0, 1].abs() < 0.2
    prompt = "In Italy the capital is"
    assert torch.equal(other(prompt), again(prompt)) and torch.isfinite(other(prompt)).all()


@pytest.mark.parametrize("place", ["ram", "disk"])
def test_tables_on_the_host_give_each_row_to_another_token(place):
    tiny = g4lens.load("tiny", device="cpu", ple=place, embed=place)
    other, n = untrained(tiny), tiny.cfg.d_vocab
    ids = torch.arange(n)
    for table in ("embed.tokens", "embed.ple_tokens"):
        was, now = (m.get_submodule(table)(ids) for m in (tiny, other))
        assert (was != now).any(1).float().mean() > 0.9
        torch.testing.assert_close(was.sum(1).sort().values, now.sum(1).sort().values)
        x = torch.randn(2, was.shape[1], generator=torch.Generator().manual_seed(0))
        products = other.get_submodule(table).products(x)
        torch.testing.assert_close(products, x @ now.T, atol=1e-4, rtol=1e-4)
    prompt = "In Italy the capital is"
    assert torch.isfinite(other(prompt)).all()
    assert not torch.allclose(other(prompt), tiny(prompt))
