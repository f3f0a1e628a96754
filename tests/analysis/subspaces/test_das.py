"""Exchanges against full passes with hooks; the search against its own exchanges."""

import pytest
import torch

import g4lens
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.patching import activation_patching
from g4lens.analysis.sites import Unit
from g4lens.analysis.subspaces.das import das, interchange_accuracy, overlap, random_basis
from g4lens.analysis.subspaces.dormant import dormant_check
from g4lens.analysis.subspaces.exchange import exchanges
from g4lens.errors import InputError


@pytest.fixture(scope="module")
def pairs():
    """Random prompts of two lengths; the sides differ in one token."""
    random, found = torch.Generator().manual_seed(0), []
    for i in range(8):
        clean = torch.randint(3, 90, (11 + i % 2,), generator=random).tolist()
        corrupted = [*clean[:7], 3 + i, *clean[8:]]
        found.append(Pair(clean, corrupted, 10 + i, 20 + i, positions={"there": 7}))
    return Pairs(found)


def basis_of(k: int, d: int, seed: int = 0) -> torch.Tensor:
    return random_basis(k, d, torch.Generator().manual_seed(seed))


UNITS = [
    Unit("resid_pre", 3, position="there"),
    Unit("resid_post", 2, position=[6, 7]),
    Unit("resid_post", 8, position="end"),
    Unit("mlp_post", 1, position="there"),
    Unit("z", 4, head=2, position="end"),
    Unit("rot_k", 5, position="there"),
    Unit("v", 4, head=0, position="there"),
]


@pytest.mark.parametrize("unit", UNITS, ids=str)
def test_an_exchange_is_a_patch_along_the_basis(model, pairs, unit):
    d = exchanges(model, pairs, unit)[0].own.shape[-1]
    basis = basis_of(2, d)
    cells = {
        "site": unit.site,
        "layers": [unit.layer],
        "positions": [unit.position],
        "heads": None if unit.head is None else [unit.head],
        "subspace": basis,
        "progress": False,
    }
    for direction, side in (("denoise", "corrupted"), ("noise", "clean")):
        result = activation_patching(model, pairs, logit_diff, direction=direction, **cells)
        found = torch.zeros(len(pairs))
        for one in exchanges(model, pairs, unit, size=3):
            if one.side == side:
                logits = one.logits(one.along(basis))
                found[one.group.index] = logit_diff(logits, one.group.targets)
        torch.testing.assert_close(found, result.per_pair.flatten(), atol=1e-4, rtol=1e-4)


def test_a_search_is_repeatable_and_leaves_the_model_alone(model, pairs):
    unit = Unit("resid_pre", 3, position="there")
    options = {"k": 2, "epochs": 3, "batch": 4, "seed": 3, "progress": False}
    one, other = (das(model, pairs, unit, **options) for _ in range(2))
    assert torch.equal(one.basis, other.basis) and one.losses == other.losses
    torch.testing.assert_close(one.basis @ one.basis.T, torch.eye(2), atol=1e-5, rtol=0)
    assert one.losses[-1] < one.losses[0]
    assert {*one.train.pairs} | {*one.held_out.pairs} == {*pairs.pairs}
    assert one.accuracy == interchange_accuracy(model, one.held_out, unit, one.basis)
    assert one.whole_accuracy == interchange_accuracy(model, one.held_out, unit)
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())
    assert "2 of 32 directions of resid_pre of block 3 at there" in repr(one)


def test_a_search_lowers_the_loss_of_its_exchanges(model, pairs):
    unit = Unit("resid_pre", 3, position="there")
    found = das(model, pairs, unit, k=8, epochs=15, batch=4, progress=False)
    losses = []
    for basis in (found.basis, basis_of(8, 32)):
        of = [
            torch.nn.functional.cross_entropy(one.logits(one.along(basis))[:, 0], one.wanted)
            for one in exchanges(model, found.train, unit, size=1)
        ]
        losses.append(float(torch.stack(of).mean()))
    assert losses[0] < losses[1]


def test_overlap():
    basis = basis_of(4, 10)
    turn = basis_of(4, 4, seed=1)
    assert overlap(basis, turn @ basis) == pytest.approx(1, abs=1e-5)
    assert overlap(basis[:2], basis) == pytest.approx(1, abs=1e-5)
    assert overlap(basis[:2], basis[2:]) == pytest.approx(0, abs=1e-5)


def test_parts_of_the_check_add_up(model, pairs):
    unit = Unit("resid_post", 9, position="end")
    found = dormant_check(model, pairs, unit, basis_of(3, 32), direction="noise")
    for inside, outside in (("seen", "unseen"), ("varying", "still")):
        assert found.shares[inside] + found.shares[outside] == pytest.approx(1, abs=1e-4)
    assert found.shares["whole"] == pytest.approx(1, abs=1e-5)
    everything = dormant_check(model, pairs, unit, torch.eye(32), direction="noise", share=1.0)
    assert everything.recovered["whole"] == pytest.approx(
        1, abs=1e-4
    )  # the end is all that is read
    assert everything.recovered["varying"] == pytest.approx(1, abs=1e-4)
    assert everything.illusory == pytest.approx(0, abs=1e-4)
    assert "illusory" in repr(everything)


@pytest.mark.parametrize("metric", ["logit_diff.pre_cap", "log_prob"])
def test_the_check_measures_with_one_metric_throughout(model, pairs, metric):
    """Where the whole of what is read is exchanged, all of any metric comes back."""
    unit = Unit("resid_post", 9, position="end")
    found = dormant_check(model, pairs, unit, torch.eye(32), metric, share=1.0)
    assert found.recovered["whole"] == pytest.approx(1, abs=1e-4)


def flat(logits, pairs):
    return logits[:, 0, 5].round()


def argmax(logits, pairs):
    return logits[:, 0].argmax(-1).float()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("rank", "metric rank gives no gradient"),
        (argmax, "metric argmax gives no gradient"),
        (flat, "its slope by every logit is zero"),
        (lambda logits, pairs: logits.sum(), r"returned \(\), expected a tensor \[rows\]"),
        (lambda logits, pairs: 3.0, "returned float"),
        ("kl", "metric kl is teacher-forced or never normalised"),
    ],
)
def test_metrics_that_the_check_cannot_use(model, pairs, metric, message):
    unit = Unit("resid_pre", 3, position="there")
    with pytest.raises(InputError, match=message):
        dormant_check(model, pairs, unit, basis_of(2, 32), metric)
    assert not any(point.is_hung for point in model.hook_points.values())


def test_the_check_takes_no_gradient_of_the_model(model, pairs):
    dormant_check(model, pairs, Unit("z", 4, head=1, position="end"), basis_of(2, 16))
    assert all(weight.grad is None for weight in model.parameters())


def test_bad_input(model, pairs):
    there = Unit("resid_pre", 3, position="there")
    basis = basis_of(2, 32)
    for unit, message in (
        (Unit("resid_pre", 7, position="there"), "nothing that is read sees resid_pre of block 7"),
        (Unit("z", 4, position="end"), "name one"),
        (Unit("pattern", 4, head=0), "has no subspaces"),
        (Unit("resid_pre", 99, position="there"), "no block 99"),
        (Unit("k", 7, position="there"), "reads block 5's"),
    ):
        with pytest.raises(InputError, match=message):
            das(model, pairs, unit, progress=False)
    for options, message in (
        ({"k": 33}, "k is 33, but .* has 32 channels"),
        ({"k": 0}, "k is 0"),
        ({"epochs": 0}, "epochs is 0"),
        ({"discovery": 1.5}, "discovery is 1.5"),
    ):
        with pytest.raises(InputError, match=message):
            das(model, pairs, there, progress=False, **options)
    no_foil = Pairs([Pair(p.clean, p.corrupted, p.answer, positions=p.positions) for p in pairs])
    with pytest.raises(InputError, match="needs a foil"):
        das(model, no_foil, there, progress=False)
    with pytest.raises(InputError, match="needs a foil"):  # before there is a split to complain of
        das(model, no_foil[0], there, progress=False)
    for bad, message in (
        (basis[:, :5], r"expected a tensor \[k, 32\]"),
        (2 * basis, "not orthonormal"),
    ):
        with pytest.raises(InputError, match=message):
            interchange_accuracy(model, pairs, there, bad)
    for options, message in (
        ({"share": 0}, "share is 0"),
        ({"direction": "up"}, "'denoise' or 'noise'"),
        ({"metric": "seq_log_prob"}, "teacher-forced"),
    ):
        with pytest.raises(InputError, match=message):
            dormant_check(model, pairs, there, basis, **options)
    model(pairs[0].clean)  # no hook is left


@pytest.mark.unchecked
def test_the_bundled_model_keeps_a_capital_in_few_directions():
    tiny = g4lens.load("tiny")
    pairs = g4lens.tasks.pairs("capital", 60).filter(tiny)
    unit = Unit("resid_pre", 3, position="subject")
    found = das(tiny, pairs, unit, k=8, by="pair", epochs=20, progress=False)
    assert found.whole_accuracy > 0.9
    assert found.accuracy > found.random_accuracy + 0.3
