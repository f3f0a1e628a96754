"""g4lens's own methods find every planted circuit they apply to, and nothing in the null."""

from functools import cache

import pytest
from torch import Tensor

from g4lens import planted
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.patching import activation_patching
from tests.planted.brute import MODELS, effects

pytestmark = pytest.mark.unchecked

METHODS = {"patching": planted.by_patching, "ablation": planted.by_ablation}
CASES = [
    pytest.param(p, method, how, id=f"{p.name}-{method}-{how}")
    for p in MODELS.values()
    for method, how in p.applies_to
    if method in METHODS
]


@cache
def scores(p: planted.Planted, method: str, how: str) -> Tensor:
    pairs = p.pairs if method == "patching" else p.pairs[: len(p.pairs) // 2]
    return METHODS[method](how)(p.model, pairs, p.units)


@pytest.mark.parametrize(("p", "method", "how"), CASES)
def test_the_circuit_is_found(p, method, how):
    assert planted.score(lambda model, pairs, units: scores(p, method, how), p) == 1.0


@pytest.mark.parametrize("p", MODELS.values(), ids=lambda p: p.name)
def test_patching_equals_brute_force(p):
    for how in ("denoise", "noise"):
        for unit, found in zip(p.units, scores(p, "patching", how).tolist(), strict=True):
            assert found == pytest.approx(float(effects(p, unit, how).mean()), abs=1e-4), unit


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_nothing_is_significant_in_the_null(direction):
    p = MODELS["null"]
    result = activation_patching(
        p.model, p.pairs, logit_diff, site="z", direction=direction, progress=False
    )
    assert int((result.permutation_pvalue(correction="max_t") < 0.05).sum()) == 0
    moved = result.effect.abs().amin(0) > 1
    assert int(moved.sum()) == len(p.units)


def test_the_same_units_are_significant_where_there_is_a_circuit():
    p = MODELS["window_inside"]
    result = activation_patching(p.model, p.pairs, logit_diff, site="z", progress=False)
    found = (result.permutation_pvalue(correction="max_t") < 0.05).nonzero().tolist()
    assert found == sorted([unit.layer, unit.head] for unit in p.circuit)
