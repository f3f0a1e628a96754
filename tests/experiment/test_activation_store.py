"""The reader: any vector, shuffled epochs, and the dataset that SAELens reads."""

import errno
import os

import pytest
import torch

from g4lens import CacheError, InputError
from g4lens.errors import StoreError
from g4lens.experiment import export
from g4lens.experiment.activation_store import ActivationStore
from g4lens.experiment.caching import cache_activations
from g4lens.experiment.store import UnitStore

NAME, HEADS = "blocks.1.hook_resid_post", "blocks.0.attn.hook_z"


def cached(model, folder, lengths, **more):
    random = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 90, (n,), generator=random) for n in lengths]
    more = {"prompts_per_unit": 2, "progress": False, **more}
    return cache_activations(model, prompts, folder, [NAME, HEADS], **more), prompts


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    return cached(model, tmp_path_factory.mktemp("store"), [5, 3, 8, 4, 6])


def test_any_vector(whole):
    store, prompts = whole
    all_rows = [store[i, NAME] for i in range(5)]
    assert [len(x) for x in all_rows] == [5, 3, 8, 4, 6]
    assert torch.equal(store[2, NAME, 7], all_rows[2][7])
    assert torch.equal(store[2, NAME, -8], all_rows[2][0])
    places = [(4, 5), (0, -1), (2, 3), (0, 0), (4, 5)]
    taken = store.take(NAME, *zip(*places, strict=True))
    assert torch.equal(taken, torch.stack([all_rows[i][p] for i, p in places]))
    assert store[0, HEADS].ndim == 3
    assert torch.equal(store.tokens(3, NAME), prompts[3])
    assert len(store) == 5 and "5 of 5 prompts, 2 activations" in repr(store)
    assert store.n_rows == 2 * 26


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ((5, NAME), "no prompt 5, the set has 0 to 4"),
        ((-1, NAME), "no prompt -1"),
        ((0, "blocks.1.hook_resid_pst"), "Did you mean 'blocks.1.hook_resid_post'"),
        ((1, NAME, 3), "not held at position 3: 0, 1, 2"),
        ((1, NAME, -4), "not held"),
    ],
)
def test_what_is_not_there(whole, key, message):
    with pytest.raises(CacheError, match=message):
        whole[0][key]


def test_unequal_numbers(whole):
    with pytest.raises(InputError, match="2 prompts and 1 positions"):
        whole[0].take(NAME, [0, 1], [0])


def test_positions_that_were_not_kept(model, tmp_path):
    store, _ = cached(model, tmp_path, [5, 3, 8], positions=[0, -1])
    assert store.positions(2, NAME) == [0, 7]
    assert torch.equal(store[2, NAME, -1], store[2, NAME][1])
    with pytest.raises(CacheError, match="not held at position 3: 0, 7"):
        store[2, NAME, 3]


@pytest.mark.parametrize("buffer", [1, 2000, 2**28])
def test_an_epoch_has_every_row_once(whole, buffer):
    store, _ = whole
    expected = torch.cat([store[i, NAME] for i in range(5)])
    found = list(store.batches(NAME, 7, seed=3, buffer=buffer))
    assert [len(x) for x in found] == [7, 7, 7, 5]
    found = torch.cat(found)
    assert not torch.equal(found, expected)
    assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, expected.tolist()))
    again = torch.cat(list(store.batches(NAME, 7, seed=3, buffer=buffer)))
    other = torch.cat(list(store.batches(NAME, 7, seed=4, buffer=buffer)))
    assert torch.equal(found, again) and not torch.equal(found, other)


def test_batches_that_cannot_be(whole):
    with pytest.raises(CacheError, match="no activation 'x'"):
        next(whole[0].batches("x", 2))
    with pytest.raises(InputError, match="at least 1"):
        next(whole[0].batches(NAME, 0))


def test_the_dataset_that_saelens_reads(model, tmp_path):
    datasets = pytest.importorskip("datasets")
    store, prompts = cached(model, tmp_path / "store", [4, 4, 4], dtype="bfloat16")
    assert store.to_arrow(tmp_path / "data", NAME) == 3
    data = datasets.load_from_disk(str(tmp_path / "data"))
    data.set_format("torch", columns=[NAME, "token_ids"])
    assert data.features[NAME].shape == (4, model.cfg.d_model)
    x = data[:]
    assert torch.equal(x[NAME], torch.stack([store[i, NAME].float() for i in range(3)]))
    assert torch.equal(x["token_ids"].long(), torch.stack(prompts))


def test_long_pieces_are_written_in_parts(whole, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    store, _ = whole
    monkeypatch.setattr(export, "MOST", 1)
    assert store.to_arrow(tmp_path / "data", HEADS, context_size=3) == 8
    data = datasets.load_from_disk(str(tmp_path / "data")).with_format("torch")
    rows = torch.cat([store[i, HEADS] for i in range(5)]).flatten(1)[:24]
    assert torch.equal(data[:][HEADS].flatten(0, 1), rows)


def test_half_a_dataset_is_not_left(model, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    store, _ = cached(model, tmp_path / "store", [4, 4, 4])

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(export, "put", full)
        with pytest.raises(StoreError, match="no space for another file in"):
            store.to_arrow(tmp_path / "data", NAME)
    assert list((tmp_path / "data").iterdir()) == []
    path = list(store.store.files().values())[1]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=f"{path.name} is not readable as a shard"):
        ActivationStore(tmp_path / "store").to_arrow(tmp_path / "data", NAME)


def test_a_folder_without_a_unit(model, tmp_path):
    store, _ = cached(model, tmp_path / "store", [4])
    next(iter(store.store.files().values())).unlink()
    empty = ActivationStore(tmp_path / "store")
    assert len(empty) == 0 and list(empty.batches(NAME, 3)) == []
    for size in (None, 3):
        with pytest.raises(InputError, match="has no unit yet"):
            empty.to_arrow(tmp_path / "data", NAME, size)


def test_where_rows_are_is_held_once_for_all_names(whole):
    store = ActivationStore(whole[0].store.folder)
    for name in (NAME, HEADS):
        assert store.take(name, [0, 1], [0, 2]).shape[0] == 2
    assert store._place.cache_info().currsize == 1


def test_ragged_prompts_are_cut_into_sequences(whole, tmp_path):
    datasets = pytest.importorskip("datasets")
    store, prompts = whole
    with pytest.raises(InputError, match="3 to 8 rows: give context_size"):
        store.to_arrow(tmp_path / "data", HEADS)
    assert store.to_arrow(tmp_path / "data", HEADS, context_size=7) == 3
    data = datasets.load_from_disk(str(tmp_path / "data")).with_format("torch")
    rows = torch.cat([store[i, HEADS] for i in range(5)]).flatten(1)[:21]
    assert torch.equal(data[:][HEADS].flatten(0, 1), rows)
    assert torch.equal(data[:]["token_ids"].flatten().long(), torch.cat(prompts)[:21])
    with pytest.raises(InputError, match="in use"):
        store.to_arrow(tmp_path / "data", HEADS, context_size=7)
    with pytest.raises(InputError, match="fewer rows"):
        store.to_arrow(tmp_path / "more", HEADS, context_size=100)


def test_folders_of_something_else(tmp_path):
    with pytest.raises(InputError, match="no results"):
        ActivationStore(tmp_path)
    UnitStore(tmp_path, {"kind": "experiment"}, ["a"]).commit("a", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="of kind 'experiment'"):
        ActivationStore(tmp_path)
