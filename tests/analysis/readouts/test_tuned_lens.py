"""Tuned lens: a stream whose translation is known, the divergence by hand, and files."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from g4lens.analysis.logit_lens import logit_lens
from g4lens.analysis.readouts.tuned_lens import load_tuned_lens, train_tuned_lens
from g4lens.errors import InputError, WeightsError
from g4lens.model.gemma4 import Gemma4
from tests.conftest import randomised, small_config


@pytest.fixture(scope="module")
def prompts():
    random = torch.Generator().manual_seed(2)
    return [torch.randint(3, 90, (n,), generator=random) for n in (11, 11, 14, 14) * 4]


@pytest.fixture(scope="module")
def lens(model, prompts):
    return train_tuned_lens(model, prompts, layers=[2, 8, 9], steps=60, progress=False)


def divergence(model, ids, layer: int, A, b) -> float:
    """KL(model || lens) in nats, mean over positions, straight from the definition."""
    logits, cache = model.run_with_cache(ids[None])
    h = cache["resid_post", layer][0] @ A.T + b
    lens = model.unembed(h[None])[0].log_softmax(-1)
    own = logits[0].log_softmax(-1)
    return float((own.exp() * (own - lens)).sum(-1).mean())


def test_it_comes_nearer_than_the_logit_lens(model, lens):
    ids = torch.randint(3, 90, (20,), generator=torch.Generator().manual_seed(9))
    eye, zero = torch.eye(32), torch.zeros(32)
    for i, layer in enumerate((2, 8)):
        plain = divergence(model, ids, layer, eye, zero)
        assert divergence(model, ids, layer, lens.weights[i], lens.biases[i]) < 0.9 * plain
        assert lens.kl[i] < lens.untuned_kl[i]
    assert lens.untuned_kl[2] == pytest.approx(0, abs=1e-5)
    assert lens.kl[2] == pytest.approx(0, abs=1e-3), "the last block has nothing to learn"


def test_one_step_reports_the_divergence(model, prompts):
    found = train_tuned_lens(model, prompts[:1], layers=[4], steps=1, rows=64, progress=False)
    expected = divergence(model, prompts[0], 4, torch.eye(32), torch.zeros(32))
    assert float(found.untuned_kl) == pytest.approx(expected, rel=1e-4)
    assert float(found.kl) == pytest.approx(expected, rel=1e-4), "it starts as the logit lens"


def test_what_it_shows_is_as_the_logit_lens_gives_it(model, lens, tokens):
    shown = lens.read(model, tokens[:1], positions=[3, -1], tokens=[7])
    _, cache = model.run_with_cache(tokens[:1])
    for i, layer in enumerate(lens.layers):
        h = cache["resid_post", layer][0, [3, -1]] @ lens.weights[i].T + lens.biases[i]
        logits = model.unembed(h[None])[0]
        torch.testing.assert_close(shown.logits[i, :, 0], logits[:, 7], atol=1e-4, rtol=1e-4)
    assert shown.site == "resid_post, tuned"
    assert shown.layers == lens.layers


def test_an_identity_is_the_logit_lens(model, lens, tokens):
    eye = replace(
        lens, weights=torch.eye(32).expand(3, -1, -1), biases=torch.zeros_like(lens.biases)
    )
    plain = logit_lens(model, tokens[:1], layers=lens.layers)
    torch.testing.assert_close(eye.read(model, tokens[:1]).entropy, plain.entropy)


def test_the_same_seed_gives_the_same(model, prompts):
    first, second = (
        train_tuned_lens(model, prompts, layers=[3], steps=3, progress=False) for _ in range(2)
    )
    assert torch.equal(first.weights, second.weights)


def test_the_model_stays_as_it_is(model, prompts, tokens):
    before = model(tokens)
    train_tuned_lens(model, prompts, layers=[3], steps=2, progress=False)
    assert torch.equal(model(tokens), before)
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


def test_a_float64_model(cfg, prompts):
    double = randomised(Gemma4(cfg)).double()
    lens = train_tuned_lens(double, prompts, layers=[3], steps=2, progress=False)
    assert lens.read(double, prompts[0][None]).entropy.isfinite().all()


# ---- files


def test_what_is_saved_is_loaded(model, lens, tmp_path):
    lens.save(tmp_path / "new" / "lens.safetensors")
    loaded = load_tuned_lens(tmp_path / "new" / "lens.safetensors", model)
    for name in ("weights", "biases", "kl", "untuned_kl"):
        assert torch.equal(getattr(loaded, name), getattr(lens, name)), name
    assert (loaded.layers, loaded.site, loaded.geometry) == (
        lens.layers, lens.site, lens.geometry,
    )  # fmt: skip
    assert not list(tmp_path.glob("new/*.partial"))


def test_another_model_is_refused(model, lens, tmp_path, tokens):
    lens.save(tmp_path / "lens.safetensors")
    other = randomised(Gemma4(small_config(d_mlp=40, sliding_window=7)))
    with pytest.raises(InputError, match=r"another model .* d_mlp 48, not 40, sliding_window 6"):
        load_tuned_lens(tmp_path / "lens.safetensors", other)
    with pytest.raises(InputError, match="another model"):
        lens.read(other, tokens[:1])


def test_no_lens_in_the_file(model, tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(WeightsError):
        load_tuned_lens(path, model)
    save_file({"weights": torch.ones(1)}, path, metadata={"g4lens": json.dumps({"format": "?"})})
    with pytest.raises(WeightsError, match="holds no tuned lens"):
        load_tuned_lens(path, model)


@pytest.mark.parametrize(
    "edit",
    [
        lambda about, x: ("[", x),
        lambda about, x: ("[]", x),
        lambda about, x: (json.dumps({**about, "layers": [2]}), x),
        lambda about, x: (json.dumps({**about, "more": 1}), x),
        lambda about, x: (json.dumps({k: v for k, v in about.items() if k != "site"}), x),
        lambda about, x: (json.dumps(about), {**x, "biases": x["biases"][:, :5].clone()}),
        lambda about, x: (json.dumps(about), {k: v for k, v in x.items() if k != "kl"}),
    ],
)
def test_a_lens_that_was_tampered_with(model, lens, tmp_path, edit):
    path = tmp_path / "lens.safetensors"
    lens.save(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["g4lens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    text, tensors = edit(about, tensors)
    save_file(tensors, path, metadata={"g4lens": text})
    with pytest.raises(WeightsError, match="holds no tuned lens"):
        load_tuned_lens(path, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "attn_out"}, "site is 'attn_out'"),
        ({"layers": [10]}, r"layers \[10\]"),
        ({"layers": []}, r"layers \[\]"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_cannot_be_trained(model, prompts, options, message):
    with pytest.raises(InputError, match=message):
        train_tuned_lens(model, prompts, **options, progress=False)


def test_a_block_that_it_has_not(model, lens, tokens):
    with pytest.raises(InputError, match="has no block 3, it has 2, 8, 9"):
        lens.read(model, tokens[:1], layers=[3])
    assert lens.read(model, tokens[:1], layers=None).layers == lens.layers
