"""The runs that the notebooks read are what their specs give, here and now."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from g4lens import Run
from g4lens.resources import bundled

COMMAND = [sys.executable, "-c", "from g4lens.cli import main; raise SystemExit(main())"]
RUNS = bundled("data", "runs")
NAMES = sorted(path.stem for path in RUNS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_run_is_verified(name):
    """By the command, in a process whose shapes nobody checks: half the time."""
    verify = [*COMMAND, "verify", str(RUNS / name), "--units", "1", "--json"]  # others every time
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(verify, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] and len(told["units"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_run_is_of_the_spec_beside_it(name):
    run, spec = Run(RUNS / name), yaml.safe_load((RUNS / f"{name}.yaml").read_text("utf-8"))
    assert run.store.about["path"] == f"../{name}.yaml"
    assert run.manifest["spec"]["experiment"]["kind"] == spec["experiment"]["kind"]
    assert run.manifest["name"] == spec["name"]
    assert all(check["passed"] for check in run.manifest["checks"])
    assert (run.folder / "report.html").is_file()


def test_every_run_has_its_spec():
    assert sorted(path.name for path in RUNS.iterdir() if path.is_dir()) == NAMES
