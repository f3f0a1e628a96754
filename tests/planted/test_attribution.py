"""How well attribution patching finds planted circuits: where theory says fully, and where not.

python -m pytest tests/planted/test_attribution.py -s     prints the table
"""

from functools import cache

import pytest
import torch

from g4lens import planted
from g4lens.analysis.gradients.attribution_patching import attribution_patching
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.patching import activation_patching
from tests.planted.brute import MODELS

pytestmark = pytest.mark.unchecked

COPIED = (  # the answer goes from where it stands to the logits without any attention in between
    "ple_lookup",
    "shared_value",
    "window_inside",
    "window_edge",
    "window_beyond",
    "colour",
    "tone",
    "subspace",
)
MISSED = {  # what hides the rest
    "induction": "a write that becomes a key under a saturated softmax",
    "edges": "the same, and queries",
    "and_gate": "a threshold far from either run",
    "or_gate": "a threshold far from either run",
}
NULLS = [p for p in MODELS.values() if p.name.startswith("null")]
BOTH = pytest.mark.parametrize("direction", ["denoise", "noise"])


@cache
def auroc(name: str, direction: str, star: bool) -> float:
    p = MODELS[name]
    return planted.score(planted.by_attribution(direction, star), p)


@BOTH
@pytest.mark.parametrize("star", [False, True], ids=["AtP", "AtP*"])
@pytest.mark.parametrize("name", COPIED)
def test_what_is_copied_is_found(name, star, direction):
    assert auroc(name, direction, star) == 1.0


@BOTH
@pytest.mark.parametrize("name", MISSED)
def test_what_acts_behind_a_saturated_step_is_missed(name, direction):
    found = [auroc(name, direction, star) for star in (False, True)]
    print(f"\n{name}, {direction}: AtP {found[0]:.2f}, AtP* {found[1]:.2f} ({MISSED[name]})")
    p = MODELS[name]
    scores = planted.by_attribution(direction)(p.model, p.pairs, p.units)
    units = [unit for unit in p.units if unit in p.circuit]
    hidden = [u for u, s in zip(p.units, scores, strict=True) if u in p.circuit and abs(s) < 1e-3]
    assert 0 < len(hidden) <= len(units)


@pytest.mark.parametrize("site", ["k", "rot_k", "q", "rot_q", "k@head"])
def test_the_qk_fix_sees_through_a_saturated_softmax(site):
    """The key that the look-back wrote, and the query that looks for it, in block 3."""
    p = MODELS["induction"]
    options = {"site": site, "layers": [3], "progress": False}
    if site in ("k", "rot_k"):
        options["positions"] = "all"
    plain, fixed = (
        attribution_patching(p.model, p.pairs, qk_fix=fix, **options).effect[:, 0] for fix in (0, 1)
    )
    truth = activation_patching(p.model, p.pairs, logit_diff.pre_cap, **options).effect[:, 0]
    if site[-1] == "q":  # both sides end in the same word: its query is the same
        assert truth.abs().max() < 1e-3
        assert fixed.abs().max() < 1e-3
        return
    truth, plain, fixed = (x.reshape(len(x), -1)[:, 0] for x in (truth, plain, fixed))
    assert truth.min() > 1
    assert plain.abs().max() < 1e-3
    assert torch.equal(fixed.sign(), truth.sign())
    assert (fixed / truth).min() > 0.3


@pytest.mark.parametrize("fix", [False, True], ids=["AtP", "QK fix"])
@BOTH
@pytest.mark.parametrize("p", NULLS, ids=lambda p: p.name)
def test_nothing_is_significant_in_a_null(p, direction, fix):
    for site in {unit.site for unit in p.units}:
        places = {unit.position for unit in p.units if unit.site == site}
        named = sorted(x for x in places if x is not None)
        options = {"positions": named} if named else {}
        if not named and site != "z":
            options = {"positions": "all"}
        for method in (attribution_patching, activation_patching)[: 2 - fix]:
            more = {"qk_fix": fix} if method is attribution_patching else {}
            result = method(
                p.model,
                p.pairs,
                logit_diff,
                site=site,
                direction=direction,
                progress=False,
                **options,
                **more,
            )
            pvalues = result.permutation_pvalue(correction="max_t")
            assert int((pvalues < 0.05).sum()) == 0, (site, method.__name__)


@pytest.mark.parametrize("name", ["null", "null_lookup", "null_picture"])
def test_units_of_a_tossed_null_move_every_pair_to_either_side(name):
    from tests.planted.brute import effects

    for unit in MODELS[name].units:
        moved = effects(MODELS[name], unit, "denoise")
        assert moved.abs().min() > 1, unit
        assert moved.sign().unique().tolist() == [-1, 1], unit


def test_the_late_null_is_idle_to_the_last_bit():
    from tests.planted.brute import effects

    for unit in MODELS["null_late"].units:
        for how in ("denoise", "noise", "zero"):
            assert effects(MODELS["null_late"], unit, how).abs().max() == 0, (unit, how)
