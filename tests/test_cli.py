"""The command line: what it prints, and one clean line for every error."""

import argparse
import json
import re
import subprocess
import sys

import pytest
import torch

import g4lens
from g4lens import cli
from g4lens.cli import arguments, info, tutorial
from g4lens.resources import bundled


def test_info_tells_geometry_blocks_parameters_and_hooks(capsys):
    assert cli.main(["info", "tiny"]) == 0
    told = capsys.readouterr().out
    assert "15 blocks" in told and "LLLLG LLLLG LLLLG" in told
    assert "10, 11, 12, 13 read those of block 8 (local)" in told
    assert "14 reads those of block 9 (global)" in told
    with torch.device("meta"):
        model = g4lens.Gemma4(g4lens.Gemma4Config.from_json(bundled("data", "tiny")))
    assert f"{sum(p.numel() for p in model.parameters()):,}" in told
    assert f"{len(model.hook_points)} hook points" in told
    assert "blocks.i.attn.hook_rot_k" in told
    assert "0 to 14   batch key_pos kv_head=1 d_head=32|64" in told
    assert re.search(r"blocks.i.attn.hook_k +0 to 9 +batch pos kv_head=1", told)


def test_the_hook_table_says_the_true_sizes(model, seen_and_heard):
    table = {}
    for line in info._hooks(model).splitlines()[1:]:
        name, *_ = line.split()
        table[name] = line.split("  ")[-1].split()
    _, cache = model.run_with_cache(seen_and_heard, "*")
    assert set(cache.keys()) == set(model.hook_points)
    for name, x in cache.items():
        axes = table[re.sub(r"blocks\.\d+", "blocks.i", name)]
        assert [axis.partition("=")[0] for axis in axes] == list(model.hook_points[name].axes)
        for axis, size in zip(axes, x.shape, strict=True):
            _, given, sizes = axis.partition("=")
            assert not given or str(size) in sizes.split("|"), (name, axes, x.shape)


def test_the_parameters_of_e2b_are_counted_by_part():
    cfg = g4lens.Gemma4Config(
        vision=g4lens.config.VisionConfig(),
        audio=g4lens.config.AudioConfig(),
        image_id=258_880,
        audio_id=258_881,
    )
    with torch.device("meta"):
        told = info._parameters(g4lens.Gemma4(cfg))
    found = {
        line.split()[0]: int(line.split()[1].replace(",", "")) for line in told.split("\n")[1:]
    }
    billions = {"embedding": 0.40, "PLE": 2.35, "decoder": 1.87, "vision": 0.17, "audio": 0.30}
    published = billions | {"total": 5.10}
    assert {part: n / 1e9 for part, n in found.items()} == pytest.approx(published, abs=0.01)


def test_info_needs_no_weights(tmp_path, capsys):
    config = bundled("data", "tiny") / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    assert cli.main(["info", str(tmp_path)]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tinny", "no-such-folder", "."])
def test_errors_are_one_line(name, capsys):
    assert cli.main(["info", name]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("g4lens: ") and told.err.count("\n") == 1


@pytest.fixture(autouse=True)
def notebooks(tmp_path, monkeypatch):
    """Two notebooks, as an installation carries them."""
    folder = tmp_path / "installed"
    folder.mkdir()
    for name in ("00_start.ipynb", "01_more.ipynb"):
        (folder / name).write_text(name)
    monkeypatch.setattr(tutorial, "bundled", lambda name: folder)
    return folder


@pytest.fixture
def started(monkeypatch):
    """The commands that would have taken this process's place."""
    commands = []
    monkeypatch.setattr(tutorial.os, "execv", lambda path, command: commands.append(command))
    return commands


def test_tutorial_copies_and_never_overwrites_changes(tmp_path, capsys, started):
    folder = tmp_path / "new" / "mine"
    assert cli.main(["tutorial", str(folder), "--no-open"]) == 0
    copies = sorted(folder.iterdir())
    assert [path.name for path in copies] == ["00_start.ipynb", "01_more.ipynb"]
    assert cli.main(["tutorial", str(folder), "--no-open"]) == 0
    copies[0].write_text("my work")
    copies[1].unlink()
    assert cli.main(["tutorial", str(folder)]) == 2
    assert copies[0].read_text() == "my work" and not copies[1].exists()
    told = capsys.readouterr().err
    assert "00_start.ipynb with changes, which would be lost" in told and "jupyter lab" in told
    assert not started


def test_an_installation_without_notebooks(tmp_path, notebooks, capsys):
    for path in notebooks.iterdir():
        path.unlink()
    assert cli.main(["tutorial", str(tmp_path / "x")]) == 2
    assert "no notebooks in" in capsys.readouterr().err


def test_tutorial_copies_can_be_written_to(tmp_path, notebooks):
    for path in notebooks.iterdir():
        path.chmod(0o444)
    assert cli.main(["tutorial", str(tmp_path / "x"), "--no-open"]) == 0
    assert all(path.stat().st_mode & 0o200 for path in (tmp_path / "x").iterdir())


def test_tutorial_without_jupyterlab(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tutorial, "find_spec", lambda name: None)
    assert cli.main(["tutorial", str(tmp_path / "x")]) == 2
    assert "pip install 'g4lens[lab]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_tutorial_opens_the_first_on_this_machine_only(tmp_path, started):
    assert cli.main(["tutorial", str(tmp_path / "x")]) == 0
    assert started[0][:3] == [sys.executable, "-m", "jupyterlab"]
    assert "--ip=127.0.0.1" in started[0]
    assert started[0][-1] == str(tmp_path / "x" / "00_start.ipynb")


def test_an_unwritable_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.main(["tutorial", str(tmp_path / "file" / "x"), "--no-open"]) == 2
    assert "cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["fly"], ["info"]])
def test_wrong_commands(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert "usage: g4lens" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"g4lens {g4lens.__version__}\n"


def test_a_reader_that_goes_away():
    command = f"{sys.executable} -m g4lens.cli info tiny | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("tiny: 15 blocks") and done.stderr == ""


@pytest.mark.unchecked
def test_plan_tells_parts_and_what_fits(capsys, tmp_path):
    command = ["plan", "google/gemma-4-E2B-it", "--context", "131072", "--memory", "8"]
    assert cli.main([*command, "--out", str(tmp_path / "plan.svg")]) == 0
    printed = capsys.readouterr().out
    assert "16 bit" in printed and "keys and values" in printed
    assert "it fits with chunk=" in printed and "ple='disk'" in printed
    assert (tmp_path / "plan.svg").read_text().count("<path") > 10
    assert cli.main(["plan", "tiny", "--context", "64", "--cache", "*resid_post", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["plans"]) == ["16", "8", "4"] and told["fits"]["total"] < told["free"]
    assert told["plans"]["16"]["parts"]["cached"] > 0


def test_every_command_can_speak_json_or_be_quiet():
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert len(commands.choices) == 9
    for name, parser in commands.choices.items():
        assert {"--json", "--quiet"} <= parser._option_string_actions.keys(), name


def test_quiet_commands_still_work(capsys, tmp_path, started):
    picture, folder = tmp_path / "plan.svg", tmp_path / "x"
    for command in (
        ["info", "tiny"],
        ["plan", "tiny", "--context", "8", "--out", str(picture)],
        ["tutorial", str(folder)],
    ):
        assert cli.main([*command, "--quiet"]) == 0
    assert capsys.readouterr() == ("", "") and picture.is_file() and len(started) == 1
    assert cli.main(["info", "tinny", "--quiet"]) == 2
    assert "Did you mean 'tiny'" in capsys.readouterr().err


def test_tutorial_tells_json(capsys, tmp_path, started):
    folder = tmp_path / "x"
    for more in ([], ["--no-open", "--quiet"]):  # JSON that is asked for is printed
        assert cli.main(["tutorial", str(folder), "--json", *more]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["folder"] == str(folder)
        assert told["notebooks"] == ["00_start.ipynb", "01_more.ipynb"]
        assert told["opened"] == (None if more else str(folder / "00_start.ipynb"))
    assert len(started) == 1


def test_json_has_no_infinity(capsys):
    args = argparse.Namespace(json=True, quiet=False)
    arguments.tell(args, {"a": [float("inf"), float("nan"), 0.1]}, lambda: "")
    assert capsys.readouterr().out == '{"a": [null, null, 0.1]}\n'


@pytest.mark.parametrize("memory", ["nan", "inf", "0", "-1", "much"])
def test_plan_of_no_memory(memory, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "tiny", "--context", "8", f"--memory={memory}"])
    assert stop.value.code == 2
    assert f"'{memory}', expected a number of GB above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--context", "131073"], "131,073 tokens is longer than the context of 131,072"),
        (["--context", "8", "--chunk", "0"], "chunk is 0, expected at least 1"),
        (["--context", "8", "--batch", "0"], "batch is 0"),
        (["--context", "8", "--cache", "blocks.*.hook_resid"], "no hook point matches"),
        (["--context", "8", "--out", "plan.doc"], "plan.doc cannot be drawn"),
    ],
)
def test_plan_refuses(options, says, capsys):
    assert cli.main(["plan", "google/gemma-4-E2B-it", *options]) == 2
    assert says in capsys.readouterr().err
