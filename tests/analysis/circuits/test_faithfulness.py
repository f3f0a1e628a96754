"""Faithfulness and its kin, on a random model and on one whose circuit is known."""

import numpy as np
import pytest
import torch

from g4lens import planted
from g4lens.analysis.circuits.agreement import edge_auroc, separation
from g4lens.analysis.circuits.circuit import Circuit
from g4lens.analysis.circuits.completeness import completeness, minimality
from g4lens.analysis.circuits.faithfulness import (
    SHARES,
    circuit_transfer,
    faithfulness,
    faithfulness_curve,
)
from g4lens.analysis.circuits.graph import Graph, Node
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.runs import measure
from g4lens.errors import InputError
from g4lens.hooks import edited_points
from g4lens.model.gemma4 import Gemma4
from tests.conftest import randomised

KNOWN = planted.get("edges")
SAY, GATE = Node("mlp", 6), Node("ple", 7)


def random_pairs(n=11, count=3):
    ids = torch.randint(3, 90, (count, 2, n), generator=torch.Generator().manual_seed(2))
    return Pairs([Pair(clean, corrupted, 5, 6) for clean, corrupted in ids])


@pytest.fixture(scope="module")
def circuit():
    return Circuit.of_edges(KNOWN.model, KNOWN.edges)


def without(circuit, *nodes):
    """The edges that touch none of these nodes."""
    kept = [e for e in circuit.edges if not {e.sender, e.receiver} & {*nodes}]
    return Circuit.of_edges(KNOWN.model, kept)


# ---- faithfulness


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_the_empty_circuit_is_one_run_and_the_full_one_the_other(model, direction):
    pairs, nothing = random_pairs(), Circuit.of_edges(model, [])
    ends = {"nothing": nothing, "everything": nothing.complement()}
    result = faithfulness(model, pairs, ends, direction=direction)
    (group,) = pairs.on(model, logit_diff)
    clean, corrupted = (measure(model, group, s, logit_diff) for s in ("clean", "corrupted"))
    other, this = (corrupted, clean) if direction == "noise" else (clean, corrupted)
    torch.testing.assert_close(result.per_pair, torch.stack([other, this], 1), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.recovered, torch.tensor([0.0, 1.0]), atol=1e-4, rtol=0)
    assert torch.equal(result.base, other) and torch.equal(result.target, this)
    assert result.axes[0].labels == ("nothing", "everything")


def test_a_node_circuit_is_the_model_with_the_other_nodes_patched(model):
    """What an MLP or a per-layer input adds, put in by a hook in place of cutting its edges."""
    pairs, graph = random_pairs(), Graph(model.cfg)
    out = {Node("mlp", 2): "blocks.2.hook_mlp_out", Node("ple", 7): "blocks.7.hook_ple_out"}
    kept = Circuit.of_nodes(model, [node for node in graph.senders if node not in out])
    found = faithfulness(model, pairs, kept).per_pair[:, 0]
    (group,) = pairs.on(model, logit_diff)
    cache = model.run_with_cache(group.corrupted, [*out.values()])[1]
    hooks = [
        (name, lambda x, hook: cache[hook.name][:, hook.positions[0]]) for name in out.values()
    ]
    patched = measure(model, group, "clean", logit_diff, hooks)
    torch.testing.assert_close(found, patched, atol=1e-4, rtol=0)
    assert (found - measure(model, group, "clean", logit_diff)).abs().max() > 1e-2


def test_the_planted_circuit_does_it_all_and_the_rest_nothing(circuit):
    named = {"circuit": circuit, "rest": circuit.complement(), "random": circuit.shuffled()}
    result = faithfulness(KNOWN.model, KNOWN.pairs, named)
    assert result.recovered.tolist() == pytest.approx([1, 0, 0], abs=1e-4)
    assert result.about == {
        "method": "faithfulness",
        "granularity": "edges",
        "ablation_value": "other run",
        "positions": "all",
        "direction": "noise: the clean run in the circuit, the corrupted one elsewhere",
        "metric": "logit_diff",
    }
    assert result.cfg is KNOWN.model.cfg and result.clusters == KNOWN.pairs.clusters


def test_either_way_to_the_answer_is_worth_its_share(circuit):
    halves = {"gate": without(circuit, SAY), "mlp": without(circuit, GATE)}
    f = faithfulness(KNOWN.model, KNOWN.pairs, halves).recovered
    assert f.sum() == pytest.approx(1, abs=0.02) and f.min() > 0.4


def test_a_figure_can_be_drawn_and_tabled(circuit):
    result = faithfulness(KNOWN.model, KNOWN.pairs, circuit)
    assert result.plot().get_ylabel() == "faithfulness"
    assert result.plot(of="values").get_ylabel() == "logit_diff"
    assert len(result.to_frame()) == len(KNOWN.pairs)


@pytest.mark.filterwarnings("ignore::g4lens.FewClustersWarning")
def test_shares_are_called_what_they_are(circuit):
    found = {
        "faithfulness": faithfulness(KNOWN.model, KNOWN.pairs, circuit),
        "gap": completeness(KNOWN.model, KNOWN.pairs, circuit, n_subsets=1),
        "added": minimality(KNOWN.model, KNOWN.pairs, circuit, n_subsets=0),
    }
    for name, result in found.items():
        assert result.plot().get_ylabel() == name
        frame = result.summary(n_resamples=50)
        assert "recovered" not in frame
        assert frame[name].tolist() == pytest.approx(result.recovered.tolist())
        assert "logit_diff" in result.plot(of="values").get_ylabel()


def test_bad_circuits_are_refused(model, circuit):
    with pytest.raises(InputError, match="another geometry"):
        faithfulness(model, random_pairs(), circuit)
    with pytest.raises(InputError, match="other weights"):
        other = randomised(Gemma4(model.cfg), seed=4)
        faithfulness(other, random_pairs(), Circuit.of_edges(model, []))
    with pytest.raises(InputError, match="no circuits"):
        faithfulness(model, random_pairs(), {})
    with pytest.raises(InputError, match="direction is 'sideways'"):
        faithfulness(model, random_pairs(), Circuit.of_edges(model, []), direction="sideways")
    assert not edited_points()


# ---- curves


@pytest.mark.parametrize("ranking", ["signed", "absolute"])
def test_the_curve_is_the_faithfulness_of_each_circuit(circuit, ranking):
    values = torch.rand(circuit.graph.shape, generator=torch.Generator().manual_seed(3)) * 0.1
    values[circuit.keep] = 1.0
    curve = faithfulness_curve(KNOWN.model, KNOWN.pairs, values, ranking=ranking)
    n = int(circuit.graph.allowed.sum())
    assert curve.shares == SHARES and curve.n_asked == tuple(int(k * n) for k in SHARES)
    f = curve.result.recovered.numpy()
    assert curve.area == pytest.approx(np.trapezoid(f, SHARES), abs=1e-6)
    assert curve.distance == pytest.approx(np.trapezoid(abs(1 - f), SHARES), abs=1e-6)
    assert curve.empty == (0.001, 0.002, 0.005) and f[:3].tolist() == [0, 0, 0]
    assert f[3:].tolist() == pytest.approx([1] * 7, abs=1e-4)
    assert curve.n_edges[-1] == n and curve.n_edges[3] == 8
    assert "empty at 0.001, 0.002, 0.005" in repr(curve)
    assert curve.result.about["ranking"] == ranking
    ax = curve.plot()
    assert ax.get_xlabel() == "share of the edges" and ax.get_xscale() == "log"


def test_a_perfect_curve_has_the_area_of_its_shares(circuit):
    shares = (0.01, 0.5, 1.0)
    curve = faithfulness_curve(KNOWN.model, KNOWN.pairs, circuit.keep.float(), shares=shares)
    assert curve.area == pytest.approx(0.99, abs=1e-4)
    assert curve.distance == pytest.approx(0, abs=1e-4)


def test_signs_matter_to_one_ranking_alone(circuit):
    values = -circuit.keep.float()
    shares = (0.01, 0.9, 1.0)
    f = {
        ranking: faithfulness_curve(
            KNOWN.model, KNOWN.pairs, values, ranking=ranking, shares=shares
        ).result.recovered.tolist()
        for ranking in ("signed", "absolute")
    }
    assert f["absolute"] == pytest.approx([1, 1, 1], abs=1e-4)
    assert f["signed"] == pytest.approx([0, 0, 1], abs=1e-4)


def test_a_curve_over_nodes(circuit):
    graph = circuit.graph
    values = torch.tensor([float(node in circuit.nodes) for node in graph.senders])
    values[:2] = torch.nan
    curve = faithfulness_curve(KNOWN.model, KNOWN.pairs, values, shares=(0.01, 0.2, 1.0))
    assert curve.n_asked == (0, 6, 32)  # of all nodes but the inputs
    assert curve.result.recovered.tolist() == pytest.approx([0, 1, 1], abs=1e-4)
    assert curve.plot().get_xlabel() == "share of the nodes"


@pytest.mark.parametrize("shares", [(), (0.5, 0.1), (0.0, 1.0), (0.5, 2.0), (0.5, 0.5)])
def test_bad_shares_are_refused(circuit, shares):
    with pytest.raises(InputError, match="expected growing numbers"):
        faithfulness_curve(KNOWN.model, KNOWN.pairs, circuit.keep.float(), shares=shares)


def test_transfer_is_faithfulness_on_every_set(circuit):
    one, other = KNOWN.pairs.split(0.5)
    circuits = {"all": circuit, "gate": without(circuit, SAY)}
    frame = circuit_transfer(KNOWN.model, {"one": one, "other": other}, circuits)
    assert frame[["pairs", "circuit"]].to_numpy().tolist() == [
        ["one", "all"],
        ["one", "gate"],
        ["other", "all"],
        ["other", "gate"],
    ]
    for (_, row), pairs in zip(frame.iterrows(), (one, one, other, other), strict=True):
        alone = faithfulness(KNOWN.model, pairs, circuits[row["circuit"]])
        assert row["faithfulness"] == pytest.approx(float(alone.recovered))
        assert row["n"] == len(pairs) and row["templates"] == 6


# ---- completeness and minimality


def test_the_planted_circuit_is_complete(circuit):
    for whole in (circuit, Circuit.of_nodes(KNOWN.model, circuit.nodes)):
        result = completeness(KNOWN.model, KNOWN.pairs, whole, n_subsets=4)
        assert result.axes[0].labels[:2] == ("nothing", "everything")
        assert len(result.axes[0]) == 2 + 4 + 4
        assert result.recovered.abs().max() < 1e-4


def test_a_second_way_shows_when_the_first_is_gone(circuit):
    first = without(circuit, GATE)
    result = completeness(KNOWN.model, KNOWN.pairs, first, n_subsets=20)
    gap = dict(zip(result.axes[0].labels, result.recovered.tolist(), strict=True))
    assert gap["mlp 6 -> logits"] == pytest.approx(gap["nothing"], abs=1e-3)
    assert gap["mlp 6 -> logits"] == pytest.approx(-0.53, abs=0.01)
    assert gap["everything"] == pytest.approx(0, abs=1e-4)


def test_each_difference_is_what_two_runs_say(circuit):
    first = without(circuit, GATE)
    result = completeness(KNOWN.model, KNOWN.pairs, first, n_subsets=20)
    place = result.axes[0].labels.index("head 5.0 -> mlp 6")
    edge = next(e for e in first.edges if str(e) == "head 5.0 -> mlp 6")
    everything = Circuit.of_edges(KNOWN.model, []).complement()
    less = [[e for e in whole.edges if e != edge] for whole in (first, everything)]
    mine, models = (
        faithfulness(KNOWN.model, KNOWN.pairs, Circuit.of_edges(KNOWN.model, edges)).per_pair[:, 0]
        for edges in less
    )
    torch.testing.assert_close(result.per_pair[:, place], mine - models, atol=1e-4, rtol=0)


def test_every_part_of_the_planted_circuit_is_needed_and_no_other(circuit):
    idle = next(iter(sorted(KNOWN.distractor_edges, key=str)))
    padded = Circuit.of_edges(KNOWN.model, [*circuit.edges, idle])
    result = minimality(KNOWN.model, KNOWN.pairs, padded)
    worth = dict(zip(padded.parts, result.recovered.tolist(), strict=True))
    assert result.axes[0].labels == tuple(map(str, padded.parts))
    assert worth.pop(idle) == pytest.approx(0, abs=1e-4)
    assert min(worth.values()) > 0.4
    nodes = minimality(KNOWN.model, KNOWN.pairs, Circuit.of_nodes(KNOWN.model, circuit.nodes))
    assert nodes.recovered.min() > 0.4 and "mlp 6" in nodes.axes[0].labels


def test_an_empty_circuit_has_no_parts():
    nothing = Circuit.of_edges(KNOWN.model, [])
    for method in (completeness, minimality):
        with pytest.raises(InputError, match="no part to take away"):
            method(KNOWN.model, KNOWN.pairs, nothing)
        with pytest.raises(InputError, match="n_subsets is -1"):
            method(KNOWN.model, KNOWN.pairs, nothing.complement(), n_subsets=-1)


# ---- agreement with a known circuit


def test_auroc_compares_the_circuit_with_the_others(circuit):
    truth = circuit.keep.float()
    assert edge_auroc(-truth, circuit) == 1.0  # the size counts
    assert edge_auroc(1 - truth, circuit) == 0.0
    assert edge_auroc(torch.zeros_like(truth), circuit) == 0.5
    values = truth.clone()
    values[circuit.graph.index(next(iter(KNOWN.distractor_edges)))] = 2.0
    n = len(KNOWN.distractor_edges)
    assert edge_auroc(values, circuit, KNOWN.distractor_edges) == pytest.approx(1 - 1 / n)


def test_bad_scores_are_refused(circuit):
    with pytest.raises(InputError, match=r"scores are \(2, 2\)"):
        edge_auroc(torch.zeros(2, 2), circuit)
    with pytest.raises(InputError, match="NaN"):
        edge_auroc(torch.full(circuit.graph.shape, torch.nan), circuit)
    with pytest.raises(InputError, match="0 of others"):
        edge_auroc(circuit.keep.float(), circuit, among=circuit.edges)
    assert separation(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 1.0])) == 2.5 / 4
