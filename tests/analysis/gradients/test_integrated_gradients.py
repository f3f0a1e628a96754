"""The shares of all positions add up to the difference, and each is the integral along the way."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import g4lens
from g4lens import planted
from g4lens.analysis import metrics
from g4lens.analysis.gradients.integrated_gradients import integrated_gradients
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.errors import InputError
from tests.analysis.test_patching import random_pairs

ODD = (3, 7)  # places where the sides of a pair differ


@pytest.fixture(scope="module")
def double(model):
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def gentle(model):
    """Per-layer embeddings and embeddings that differ little between a few tokens."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for table in (model.embed.tokens.weight, model.embed.ple_tokens.weight):
            table[41:44] = table[40] + 0.02 * table[44:47]
    random = torch.Generator().manual_seed(1)
    pairs = []
    for answer in (5, 6):
        clean = torch.randint(3, 39, (11,), generator=random)
        corrupted = clean.clone()
        clean[list(ODD)], corrupted[list(ODD)] = torch.tensor([40, 41]), torch.tensor([42, 43])
        pairs.append(Pair(clean, corrupted, answer, 9, positions={"it": list(ODD)}))
    return model, Pairs(pairs)


def metric_at(model, pair, step):
    """The metric with both inputs a share of the way from the corrupted prompt's to the clean's."""
    ends = [model(getattr(pair, side)[None], stop=0) for side in ("corrupted", "clean")]
    mixed = {
        name: torch.lerp(*(getattr(end, name) for end in ends), step) for name in ("resid", "ple")
    }
    state = model(state=replace(ends[0], **mixed), stop=model.cfg.n_layers)
    logits = torch.nn.functional.linear(model.ln_final(state.resid), model.embed.tokens.weight)
    return float(logits[0, -1, pair.answer] - logits[0, -1, pair.foil])


def test_shares_add_up_to_the_difference(gentle):
    model, pairs = gentle
    found = integrated_gradients(model, pairs, steps=32, progress=False)
    with torch.no_grad():
        expected = [metric_at(model, p, 1.0) - metric_at(model, p, 0.0) for p in pairs]
    torch.testing.assert_close(found.target, torch.tensor(expected), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.per_pair.sum((1, 2)), found.target, atol=1e-4, rtol=1e-4)
    assert found.error < 1e-4
    elsewhere = [p for p in range(11) if p not in ODD]
    assert not found.per_pair[:, :, elsewhere].any()
    assert found.per_pair[:, :, ODD[0]].abs().min() > 0
    assert found.recovered.sum() == pytest.approx(1, abs=1e-4)


def test_a_share_is_the_integral_of_the_gradient(gentle):
    """By the trapezoid rule over finite differences of one position's inputs."""
    model, pairs = gentle
    found = integrated_gradients(model, pairs[0], steps=24, progress=False)
    pair, total, n, step = pairs[0], 0.0, 16, 1e-5
    ends = [model(getattr(pair, side)[None], stop=0) for side in ("corrupted", "clean")]
    with torch.no_grad():
        for i in range(n + 1):
            values = []
            for sign in (1, -1):
                mixed = {}
                for name in ("resid", "ple"):
                    a, b = (getattr(end, name) for end in ends)
                    mixed[name] = torch.lerp(a, b, i / n)
                    mixed[name][:, ODD[0]] += sign * step * (b - a)[:, ODD[0]]
                state = model(state=replace(ends[0], **mixed), stop=model.cfg.n_layers)
                resid = model.ln_final(state.resid)
                logits = torch.nn.functional.linear(resid, model.embed.tokens.weight)
                values.append(float(logits[0, -1, pair.answer] - logits[0, -1, pair.foil]))
            total += (values[0] - values[1]) / (2 * step) / n / (2 if i in (0, n) else 1)
    assert float(found.tokens()[ODD[0]]) == pytest.approx(total, rel=1e-3)


def test_it_switches_gradients_on_for_itself(gentle):
    model, pairs = gentle
    with torch.no_grad():
        found = integrated_gradients(model, pairs, steps=2, progress=False)
    assert found.values.abs().max() > 0


def test_places_collect_positions(gentle):
    model, pairs = gentle
    each = integrated_gradients(model, pairs, steps=4, progress=False)
    named = integrated_gradients(model, pairs, steps=4, positions=["it", 0], progress=False)
    assert named.axes[1].labels == ("it", 0)
    torch.testing.assert_close(named.per_pair[:, :, 0], each.per_pair[:, :, list(ODD)].sum(2))
    torch.testing.assert_close(named.missing, each.missing)


def test_budget_changes_nothing_but_the_parts(gentle):
    model, pairs = gentle
    whole, small = (
        integrated_gradients(model, pairs, steps=5, budget=budget, progress=False)
        for budget in (2**30, 2**20)
    )
    torch.testing.assert_close(whole.per_pair, small.per_pair)
    with pytest.raises(InputError, match=r"budget is 0.1 MiB, but the graph of one pair of 11"):
        integrated_gradients(model, pairs, budget=2**17, progress=False)


@pytest.mark.parametrize("baseline", ["zero", "mean", "pad"])
def test_named_baselines_leave_bos_and_forced_tokens_alone(double, baseline):
    ids = torch.tensor([2, 11, 12, 13, 14, 15])
    pair = Pair(ids, ids, [5, 6, 7])
    found = integrated_gradients(
        double, pair, "seq_log_prob", baseline=baseline, steps=20, progress=False
    )
    assert found.per_pair.shape == (1, 2, 6)  # the two forced tokens are no input
    assert not found.per_pair[0, :, 0].any()
    assert found.per_pair[0, :, 1:].abs().min() > 0
    torch.testing.assert_close(found.per_pair.sum((1, 2)) + found.missing, found.target)
    assert found.about["baseline"] == baseline


@pytest.mark.parametrize("name", ["colour", "tone"])
def test_a_planted_picture_or_sound_gets_it_all(name):
    p = planted.get(name)
    found = integrated_gradients(p.model, p.pairs[:2], steps=64, progress=False)
    for i, pair in enumerate(p.pairs[:2]):
        soft = [t.index for t in pair.clean.tokens if t.modality in ("image", "audio")]
        inside = found.tokens(i)[soft]
        assert float(inside.sum()) == pytest.approx(float(found.target[i]), rel=0.02)
        if name == "colour":
            assert int(found.tokens(i).argmax()) == pair.positions["asked"]


def test_two_legs_add_up(double):
    random = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(3, 90, (2, 8), generator=random)
    whole = integrated_gradients(
        double,
        Pair(clean, corrupted, [5, 6, 7], [8, 9]),
        "seq_log_prob_diff",
        steps=3,
        progress=False,
    )
    legs = [
        integrated_gradients(
            double, Pair(clean, corrupted, a), "seq_log_prob", steps=3, progress=False
        )
        for a in ([5, 6, 7], [8, 9])
    ]
    torch.testing.assert_close(whole.per_pair, legs[0].per_pair - legs[1].per_pair)
    torch.testing.assert_close(whole.missing, legs[0].missing - legs[1].missing)


def test_the_pictures(monkeypatch):
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    tiny = g4lens.load("tiny")
    grid = np.zeros((96, 96, 3), dtype=np.uint8)
    grid[:48, :48, 0] = 255
    image, other = g4lens.Image(grid), g4lens.Image(grid[::-1].copy())
    time = np.arange(8000) / 16000
    sound = g4lens.Audio(0.3 * np.sin(2 * np.pi * 440 * time).astype(np.float32), rate=16000)
    sides = [(x, "What colour is $x^2", sound, " there?") for x in (image, other)]
    found = integrated_gradients(tiny, Pair(*sides, " red", " blue"), steps=2, progress=False)
    ax = found.plot()
    ax.figure.canvas.draw()
    texts = [text.get_text() for text in ax.texts]
    assert "[image 0]" in texts and "[audio 0]" in texts and "<bos>" in texts
    picture, spectrogram = (a for a in ax.child_axes if a.get_title())
    n_tiles = len([t for t in found.prompts[0].tokens if t.modality == "image"])
    tiles = [patch for patch in picture.patches if isinstance(patch, Rectangle)]
    assert len(tiles) == n_tiles
    strongest = int(
        found.tokens()[[t.index for t in found.prompts[0].tokens if t.modality == "image"]]
        .abs()
        .argmax()
    )
    assert max(range(n_tiles), key=lambda k: tiles[k].get_linewidth()) == strongest
    assert picture.get_title().startswith("image 0") and spectrogram.images
    plt.close("all")


def flat(logits, pairs):
    return logits[:, 0, 5].round()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baseline": "zer"}, "Did you mean 'zero'"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 2.5}, "at least 1"),
        ({"metric": "rank"}, "metric rank gives no gradient"),
        ({"metric": flat}, "metric flat gives no gradient: its slope by every logit is zero"),
        ({"positions": ["subjct"]}, "Did you mean 'subject'"),
    ],
)
def test_bad_input_is_refused(model, options, message):
    with pytest.raises(InputError, match=message):
        integrated_gradients(model, random_pairs(), progress=False, **options)
    assert not any(point.is_hung for point in model.hook_points.values())


def test_sides_of_unequal_length_and_prompts_of_ids(model):
    pair = Pair(torch.tensor([2, 11, 12]), torch.tensor([2, 11]), 5, 6)
    with pytest.raises(InputError, match="compare them by named positions"):
        integrated_gradients(model, pair, progress=False)
    found = integrated_gradients(model, pair, metrics.logit, baseline="zero", progress=False)
    with pytest.raises(InputError, match="give text, parts or a Prompt"):
        found.plot()
    with pytest.raises(InputError, match="no pair 1"):
        found.plot(pair=1)


def test_shares_of_no_difference_are_not_drawn():
    tiny = g4lens.load("tiny")
    same = Pair("In Italy the capital is", "In Italy the capital is", " Rome")
    found = integrated_gradients(tiny, same, metrics.logit, steps=2, progress=False)
    assert not found.target.any() and found.plot().get_title()
    with pytest.raises(InputError, match="have the same metric: plot 'values'"):
        found.plot("recovered")
