"""Long prompts, chunk by chunk: what memory does not hold lies on the disk, and is the same."""

import errno
import os
from pathlib import Path

import pytest
import torch

import g4lens
from g4lens import InputError
from g4lens.errors import StoreError
from g4lens.experiment import scratch
from g4lens.experiment.caching import cache_activations
from g4lens.experiment.scratch import Scratch

NAMES = ["hook_embed", "blocks.*.hook_resid_post", "blocks.9.attn.hook_rot_k"]


@pytest.fixture
def ids():
    return torch.randint(20, 900, (1, 300), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_copy_on_disk(tmp_path, dtype):
    x = torch.arange(30).reshape(2, 3, 5).to(dtype)
    there = Scratch(tmp_path / "new")(x)
    assert torch.equal(there, x) and there.dtype == dtype
    there[0] = 0
    assert x[0].any(), "it is a copy"
    assert list((tmp_path / "new").iterdir()) == [], "without a name"
    assert Scratch(tmp_path)(x[:0]).shape == (0, 3, 5)


def test_a_spilled_cache_is_the_same(tmp_path, ids):
    model = g4lens.load("tiny")
    _, held = model.run_with_cache(ids, chunk=64, read=-1)
    _, spilled = model.run_with_cache(ids, chunk=64, read=-1, spill=Scratch(tmp_path))
    assert set(held) == set(spilled)
    for name in held:
        assert torch.equal(held[name], spilled[name]), name
    rows = spilled.pattern(4, heads=[1], queries=[5, -1])
    assert torch.equal(rows, held.pattern(4, heads=[1], queries=[5, -1]))
    maps = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").is_file() else None
    assert maps is None or str(tmp_path) in maps


def test_a_store_filled_in_chunks(tmp_path, ids):
    model = g4lens.load("tiny")
    prompts = [ids[0].tolist(), ids[0, :20].tolist()]
    whole = cache_activations(model, prompts, tmp_path / "a", NAMES, progress=False)
    parts = cache_activations(model, prompts, tmp_path / "b", NAMES, chunk=64, progress=False)
    assert parts.verify() == [] and parts.spec["chunk"] == 64 and "chunk" not in whole.spec
    for name in whole.names:
        for prompt in whole.prompts:
            torch.testing.assert_close(
                parts[prompt, name], whole[prompt, name], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("chunk", [0, -1, 2.5])
def test_a_chunk_of_nothing(tmp_path, chunk):
    with pytest.raises(InputError, match=r"chunk is .*, expected at least 1 position"):
        cache_activations(g4lens.load("tiny"), ["a"], tmp_path / "x", NAMES, chunk=chunk)
    assert not (tmp_path / "x").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match=r"no room for 0.00 GB of activations \(No space left"):
        Scratch(tmp_path)(torch.zeros(3))


def test_a_system_that_cannot_reserve_room(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(scratch, "PIECE", 7)
    x = torch.arange(30).reshape(2, 15)
    assert torch.equal(Scratch(tmp_path)(x), x)
