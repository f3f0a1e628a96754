"""The edges that are said to carry the answer do, each alone, and no other between active parts."""

from functools import partial

import pytest
import torch

from g4lens import planted
from g4lens.analysis.circuits.edge_attribution import edge_attribution
from g4lens.analysis.circuits.edge_scores import EdgeScores
from g4lens.analysis.circuits.graph import Edge, Graph, Node
from g4lens.analysis.circuits.graph_run import circuit_metric
from g4lens.analysis.circuits.path_patching import path_patching
from g4lens.errors import InputError

pytestmark = pytest.mark.unchecked

KNOWN = planted.get("edges")
GRAPH = Graph(KNOWN.model.cfg)
EDGES = sorted(KNOWN.edges | KNOWN.distractor_edges, key=str)


def cut(edges, direction):
    """How far the metric moves when these edges, one at a time, carry the other run."""
    keep = GRAPH.allowed.repeat(1 + len(edges), 1, 1)
    for n, edge in enumerate(edges):
        keep[(n, *GRAPH.index(edge))] = False
    found = circuit_metric(KNOWN.model, KNOWN.pairs, keep=keep, direction=direction)
    return found[:-1] - found[-1]


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_circuit_edges_move_every_pair_and_others_none(direction):
    moved = dict(zip(EDGES, cut(EDGES, direction), strict=True))
    sign = -1 if direction == "noise" else 1
    for edge, effect in moved.items():
        if edge in KNOWN.edges:
            assert (sign * effect).min() > 5, edge
        else:
            assert effect.abs().max() < 1e-4, edge


def test_every_kind_of_port_is_entered_and_more_edges_are_idle():
    assert {edge.port for edge in KNOWN.edges} == {"q", "k", "v", "in", "gate", "value"}
    assert Node("logits") in {edge.receiver for edge in KNOWN.edges}
    assert len(KNOWN.distractor_edges) > len(KNOWN.edges)
    assert not KNOWN.edges & KNOWN.distractor_edges


def test_of_the_readers_of_one_key_one_counts():
    """Blocks 3, 5 and 7 read the keys of block 3; head 2.0 changes them, and 5.0 alone matters."""
    cfg, writer = KNOWN.model.cfg, Node("head", 2, 0)
    assert cfg.readers(3) == (3, 5, 7)
    counts, *others = (Edge(writer, Node("head", layer, 0), "k") for layer in (5, 3, 7))
    assert counts in KNOWN.edges
    assert {*others} <= KNOWN.distractor_edges


def test_the_reader_that_does_not_count_attends_as_the_other_does():
    pair = KNOWN.pairs[0]
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in (5, 7)]
    rows = [
        KNOWN.model.run_with_cache(side, names)[1][name][0, 0, -1]
        for side in (pair.clean, pair.corrupted)
        for name in names
    ]
    places = [int(row.argmax()) for row in rows]
    one, two = (pair.positions[name] + 1 for name in ("one", "two"))
    assert places == [one, one, two, two]
    assert all(float(row.max()) > 0.99 for row in rows)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_path_patching_finds_the_circuit(direction):
    def method(model, pairs):
        return EdgeScores.of_paths(path_patching(model, pairs, direction=direction, progress=False))

    assert planted.score_edges(method, KNOWN) == 1.0


def test_scores_of_edges():
    truth = torch.zeros(GRAPH.shape)
    for edge in KNOWN.edges:
        truth[GRAPH.index(edge)] = -1.0
    assert planted.score_edges(lambda model, pairs: truth, KNOWN) == 1.0
    assert planted.score_edges(lambda model, pairs: 0 * truth, KNOWN) == 0.5
    with pytest.raises(InputError, match="induction does not say which edges"):
        planted.score_edges(lambda model, pairs: truth, planted.get("induction"))
    with pytest.raises(InputError, match="NaN"):
        planted.score_edges(lambda model, pairs: truth / 0, KNOWN)


def test_a_slope_sees_no_edge_through_a_saturated_softmax():
    """EAP finds what comes behind the last attention, and of what steers attention nothing."""
    scores = edge_attribution(KNOWN.model, KNOWN.pairs).values
    late = {edge for edge in KNOWN.edges if edge.sender.kind in ("mlp", "ple", "head")}
    late = {edge for edge in late if edge.sender.layer >= 5}
    assert len(late) == 4
    for edge in KNOWN.edges:
        size = abs(float(scores[GRAPH.index(edge)]))
        assert size > 1 if edge in late else size < 1e-3, edge
    assert 0.8 < planted.score_edges(lambda model, pairs: scores, KNOWN) < 0.95


def test_steps_see_it_if_one_falls_where_attention_turns():
    """Halfway two names tie. Of five steps one is there; of six none, and the turn is narrow."""
    found = {
        steps: planted.score_edges(partial(edge_attribution, steps=steps), KNOWN)
        for steps in (5, 6)
    }
    assert found[5] == 1.0 and found[6] < 1.0
