"""The planted subspace: what it says of itself, what DAS finds in it, and what an illusion does."""

import pytest
import torch

from g4lens import planted
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.patching import activation_patching
from g4lens.analysis.sites import SITES, Unit
from g4lens.analysis.subspaces.das import das, interchange_accuracy, overlap, random_basis
from g4lens.analysis.subspaces.dormant import dormant_check
from g4lens.planted.subspace import subspace

pytestmark = pytest.mark.unchecked


@pytest.fixture(scope="module")
def p():
    return subspace()


@pytest.fixture(scope="module")
def found(p):
    return das(p.model, p.pairs, p.unit, k=2, epochs=40, lr=0.1, batch=32, progress=False)


def recovered(p, basis, direction="denoise") -> float:
    """By activation patching along the basis."""
    result = activation_patching(
        p.model,
        p.pairs,
        logit_diff,
        p.unit.site,
        direction,
        layers=[p.unit.layer],
        positions=[p.unit.position],
        subspace=basis,
        progress=False,
    )
    return float(result.recovered)


def test_it_stands_in_the_catalogue(p):
    assert planted.get("subspace").about == p.about
    assert ("das", "both") in p.applies_to


def test_bases_are_orthonormal_and_apart(p):
    bases = torch.cat([p.subspace, p.echo, p.dormant])
    torch.testing.assert_close(bases @ bases.T, torch.eye(6), atol=1e-5, rtol=0)
    assert overlap(p.illusion, p.echo) == pytest.approx(0.5, abs=1e-5)
    assert overlap(p.illusion, p.dormant) == pytest.approx(0.5, abs=1e-5)


def test_no_channel_shows_the_variable(p):
    assert p.subspace.square().sum(0).max() < 0.5


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_subspace_carries_all_and_the_others_nothing(p, direction):
    assert recovered(p, p.subspace, direction) == pytest.approx(1, abs=1e-4)
    assert recovered(p, p.echo, direction) == pytest.approx(0, abs=1e-4)
    assert recovered(p, p.dormant, direction) == pytest.approx(0, abs=1e-4)
    assert recovered(p, p.illusion, direction) > 0.05


def test_echo_is_as_active_and_dormant_is_still(p):
    sides = []
    for pair in p.pairs:
        at = pair.positions["marker"]
        name = SITES[p.unit.site].full_name(p.unit.layer)
        rows = [
            p.model.run_with_cache(side, name)[1][name][0, at]
            for side in (pair.clean, pair.corrupted)
        ]
        sides.append(rows[0] - rows[1])
    moved = torch.stack(sides)
    colour, echo, dormant = (
        (moved @ basis.T).norm(dim=1) for basis in (p.subspace, p.echo, p.dormant)
    )
    torch.testing.assert_close(colour, echo, rtol=1e-3, atol=1e-4)
    assert dormant.max() < 1e-4 < 1 < colour.min()


def test_das_finds_it(p, found):
    assert found.accuracy == found.train_accuracy == 1.0
    assert found.random_accuracy < 0.2
    assert overlap(found.basis, p.subspace) > 0.9  # random: 2 of 64 directions, 0.03
    assert overlap(found.basis, p.echo) < 0.05
    assert interchange_accuracy(p.model, found.held_out, p.unit, found.basis) == 1.0
    assert recovered(p, found.basis) > 0.9


def test_das_finds_nothing_where_the_variable_is_not_read(p):
    late = Unit("resid_post", 2, position=1)
    random = random_basis(2, 64, torch.Generator().manual_seed(0))
    assert interchange_accuracy(p.model, p.pairs, late, random) == 0


def test_the_check_tells_an_illusion_from_the_variable(p, found):
    true, echo, illusion, learnt = (
        dormant_check(p.model, p.pairs, p.unit, basis)
        for basis in (p.subspace, p.echo, p.illusion, found.basis)
    )
    assert true.recovered["varying"] == pytest.approx(1, abs=1e-3)
    assert abs(true.illusory) < 1e-3
    assert echo.recovered["whole"] == pytest.approx(0, abs=1e-4)
    assert illusion.recovered["whole"] > 0.05
    assert illusion.recovered["varying"] == pytest.approx(0, abs=1e-3)
    assert illusion.recovered["still"] == pytest.approx(illusion.recovered["whole"], abs=1e-3)
    assert illusion.recovered["unseen"] == pytest.approx(0, abs=1e-3)
    assert learnt.illusory < 0.1 * learnt.recovered["whole"]
