"""Tables in RAM and on disk: the logits of the table on the device, bit for bit, and no weights."""

import copy
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

import g4lens
from g4lens.errors import InputError, WeightsError
from g4lens.weights import save
from tests.conftest import pictures, sounds
from tests.parity import checkpoints as made

HOST = ["ram", "disk"]
PLE = "model.language_model.embed_tokens_per_layer.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    made.reference(made.config(made.E2B)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def plain(saved):
    return g4lens.load(saved, device="cpu")


@pytest.fixture(scope="module", params=HOST)
def hosted(request, saved):
    return g4lens.load(saved, device="cpu", ple=request.param)


@pytest.fixture(scope="module")
def seen_and_heard():
    ids = [2, 11, made.BOI, *[made.IMAGE] * 6, made.EOI, 12, made.BOA, *[made.AUDIO] * 5]
    ids = torch.tensor([[*ids, made.EOA, 13, 199, 0, 13]])
    return {"input_ids": ids, **pictures((3, 2), patch=16), **sounds(18, n_mels=128)}


def ids(*lengths):
    random = torch.Generator().manual_seed(3)
    return [torch.randint(3, 190, (n,), generator=random) for n in lengths]


def shifted(x, hook):
    batch, row = hook.at(4)
    x[batch, row] += 0.5
    return x * 1.25


def test_the_table_is_no_weight(hosted, plain):
    table = hosted.embed.ple_tokens
    names = {name for name, _ in hosted.named_parameters()}
    assert {name for name, _ in plain.named_parameters()} - names == {"embed.ple_tokens.weight"}
    assert set(hosted.state_dict()) == set(plain.state_dict())
    assert copy.deepcopy(hosted).embed.ple_tokens is table
    assert f"200, 80, {table.place}" in repr(hosted)


def test_the_same_logits(hosted, plain, seen_and_heard):
    for inputs in (seen_and_heard, torch.stack(ids(30, 30)), ids(9, 23, 2)):
        for options in ({}, {"read": -1}, {"chunk": 7}, {"stop": 3}):
            ours, theirs = hosted(inputs, **options), plain(inputs, **options)
            if "stop" in options:
                ours, theirs = ours.ple, theirs.ple
            assert torch.equal(ours, theirs)


def test_the_same_text(hosted, plain, seen_and_heard):
    for inputs in (seen_and_heard, ids(5, 12)):
        ours, theirs = (m.generate(inputs, 8, stop_tokens=[]) for m in (hosted, plain))
        assert ours == theirs


def test_the_same_hooks(hosted, plain, seen_and_heard):
    hooks = [("hook_ple_token", shifted), ("hook_embed", shifted)]
    ours, theirs = (m.run_with_hooks(seen_and_heard, fwd_hooks=hooks) for m in (hosted, plain))
    assert torch.equal(ours, theirs) and not torch.equal(ours, plain(seen_and_heard))
    with hosted.hooks(hooks), plain.hooks(hooks):
        ours, theirs = (m.generate(ids(9)[0][None], 5, stop_tokens=[]) for m in (hosted, plain))
    assert ours == theirs


def test_the_same_gradients(hosted, plain):
    def objective(logits):
        return logits[:, -1, 7].sum()

    ours, theirs = (m.run_with_grads(ids(9), objective, "hook_ple_token") for m in (hosted, plain))
    assert torch.equal(ours.grads["hook_ple_token"], theirs.grads["hook_ple_token"])


@pytest.mark.parametrize("place", HOST)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_rows_follow_the_dtype_of_the_weights(saved, place, dtype):
    there, here = (g4lens.load(saved, device="cpu", dtype=dtype, ple=x) for x in (place, "device"))
    assert there.embed.ple_tokens.dtype == torch.float32
    tokens = torch.stack(ids(20))
    assert torch.equal(there(tokens), here(tokens)) and str(here(tokens).dtype).endswith(dtype)
    moved = g4lens.load(saved, device="cpu", ple=place).to(here(tokens).dtype)
    assert torch.equal(moved(tokens), here(tokens))


@pytest.mark.parametrize("place", HOST)
def test_the_embedding_too(saved, plain, place, seen_and_heard):
    model = g4lens.load(saved, device="cpu", ple=place, embed=place)
    torch.testing.assert_close(model(seen_and_heard), plain(seen_and_heard), atol=1e-5, rtol=0)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in plain.parameters())
    lens, theirs = (g4lens.logit_lens(m, ids(9)[0][None]) for m in (model, plain))
    assert torch.equal(lens.top_ids, theirs.top_ids)


def test_slices_of_the_embedding_join(saved, plain, monkeypatch):
    monkeypatch.setattr("g4lens.tables.SLICE", 7)
    model, tokens = g4lens.load(saved, device="cpu", embed="disk"), torch.stack(ids(9, 9))
    torch.testing.assert_close(model(tokens), plain(tokens), atol=1e-5, rtol=0)
    grads = [m.run_with_grads(tokens, torch.sum, "hook_embed").grads for m in (model, plain)]
    torch.testing.assert_close(grads[0]["hook_embed"], grads[1]["hook_embed"], atol=1e-3, rtol=1e-4)


def test_rows_are_an_embeddings(hosted, plain):
    ours, theirs = hosted.embed.ple_tokens, plain.embed.ple_tokens
    for wanted in ([[5, 4, 4], [199, 0, 5]], 7, [], list(range(200)), [[[3]]]):
        wanted = torch.tensor(wanted, dtype=torch.int64)
        assert torch.equal(ours(wanted), theirs(wanted))
    for bad in (200, -1):
        with pytest.raises(InputError, match=rf"{PLE} has rows 0 to 199, not {bad}"):
            ours(torch.tensor([4, bad]))


def test_only_the_rows_asked_for_are_read(saved, monkeypatch):
    table, read = g4lens.load(saved, device="cpu", ple="disk").embed.ple_tokens, []
    preadv = os.preadv

    def noting(fd, buffers, offset):
        read.append((offset, buffers[0].nbytes))
        return preadv(fd, [buffers[0][:100]], offset)  # as much as it likes

    monkeypatch.setattr(os, "preadv", noting)
    rows = table(torch.tensor([9, 3, 4, 3]))
    assert torch.equal(rows, load_file(saved / "model.safetensors")[PLE][[9, 3, 4, 3]])
    first = [(offset, n) for offset, n in read if n % 320 == 0]
    assert [n for _, n in first] == [640, 320] and first == sorted(first)


@pytest.mark.parametrize("place", HOST)
@pytest.mark.parametrize("option", ["ple", "embed"])
def test_a_file_cut_short_while_in_use(folder, place, option):
    model = g4lens.load(folder, device="cpu", **{option: place})
    tokens, path = torch.stack(ids(9)), folder / "model.safetensors"
    before, whole = model(tokens), path.read_bytes()
    os.truncate(path, len(whole) // 2)
    for use in (model, lambda x: model.generate(x, 3)):
        with pytest.raises(WeightsError, match=rf"cut short to {len(whole) // 2:,} of .* bytes"):
            use(tokens)
    with path.open("r+b") as file:
        file.write(whole)
    assert torch.equal(model(tokens), before)


@pytest.mark.parametrize("place", HOST)
@pytest.mark.parametrize("option", ["ple", "embed"])
def test_a_file_cut_to_nothing(folder, place, option, seen_and_heard):
    """Towers and the other table are mapped from the same file, and are not touched before."""
    model = g4lens.load(folder, device="cpu", **{option: place})
    os.truncate(folder / "model.safetensors", 0)
    for inputs in (seen_and_heard, torch.stack(ids(9))):
        with pytest.raises(WeightsError, match="cut short to 0 of"):
            model(inputs)


def test_a_disk_that_fails(saved, monkeypatch):
    table = g4lens.load(saved, device="cpu", ple="disk").embed.ple_tokens

    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(WeightsError, match=r"cannot be read \(\[Errno 5\]"):
        table(torch.tensor([3]))


def test_pickles_hold_the_path_alone(hosted, folder):
    table = hosted.embed.ple_tokens
    text = pickle.dumps(table)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert again.place == table.place and torch.equal(
        again(torch.arange(9)), table(torch.arange(9))
    )
    model = g4lens.load(folder, device="cpu", ple=table.place)
    rebuilt, tokens = pickle.loads(pickle.dumps(model)), torch.stack(ids(9))
    assert torch.equal(rebuilt(tokens), model(tokens)) and rebuilt.source == model.source
    text = pickle.dumps(model.embed.ple_tokens)
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"no table .* can be read from it"):
        pickle.loads(text)


def test_saved_and_reloaded(hosted, plain, folder):
    tokens = torch.stack(ids(9, 9))
    save(hosted, folder)
    theirs, ours = plain.state_dict(), load_file(folder / "model.safetensors")
    assert len(ours) == len(theirs) and torch.equal(ours[PLE], theirs["embed.ple_tokens.weight"])
    again = g4lens.load(folder, device="cpu", ple=hosted.embed.ple_tokens.place)
    assert torch.equal(again(tokens), plain(tokens))
    wide = g4lens.load(folder, device="cpu", ple="disk", dtype="float64")
    save(wide, folder)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {torch.float64}
    # the old file is gone, but open: its rows are still those of this model
    assert torch.equal(again(tokens), plain(tokens))
    if again.embed.ple_tokens.place == "disk":
        with pytest.raises(WeightsError, match="is no more the file that"):
            again.state_dict()


def test_shards(folder, plain):
    made.as_hub(folder, n_shards=3)
    model, tokens = g4lens.load(folder, device="cpu", ple="disk"), torch.stack(ids(9, 9))
    assert torch.equal(model(tokens), plain(tokens)) and model.source.ple == "disk"


@pytest.fixture(scope="module")
def two():
    """The bundled model, with its tables on the device and on disk."""
    return g4lens.load("tiny", device="cpu"), g4lens.load("tiny", device="cpu", ple="disk")


TEXTS = ["Paris is the capital of France.", "The picture shows a red square."]


def test_bigram_tables(two):
    ours, theirs = (
        g4lens.bigram_table(m, TEXTS, tokens=list(range(20, 60)), progress=False) for m in two
    )
    assert torch.equal(ours.top_ids, theirs.top_ids)
    assert torch.equal(ours.top_values, theirs.top_values)


@pytest.mark.parametrize("analysis", [g4lens.ple_swap, g4lens.direct_logit_attribution])
def test_analyses_of_pairs(two, analysis):
    pair = g4lens.Pair(TEXTS[0], "Paris is the capital of Spain.", " is", " the")
    ours, theirs = (analysis(m, pair) for m in two)
    assert torch.equal(ours.per_pair, theirs.per_pair)


def test_the_pad_row(two):
    picture = g4lens.Image(g4lens.sample("images/corners.png"))
    pair = g4lens.Pair((picture, " shows"), (picture, " is"), " a", " the")
    ours, theirs = (g4lens.pad_row(m, pair, value="mean", progress=False) for m in two)
    assert torch.equal(ours.per_pair, theirs.per_pair)


def test_the_halves(two):
    ours, theirs = (g4lens.ple_split(m, TEXTS[0]) for m in two)
    assert torch.equal(ours.token, theirs.token) and torch.equal(ours.context, theirs.context)


def test_selfcheck(two):
    pair = g4lens.Pair(TEXTS[0], "Paris is the capital of Spain.", " is", " the")
    assert g4lens.selfcheck(two[1], pair).passed


def test_widgets(two):
    from g4lens.widgets.architecture_map import MapLogic
    from g4lens.widgets.ple_explorer import PLELogic

    assert MapLogic(two[0]).facts("ple") == MapLogic(two[1]).facts("ple")
    ours, theirs = (PLELogic(m, TEXTS[0]) for m in two)
    assert ours.answer("shares", {}, print) == theirs.answer("shares", {}, print)
    token = {"token": int(ours.looked_up[3])}
    assert ours.answer("promotes", token, print) == theirs.answer("promotes", token, print)
