"""`g4lens verify`: what agrees with a run, and what does not."""

import json

import pandas as pd
import pytest

from g4lens import cli
from g4lens.errors import InputError
from g4lens.experiment import version
from g4lens.experiment.record import Run, provenance
from g4lens.experiment.record.manifest import hash_of
from tests.experiment.recorded import change_weights, done, moved, pictured, written

pytestmark = pytest.mark.unchecked


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return done(written(tmp_path_factory.mktemp("verify") / "home"))


@pytest.fixture
def again(recorded, tmp_path):
    return moved(recorded, tmp_path / "elsewhere")


def home_of(run):
    return run.folder.parent


def test_an_untouched_run_agrees_wherever_it_was_moved(again):
    verdict = again.verify(k=2, seed=0)
    assert verdict.passed, verdict
    assert len(verdict.units) == 2
    assert all(off == {"logit_diff": 0} for off in verdict.units.values())  # the same machine
    assert repr(verdict).endswith("\nverified")
    drawn = {tuple(again.verify(k=1).units) for _ in range(6)}
    assert len(drawn) > 1


def test_no_unit_need_be_run(again):
    assert again.verify(k=0).units == {}
    with pytest.raises(InputError, match="units is -1, expected 0 or more"):
        again.verify(k=-1)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("summary.parquet", "summary.parquet is not what was written"),
        ("figures/prompts.logit_diff.svg", "prompts.logit_diff.svg is not what was written"),
        ("report.html", "report.html is not what was written"),
        ("manifest.json", "manifest.json is not what was written"),
        ("index.parquet", "index.parquet"),
    ],
)
def test_a_tampered_file_is_named(again, name, said):
    path = again.folder / name
    path.write_bytes(path.read_bytes().replace(b"e", b"E", 1))
    verdict = Run(again.folder).verify(k=0)
    assert not verdict.passed
    assert any(said in line for line in verdict.problems), verdict


def test_a_file_that_is_gone_is_named(again):
    (again.folder / "figures" / "z.zero.logit_diff.pdf").unlink()
    (line,) = again.verify(k=0).problems
    assert line.endswith("z.zero.logit_diff.pdf is missing: run again")


def test_a_unit_with_other_numbers_is_found_twice(again):
    unit, path = next(iter(again.store.files().items()))
    frame = pd.read_parquet(path)
    frame.loc[3, "value"] += 1
    frame.to_parquet(path)
    verdict = again.verify(k=len(again.store.units))
    assert any(f"{path} is not what was written" in line for line in verdict.problems)
    assert any(f"unit {unit}, logit_diff: 1 away" in line for line in verdict.problems)
    assert verdict.units[unit]["logit_diff"] == pytest.approx(1)


def test_a_unit_that_was_exchanged_with_its_hash_is_not_that_of_the_record(again):
    unit, path = next(iter(again.store.files().items()))
    frame = again.store.frame().query("unit == @unit").drop(columns="unit")
    path.unlink()
    again.store.commit(unit, frame.assign(value=frame["value"] + 1))
    again.store.write_index()
    problems = again.verify(k=0).problems
    assert problems == (f"unit {unit} is not the one that the record is of",)


def rewrite_manifest(of, **changes):
    held = {**of.manifest, **changes}
    held["sha256"] = hash_of(held)
    (of.folder / "manifest.json").write_text(json.dumps(held))


def test_the_manifest_of_another_run_is_refused(again):
    own = again.manifest["run"]
    units = {"other.0000": {"sha256": "0" * 64}}
    rewrite_manifest(again, run="0123456789abcdef", units=units, media={"a": "b"}, tolerance={})
    (problem,) = Run(again.folder).verify().problems
    assert problem == (
        f"{again.folder} has the manifest of run 0123456789abcdef, it is {own}: run again"
    )
    assert not Run(again.folder).is_whole


def test_self_checks_that_failed_are_told(again):
    first, *rest = again.manifest["checks"]
    rewrite_manifest(again, checks=[{**first, "passed": False}, *rest])
    name = first["name"]
    verdict = Run(again.folder).verify(k=0)
    assert verdict.passed  # it is what it says
    assert f"self-check {name!r} failed when the record was written" in verdict.notes


def test_what_was_chosen_has_its_hash(tmp_path):
    path = written(tmp_path / "home")
    kind = "{kind: steering, layers: [4], strengths: 1}"
    text = path.read_text()
    start = text.index("experiment:")
    path.write_text(f"{text[:start]}experiment: {kind}\nstatistics: {{draws: 300}}\n")
    run = done(path)
    assert run.verify(k=0).passed
    vectors = run.folder / "chosen" / "directions.safetensors"
    assert "chosen/directions.safetensors" in run.manifest["files"]
    vectors.write_bytes(vectors.read_bytes()[:-4] + b"1234")
    (problem,) = run.verify(k=0).problems
    assert problem == f"{vectors} is not what was written: run again"


def test_changed_weights_under_the_same_name_are_named(again):
    change_weights(home_of(again))
    verdict = again.verify()
    assert any(line.startswith("model.weights.model.safetensors is") for line in verdict.problems)
    assert "no unit was run again: the inputs are others" in verdict.problems
    assert verdict.units == {}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("value: zero", "value: mean", "experiment.value is ['zero'] in the run and ['mean'] now"),
        ("draws: 300", "draws: 400", "statistics.draws is 300 in the run and 400 now"),
        ("value: zero", "value: none", "the inputs cannot be taken"),
    ],
)
def test_another_spec_is_told(again, before, after, said):
    path = home_of(again) / "spec.yaml"
    path.write_text(path.read_text().replace(before, after))
    problems = again.verify().problems
    assert any(said in line for line in problems), problems


def test_other_pairs_are_told(again):
    path = home_of(again) / "pairs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    assert any(line.startswith("pairs.sha256 is") for line in again.verify().problems)


def test_code_packages_and_machine_are_told_and_no_failure(again, monkeypatch):
    there = provenance.packages()
    now = version.code()
    monkeypatch.setattr(version, "code", lambda: {**now, "source": "0" * 64})
    monkeypatch.setattr(provenance, "packages", lambda: {**there, "torch": "9.9"})
    verdict = again.verify(k=1)
    assert verdict.passed
    assert any(line.startswith("code.source is") for line in verdict.notes)
    assert any(line.endswith("in the run and '9.9' now") for line in verdict.notes)
    more = {f"package-{i:02}": "1" for i in range(12)}
    monkeypatch.setattr(provenance, "packages", lambda: {**there, **more})
    told = [line for line in again.verify(k=0).notes if "package" in line]
    assert len(told) == 9
    assert told[-1] == "4 more packages are others"


def test_missing_and_changed_pictures_are_named(tmp_path):
    run = done(pictured(tmp_path / "home"))
    assert len(run.manifest["media"]) == 3
    assert run.verify(k=1).passed
    name = next(iter(run.manifest["media"]))
    picture, other = home_of(run) / name, home_of(run) / list(run.manifest["media"])[1]
    content = picture.read_bytes()
    picture.write_bytes(other.read_bytes())
    assert any(line.startswith(f"media.{name} is") for line in run.verify(k=0).problems)
    picture.unlink()
    problems = run.verify().problems
    assert any("the inputs cannot be taken" in x and picture.name in x for x in problems)
    picture.write_bytes(content)
    assert run.verify(k=0).passed


def test_the_command(again, capsys):
    assert cli.main(["verify", str(again.folder), "--units", "1"]) == 0
    assert capsys.readouterr().out.endswith("verified\n")
    (again.folder / "report.html").write_text("")
    assert cli.main(["verify", str(again.folder), "--units", "0", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["passed"] is False
    assert "report.html" in told["problems"][0]
    assert cli.main(["verify", str(again.folder), "--units", "0", "--quiet"]) == 1
    assert capsys.readouterr().out == ""
    assert cli.main(["verify", str(home_of(again) / "nothing")]) == 2
    assert "holds no results" in capsys.readouterr().err
