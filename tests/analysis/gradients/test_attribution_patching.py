"""Every cell is the derivative of activation patching at its start, by finite differences."""

import copy

import pytest
import torch

from g4lens.analysis import metrics
from g4lens.analysis.gradients.attribution_patching import attribution_patching
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.patching import activation_patching
from g4lens.analysis.sites import SITES
from g4lens.errors import InputError
from g4lens.hooks import edited_points
from g4lens.model.gemma4 import Gemma4
from tests.analysis.test_patching import random_pairs
from tests.conftest import randomised, small_config

N, STEP = 11, 1e-5
PRE_CAP = metrics.logit_diff.pre_cap
SIDES = {"denoise": ("corrupted", "clean"), "noise": ("clean", "corrupted")}
CELLS = [(0, 2), (4, 3), (5, 10), (8, 10)]  # block, position


@pytest.fixture(scope="module")
def double(model) -> Gemma4:
    return copy.deepcopy(model).double()


@pytest.fixture(scope="module")
def two_keys() -> Gemma4:
    """Two key heads for four query heads, and a global last owner."""
    kinds = ("local", "global", "local", "local", "global") + ("local", "global") * 2
    changes = {"n_kv_heads": 2, "n_layers": 9, "layer_types": kinds, "n_kv_shared_layers": 4}
    return randomised(Gemma4(small_config(**changes)), seed=1).double()


def moved(model, pair, hooks):
    """The metric of one full pass with hooks."""
    base = pair[0]
    kept = []
    hooks = [*hooks, ("hook_logits_pre_cap", lambda x, hook: kept.append(x))]
    with torch.no_grad():
        model.run_with_hooks(base[None], fwd_hooks=hooks)
    return float(kept[0][0, -1, pair[2]] - kept[0][0, -1, pair[3]])


def slope(model, pair, name, index):
    """d/de of the metric where the base's activation is moved by e times the difference."""
    base, source = (model.run_with_cache(ids[None], name)[1][name] for ids in pair[:2])

    def at(step):
        def edit(x, hook):
            x[index] = base[index] + step * (source[index] - base[index])

        return moved(model, pair, [(name, edit)])

    return (at(STEP) - at(-STEP)) / (2 * STEP)


def runs(pairs, direction):
    for pair in pairs:
        base, source = (getattr(pair, side) for side in SIDES[direction])
        yield base, source, pair.answer, pair.foil


@pytest.mark.parametrize(
    ("site", "direction"),
    [(site, "denoise") for site in SITES if SITES[site].heads != "query"]
    + [(site, "noise") for site in ("resid_pre", "ple_token", "rot_k", "mlp_post")],
)
def test_a_cell_is_the_derivative_of_patching(double, site, direction):
    pairs = random_pairs(count=2)
    result = attribution_patching(double, pairs, site=site, direction=direction, progress=False)
    assert [axis.name for axis in result.axes] == ["layer", "pos"]
    for layer, position in CELLS:
        if layer not in result.axes[0].labels:
            continue
        name, index = SITES[site].full_name(layer), (slice(None), position)
        if SITES[site].kind == "ple":
            name, index = f"hook_{site}", (slice(None), position, layer)
        expected = [slope(double, pair, name, index) for pair in runs(pairs, direction)]
        cell = result.per_pair[:, result.axes[0].labels.index(layer), position]
        torch.testing.assert_close(
            cell.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("site", ["z", "q", "rot_q"])
def test_heads_are_derivatives_too(double, site):
    pairs = random_pairs(count=2)
    result = attribution_patching(double, pairs, site=site, progress=False)
    for layer, head in [(0, 1), (4, 3), (8, 0)]:
        index = (slice(None), slice(None), head)
        name = SITES[site].full_name(layer)
        expected = [slope(double, pair, name, index) for pair in runs(pairs, "denoise")]
        torch.testing.assert_close(
            result.per_pair[:, layer, head].double(),
            torch.tensor(expected).double(),
            atol=1e-5,
            rtol=1e-5,
        )


def attention(model, ids, layer, k=None, v=None, q=None):
    """One block's pattern and z, with other keys, values or queries of our choice."""
    cache = model.run_with_cache(ids[None], f"blocks.{layer}.attn.*")[1]
    q = cache["rot_q", layer] if q is None else q
    k = cache["rot_k", layer] if k is None else k
    v = cache["norm_v", layer] if v is None else v
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    closed = (distance < 0) | (distance >= model.cfg.window(layer))
    pattern = scores.masked_fill(closed, -torch.inf).softmax(-1)
    return pattern, torch.einsum("bhqk,bkhd->bqhd", pattern, v)


def z_gradient(model, pair, layer):
    kept = []
    with model.hooks([("hook_logits_pre_cap", lambda x, hook: kept.append(x))]):
        return model.run_with_grads(
            pair[0][None],
            lambda _: kept[0][0, -1, pair[2]] - kept[0][0, -1, pair[3]],
            f"blocks.{layer}.attn.hook_z",
        ).grads["z", layer]


@pytest.mark.parametrize("fixture", ["double", "two_keys"])
@pytest.mark.parametrize("site", ["pattern", "k@head", "v@head"])
def test_what_one_head_sees(fixture, site, request):
    """By full passes that write the head's z, had its keys or values moved by a small step."""
    model, pairs = request.getfixturevalue(fixture), random_pairs(count=2)
    maps = {
        "all": attribution_patching(model, pairs, site=site, progress=False),
        "each": attribution_patching(
            model, pairs, site=site, positions=slice(None), progress=False
        ),
    }
    torch.testing.assert_close(maps["each"].per_pair.sum(-1), maps["all"].per_pair)
    for layer, head, position in [(1, 1, None), (5, 0, 3), (8, 3, None)]:
        expected = []
        for pair in runs(pairs, "denoise"):
            g = z_gradient(model, pair, layer)[:, :, head]
            rows = slice(None) if position is None else [position]

            def z_at(step, rows=rows, pair=pair, layer=layer, head=head):
                a, b = (
                    {"cache": model.run_with_cache(ids[None], f"blocks.{layer}.attn.*")[1]}
                    for ids in pair[:2]
                )
                k, v = (a["cache"][n, layer].clone() for n in ("rot_k", "norm_v"))
                pattern, _ = attention(model, pair[0], layer)
                if site == "pattern":
                    pattern = pattern.clone()
                    theirs, _ = attention(model, pair[1], layer)
                    pattern[:, :, rows] += step * (theirs - pattern)[:, :, rows]
                    v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
                    return torch.einsum("bqk,bkd->bqd", pattern[:, head], v[:, :, head])
                x, n = (k, "rot_k") if site == "k@head" else (v, "norm_v")
                x[:, rows] += step * (b["cache"][n, layer] - x)[:, rows]
                return attention(model, pair[0], layer, k, v)[1][:, :, head]

            change = (z_at(STEP) - z_at(-STEP)) / (2 * STEP)
            expected.append(float((g * change).sum()))
        result = maps["all" if position is None else "each"].per_pair[:, layer, head]
        cell = result if position is None else result[:, position]
        torch.testing.assert_close(
            cell.double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("fixture", ["double", "two_keys"])
@pytest.mark.parametrize(
    ("site", "places"), [("rot_k", None), ("k", None), ("rot_k", [[2, 4], "all of it"])]
)
def test_the_qk_fix_recomputes_all_readers_of_a_key(fixture, site, places, request):
    model = request.getfixturevalue(fixture)
    pairs = Pairs(
        [
            Pair(p.clean, p.corrupted, p.answer, p.foil, positions={"all of it": slice(None)})
            for p in random_pairs(count=2)
        ]
    )
    result = attribution_patching(
        model, pairs, site=site, positions=places, qk_fix=True, progress=False
    )
    owner = model.cfg.horizon
    spots = [[2], [10]] if places is None else [[2, 4], list(range(N))]
    for layer, readers in [(owner, model.cfg.readers(owner)), (8, [8])]:
        if layer not in result.axes[0].labels:
            continue
        expected = torch.zeros(len(pairs), len(spots), dtype=torch.double)
        for i, pair in enumerate(runs(pairs, "denoise")):
            for reader in readers:
                name, slopes = f"blocks.{reader}.attn.hook_rot_k", z_gradient(model, pair, reader)
                mine, theirs = (model.run_with_cache(ids[None], name)[1][name] for ids in pair[:2])
                z = attention(model, pair[0], reader)[1]
                for j, spot in enumerate(spots):
                    k = mine.clone()
                    k[:, spot] = theirs[:, spot]
                    expected[i, j] += (slopes * (attention(model, pair[0], reader, k)[1] - z)).sum()
        columns = [spot[0] for spot in spots] if places is None else [0, 1]
        cells = result.per_pair[:, result.axes[0].labels.index(layer)][:, columns]
        torch.testing.assert_close(cells.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["q", "rot_q"])
def test_the_qk_fix_of_queries(two_keys, site):
    pairs = random_pairs()
    result = attribution_patching(two_keys, pairs, site=site, qk_fix=True, progress=False)
    for layer, head in [(1, 1), (6, 2)]:
        expected = []
        for pair in runs(pairs, "denoise"):
            name = f"blocks.{layer}.attn.hook_rot_q"
            q = two_keys.run_with_cache(pair[1][None], name)[1][name]
            change = (
                attention(two_keys, pair[0], layer, q=q)[1] - attention(two_keys, pair[0], layer)[1]
            )
            expected.append(float((z_gradient(two_keys, pair, layer) * change)[:, :, head].sum()))
        cell = result.per_pair[:, layer, head].double()
        torch.testing.assert_close(cell, torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)


def test_grad_drop_averages_sizes_without_one_block_at_a_time(double):
    pairs = random_pairs(count=1)
    site, layer, position = "mlp_out", 2, 4
    result = attribution_patching(double, pairs, site=site, grad_drop=True, progress=False)
    pair, sizes, name = next(runs(pairs, "denoise")), [], SITES[site].full_name(layer)
    base, source = (double.run_with_cache(ids[None], name)[1][name] for ids in pair[:2])
    for block in range(10):
        kept = []
        writes = [f"blocks.{block}.hook_{x}" for x in ("attn_out", "mlp_out", "ple_out")]
        with double.hooks(
            [("hook_logits_pre_cap", lambda x, hook, kept=kept: kept.append(x))],
            [(writes, lambda grad, hook: torch.zeros_like(grad))],
        ):
            grads = double.run_with_grads(
                pair[0][None],
                lambda _, kept=kept: kept[0][0, -1, pair[2]] - kept[0][0, -1, pair[3]],
                name,
            ).grads
        sizes.append(float(((source - base) * grads[name])[0, position].sum().abs()))
    assert sizes[layer] == 0
    assert float(result.per_pair[0, layer, position]) == pytest.approx(sum(sizes) / 9, rel=1e-5)
    with pytest.raises(InputError, match="no sign to flip"):
        result.permutation_pvalue()


def test_several_sites_are_what_each_is_alone(model):
    pairs = random_pairs()
    together = attribution_patching(model, pairs, site=list(SITES), progress=False)
    assert list(together) == list(SITES)
    for site in ("resid_pre", "rot_k", "pattern", "mlp_post"):
        alone = attribution_patching(model, pairs, site=site, progress=False)
        torch.testing.assert_close(together[site].per_pair, alone.per_pair)
        assert together[site].cost.passes == 3 * len(pairs)


@pytest.mark.parametrize("site", list(SITES))
def test_axes_base_and_zeros_are_those_of_patching(model, site):
    pairs = random_pairs()
    found = attribution_patching(model, pairs, site=site, progress=False)
    patched = activation_patching(model, pairs, PRE_CAP, site=site, progress=False)
    assert found.axes == patched.axes
    assert (
        found.per_pair[patched.effect == 0].abs().max() == 0
        if (patched.effect == 0).any()
        else True
    )
    torch.testing.assert_close(found.target, patched.target - patched.base, atol=1e-4, rtol=1e-4)
    assert not found.base.any()


def test_a_small_step_is_what_patching_measures():
    """With towards equal runs the estimate and the truth meet."""
    model = randomised(Gemma4(small_config(d_vocab=100)))
    with torch.no_grad():
        for table in (model.embed.tokens.weight, model.embed.ple_tokens.weight):
            table[41] = table[40] + 1e-3 * table[42]
    clean = torch.randint(3, 39, (N,), generator=torch.Generator().manual_seed(3))
    clean[3] = 40
    corrupted = clean.clone()
    corrupted[3] = 41
    model = model.double()
    pair = Pair(clean, corrupted, 5, 6)
    for site in ("resid_post", "rot_k", "z", "mlp_post"):
        where = {"site": site, "layers": [1, 5], "progress": False}
        found = attribution_patching(model, pair, **where).values
        patched = activation_patching(model, pair, PRE_CAP, **where).effect.mean(0)
        assert (found - patched).norm() < 0.05 * patched.norm(), site


def test_named_places_of_prompts_of_unequal_length(double):
    random = torch.Generator().manual_seed(0)
    pairs = []
    for n, m in ((9, 12), (10, 10), (9, 12)):
        clean, corrupted = (torch.randint(3, 90, (k,), generator=random) for k in (n, m))
        places = {
            "it": {"clean": [3, 4], "corrupted": [m - 4, m - 3]},
            "last": {"clean": n - 1, "corrupted": m - 1},
        }
        pairs.append(Pair(clean, corrupted, 5, 6, positions=places))
    found = attribution_patching(
        double, pairs, site=["resid_pre", "norm_v"], positions=["it", "last"], progress=False
    )
    for site, result in found.items():
        for layer, column in [(5, 0), (8, 1)]:
            for i, pair in enumerate(pairs):
                place = pair.positions[("it", "last")[column]]
                name = SITES[site].full_name(layer)
                base, source = (
                    double.run_with_cache(ids[None], name)[1][name]
                    for ids in (pair.corrupted, pair.clean)
                )
                mine, theirs = place["corrupted"], place["clean"]

                def at(
                    step, name=name, base=base, source=source, mine=mine, theirs=theirs, pair=pair
                ):
                    def edit(x, hook):
                        x[:, mine] = base[:, mine] + step * (source[:, theirs] - base[:, mine])

                    return moved(double, (pair.corrupted, None, 5, 6), [(name, edit)])

                expected = (at(STEP) - at(-STEP)) / (2 * STEP)
                assert float(result.per_pair[i, layer, column]) == pytest.approx(
                    expected, abs=1e-5, rel=1e-5
                )
    with pytest.raises(InputError, match="no common positions: name them"):
        attribution_patching(double, pairs, progress=False)


def test_a_forced_difference_sums_both_continuations(model):
    random = torch.Generator().manual_seed(0)
    clean, corrupted = torch.randint(3, 90, (2, 8), generator=random)
    pair = Pair(clean, corrupted, [5, 6, 7], [8, 9])
    whole = attribution_patching(model, pair, "seq_log_prob_diff", progress=False)
    legs = [
        attribution_patching(model, Pair(clean, corrupted, one), "seq_log_prob", progress=False)
        for one in (pair.answer, pair.foil)
    ]
    torch.testing.assert_close(
        whole.per_pair, legs[0].per_pair - legs[1].per_pair, atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(whole.target, legs[0].target - legs[1].target, atol=1e-4, rtol=1e-4)


def test_kl_runs_its_clean_side_undisturbed(model):
    result = attribution_patching(model, random_pairs(), "kl", direction="denoise", progress=False)
    assert result.values.abs().max() > 0
    assert not result.is_normalised


def test_budget_changes_nothing_but_the_parts(model):
    pairs = random_pairs(count=5)
    whole = attribution_patching(model, pairs, site=["z", "k"], qk_fix=True, progress=False)
    small = attribution_patching(
        model, pairs, site=["z", "k"], qk_fix=True, budget=2**21, progress=False
    )
    for site in whole:
        torch.testing.assert_close(whole[site].per_pair, small[site].per_pair, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match=r"budget is 0.1 MiB, but the graph of one pair of 11"):
        attribution_patching(model, pairs, budget=2**17, progress=False)


def test_inside_hooks_the_edited_run_is_attributed(double):
    pairs = random_pairs(count=1)
    twice = ("blocks.2.hook_mlp_out", lambda x, hook: x * 2)
    with double.hooks([twice]):
        result = attribution_patching(double, pairs, site="resid_pre", progress=False)
        expected = [
            slope(double, pair, "blocks.4.hook_resid_pre", (slice(None), 3))
            for pair in runs(pairs, "denoise")
        ]
    assert float(result.per_pair[0, 4, 3]) == pytest.approx(expected[0], abs=1e-5, rel=1e-5)


def no_gradient(logits, pairs):
    return logits[:, 0].argmax(-1).float()


def flat(logits, pairs):
    return logits[:, 0, 5].round()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "rank"}, "metric rank gives no gradient"),
        ({"metric": no_gradient}, "metric no_gradient gives no gradient"),
        ({"metric": flat}, "metric flat gives no gradient: its slope by every logit is zero"),
        ({"metric": "kl", "direction": "noise"}, "metric kl gives no gradient in clean runs"),
        ({"site": "resid_prr"}, "Did you mean 'resid_pre'"),
        ({"site": []}, "at least one"),
        ({"direction": "up"}, "'denoise' or 'noise'"),
        ({"heads": [0]}, "not divided into heads"),
        ({"layers": [10]}, "no block 10"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(model, options, message):
    with pytest.raises(InputError, match=message):
        attribution_patching(model, random_pairs(), progress=False, **options)
    assert not edited_points()
    assert not any(point.is_hung for point in model.hook_points.values())


def test_hooks_on_patterns_are_refused_where_patterns_are_rebuilt(model):
    with model.hooks([("blocks.1.attn.hook_pattern", lambda x, hook: None)]):
        attribution_patching(model, random_pairs(), site="z", progress=False)
        with pytest.raises(InputError, match="rebuild from queries and keys"):
            attribution_patching(model, random_pairs(), site="v@head", progress=False)


def test_where_gradients_are_switched_off_they_are_switched_on(model):
    with torch.no_grad():
        found = attribution_patching(model, random_pairs(), site="z", progress=False)
        assert not torch.is_grad_enabled()
    assert found.values.abs().max() > 0


def test_inference_mode_is_named(model):
    with torch.inference_mode(), pytest.raises(InputError, match=r"torch.inference_mode\(\) is on"):
        attribution_patching(model, random_pairs(), site="z", progress=False)


def test_the_model_is_left_without_hooks_and_gradients():
    model = randomised(Gemma4(small_config())).requires_grad_(True)
    result = attribution_patching(
        model, random_pairs(), site=list(SITES), qk_fix=True, progress=False
    )
    assert all(p.grad is None for p in model.parameters())
    assert not any(point.is_hung for point in model.hook_points.values())
    assert not any(r.per_pair.requires_grad or r.target.requires_grad for r in result.values())
