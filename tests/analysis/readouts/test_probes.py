"""Probes on models where it is known what can be read, and controls that must fail."""

import builtins

import pytest
import torch

import g4lens
from g4lens.analysis.readouts.probes import probe
from g4lens.errors import G4LensError, InputError


@pytest.fixture(scope="module")
def prompts() -> list[torch.Tensor]:
    """The token before the last one decides: odd or even."""
    return [
        torch.randint(3, 90, (8,), generator=torch.Generator().manual_seed(i)) for i in range(48)
    ]


def labels_of(prompts, at: int = -1) -> list[str]:
    return ["low" if int(ids[at]) < 46 else "high" for ids in prompts]


def test_what_the_token_says_is_read_everywhere(model, prompts):
    planted = [torch.cat([ids[:-1], torch.tensor([10 + i % 2])]) for i, ids in enumerate(prompts)]
    found = probe(model, planted, [i % 2 for i in range(48)], layers=[0, 1])
    assert (found.accuracy > 0.9).all()
    assert (found.untrained > 0.9).all(), "an untrained model tells two tokens apart as well"
    assert found.classes == (0, 1)
    assert found.chance == 0.5


def test_labels_that_say_nothing_are_not_read(model, prompts):
    labels = torch.randint(0, 2, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    found = probe(model, prompts, labels, layers=4, items=list(range(48)))
    assert found.accuracy.item() < 0.75
    assert found.control.item() < 0.75


def test_a_cluster_that_gives_the_label_away_is_held_out(model, prompts):
    """Each prompt stands there four times: a probe that has seen its copy is always right."""
    copies = [ids for ids in prompts[:16] for _ in range(4)]
    labels = [i // 4 % 2 for i in range(64)]
    leaked = probe(model, copies, labels, layers=4)
    fair = probe(model, copies, labels, layers=4, clusters=[i // 4 for i in range(64)])
    assert leaked.accuracy.item() == 1
    assert fair.accuracy.item() < 0.9
    assert leaked.control.item() > 0.7, "items that return are learned by heart"
    assert torch.equal(leaked.selectivity, leaked.accuracy - leaked.control)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_the_directions_classify_as_the_probe_does(model, prompts, n_classes):
    labels = [int(ids[-1]) * n_classes // 90 for ids in prompts]
    found = probe(model, prompts, labels, layers=[2], folds=2, penalty=1e-3)
    states = torch.stack(
        [model.run_with_cache(ids[None])[1]["resid_post", 2][0, -1] for ids in prompts]
    )
    said = (states @ found.weights[0].T + found.biases[0]).argmax(-1)
    assert found.weights.shape == (1, n_classes, 32)
    assert (said == torch.tensor(labels)).float().mean() > 0.95


def test_heads_and_several_positions(model, prompts):
    found = probe(
        model, prompts, labels_of(prompts), layers=[3], site="z", positions=[-2, -1], folds=2
    )
    assert found.weights.shape == (1, 2, 32)


def test_it_draws_and_tabulates(model, prompts):
    found = probe(model, prompts, labels_of(prompts), layers=[0, 5], folds=2)
    assert list(found.to_frame().layer) == [0, 5]
    assert len(found.plot().get_lines()) >= 4
    assert repr(found).startswith("Probes(2 classes from resid_post of 2 blocks; best in block")


def test_a_bundled_fact_is_selective():
    """The colour that is asked for stands at the last position in the end."""
    model = g4lens.load("tiny", device="cpu")
    pairs = g4lens.tasks.pairs("colour", 28)
    colours = [pair.answer for pair in pairs]
    found = probe(
        model, [pair.clean for pair in pairs], [c in (" red", " blue") for c in colours],
        layers=[14], items=list(range(28)), folds=2,
    )  # fmt: skip
    assert found.accuracy.item() > 0.95
    assert found.selectivity.item() > 0.2
    assert found.untrained.item() < 0.8


# ---- what cannot be probed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["same"] * 48}, "all labels are 'same': a probe needs two classes"),
        ({"labels": ["a"] * 47}, "47 labels for 48 prompts"),
        ({"labels": ["a"] * 46 + ["b"] * 2}, "class 'b' stands in 2 clusters"),
        ({"clusters": [0] * 48}, "stands in 1 clusters, expected one for each of 4 folds"),
        ({"items": ["one"] * 48}, r"all rows are of one item \('one'\)"),
        ({"folds": 1}, "folds is 1"),
        ({"penalty": 0}, "penalty is 0"),
        ({"layers": 10}, "no block 10"),
        ({"site": "resid"}, "no site is called 'resid'"),
    ],
)
def test_clear_errors(model, prompts, changes, message):
    options = {"labels": labels_of(prompts), "layers": 2, **changes}
    with pytest.raises(InputError, match=message):
        probe(model, prompts, **options)
    assert not any(point.is_hung for point in model.hook_points.values())


def test_without_scikit_learn(model, prompts, monkeypatch):
    imported = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(f"No module named {name!r}")
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(G4LensError, match="pip install scikit-learn"):
        probe(model, prompts, labels_of(prompts), layers=2)
