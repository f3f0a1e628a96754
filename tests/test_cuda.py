"""What only a GPU can show. Run where there is one: `pytest -m cuda`."""

import copy
from contextlib import contextmanager

import pytest
import torch

import g4lens
import g4lens.plan

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, there is none"),
]


@pytest.fixture(scope="module")
def moved(model):
    return copy.deepcopy(model).to("cuda")


def test_the_same_logits(model, moved, seen_and_heard):
    ours = moved(seen_and_heard)
    assert ours.device.type == "cuda"
    torch.testing.assert_close(ours.cpu(), model(seen_and_heard), atol=2e-3, rtol=0)


def test_the_same_text(model, moved, tokens):
    there, here = (m.generate(tokens, max_new_tokens=8, stop_tokens=[]) for m in (moved, model))
    assert [out.tokens for out in there] == [out.tokens for out in here]


def test_backward_hooks_know_their_positions_on_the_backward_thread(moved, tokens):
    told = []
    names = ["blocks.2.hook_resid_post"]
    with moved.hooks(bwd_hooks=[(names, lambda grad, hook: told.append(hook.positions))]):
        moved(tokens)[:, -1, 5].sum().backward()
    assert told[0].tolist() == [list(range(23))] * 2


def test_caches_move_as_they_are_made(moved, tokens):
    _, cache = moved.run_with_cache(tokens, device="cpu")
    assert {x.device.type for x in cache.values()} == {"cpu"}


@contextmanager
def no_waiting():
    """In the block, to read from the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_in_a_pass_waits_for_the_device(moved, tokens):
    batch = g4lens.inputs.batch.prepare(tokens, None, moved.cfg)
    rows = g4lens.state.Rows(batch.positions.to("cuda"), 0)
    ids, lengths = batch.tokens.to("cuda"), batch.lengths
    moved(tokens)  # the libraries are there
    with no_waiting():
        logits = moved.unembed(moved.run(moved.begin(ids, rows, lengths)).resid)
    torch.testing.assert_close(logits, moved(tokens))


def test_nor_in_a_tower(moved, seen_and_heard):
    batch = g4lens.inputs.batch.prepare(seen_and_heard, None, moved.cfg)
    moved(seen_and_heard)
    for tower, inputs in (
        (moved.vision, (batch.pixels, batch.patch_positions)),
        (moved.audio, (batch.mel, batch.mel_mask)),
    ):
        there = [x if x is None else x.to("cuda") for x in (*inputs, tower.packing(inputs[-1]))]
        with no_waiting():
            tower(*there)


@pytest.mark.parametrize("options", [{"chunk": 7}, {"chunk": 7, "read": -1}])
def test_the_same_in_chunks(moved, tokens, options):
    whole = moved(tokens, read=options.get("read"))
    torch.testing.assert_close(moved(tokens, **options), whole, atol=2e-3, rtol=0)


def test_the_plan_holds(moved):
    ids = torch.randint(3, 90, (64, 400))
    moved(ids[:1], read=-1)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    moved(ids, read=-1)
    grown = torch.cuda.max_memory_allocated() - before
    options = g4lens.plan.Options(context=400, batch=64, dtype="float32")
    told = g4lens.plan.plan(moved.cfg, options)
    assert grown == pytest.approx(told.total - told.weights, rel=0.1)


@pytest.mark.parametrize("site", ["resid_pre", "z", "pattern", "v@head", "ple_token", "rot_k"])
def test_the_same_sweeps(model, moved, tokens, site):
    pair = g4lens.Pair(tokens[0], tokens[1], 5, 6)
    carry = ("ple", "kv") if site == "resid_pre" else ()
    there, here = (
        g4lens.activation_patching(m, pair, site=site, carry=carry, progress=False)
        for m in (moved, model)
    )
    torch.testing.assert_close(there.per_pair, here.per_pair, atol=2e-3, rtol=2e-3)
    there, here = (g4lens.ablation(m, pair, site="z", progress=False) for m in (moved, model))
    torch.testing.assert_close(there.per_pair, here.per_pair, atol=2e-3, rtol=2e-3)
    assert g4lens.selfcheck(moved, pair).passed


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_by_torchao(kind):
    pytest.importorskip("torchao", reason="needs torchao: pip install 'g4lens[quantize]'")
    options = {"dtype": "bfloat16", "device": "cuda"}
    found = g4lens.quantisation_error("tiny", ["The capital of France is"], kind, **options)
    assert 0 < found.total_kl < 0.1
    model = g4lens.load("tiny", quantize=kind, **options)
    assert model.source.quantize == kind
    grads = model.run_with_grads("The", lambda logits: logits[0, -1, 5], "resid_post").grads
    assert all(grad.isfinite().all() for grad in grads.values())
