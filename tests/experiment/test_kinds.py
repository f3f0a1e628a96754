"""Every kind's units are what the method gives, whoever computes them; and what controls are."""

import pandas as pd
import pytest
import torch

import g4lens
from g4lens import InputError
from g4lens.analysis.circuits.path_patching import path_patching
from g4lens.analysis.gradients.attribution_patching import attribution_patching
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.vectors import difference_of_means, steering
from g4lens.experiment.kinds import Experiment
from g4lens.experiment.kinds.base import Baseline, Chunk
from g4lens.experiment.kinds.controls import other_heads, other_places, permuted, turned
from g4lens.experiment.run_spec import Spec

pytestmark = pytest.mark.unchecked

N = 8
FLAT = {
    "patching": {"site": ["resid_pre", "z"], "layers": [2, 7], "positions": ["subject", "end"]},
    "ablation": {"site": "z", "value": ["mean", "resample"], "layers": [3, 8], "heads": [1, 2]},
    "knockout": {"edges": [["subject", "end"]], "layers": ["window", 2]},
    "path_patching": {"senders": ["head 3.1", "mlp 2"], "receivers": ["logits", "head 9.0 q"]},
    "attribution": {"site": "z", "heads": [0, 3]},
    "circuits": {"shares": [0.02, 0.2]},
    "steering": {"layers": [4], "strengths": [1.0, 2.0]},
    "logit_lens": {"layers": [0, 14]},
}


@pytest.fixture(scope="module")
def tiny():
    return g4lens.load("tiny")


@pytest.fixture(scope="module")
def pairs():
    return g4lens.tasks.pairs("capital", N)


def spec(kind, metrics="logit_diff", **given):
    experiment = {"kind": kind, **FLAT[kind], **given.pop("experiment", {})}
    whole = {
        "name": "x",
        "model": "tiny",
        "pairs": {"task": "capital", "n": N},
        "pairs_per_unit": 3,
    }
    return Spec.model_validate({**whole, "metrics": metrics, "experiment": experiment, **given})


def whole(experiment, variant, baseline="none"):
    """All chunks of a variant."""
    name = variant if baseline == "none" else f"{variant}.{baseline}"
    units = [unit for unit in experiment.units if unit.rpartition(".")[0] == name]
    return pd.concat([experiment.frame(unit) for unit in units], ignore_index=True)


def values(frame, cells, prompts):
    """`[prompt, *cells]` of a frame."""
    table = frame.set_index(["prompt", *cells])["value"]
    kinds = [list(dict.fromkeys(frame[name])) for name in cells]
    index = pd.MultiIndex.from_product([prompts, *kinds])
    return torch.tensor(table[index].to_numpy()).reshape(len(prompts), *map(len, kinds))


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


# ---- each kind


def test_patching(tiny, pairs):
    experiment = Experiment(spec("patching"), tiny, pairs)
    frame = whole(experiment, "z.denoise")
    given = {"layers": [2, 7], "positions": ["subject", "end"], "progress": False}
    result = g4lens.activation_patching(tiny, pairs, site="z", **given)
    same(values(frame, ["layer", "head", "position"], range(N)), result.per_pair)
    first = frame.drop_duplicates("prompt")
    same(torch.tensor(first["base"].to_numpy()), result.base)
    same(torch.tensor(first["target"].to_numpy()), result.target)
    assert tuple(first["cluster"]) == pairs.clusters
    assert set(frame["direction"]) == {"denoise"} and set(frame["site"]) == {"z"}


def test_ablation_takes_its_means_over_all_pairs(tiny, pairs):
    experiment = Experiment(spec("ablation"), tiny, pairs)
    given = {"layers": [3, 8], "heads": [1, 2], "progress": False}
    result = g4lens.ablation(tiny, pairs, site="z", value="mean", **given)
    same(values(whole(experiment, "z.mean"), ["layer", "head"], range(N)), result.per_pair)
    drawn = whole(experiment, "z.mean", "random.0")
    other = g4lens.ablation(tiny, pairs, site="z", value="mean", layers=[3, 8], progress=False)
    said = dict.fromkeys(drawn["details"])
    assert len(said) == 1 and set(drawn["head"]) == {1, 2}
    new = [int(part.split()[1]) for part in next(iter(said)).split("drawn ")[1].split(", ")]
    assert set(new) == {0, 3}
    same(values(drawn, ["layer", "head"], range(N)), other.per_pair[:, :, new])


def test_knockout(tiny, pairs):
    experiment = Experiment(spec("knockout"), tiny, pairs)
    frame = whole(experiment, "all_blocks")
    edges = [("subject", "end")]
    result = g4lens.knockout(tiny, pairs, edges=edges, layers=("window", 2), progress=False)
    same(values(frame, ["edge", "layer"], range(N)), result.per_pair)
    drawn = whole(experiment, "all_blocks", "random.0")
    assert set(drawn["edge"]) == {"subject -> end"}
    assert not (drawn["value"] == frame["value"]).all()


def test_path_patching(tiny, pairs):
    experiment = Experiment(spec("path_patching"), tiny, pairs)
    graph = experiment.kind.graph
    head, mlp = graph.senders[2 + 3 * 6 + 1], graph.senders[2 + 2 * 6 + 4]
    reader = (graph.senders[2 + 9 * 6], "q")
    result = path_patching(
        tiny, pairs, senders=[head, mlp], receivers=[graph.nodes[-1], reader], progress=False
    )
    same(values(whole(experiment, "noise"), ["sender", "receiver"], range(N)), result.per_pair)
    drawn = whole(experiment, "noise", "random.0")
    assert set(drawn["sender"]) == {"head 3.1"} and "head 3.1" in drawn["details"][0]


def test_attribution(tiny, pairs):
    experiment = Experiment(spec("attribution"), tiny, pairs)
    result = attribution_patching(tiny, pairs, "logit_diff", "z", heads=[0, 3], progress=False)
    same(values(whole(experiment, "z.denoise"), ["layer", "head"], range(N)), result.per_pair)


def test_steering_finds_and_measures_on_different_templates(tiny, pairs):
    experiment = Experiment(spec("steering"), tiny, pairs)
    frame = whole(experiment, "difference_of_means")
    found_on, measured = pairs.split(0.5)
    numbers = [list(pairs).index(pair) for pair in measured]
    assert list(dict.fromkeys(frame["prompt"])) == numbers
    assert not {pairs.clusters[i] for i in numbers} & set(found_on.clusters)
    direction = difference_of_means(tiny, found_on, None, 4, positions="end")
    result = steering(tiny, measured, "logit_diff", direction, [1.0, 2.0], progress=False)
    same(values(frame, ["layer", "strength"], numbers), result.per_pair[:, None])
    kind = experiment.kind
    for control in ("direction", "permuted"):
        other = kind.direction("difference_of_means", 4, Baseline(control))
        torch.testing.assert_close(other.norms, direction.norms)
        assert not torch.equal(other.vectors, direction.vectors)


def test_circuits_and_their_controls(tiny, pairs):
    experiment = Experiment(spec("circuits"), tiny, pairs)
    frame, drawn = (whole(experiment, "noise", which) for which in ("none", "random.0"))
    recovered = {
        name: ((x["value"] - x["base"]).mean() / (x["target"] - x["base"]).mean())
        for name, x in (
            ("chosen", frame[frame["share"] == 0.2]),
            ("random", drawn[drawn["share"] == 0.2]),
        )
    }
    assert recovered["chosen"] > 0.5 > recovered["random"]
    sizes = [details.split("edges ")[1].split(", circuits")[0] for details in frame["details"]]
    assert len(set(sizes)) == 1
    assert set(frame["granularity"]) == {"edges"}
    assert set(frame["ablation_value"]) == {"other run"}
    assert set(drawn["details"]) != set(frame["details"])


def test_the_lens_of_the_last_block_is_the_model(tiny, pairs):
    metrics = ["logit_diff", "kl", "seq_log_prob_diff"]
    frame = whole(Experiment(spec("logit_lens", metrics), tiny, pairs), "resid_post")
    last = frame[frame["layer"] == 14]
    assert (last["value"] - last["target"]).abs().max() < 1e-3
    assert set(frame["metric"]) == set(metrics)
    lens = g4lens.logit_lens(
        tiny, pairs[0].clean, positions=-1, tokens=[pairs[0].answer, pairs[0].foil]
    )
    first = frame[
        (frame["prompt"] == 0) & (frame["layer"] == 0) & (frame["metric"] == "logit_diff")
    ]
    difference = lens.logits[0, 0, 0] - lens.logits[0, 0, 1]
    assert abs(float(first["value"].iloc[0]) - float(difference)) < 1e-3


@pytest.mark.parametrize("kind", FLAT)
def test_units_follow_from_the_spec_alone(tiny, pairs, kind):
    """Computed by another, backwards: the same bits."""
    few = {"patching": {"layers": [4]}, "knockout": {"layers": [4]}}
    small = spec(kind, experiment=few.get(kind, {}))
    one, other = (Experiment(small, tiny, pairs) for _ in range(2))
    assert one.units == other.units and one.identity() == other.identity()
    some = [unit for unit in one.units if unit.endswith(("0000", "0001"))][:4]
    forwards = {unit: one.frame(unit) for unit in some}
    for unit in reversed(some):
        pd.testing.assert_frame_equal(other.frame(unit), forwards[unit], check_exact=True)
    for name in {*forwards[some[0]].columns} & {*one.cells}:
        assert forwards[some[0]][name].map(type).nunique() == 1


# ---- controls


def test_permuted_labels_are_exchanged_within_templates():
    made = Pairs([Pair("a", "b", " x", " y", f"t{i // 4}") for i in range(12)])
    found = permuted(made, Baseline("permuted", 0, 7))
    turned_round = [new.answer == " y" for new in found]
    assert [sum(turned_round[i : i + 4]) for i in (0, 4, 8)] == [2, 2, 2]
    assert all({new.answer, new.foil} == {" x", " y"} and new.clean == "a" for new in found)
    assert [p.answer for p in permuted(made, Baseline("permuted", 1, 7))] != [
        p.answer for p in found
    ]
    single = Pairs([Pair("a", "b", f" {i}", None, "t") for i in range(6)])
    new = permuted(single, Baseline("permuted"))
    assert sorted(p.answer for p in new) == sorted(p.answer for p in single)
    places = Pairs(
        [Pair("a", "b", " x", " y", "t", {"p": {"clean": 1, "corrupted": 2}}) for _ in range(2)]
    )
    sides = [pair.clean for pair in turned(places, Baseline("permuted"))]
    assert sorted(sides) == ["a", "b"]
    other = turned(places, Baseline("permuted"))[sides.index("b")]
    assert other.positions["p"] == {"clean": 2, "corrupted": 1} and other.answer == " y"


def test_other_heads_and_places(tiny, pairs):
    assert set(other_heads([0, 1], 4, Baseline("random")).values()) == {2, 3}
    assert len(other_heads([0, 1, 2], 4, Baseline("random"))) == 1
    chunk = Chunk(pairs[2:5], (2, 3, 4))
    found = other_places(tiny, chunk, ["subject", "end"], Baseline("random"))
    assert list(found.names.values()) == ["subject", "end"]
    assert found.fewer == ""
    for group in found.chunk.pairs.on(tiny, "logit"):
        taken = [group.places(place, "clean") for place in ("subject", "end")]
        for name, own in zip(found.names, taken, strict=True):
            drawn = group.places(name, "clean")
            assert drawn.shape == own.shape and (drawn > 0).all()
            for row, *others in zip(drawn, *taken, strict=True):
                assert not torch.isin(row, torch.cat(others)).any()
    again = other_places(tiny, Chunk(pairs[3:4], (3,)), ["subject", "end"], Baseline("random"))
    assert again.chunk.pairs[0].positions == found.chunk.pairs[1].positions


def test_a_control_of_fewer_positions_says_so(tiny):
    pair = Pair("one two three four", "one two three five", " a", " b", "t", {"most": [1, 2, 3]})
    kind = {"kind": "patching", "site": "resid_pre", "layers": [2], "positions": ["most"]}
    few = Experiment(spec("patching", experiment=kind), tiny, Pairs([pair] * 2))
    n = len(tiny.prompt("one two three four").tokens)
    frame = whole(few, "resid_pre.denoise", "random.0")
    assert frame["details"].str.contains(f"positions, in places but {n - 4} for 3").all()


def test_sources_that_the_target_does_not_see_are_not_drawn(tiny):
    words = "one two three four five six seven eight"
    pair = Pair(words, words.replace("one", "nine"), " a", " b", "t")
    for draw in range(20):
        baseline = Baseline("random", draw)
        found = other_places(tiny, Chunk(Pairs([pair]), (0,)), [1], baseline, {1: [3, 4]})
        (drawn,) = found.chunk.pairs[0].positions.values()
        assert set(drawn) <= {2, 3, 4}


def test_metrics_without_labels_have_no_permuted_control(tiny, pairs):
    """KL(clean || run) knows neither answer nor foil: its control would be the thing itself."""
    both = Experiment(spec("ablation", ["logit_diff", "kl"]), tiny, pairs)
    assert set(whole(both, "z.mean")["metric"]) == {"logit_diff", "kl"}
    assert set(whole(both, "z.mean", "permuted.0")["metric"]) == {"logit_diff"}
    plan = both.plan().set_index(["variant", "baseline"])["cells"]
    assert plan["z.mean", "none"] == 2 * plan["z.mean", "permuted.0"]
    alone = Experiment(spec("ablation", "kl"), tiny, pairs)
    assert alone.absent["permuted"] == "kl depends on no label"
    steered = Experiment(spec("steering", "kl"), tiny, pairs)
    assert "permuted" not in steered.absent


def test_every_block_has_a_random_direction_of_its_own(tiny, pairs):
    kind = Experiment(spec("steering", experiment={"layers": [3, 4]}), tiny, pairs).kind
    units = [
        x.vectors / x.norms[:, None]
        for x in (
            kind.direction("difference_of_means", layer, Baseline("direction", draw))
            for layer in (3, 4)
            for draw in (0, 1)
        )
    ]
    cosines = torch.cat(units) @ torch.cat(units).T
    assert (cosines - torch.eye(4)).abs().max() < 0.5


def test_what_has_no_control_says_why(tiny, pairs):
    given = {"layers": None, "positions": None, "heads": None}
    full = Experiment(spec("patching", experiment={"site": "z", **given}), tiny, pairs)
    assert full.absent == {
        "random": "the map holds every unit of its kind in its blocks",
        "direction": "no direction is part of it",
    }
    off = Experiment(spec("patching", baselines={"random": 0, "permuted": 2}), tiny, pairs)
    assert [str(baseline) for baseline in off.baselines] == ["none", "permuted.0", "permuted.1"]
    lonely = Pairs([Pair(pair.clean, pair.corrupted, pair.answer) for pair in pairs])
    lens = Experiment(spec("logit_lens", "logit"), tiny, lonely)
    assert "no pair has a foil" in lens.absent["permuted"]


# ---- plans and mistakes


def test_the_plan(tiny, pairs):
    layers = {"layers": [2, 14]}  # what the subject holds there, nothing reads
    metrics = ["logit_diff", "kl"]
    experiment = Experiment(spec("patching", metrics, experiment=layers), tiny, pairs)
    plan = experiment.plan()
    assert plan["units"].sum() == len(experiment.units)
    given = {**layers, "positions": ["subject", "end"]}
    cost = g4lens.patching_cost(tiny, pairs, site="resid_pre", **given)
    row = plan[(plan["variant"] == "resid_pre.denoise") & (plan["baseline"] == "none")].iloc[0]
    assert row["cells"] == 2 * (cost.cells + cost.skipped) and row["removed"] > 0
    assert (plan["seconds"] > 0).all() and (plan["bytes"] > 0).all()
    cut = Experiment(spec("knockout"), tiny, pairs)
    found = cut.plan().iloc[0]
    edges, window = [("subject", "end")], ("window", 2)
    paid = g4lens.knockout(tiny, pairs, edges=edges, layers=window, progress=False).cost
    assert found["cells"] == paid.cells + paid.skipped and found["removed"] == paid.skipped
    assert found["passes"] == round(paid.passes, 1)
    for kind in FLAT:
        found = Experiment(spec(kind), tiny, pairs).plan()
        assert (found["passes"] > 0).all() and (found["cells"] >= found["removed"]).all()


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("patching", {"layers": [40]}, "experiment: no block 40"),
        ("patching", {"positions": ["subjekt"]}, "no place 'subjekt'.*'subject'"),
        ("patching", {"positions": None}, "position"),
        ("patching", {"heads": [9], "site": "z"}, "no query head 9"),
        ("ablation", {"site": "resid_pre"}, "not divided into heads"),
        ("knockout", {"edges": [["subjct", "end"]]}, "no place 'subjct'"),
        ("knockout", {"edges": [["text", "end"]]}, "no other positions"),
        ("path_patching", {"senders": ["head 3.9"]}, "no node or port is called 'head 3.9'"),
        ("steering", {"layers": [15]}, "no block 15"),
        ("steering", {"positions": "nd"}, "no place 'nd'"),
        ("logit_lens", {"layers": [-1]}, "no block -1"),
        ("ablation", {"value": ["zero", "pos_mean"]}, "'pos_mean' needs prompts of one length"),
        ("steering", {"vector": "function_vector", "n_heads": 61}, "n_heads is 61, expected 1 to"),
    ],
)
def test_mistakes(tiny, pairs, kind, given, message):
    with pytest.raises(InputError, match=message):
        Experiment(spec(kind, experiment=given), tiny, pairs)


def test_metrics_that_do_not_fit(tiny, pairs):
    with pytest.raises(InputError, match="no logit lens"):
        Experiment(spec("logit_lens", "logit_diff.pre_cap"), tiny, pairs)
    lonely = Pairs([Pair(pair.clean, pair.corrupted, pair.answer) for pair in pairs])
    with pytest.raises(InputError, match="foil"):
        Experiment(spec("logit_lens", "seq_log_prob_diff"), tiny, lonely)
    with pytest.raises(InputError, match=r"split: discovery=0\.001"):
        Experiment(spec("logit_lens", split=0.001), tiny, pairs)
    with pytest.raises(InputError, match="no unit 'x'"):
        Experiment(spec("logit_lens"), tiny, pairs).frame("x")
