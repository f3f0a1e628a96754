"""The command line: what it prints, and one clean line for every error."""

import pytest

import g4lens
from g4lens import cli


def test_info_tells_geometry_blocks_parameters_and_hooks(capsys):
    assert cli.main(["info", "tiny"]) == 0
    told = capsys.readouterr().out
    assert "15 blocks" in told and "LLLLG LLLLG LLLLG" in told
    assert "10, 11, 12, 13 read those of block 8 (local)" in told
    assert "14 read those of block 9 (global)" in told
    model = g4lens.load("tiny", device="cpu")
    assert f"{sum(p.numel() for p in model.parameters()):,}" in told
    assert f"{len(model.hook_points)} hook points" in told
    assert "blocks.i.attn.hook_rot_k" in told and "batch key_pos kv_head d_head" in told


def test_info_needs_no_weights(tmp_path, capsys):
    config = g4lens.resources.bundled("data", "tiny") / "config.json"
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    assert cli.main(["info", str(tmp_path)]) == 0
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tinny", "no-such-folder", "."])
def test_errors_are_one_line(name, capsys):
    assert cli.main(["info", name]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("g4lens: ") and told.err.count("\n") == 1


def test_tutorial_copies_and_never_overwrites_changes(tmp_path, capsys):
    folder = tmp_path / "mine"
    assert cli.main(["tutorial", str(folder), "--no-open"]) == 0
    notebooks = sorted(folder.iterdir())
    assert notebooks and all(path.suffix == ".ipynb" for path in notebooks)
    assert cli.main(["tutorial", str(folder), "--no-open"]) == 0
    notebooks[0].write_text("my work")
    assert cli.main(["tutorial", str(folder), "--no-open"]) == 2
    assert notebooks[0].read_text() == "my work"
    assert "would be lost" in capsys.readouterr().err


def test_tutorial_without_jupyterlab(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["tutorial", str(tmp_path / "x")]) == 2
    assert "pip install 'g4lens[lab]'" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_tutorial_opens_on_this_machine_only(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(cli.subprocess, "run", lambda command, check: started.append(command))
    assert cli.main(["tutorial", str(tmp_path / "x")]) == 0
    assert "--ip=127.0.0.1" in started[0]


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
