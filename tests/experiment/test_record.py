"""The record of a run: manifest, tables, statistics, figures."""

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys
import threading
import time
from importlib.metadata import version as version_of

import numpy as np
import pandas as pd
import pytest
import torch

import g4lens
from g4lens import cli
from g4lens.analysis.result import Result, axis
from g4lens.analysis.selfcheck import Check
from g4lens.errors import InputError, StoreError
from g4lens.experiment import version
from g4lens.experiment.record import Run, folder
from g4lens.experiment.record.manifest import hash_of
from g4lens.experiment.record.summary import cell_columns, results, summary
from g4lens.experiment.run import prepare, run
from tests.experiment.recorded import done, moved, written

pytestmark = pytest.mark.unchecked


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return done(written(tmp_path_factory.mktemp("record") / "home"))


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_manifest_holds_what_the_run_follows_from(recorded):
    home, manifest = recorded.folder.parent, recorded.manifest
    weights = manifest["model"]["weights"]
    assert weights["model.safetensors"] == digest(home / "model" / "model.safetensors")
    assert manifest["model"]["name"] == "model"
    assert manifest["model"]["dtype"] == "float32"
    assert manifest["pairs"] | {"sha256": ""} == {
        "n": 12,
        "sha256": "",
        "dropped": 0,
        "measured": 12,
        "clusters": recorded.metrics["cluster"].nunique(),
    }
    assert manifest["seeds"] == {"experiment": 0, "pairs": 0, "statistics": 0}
    assert manifest["packages"]["torch"] == version_of("torch")
    assert manifest["machine"]["threads"] == torch.get_num_threads()
    assert manifest["code"]["source"] == version.source()
    assert {check["name"] for check in manifest["checks"]} >= {"patch everything = clean"}
    assert all(check["passed"] and check["value"] >= 0 for check in manifest["checks"])
    assert any("clusters hold the truth less often" in note for note in manifest["notes"])


def test_every_unit_and_file_is_in_the_manifest_with_its_hash(recorded):
    manifest, store = recorded.manifest, recorded.store
    assert list(manifest["units"]) == store.units
    for unit, told in manifest["units"].items():
        assert told["attempts"] == 1
        assert told["seconds"] > 0
        assert told["code"] == manifest["code"]["source"]
        assert digest(store.files()[unit]) == told["sha256"]
    for name, expected in manifest["files"].items():
        assert digest(recorded.folder / name) == expected
    beside = {"manifest.json", "spec.json", "index.parquet", "attempts", "shards"}
    found = {path.relative_to(recorded.folder).as_posix() for path in recorded.folder.rglob("*")}
    assert {name.split("/")[0] for name in found - set(manifest["files"])} == beside | {"figures"}


def test_each_unit_tells_the_code_that_it_was_computed_with(recorded, tmp_path):
    """Half of them come of an older checkout, one of a log that is lost."""
    again = moved(recorded, tmp_path / "home")
    (path,) = (again.folder / "attempts").iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    older = {"version": "0.0.9", "source": "0" * 64, "commit": "1" * 40, "diff": None}
    assert {line["code"]["version"] for line in lines if "code" in line} == {g4lens.__version__}
    names = again.store.units
    for line in lines:
        if "code" in line and line["unit"] in names[:6]:
            line["code"] = older
    lines = [line for line in lines if line["unit"] != names[-1]]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again.write_record()
    found, now = again.manifest, version.code()
    assert [unit["code"] for unit in found["units"].values()] == [
        *["0" * 64] * 6,
        *[now["source"]] * (len(names) - 7),
        None,
    ]
    assert found["computed_with"] == [
        {**older, "units": 6},
        {**now, "units": len(names) - 7},
        {"version": None, "source": None, "commit": None, "diff": None, "units": 1},
    ]
    told = again.verify(k=0)
    assert told.passed
    assert any("6 units were computed with 0.0.9, source 000000000000" in x for x in told.notes)
    assert any("1 units were computed with a code that is not known" in x for x in told.notes)
    page = (again.folder / "report.html").read_text()
    assert f"6 computed with source {'0' * 64}, commit {'1' * 40}" in page
    assert "1 computed with unknown code" in page


def test_metrics_are_the_rows_of_all_units(recorded):
    metrics, store = recorded.metrics, recorded.store
    whole = store.frame().reset_index(drop=True)
    assert len(metrics) == len(whole)
    assert cell_columns(metrics) == ["layer", "head"]
    columns = ["unit", "variant", "baseline", "layer", "prompt", "metric", "value", "base"]
    pd.testing.assert_frame_equal(metrics[columns], whole[columns])
    assert str(metrics["head"].dtype) == "Int64"  # mlp_out has none
    assert metrics.loc[metrics["variant"] == "mlp_out.zero", "head"].isna().all()


def test_the_summary_is_that_of_results(recorded):
    table = recorded.summary
    own = table[(table["variant"] == "mlp_out.zero") & (table["baseline"] == "none")]
    rows = recorded.metrics.query("variant == 'mlp_out.zero' and baseline == 'none'")
    value = rows.pivot(index="prompt", columns="layer", values="value")
    each = rows.drop_duplicates("prompt").set_index("prompt").loc[value.index]
    result = Result(
        torch.tensor(value.to_numpy("float64")),
        (axis("layer", list(value)),),
        torch.tensor(each["base"].to_numpy("float64")),
        torch.tensor(each["target"].to_numpy("float64")),
        tuple(each["cluster"]),
        {"method": "ablation", "metric": "logit_diff"},
        prepare(recorded.folder.parent / "spec.yaml").model.cfg,
    )
    with pytest.warns(UserWarning, match="clusters hold"):
        low, high = result.bootstrap_ci("recovered", n_resamples=300)
    expected = {
        "mean": value.mean().to_numpy(),
        "recovered": result.recovered,
        "recovered_low": low,
        "recovered_high": high,
        "effect": result.effect.mean(0),
        "effect_size": result.effect_sizes,
        "p": result.permutation_pvalue(None, n_permutations=300),
        "p_adj": result.permutation_pvalue("max_t", n_permutations=300),
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(own[name], numbers, err_msg=name)
    assert (own["n"] == 12).all()
    assert (own["n_clusters"] == each["cluster"].nunique()).all()
    conditions = ["site", "granularity", "positions", "direction", "ablation_value"]
    assert own[conditions].drop_duplicates().to_numpy().tolist() == [
        ["mlp_out", "layer", "all", "noise", "zero"]
    ]


def test_a_control_is_measured_on_the_scale_of_the_thing_itself(recorded):
    table = recorded.summary.query("variant == 'mlp_out.zero' and baseline == 'permuted.0'")
    own = recorded.summary.query("variant == 'mlp_out.zero' and baseline == 'none'")
    span = own["target"].iloc[0] - own["base"].iloc[0]
    np.testing.assert_allclose(table["recovered"], table["effect"] / span)


def test_what_is_undefined_is_nan_with_a_reason(recorded):
    job = prepare(recorded.folder.parent / "spec.yaml")
    frame = recorded.metrics.query("variant == 'mlp_out.zero'")
    frame = frame.assign(cluster="one", target=frame["base"])
    table, notes = summary(results(frame, job.model.cfg, job.spec), job.spec, ["layer", "head"])
    for name in ("recovered", "recovered_low", "mean_low", "effect_size", "p", "p_adj"):
        assert table[name].isna().all(), name
    assert table["mean"].notna().all()
    assert any("recovery is undefined" in note for note in notes)
    assert any("1 cluster of pairs, expected at least 2" in note for note in notes)
    assert any("no p-value below" in note for note in notes)


def test_notes_name_the_variants_that_they_are_of(recorded):
    job = prepare(recorded.folder.parent / "spec.yaml")
    frame = recorded.metrics
    other = frame["variant"] == "z.zero"
    odd = other & (frame["prompt"] == 3)
    frame = frame.assign(target=frame["target"].where(~odd, frame["base"]))
    notes = summary(results(frame, job.model.cfg, job.spec), job.spec, ["layer", "head"])[1]
    (ways,) = (note for note in notes if "target - base is below a tenth" in note)
    assert ways.startswith("z.zero, logit_diff: in 1 of 12 pairs")
    (few,) = (note for note in notes if "clusters hold" in note)
    assert few.startswith("intervals from")  # of all variants
    assert "300 draws leave intervals and p-values coarse, 2,000 are enough" in notes


def test_a_metric_at_its_floor_has_no_p_value(recorded):
    """KL from the clean run cannot be negative: each cell would be found, however little moves."""
    job = prepare(recorded.folder.parent / "spec.yaml")
    metrics = ["kl", "logit_diff"]
    spec = job.spec.model_copy(update={"metrics": metrics})
    own = recorded.metrics.query("variant == 'mlp_out.zero' and baseline == 'none'")
    noise = own["value"].abs() * 1e-9
    kl = own.assign(metric="kl", value=noise, base=0.0, target=1.0)
    back = kl.assign(variant="back", value=1 - noise, base=1.0, target=0.0)
    frame = pd.concat([own, kl, back], ignore_index=True)
    table, notes = summary(results(frame, job.model.cfg, spec), spec, ["layer", "head"])
    by = table.set_index(["variant", "metric"])[["p", "p_adj", "smallest_effect"]]
    assert by.loc["mlp_out.zero", "kl"].isna().all(axis=None)
    assert by.loc["mlp_out.zero", "logit_diff"].notna().all(axis=None)
    assert by.loc["back", "kl"].notna().all(axis=None)
    (note,) = (note for note in notes if "cannot fall" in note)
    assert note.startswith("mlp_out.zero, kl: kl stands at 0 without intervention")


def test_pairs_that_were_left_out_are_counted(tmp_path):
    """Answers that the model never gives: half of the pairs go, and the page says so."""
    path = written(tmp_path / "home")
    pairs = list(g4lens.Pairs.from_jsonl(tmp_path / "home" / "pairs.jsonl"))
    wrong = [dataclasses.replace(pair, answer=" the") for pair in pairs[6:]]
    g4lens.Pairs(pairs[:6] + wrong).to_jsonl(tmp_path / "home" / "pairs.jsonl")
    text = path.read_text().replace("pairs.jsonl}", "pairs.jsonl, filter: true}")
    path.write_text(text.replace("[mlp_out, z]", "mlp_out").replace("[1, 8]", "[8]"))
    found = done(path)
    held = found.manifest["pairs"]
    assert held["n"] == held["measured"] == 12 - held["dropped"]
    assert held["dropped"] >= 6
    said = f"{held['dropped']} more that the model gets wrong were left out"
    assert said in (found.folder / "report.html").read_text()


def test_the_same_numbers_give_the_same_bytes(recorded, tmp_path, monkeypatch):
    import matplotlib as mpl

    again = moved(recorded, tmp_path / "home")
    before = {name: digest(again.folder / name) for name in again.manifest["files"]}
    assert {name.rpartition(".")[2] for name in before} == {"parquet", "svg", "pdf", "html"}
    shutil.rmtree(again.folder / "figures")
    monkeypatch.setitem(mpl.rcParams, "font.size", 20)  # a user's own settings
    again.write_record()
    after = {name: digest(again.folder / name) for name in before}
    assert after == before


def test_a_complete_run_is_left_as_it_is(recorded, tmp_path):
    again = moved(recorded, tmp_path / "home")
    before = {path: path.read_bytes() for path in again.folder.rglob("*") if path.is_file()}
    run(tmp_path / "home" / "spec.yaml", again.folder, progress=False)
    assert {p: p.read_bytes() for p in again.folder.rglob("*") if p.is_file()} == before
    (again.folder / "manifest.json").unlink()
    assert not again.is_recorded
    run(tmp_path / "home" / "spec.yaml", again.folder, progress=False)
    assert Run(again.folder).manifest["files"] == recorded.manifest["files"]


def test_a_record_that_was_tampered_with_is_written_anew(recorded, tmp_path):
    again = moved(recorded, tmp_path / "home")
    for name in ("summary.parquet", "report.html", "manifest.json"):
        path = again.folder / name
        content = path.read_bytes()
        path.write_bytes(b"{}")
        assert again.is_recorded
        assert not Run(again.folder).is_whole
        path.write_bytes(content)
        assert Run(again.folder).is_whole
    (again.folder / "summary.parquet").unlink()
    found = run(tmp_path / "home" / "spec.yaml", again.folder, progress=False)
    assert found.is_whole
    assert found.manifest["files"] == recorded.manifest["files"]


def test_a_failed_self_check_is_told(recorded, tmp_path, monkeypatch, capsys):
    again = moved(recorded, tmp_path / "home")
    (again.folder / "manifest.json").unlink()
    found = [Check("sums", 0.5, 0.1), Check("reach", 0.0, 0.1)]
    monkeypatch.setattr("g4lens.experiment.record.manifest.selfcheck", lambda *args: found)
    command = ["run", str(tmp_path / "home" / "spec.yaml"), "--out", str(again.folder), "--json"]
    assert cli.main(command) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == ["sums"]
    assert "self-check 'sums' failed" in str(Run(again.folder).verify(0))


def test_a_manifest_of_another_schema_is_no_record(recorded, tmp_path):
    again = moved(recorded, tmp_path / "home")
    held = {**again.manifest, "schema": 1}
    (again.folder / "manifest.json").write_text(json.dumps({**held, "sha256": hash_of(held)}))
    with pytest.raises(StoreError, match=r"not what was written \(schema 1, not 2\): run again"):
        Run(again.folder).manifest  # noqa: B018
    assert not Run(again.folder).is_whole


def test_no_record_is_made_of_a_damaged_unit_or_for_another_spec(recorded, tmp_path):
    again = moved(recorded, tmp_path / "home")
    before = (again.folder / "manifest.json").read_bytes()
    path = tmp_path / "home" / "spec.yaml"
    text = path.read_text()
    path.write_text(text.replace("draws: 300", "draws: 400"))
    with pytest.raises(InputError, match=r"another spec: spec.statistics.draws is 300 there"):
        again.write_record()
    path.write_text(text)
    unit = next(iter(again.store.files().values()))
    unit.write_bytes(unit.read_bytes()[:-9] + b"123456789")
    with pytest.raises(StoreError, match=f"{unit.name} is not what was written: delete it"):
        again.write_record()
    assert (again.folder / "manifest.json").read_bytes() == before


def test_two_who_write_the_record_at_once_leave_that_of_one(recorded, tmp_path, monkeypatch):
    again, put = moved(recorded, tmp_path / "home"), folder.put
    names = ("metrics.parquet", "report.html", "manifest.json")
    monkeypatch.setattr(Run, "_files", lambda self, job: dict.fromkeys(names, job))

    def slow(where, chunks, name):
        time.sleep(0.02)
        return put(where, chunks, name)

    monkeypatch.setattr(folder, "put", slow)
    writers = [
        threading.Thread(target=Run(again.folder).write_record, args=(f"{i}".encode(),))
        for i in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len({(again.folder / name).read_bytes() for name in names}) == 1


def test_a_run_with_missing_units_has_no_record_yet(recorded, tmp_path):
    part = run(recorded.folder.parent / "spec.yaml", tmp_path / "run", shard=(1, 2), progress=False)
    assert "units missing" in repr(part)
    with pytest.raises(InputError, match=r"units are missing, run it to its end"):
        part.manifest  # noqa: B018
    with pytest.raises(InputError, match=r"has no units .* yet: run again"):
        part.write_record()
    with pytest.raises(InputError, match="holds no results"):
        Run(tmp_path / "nothing")


def test_tables_that_were_tampered_with_are_refused(recorded, tmp_path):
    again = moved(recorded, tmp_path / "home")
    again.summary.assign(p_adj=0.001).to_parquet(again.folder / "summary.parquet")
    with pytest.raises(StoreError, match=r"summary.parquet is not what was written: run again"):
        again.summary  # noqa: B018
    path = again.folder / "manifest.json"
    path.write_text(path.read_text().replace('"float32"', '"float64"'))
    with pytest.raises(StoreError, match=r"manifest.json is not what was written"):
        Run(again.folder).manifest  # noqa: B018


def test_other_results_are_no_run(tmp_path):
    from g4lens.experiment.store import UnitStore

    store = UnitStore(tmp_path / "out", {"kind": "activations"}, ["a"])
    store.commit("a", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="holds activations, expected a run"):
        Run(tmp_path / "out")


@pytest.fixture
def asked_anew():
    """Code that is asked for in a test is not remembered in the next one."""
    version.code.cache_clear()
    yield version.code.cache_clear
    version.code.cache_clear()


def test_a_checkout_tells_its_commit_and_an_installed_package_none(
    tmp_path, monkeypatch, asked_anew
):
    def git(*args):
        subprocess.run(["git", "-C", str(tmp_path), *args], check=True, capture_output=True)

    package = tmp_path / "g4lens"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    monkeypatch.setattr(version, "PACKAGE", package)
    git("init", "-q")
    assert version.code()["commit"] is None  # in a checkout, but not of it
    git("add", ".")
    git("-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "-qm", "m")
    asked_anew()
    clean = version.code()
    assert len(clean["commit"]) == 40
    assert clean["diff"] is None
    (package / "__init__.py").write_text("a = 2\n")
    asked_anew()
    assert len(version.code()["diff"]) == 64
    asked_anew()
    monkeypatch.setenv("PATH", "")
    assert version.code()["commit"] is None


def test_reading_a_record_loads_no_plots(recorded):
    code = (
        "import sys; from g4lens.experiment.record import Run; "
        f"Run({str(recorded.folder)!r}).manifest; "
        "print([m for m in ('matplotlib', 'scipy', 'jinja2', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []
