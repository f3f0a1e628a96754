"""`g4lens run`: from a spec file to a folder, in one go, in parts, and again."""

import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import g4lens
from g4lens import cli
from g4lens.analysis.circuits.circuit import Circuit
from g4lens.analysis.circuits.faithfulness import faithfulness
from g4lens.experiment.record import Run
from g4lens.experiment.run import prepare, run
from g4lens.experiment.store import UnitStore

pytestmark = pytest.mark.unchecked

SPECS = {
    "patching": "{kind: patching, site: resid_pre, layers: [3, 9], positions: [subject, end]}",
    "ablation": "{kind: ablation, site: ple_out, value: [zero, mean, resample], layers: [2, 13]}",
    "circuits": "{kind: circuits, shares: [0.05, 0.5]}",
}


@pytest.fixture
def unrecorded(monkeypatch):
    """Runs that stop before their record, which has tests of its own and takes its time."""
    monkeypatch.setattr(Run, "write_record", lambda self, job=None: None)


def write(folder, kind="patching", **changes):
    folder.mkdir(exist_ok=True)
    lines = {
        "name": "capitals",
        "model": "tiny",
        "pairs": "{task: capital, n: 8}",
        "experiment": SPECS.get(kind, kind),
        "pairs_per_unit": 3,
        **changes,
    }
    path = folder / "spec.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def command(*arguments):
    return cli.main(["run", *map(str, arguments)])


def frame(folder):
    return UnitStore.open(folder).frame()


@pytest.mark.parametrize("kind", ["patching", "ablation"])
def test_a_spec_becomes_a_folder(tmp_path, capsys, unrecorded, kind):
    path, out = write(tmp_path / "home", kind), tmp_path / "out"
    assert command(path, "--out", out, "--json", "--quiet") == 0
    told = json.loads(capsys.readouterr().out)
    store = UnitStore.open(out)
    assert told["done"] == told["units"] == len(store.units) == len(prepare(path).experiment.units)
    assert not store.verify() and not list(out.rglob(".part-*"))
    assert set(frame(out)["baseline"]) > {"none", "permuted.0"}
    assert store.about["path"] == "../home/spec.yaml"
    before = {file: file.stat().st_mtime_ns for file in (out / "shards").iterdir()}
    assert command(path, "--out", out, "--quiet") == 0
    assert before == {file: file.stat().st_mtime_ns for file in (out / "shards").iterdir()}
    assert capsys.readouterr().out == ""


def test_the_record_is_written_at_the_end(tmp_path):
    path, out = write(tmp_path / "home", "circuits"), tmp_path / "out"
    run(path, out, shard=(1, 2), progress=False)
    assert not (out / "manifest.json").exists()
    run(path, out, progress=False)
    assert {"manifest.json", "summary.parquet", "report.html"} < {p.name for p in out.iterdir()}
    assert {p.name for p in (out / "chosen").iterdir()} == {
        f"noise.logit_diff.{share}.json" for share in (0.05, 0.5)
    }


def test_parts_make_the_same_whole(tmp_path, capsys, unrecorded):
    path = write(tmp_path / "home")
    run(path, tmp_path / "whole", progress=False)
    for k in (2, 1):
        assert command(path, "--out", tmp_path / "parts", "--shard", f"{k}/2") == 0
        told = capsys.readouterr().out
        assert ("report.html" in told) == (k == 1)
    pd.testing.assert_frame_equal(
        frame(tmp_path / "parts"), frame(tmp_path / "whole"), check_exact=True
    )
    parts, whole = (
        {p.name for p in (tmp_path / x / "shards").iterdir()} for x in ("parts", "whole")
    )
    assert parts == whole


def test_a_lost_unit_is_done_again(tmp_path, unrecorded):
    path, out = write(tmp_path / "home"), tmp_path / "out"
    run(path, out, progress=False)
    lost = sorted((out / "shards").iterdir())[1]
    content = lost.read_bytes()
    lost.unlink()
    run(path, out, progress=False)
    assert lost.read_bytes() == content


def test_what_was_chosen_is_kept(tmp_path, unrecorded):
    """The circuits beside the numbers are those that were measured."""
    model, out = g4lens.load("tiny"), tmp_path / "out"
    path = write(tmp_path / "home", "circuits")
    run(path, out, progress=False)
    prepare(path).experiment.kind.keep(out / "chosen", ["logit_diff"])  # as the record does
    kept = {p.stem: Circuit.from_json(p, model) for p in (out / "chosen").iterdir()}
    assert set(kept) == {"noise.logit_diff.0.05", "noise.logit_diff.0.5"}
    table, pairs = frame(out).query("baseline == 'none'"), g4lens.tasks.pairs("capital", 8)
    some = [pairs[i] for i in dict.fromkeys(table["prompt"])]
    for share in (0.05, 0.5):
        result = faithfulness(model, some, kept[f"noise.logit_diff.{share}"])
        found = torch.tensor(table[table["share"] == share]["value"].to_numpy())
        torch.testing.assert_close(found, result.per_pair[:, 0], atol=1e-3, rtol=1e-4)
    kind = "{kind: steering, layers: [2, 5]}"
    steered = prepare(write(tmp_path / "home", kind)).experiment.kind
    steered.keep(tmp_path / "steered", ["logit_diff"])
    vectors = load_file(tmp_path / "steered" / "directions.safetensors")
    assert set(vectors) == {f"difference_of_means.{i}.resid_post" for i in (2, 5)}
    assert vectors["difference_of_means.2.resid_post"].shape == (model.cfg.d_model,)


def test_dry(tmp_path, capsys):
    path = write(tmp_path / "home", "ablation")
    assert command(path, "--dry") == 0
    told = capsys.readouterr().out
    assert "ple_out.resample" in told and "no random control: the map holds every unit" in told
    assert command(path, "--dry", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["total"]["units"] == sum(row["units"] for row in told["plan"]) == 27
    assert set(told["absent"]) == {"random"}
    assert sorted(tmp_path.iterdir()) == [tmp_path / "home"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "tinny"}, "tinny"),
        ({"metrics": "[logit_dif]"}, "metrics[0]: no metric is called 'logit_dif'. Did you mean"),
        ({"experiment": "{kind: patching, site: resid_prae}"}, "experiment.site[0]"),
        ({"experiment": "{kind: patching, sight: z}"}, "experiment.sight is unknown"),
        ({"experiment": "{kind: patching, layers: [15]}"}, "experiment: no block 15"),
        ({"experiment": "{kind: patching, positions: [subjct]}"}, "'subject'"),
        ({"pairs": "{task: capital, n: 100000}"}, "different pairs"),
        ({"pairs": "{file: pairs.jsonl}"}, "no file"),
        ({"pairs": "{file: ../pairs.jsonl}"}, "outside the spec's folder"),
        ({"pairs": "!!python/name:os.system"}, "not readable as YAML"),
        ({"split": "0.99999"}, "split: discovery=0.99999"),
        ({"model": "{name: tiny, device: nowhere}"}, "nowhere"),
    ],
)
def test_a_bad_spec_is_one_line_and_code_2(tmp_path, capsys, changes, message):
    path = write(tmp_path / "home", **changes)
    for more in (["--out", tmp_path / "out"], ["--dry"]):
        assert command(path, *more) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and message in told.err, told.err
    assert not (tmp_path / "out").exists()


def pairs_file(home, *lines):
    home.mkdir()
    (home / "pairs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return write(home, "{kind: patching, layers: [2]}", pairs="{file: pairs.jsonl}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            {"clean": "one two", "corrupted": "one", "answer": " a", "foil": " b"},
            "pair 0: the clean",
        ),
        ({"clean": "one", "corrupted": "two", "answer": " a", "foil": " a"}, "the same"),
        ({"clean": "one", "corrupted": "two", "answer": " a"}, "needs a foil"),
        ({"clean": "one", "corrupted": "two", "answr": " a"}, "'answr' is none of"),
        ({"clean": [{"image": "a.png"}], "corrupted": "two", "answer": " a"}, "no image"),
        (
            {"clean": [{"image": "../a.png"}], "corrupted": "x", "answer": " a"},
            "outside the folder",
        ),
        ({"clean": [{"image": "bad.png"}], "corrupted": "x", "answer": " a"}, "not readable"),
    ],
)
def test_bad_pairs(tmp_path, capsys, line, message):
    (tmp_path / "a.png").write_bytes(g4lens.sample("images/corners.png").read_bytes())
    path = pairs_file(tmp_path / "home", line)
    (tmp_path / "home" / "bad.png").write_text("no picture")
    assert command(path, "--out", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1, told
    assert not (tmp_path / "out").exists()


def test_no_pairs_and_no_folder(tmp_path, capsys):
    assert command(pairs_file(tmp_path / "home"), "--out", tmp_path / "out") == 2
    assert "no pairs" in capsys.readouterr().err
    assert command(write(tmp_path / "other")) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_a_folder_of_another_spec(tmp_path, capsys, unrecorded):
    out = tmp_path / "out"
    run(write(tmp_path / "home"), out, progress=False)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    for changes, message in (
        ({"seed": 3}, "spec.seed is 0 there and 3 here"),
        ({"pairs": "{task: capital, n: 8, seed: 1}"}, "pairs"),
        ({"metrics": "kl"}, "metrics"),
    ):
        assert command(write(tmp_path / "home", **changes), "--out", out) == 2
        told = capsys.readouterr().err
        assert "results of another spec" in told and message in told, told
    assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}


def test_ctrl_c_leaves_what_is_done(tmp_path, capsys, monkeypatch):
    from g4lens.experiment.kinds import Experiment

    path, out, measured = write(tmp_path / "home"), tmp_path / "out", Experiment.frame
    done = []

    def stopping(self, unit):
        if done:
            raise KeyboardInterrupt
        done.append(unit)
        return measured(self, unit)

    monkeypatch.setattr(Experiment, "frame", stopping)
    assert command(path, "--out", out, "--quiet") == 130
    assert "run again" in capsys.readouterr().err
    assert list(UnitStore.open(out).files()) == done
