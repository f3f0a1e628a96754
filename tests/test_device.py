"""Nothing inside a pass waits for the device, and an idle model compiles.

On the meta device no number can be read back, so a pass that runs there has asked for none. Where
inputs are prepared, on the CPU, reading is free: ids and positions are checked there.
"""

import shutil
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import g4lens
from g4lens.errors import InputError
from g4lens.inputs.batch import prepare
from g4lens.state import Rows

READ_BACK = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "_unique2", "masked_select")


class NoReading(TorchDispatchMode):
    """Raises where a number of a tensor decides what Python does next, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in READ_BACK or masked:
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def steps(model, batch, device="cpu"):
    """What a plain call does between the preparing and the logits, as `_run_batch` calls it."""
    rows = Rows(batch.positions.to(device), None if batch.is_padded else 0)
    lengths, tokens = batch.lengths, batch.tokens.to(device)
    read = torch.full((len(tokens), 1), tokens.shape[1] - 1, device=device)
    return rows, lengths, tokens, read


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("read_last", [False, True])
def test_no_number_is_read_back(model, tokens, padded, read_last):
    batch = prepare([tokens[0], tokens[1, :9]] if padded else tokens, None, model.cfg)
    rows, lengths, ids, read = steps(model, batch)
    with NoReading():
        state = model.run(model.begin(ids, rows, lengths), read=read if read_last else None)
        logits = model.unembed(state.resid)
    torch.testing.assert_close(logits, model(batch, read=-1 if read_last else None))


def test_nor_while_generating_or_in_chunks(model, tokens):
    batch = prepare(tokens, None, model.cfg)
    rows, lengths, ids, _ = steps(model, batch)
    with NoReading():
        first = model.run(model.begin(ids[:, :14], rows.slice(0, 14), lengths))
        state = model.run(model.begin(ids[:, 14:22], rows.slice(14, 22), lengths, past=first.kv))
        logits, _ = model.advance(ids[:, 22], state.take(torch.full((2, 1), 7)), 1)
    torch.testing.assert_close(logits, model(tokens, read=-1)[:, 0], atol=2e-4, rtol=1e-4)


def test_nor_in_hooks_that_do_not_ask(model, tokens):
    batch = prepare(tokens, None, model.cfg)
    rows, lengths, ids, _ = steps(model, batch)
    edits = [("blocks.*.attn.hook_z", lambda x, hook: x * 0.5), ("*hook_pattern", lambda x, h: x)]
    with NoReading(), model.hooks(edits):
        model.unembed(model.run(model.begin(ids, rows, lengths)).resid)


def test_nor_in_a_tower(model, seen_and_heard):
    batch = prepare(seen_and_heard, None, model.cfg)
    for tower, inputs in (
        (model.vision, (batch.pixels, batch.patch_positions)),
        (model.audio, (batch.mel, batch.mel_mask)),
    ):
        packing = tower.packing(inputs[-1])
        with NoReading():
            tower(*inputs, packing)


def test_a_whole_call_on_the_meta_device(cfg, tokens, seen_and_heard):
    with torch.device("meta"):
        model = g4lens.Gemma4(cfg)
    for options in ({}, {"read": -1}, {"read": [0, -1], "chunk": 7}, {"chunk": 5}):
        for inputs in (tokens, seen_and_heard):
            assert model(inputs, **options).is_meta, options
    state = model(tokens, stop=3)
    assert model(tokens, past=state.kv).is_meta


def test_ids_are_checked_when_they_are_prepared(cfg):
    """On the CPU, before anything is on a device that would abort the process."""
    for wrong in ([[5, cfg.d_vocab]], [[5, -1]]):
        with pytest.raises(InputError):
            prepare(torch.tensor(wrong), None, cfg)


# ---- compiled

COMPILED = """
import sys, torch, g4lens
from tests.conftest import randomised, small_config

torch.set_num_threads(1)
torch.set_grad_enabled(False)
kinds = ("local", "global", "local", "global")
cfg = small_config(n_layers=4, layer_types=kinds, n_kv_shared_layers=2, vision=None, audio=None)
model = randomised(g4lens.Gemma4(cfg))
ids = torch.randint(3, 90, (2, 23), generator=torch.Generator().manual_seed(0))
compiled = torch.compile(model, backend=sys.argv[1])
plain = model(ids)
torch.testing.assert_close(compiled(ids), plain, atol=1e-4, rtol=1e-4)
before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
assert before > 0
for layer in range(4):
    with model.hooks([(f"blocks.{layer}.hook_resid_post", lambda x, hook: x * 0.5)]):
        assert torch.equal(compiled(ids), model(ids))
        assert not torch.allclose(compiled(ids), plain)
with g4lens.hooks.hang([]):
    assert torch.equal(compiled(ids), plain)
torch.testing.assert_close(compiled(ids), plain, atol=1e-4, rtol=1e-4)
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before, "compiled for a hook"
"""


def backends():
    missing = shutil.which("g++") is None and shutil.which("clang++") is None
    no_compiler = pytest.mark.skipif(missing, reason="inductor needs a C++ compiler, there is none")
    return ["eager", "aot_eager", pytest.param("inductor", marks=no_compiler)]


@pytest.mark.parametrize("backend", backends())
def test_compiled_with_idle_hook_points(backend):
    """In a process of its own: the checks of shapes that tests hang everywhere do not compile."""
    run = [sys.executable, "-W", "ignore", "-c", COMPILED, backend]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
