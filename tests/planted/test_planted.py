"""The planted models are what they say: by full forward passes, one unit at a time."""

import pytest
import torch

from g4lens import planted
from g4lens.analysis.sites import Unit
from g4lens.errors import InputError
from g4lens.planted import builder
from tests.planted.brute import MODELS, activation, effects, groups

pytestmark = pytest.mark.unchecked

SIDES = ("clean", "corrupted")
CIRCUITS = [p for p in MODELS.values() if p.circuit]
NOTHING = 1e-4  # of effects of order 10


def named(p: planted.Planted) -> str:
    return p.name


def directions(p: planted.Planted) -> list[str]:
    """Those in which the circuit shows, as brute force knows them."""
    asked = [value for _, value in p.applies_to]
    return [how for how in ("denoise", "noise", "zero") if how in asked]


@pytest.mark.parametrize("p", CIRCUITS, ids=named)
def test_every_prompt_is_answered(p):
    for group in groups(p):
        for side, ids in (
            ("clean", group.targets.answer_ids),
            ("corrupted", group.targets.foil_ids),
        ):
            best = p.model(group.batch(side), read=-1)[:, 0].argmax(-1)
            assert torch.equal(best, ids[:, 0]), side


@pytest.mark.parametrize("p", CIRCUITS, ids=named)
def test_every_circuit_unit_has_an_effect_and_no_distractor_has_one(p):
    for how in directions(p):
        for unit in p.units:
            moved = effects(p, unit, how)
            if unit in p.circuit:
                assert moved.abs().min() > 1, (how, unit)
                assert len(set(moved.sign().tolist())) == 1, (how, unit)
            elif how != "zero":  # a missing write makes the stream shorter, and the norms feel it
                assert moved.abs().max() < NOTHING, (how, unit)


@pytest.mark.parametrize("p", MODELS.values(), ids=named)
def test_every_unit_tells_clean_from_corrupted(p):
    for unit in p.units:
        for group in groups(p):
            clean, corrupted = (activation(p.model, group, side, unit) for side in SIDES)
            assert (clean - corrupted).flatten(1).norm(dim=1).min() > 1, unit


@pytest.mark.parametrize("p", CIRCUITS, ids=named)
def test_brute_force_scores_one(p):
    assert len(p.distractors) >= len(p.circuit)
    assert not p.circuit & p.distractors
    for how in directions(p):
        found = [effects(p, unit, how).mean() for unit in p.units]
        assert planted.score(lambda model, pairs, units, found=found: found, p) == 1.0, how


@pytest.mark.parametrize(("name", "other_way"), [("and_gate", "denoise"), ("or_gate", "noise")])
def test_a_gate_hides_single_inputs_in_the_other_direction(name, other_way):
    p = MODELS[name]
    assert ("patching", other_way) not in p.applies_to
    for unit in p.units:
        assert effects(p, unit, other_way).abs().max() < 1e-5, unit


def test_the_null_moves_every_pair_but_to_either_side():
    p = MODELS["null"]
    for unit in p.units:
        moved = effects(p, unit, "denoise")
        assert moved.abs().min() > 1
        assert moved.sign().unique().tolist() == [-1, 1]


def test_readers_of_one_value_have_known_shares():
    p = MODELS["shared_value"]
    model = p.model
    # what a block writes is multiplied by the scalars from its own on
    written = {
        layer: float(model.blocks[layer].ln1_post.weight[0])
        * float(torch.stack([block.scalar for block in model.blocks[layer:]]).prod())
        for layer in (5, 7)
    }
    first, second = (effects(p, Unit("v@head", layer, 0), "denoise").mean() for layer in (5, 7))
    # the answer's direction for either part has the same length, the soft cap bends a little
    assert first / second == pytest.approx(written[5] / written[7], rel=0.05)
    assert first / second != pytest.approx(1, rel=0.3)


def test_windows_differ_in_the_distance_alone():
    inside, edge, beyond = (MODELS[f"window_{x}"] for x in ("inside", "edge", "beyond"))
    for other in (edge, beyond):
        for name, weight in inside.model.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name]), name
    distances = []
    for p in (inside, edge, beyond):
        distances.append({len(pair.clean) - 1 - pair.positions["marker"] for pair in p.pairs})
    window = inside.model.cfg.sliding_window
    assert distances[:2] == [{window - 1}, {window}]
    assert min(distances[2]) > window
    local = Unit("z", 2, 0)
    assert local in inside.circuit
    assert local in edge.distractors and local in beyond.distractors


@pytest.mark.parametrize("p", MODELS.values(), ids=named)
def test_pairs_make_statistics_possible(p):
    assert len(set(p.pairs.clusters)) == 12
    assert all(float(block.scalar) != 1 for block in p.model.blocks)
    for pair in p.pairs:
        assert len(pair.clean) == len(pair.corrupted)


def test_a_model_is_found_by_name():
    assert planted.get("tone").name == "tone"
    with pytest.raises(InputError, match="Did you mean 'induction'"):
        planted.get("inductoin")


def test_units_are_listed_in_an_order_that_tells_nothing():
    p = MODELS["induction"]
    assert set(p.units) == p.circuit | p.distractors
    assert p.units == sorted(p.units, key=str)
    assert "2 units among 5" in repr(p)


def test_scores():
    p = MODELS["induction"]

    def truth(model, pairs, units):
        return [-1.0 if unit in p.circuit else 0.5 for unit in units]  # the size counts

    assert planted.score(truth, p) == 1.0
    assert planted.score(lambda m, pairs, units: [0.0] * len(units), p) == 0.5
    assert planted.score(lambda m, pairs, units: -truth_of(p, units), p) == 0.0


def truth_of(p, units):
    return torch.tensor([0.0 if unit in p.circuit else 1.0 for unit in units])


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda units: [1.0], r"scores are \(1,\), expected one for each of 5"),
        (lambda units: [float("nan")] * len(units), "is NaN"),
    ],
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(InputError, match=message):
        planted.score(lambda model, pairs, units: scores(units), MODELS["induction"])


def test_a_null_has_no_score():
    with pytest.raises(InputError, match="null has no circuit"):
        planted.score(lambda model, pairs, units: [0.0] * len(units), MODELS["null"])


def test_a_full_stream_takes_no_more_spaces():
    b = builder.Builder()
    with pytest.raises(InputError, match="63 are free"):
        b.space("too much", 64)
