"""Cached activations are those of the plain runs, whole after a kill, the same bits again."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import PIL.Image
import pytest
import torch

import g4lens
from g4lens import Audio, CacheError, HookNameError, Image, InputError
from g4lens.experiment.activation_store import ActivationStore
from g4lens.experiment.caching import cache_activations
from g4lens.experiment.work import Work

NAMES = [
    "hook_embed",
    "hook_ple",
    "blocks.*.hook_resid_post",
    "blocks.9.attn.hook_rot_k",
    "blocks.14.attn.hook_norm_v",
    "blocks.3.attn.hook_z",
    "blocks.3.mlp.hook_post",
    "blocks.2.ln1.hook_scale",
]


@pytest.fixture(scope="module")
def tiny():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that are started below
    yield g4lens.load("tiny")
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prompts():
    image = Image(g4lens.sample("images/corners.png"))
    return [
        "The capital city of Syria is",
        [{"role": "user", "content": ["see", image]}, {"role": "assistant", "content": "a square"}],
        "Then",
        (Audio(g4lens.sample("sounds/beeps.wav")), " what is it?"),
        [2, 31, 32, 33],
    ]


def made(model, prompt):
    if isinstance(prompt, str):
        return model.prompt(prompt)
    if isinstance(prompt, tuple):
        return model.prompt(*prompt)
    return torch.tensor([prompt]) if isinstance(prompt[0], int) else model.chat(prompt)


def kept(store):
    """Every file's content but when and by whom it was tried."""
    paths = [p for p in store.store.folder.rglob("*") if p.is_file()]
    return {p.name: p.read_bytes() for p in paths if p.parent.name != "attempts"}


@pytest.mark.parametrize("positions", ["all", "last", "1:-1", slice(-2, None), [-1, 0]])
def test_rows_are_those_of_the_plain_runs(tiny, prompts, tmp_path, positions):
    store = cache_activations(
        tiny, prompts, tmp_path, NAMES, positions=positions, prompts_per_unit=2, progress=False
    )
    assert store.verify() == [] and store.prompts == [0, 1, 2, 3, 4]
    for i, prompt in enumerate(prompts):
        _, cache = tiny.run_with_cache(made(tiny, prompt), store.names)
        n = int(cache.lengths[0])
        span = slice(1, -1) if positions == "1:-1" else positions
        wanted = {"all": list(range(n)), "last": [n - 1]}.get(str(positions))
        if wanted is None:
            wanted = [0, n - 1] if isinstance(span, list) else list(range(n))[span]
        for name in store.names:
            assert store.positions(i, name) == wanted
            torch.testing.assert_close(store[i, name], cache[name][0, wanted], rtol=1e-4, atol=1e-4)
        ids = made(tiny, prompt)
        ids = ids[0] if isinstance(ids, torch.Tensor) else ids.ids
        assert torch.equal(store.tokens(i, NAMES[0]), ids[wanted])


@pytest.mark.parametrize("word", ["image", "user", "special", "model"])
def test_rows_of_a_modality_or_role(tiny, prompts, tmp_path, word):
    name = "blocks.14.hook_resid_post"
    store = cache_activations(tiny, prompts[:4], tmp_path, name, positions=word, progress=False)
    for i, prompt in enumerate(prompts[:4]):
        whole = made(tiny, prompt)
        wanted = [t.index for t in whole.tokens if word in (t.modality, t.role)]
        assert store.positions(i, name) == wanted
        _, cache = tiny.run_with_cache(whole, name)
        torch.testing.assert_close(store[i, name], cache[name][0, wanted], rtol=1e-4, atol=1e-4)


def test_what_the_towers_hand_over_and_the_logits(tiny, prompts, tmp_path):
    names = ["vision.hook_image_tokens", "audio.hook_audio_tokens", "hook_logits"]
    store = cache_activations(
        tiny, prompts, tmp_path, names, prompts_per_unit=1, dtype="float64", progress=False
    )
    for i, kind in ((1, "image"), (3, "audio")):
        whole, name = (
            made(tiny, prompts[i]),
            f"{'vision' if i == 1 else 'audio'}.hook_{kind}_tokens",
        )
        places = [t.index for t in whole.tokens if t.modality == kind]
        assert store.positions(i, name) == places
        _, cache = tiny.run_with_cache(whole, name)
        torch.testing.assert_close(store[i, name].float(), cache[name], rtol=1e-4, atol=1e-4)
    assert store[0, names[0]].shape == (0, tiny.cfg.d_model)
    assert store[0, names[0]].dtype == torch.float64
    logits = tiny(prompts[0])[0].double()
    torch.testing.assert_close(store[0, "hook_logits"], logits, rtol=1e-4, atol=1e-4)


def test_a_run_stops_behind_the_last_block_named(tiny):
    def stop(*names):
        return Work(tiny, ["a"], names, "all", None, 1).stop

    assert stop("blocks.3.hook_resid_post", "blocks.1.attn.hook_q") == 4
    assert stop("hook_embed") == 0 and stop("hook_logits", "hook_embed") is None
    ran = []
    with tiny.hooks([("blocks.*.hook_resid_post", lambda x, hook: ran.append(hook.layer()))]):
        work = Work(tiny, ["a"], ["blocks.3.hook_resid_mid"], "all", None, 1)
        work.tensors(work.units[0])
    assert set(ran) == {0, 1, 2, 3}


def test_the_same_call_gives_the_same_bits_in_any_order_of_jobs(tiny, prompts, tmp_path):
    def cached(folder, **more):
        return cache_activations(
            tiny, prompts, tmp_path / folder, NAMES, prompts_per_unit=1, progress=False, **more
        )

    once = cached("once")
    partial = cached("jobs", shard=(2, 2))
    assert partial.prompts == [1, 3] and len(partial.store.missing()) == 3
    with pytest.raises(CacheError, match=r"no prompt 0, the set has 0 to 4, of which 2 are there"):
        partial[0, "hook_embed"]
    assert kept(cached("jobs", shard=(1, 2))) == kept(once)


def test_a_rerun_runs_nothing_again(tiny, prompts, tmp_path, monkeypatch):
    first = cache_activations(tiny, prompts, tmp_path, "hook_embed", progress=False)
    before = kept(first)
    monkeypatch.setattr(Work, "tensors", lambda *_: pytest.fail("ran again"))
    assert kept(cache_activations(tiny, prompts, tmp_path, "hook_embed", progress=False)) == before


@pytest.mark.parametrize(
    "change", [{"positions": "last"}, {"dtype": "float16"}, {"prompts_per_unit": 3}]
)
def test_other_arguments_need_another_folder(tiny, prompts, tmp_path, change):
    cache_activations(tiny, prompts, tmp_path, "hook_embed", progress=False)
    with pytest.raises(
        InputError, match=f"another spec: .*{next(iter(change))}|another spec: units"
    ):
        cache_activations(tiny, prompts, tmp_path, "hook_embed", progress=False, **change)
    with pytest.raises(InputError, match=r"prompts\.sha256"):
        cache_activations(tiny, ["x", *prompts[1:]], tmp_path, "hook_embed", progress=False)


def test_an_edited_model_needs_another_folder(model, tmp_path):
    prompts = [torch.tensor([2, 5, 6])]
    cache_activations(model, prompts, tmp_path, "hook_embed", progress=False)
    weight = next(iter(model.parameters()))
    before = weight.clone()
    try:
        weight.mul_(2)
        with pytest.raises(InputError, match=r"model\.weights\.in memory"):
            cache_activations(model, prompts, tmp_path, "hook_embed", progress=False)
    finally:
        weight.copy_(before)
    with (
        model.hooks([("hook_embed", lambda x, hook: x)]),
        pytest.raises(InputError, match=r"model\.edited"),
    ):
        cache_activations(model, prompts, tmp_path, "hook_embed", progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "empty list"),
        ({"prompts": ["<|image|>"]}, "placeholder"),
        ({"prompts": ["a", {"b": 1}]}, "prompt 1"),
        ({"prompts": ["a", [1, "b"]]}, "prompt 1"),
        ({"prompts": ["a", [[10**9]]]}, "prompt"),
        ({"prompts": [("a", Image("nowhere.png"))]}, r"nowhere\.png"),
        ({"positions": "lst"}, "Did you mean 'last'"),
        ({"positions": [5]}, "prompt 0: position 5 is outside its"),
        ({"positions": "image"}, "no prompt has any"),
        ({"positions": "user", "prompts": [[2, 3]]}, "ids do not tell where 'user'"),
        ({"positions": slice(0, 4, 2)}, "steps of 1"),
        ({"dtype": "float3"}, "Did you mean 'float32'"),
        ({"prompts_per_unit": 0}, "at least 1"),
        ({"shard": (3, 2)}, "expected 1/2 to 2/2"),
        ({"names_filter": "blocks.3.attn.hook_pattern"}, "no row for each position"),
        ({"names_filter": "vision.blocks.0.hook_resid_post"}, "no row for each position"),
    ],
)
def test_bad_input_writes_nothing(tiny, tmp_path, arguments, message):
    whole = {"prompts": ["a b"], "names_filter": "hook_embed", **arguments}
    prompts, names = whole.pop("prompts"), whole.pop("names_filter")
    with pytest.raises(InputError, match=message):
        cache_activations(tiny, prompts, tmp_path / "x", names, progress=False, **whole)
    assert not (tmp_path / "x").exists()


def test_pictures_that_have_no_position_wanted(tiny, tmp_path):
    prompts = [("see", Image(g4lens.sample("images/corners.png")))]
    kept = {"progress": False, "positions": "tool"}
    with pytest.raises(InputError, match="'tool': no prompt has any"):
        cache_activations(tiny, prompts, tmp_path / "x", "hook_embed", **kept)
    assert not (tmp_path / "x").exists()
    kept["positions"] = "image"
    assert cache_activations(tiny, prompts, tmp_path / "x", "hook_embed", **kept).n_rows > 0


def test_a_picture_named_in_a_message_is_known_by_its_content(tiny, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(g4lens.sample("images/corners.png").read_bytes())
    part = {"type": "image", "image": str(path)}
    prompts = [[{"role": "user", "content": ["see", part]}]]
    first = cache_activations(tiny, prompts, tmp_path / "x", "hook_embed", progress=False)
    assert first.n_rows > 10
    with PIL.Image.open(path) as picture:
        picture.rotate(90).save(path)
    with pytest.raises(InputError, match=r"another spec: prompts\.sha256"):
        cache_activations(tiny, prompts, tmp_path / "x", "hook_embed", progress=False)
    path.write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"prompt 0: Image\(.*a\.png.* is not readable"):
        cache_activations(tiny, prompts, tmp_path / "y", "hook_embed", progress=False)


def test_an_unknown_name_writes_nothing(tiny, tmp_path):
    with pytest.raises(HookNameError, match="Did you mean"):
        cache_activations(tiny, ["a"], tmp_path / "x", "hook_embd", progress=False)
    assert not (tmp_path / "x").exists()


# ---- killed

RUN = """
    import sys, time, torch, g4lens
    from g4lens.experiment import caching, work
    torch.set_num_threads(1)
    slowly = work.Work.tensors
    def tensors(self, unit):
        time.sleep(float(sys.argv[2]))
        return slowly(self, unit)
    work.Work.tensors = tensors
    caching.cache_activations(g4lens.load("tiny"), sys.argv[3:], sys.argv[1],
        "blocks.*.hook_resid_post", prompts_per_unit=1, progress=False)
"""


WORDS = [f"{a} {b}" for a in ("Paris", "Rome") for b in ("is", "and", "the", "a", "of")]


def start(folder, seconds):
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(folder), str(seconds), *WORDS]
    return subprocess.Popen(command)


def test_a_run_that_was_killed_is_taken_up(tiny, tmp_path):
    def here(folder):
        names, one = "blocks.*.hook_resid_post", 1
        return cache_activations(tiny, WORDS, folder, names, prompts_per_unit=one, progress=False)

    killed, shards = start(tmp_path / "killed", 0.2), tmp_path / "killed" / "shards"
    end = time.monotonic() + 120
    while len(list(shards.glob("*.safetensors"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    (shards / ".part-left").write_bytes(b"half a shard")
    assert 2 <= len(ActivationStore(tmp_path / "killed")) < 10
    other = start(tmp_path / "killed", 0.05)  # two take it up at once
    whole, again = here(tmp_path / "whole"), here(tmp_path / "killed")
    assert other.wait() == 0
    assert kept(whole) == kept(again) and again.verify() == []
    index = again.store.index()
    assert index.groupby(["prompt", "name"]).size().eq(1).all() and len(index) == 10 * 15


# ---- the command


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"text": "one two"}\n{"text": "three"}\n')
    path = tmp_path / "s.yaml"
    path.write_text("model: tiny\nprompts: p.jsonl\nnames: hook_embed\nprompts_per_unit: 1\n")
    return path


def test_the_command(spec, tmp_path, capsys):
    from g4lens import cli

    out = tmp_path / "out"
    assert cli.main(["cache", str(spec), "--out", str(out), "--shard", "2/2", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["units"] == 2 and told["done"] == 1 and told["prompts"] == 1
    assert cli.main(["cache", str(spec), "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "done     2" in told.out and "2/2" in told.err
    assert cli.main(["cache", str(spec), "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert ActivationStore(out).store.about["prompts"] == str(tmp_path / "p.jsonl")


def test_the_command_that_verifies(spec, tmp_path, capsys):
    from g4lens import cli

    out = tmp_path / "out"
    assert cli.main(["cache", str(spec), "--out", str(out), "--quiet"]) == 0
    assert cli.main(["verify", str(out)]) == 0
    assert "the hashes of 2 units" in capsys.readouterr().out
    path = next((out / "shards").iterdir())
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cli.main(["verify", str(out), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["passed"] and path.name in told["problems"][0]
    assert cli.main(["verify", str(out), "--quiet"]) == 1
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("names:", "nams:", "nams is unknown"),
        ("hook_embed", "hook_embd", "names[0]: no hook point"),
        ("p.jsonl", "q.jsonl", "no file"),
        ("tiny", "tinny", "tinny"),
    ],
)
def test_a_bad_spec_is_one_line_and_code_2(spec, tmp_path, capsys, old, new, message):
    from g4lens import cli

    spec.write_text(spec.read_text().replace(old, new))
    assert cli.main(["cache", str(spec), "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and message in told.err
    assert not (tmp_path / "out").exists()


def test_media_outside_of_the_spec_s_folder(spec, tmp_path, capsys):
    from g4lens import cli

    data, home = tmp_path / "data", tmp_path / "home"
    data.mkdir(), home.mkdir()
    (data / "a.png").write_bytes(g4lens.sample("images/corners.png").read_bytes())
    (data / "p.jsonl").write_text('{"image": "a.png"}\n')
    (home / "s.yaml").write_text(spec.read_text().replace("p.jsonl", "../data/p.jsonl"))
    assert cli.main(["cache", str(home / "s.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert "lies outside the folder" in capsys.readouterr().err


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_bad_shards(spec, shard, capsys):
    from g4lens import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["cache", str(spec), "--out", "x", f"--shard={shard}"])
    assert stop.value.code == 2 and "k/n" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_scripts(shell, capsys):
    from g4lens import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    assert stop.value.code == 0 and "cache" in capsys.readouterr().out
