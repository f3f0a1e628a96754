"""Edge attribution against the derivative of the run of the graph."""

import copy
from dataclasses import replace

import pytest
import torch

import g4lens
from g4lens.analysis.circuits.edge_attribution import edge_attribution
from g4lens.analysis.circuits.edge_scores import EdgeScores
from g4lens.analysis.circuits.graph import Graph, Node
from g4lens.analysis.circuits.graph_run import graph_run, run_bytes
from g4lens.analysis.circuits.path_patching import path_patching
from g4lens.analysis.gradients.slopes import graph_bytes
from g4lens.analysis.metrics import as_metric
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.errors import InputError
from g4lens.hooks import edited_points
from g4lens.model.gemma4 import Gemma4
from tests.analysis.circuits.test_graph_run import CASES, random_pairs
from tests.conftest import randomised, small_config


@pytest.mark.parametrize("metric", ["logit_diff", "log_prob.pre_cap"])
@pytest.mark.parametrize("direction", ["noise", "denoise"])
@pytest.mark.parametrize("case", CASES)
def test_eap_is_the_derivative(case, direction, metric):
    """The score is minus the slope of the metric by how much of the edge is kept."""
    model = randomised(Gemma4(small_config(**CASES[case])), seed=6).double()
    scores = compared_with_slopes(model, metric, direction)
    assert (scores.values[scores.graph.allowed] != 0).float().mean() > 0.9
    assert not scores.values[~scores.graph.allowed].any()


def compared_with_slopes(model, metric, direction):
    pairs, graph, metric = random_pairs(2), Graph(model.cfg), as_metric(metric)
    scores = edge_attribution(model, pairs, metric, direction=direction)
    keep = torch.ones(1, *graph.shape, dtype=torch.float64, requires_grad=True)
    (group,) = pairs.on(model, metric)
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        for values, found in zip(
            graph_run(model, group, metric, keep, direction)[0], scores.per_pair, strict=True
        ):
            (slope,) = torch.autograd.grad(values, keep, retain_graph=True)
            torch.testing.assert_close(found.double(), -slope[0], rtol=1e-5, atol=1e-7)
    return scores


def test_kl_runs_its_clean_side_undisturbed():
    """While the corrupted run is differentiated; of the clean run it has no slope."""
    model = randomised(Gemma4(small_config()), seed=6).double()
    assert compared_with_slopes(model, "kl", "denoise").values.abs().max() > 0
    assert edge_attribution(model, random_pairs(1), "kl", steps=2).values.abs().max() > 0
    with pytest.raises(InputError, match="metric kl gives no gradient in clean runs"):
        edge_attribution(model, random_pairs(1), "kl")


@pytest.mark.parametrize("steps", [1, 3])
def test_eap_ig_adds_up(steps):
    """All edges of an input together are its change times the whole gradient, step by step.

    Embeddings and per-layer embeddings are mixed together, in the middles of the steps.
    """
    model = randomised(Gemma4(small_config()), seed=9).double()
    pairs, graph, metric = random_pairs(2), Graph(model.cfg), as_metric("logit_diff")
    (group,) = pairs.on(model, metric)
    clean, corrupted = (model(group.batch(side), stop=0) for side in ("clean", "corrupted"))
    token, stream = 0.0, 0.0
    with torch.no_grad():
        halves = [
            model.run_with_cache(group.batch(s), "hook_ple_token", stop=0)[1]["hook_ple_token"]
            for s in ("clean", "corrupted")
        ]
    for i in range(steps):
        share = (i + 0.5) / steps
        resid, ple = (
            torch.lerp(getattr(clean, x), getattr(corrupted, x), share).requires_grad_()
            for x in ("resid", "ple")
        )
        logits = model(state=replace(clean, resid=resid, ple=ple), read=-1)
        by_resid, by_ple = torch.autograd.grad(metric(logits, group.targets).sum(), (resid, ple))
        stream = stream + ((corrupted.resid - clean.resid) * by_resid).sum((1, 2)) / steps
        token = token + ((halves[1] - halves[0]) * by_ple).sum((1, 2, 3)) / steps
    scores = edge_attribution(model, pairs, metric, steps=steps).per_pair.double()
    into_stream = torch.tensor([port != "value" for _, port in graph.ports])
    torch.testing.assert_close(scores[:, 0, into_stream].sum(1), stream, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores[:, 1].sum(1), token, rtol=1e-5, atol=1e-6)


def test_small_steps_lead_to_path_patching():
    """Where the runs are near each other, the estimate is the effect."""
    model = randomised(Gemma4(small_config()), seed=9).double()
    ids = random_pairs(1)[0].clean
    weight = model.embed.tokens.weight
    weight[50] = weight[int(ids[4])] + 1e-3 * torch.randn(32, dtype=weight.dtype)
    near = ids.clone()
    near[4] = 50
    model.embed.ple_tokens.weight[50] = model.embed.ple_tokens.weight[int(ids[4])]
    pairs = Pairs([Pair(ids, near, 5, 6)])
    ports = [(Node("head", 8, 1), name) for name in ("q", "k", "v")]
    ports += [(Node("mlp", 5), "in"), (Node("ple", 6), "gate"), (Node("logits"), "in")]
    exact = EdgeScores.of_paths(path_patching(model, pairs, receivers=ports, progress=False))
    columns = [exact.graph.column(*port) for port in ports]
    expected, found = exact.values[:, columns], edge_attribution(model, pairs).values[:, columns]
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_half_precision_is_near_the_whole():
    """Of the bundled model in bfloat16, as E2B is released; the same by path patching."""
    half = g4lens.load("tiny", device="cpu", dtype="bfloat16")
    pairs, whole = g4lens.tasks.pairs("ioi", 2), copy.deepcopy(half).float()
    for steps in (None, 2):
        found, expected = (
            edge_attribution(model, pairs, steps=steps).values.flatten() for model in (half, whole)
        )
        assert found.dtype == torch.float32
        assert torch.cosine_similarity(found, expected, 0) > 0.999
    ports = [(Node("head", 14, 1), "q"), (Node("head", 14, 1), "k"), (Node("mlp", 9), "in")]
    ports += [(Node("ple", 6), "gate"), (Node("ple", 6), "value"), (Node("logits"), "in")]
    measured, exact = (
        path_patching(model, pairs, receivers=ports, progress=False).effect.flatten()
        for model in (half, whole)
    )
    assert torch.cosine_similarity(measured, exact, 0) > 0.99


def test_what_is_reported():
    """Frame, best edges, account of itself; batches change nothing."""
    model = randomised(Gemma4(small_config()), seed=6).double()
    pairs = random_pairs(3)
    scores = edge_attribution(model, pairs, steps=2, direction="denoise")
    (group,) = pairs.on(model, "logit_diff")
    just = run_bytes(Graph(model.cfg), group) + graph_bytes(model.cfg, 14, reads=1)
    with pytest.raises(InputError, match="the graph of one pair of 14 tokens takes"):
        edge_attribution(model, pairs, budget=just - 1)
    one = edge_attribution(model, pairs, steps=2, direction="denoise", budget=just)
    torch.testing.assert_close(scores.per_pair, one.per_pair, rtol=1e-5, atol=1e-6)
    frame, best = scores.to_frame(), scores.top(3)
    assert len(frame) == int(scores.graph.allowed.sum())
    row = frame.loc[frame.score.abs().idxmax()]
    assert (row.sender, row.receiver) == (str(best[0][0].sender), str(best[0][0].receiver))
    assert abs(best[0][1]) >= abs(best[1][1]) >= abs(best[2][1]) > 0
    assert scores.about["method"] == "EAP-IG" and scores.about["steps"] == "2"
    assert str(best[0][0]) in repr(scores)
    assert not edited_points()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "rank"}, "metric rank gives no gradient"),
        ({"metric": lambda logits, pairs: logits[:, 0, 5].round()}, "its slope by every logit is"),
        ({"steps": 0}, "steps is 0"),
        ({"direction": "up"}, "direction is 'up'"),
    ],
)
def test_bad_input(model, options, message):
    """Named, at once."""
    with pytest.raises(InputError, match=message):
        edge_attribution(model, random_pairs(1), **options)
    assert not edited_points()
    assert not any(point.is_hung for point in model.hook_points.values())
