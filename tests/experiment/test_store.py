"""The unit store: whole or absent, resumable, its hashes, folders that it must not touch."""

import errno
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from g4lens.errors import InputError, StoreError
from g4lens.experiment import files
from g4lens.experiment import store as store_module
from g4lens.experiment.store import UnitStore

UNITS = ["a", "b", "c"]
SPEC = {"x": {"y": 1, "z": [1, 2]}}
NAME = "blocks.0.hook_resid_post"


@pytest.fixture
def tensors():
    return {
        NAME: torch.randn(5, 3, dtype=torch.bfloat16),
        "offsets": torch.tensor([0, 2, 5]),
        "prompts": torch.tensor([7, 8]),
        "nothing": torch.empty(0, 4),
        "number": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
    }


def names_in(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_nothing_is_written_before_the_first_commit(tmp_path):
    store = UnitStore(tmp_path / "new", SPEC, UNITS)
    assert store.missing() == UNITS and not (tmp_path / "new").exists()
    assert len(store.index()) == 0


def test_tensors_are_those_that_safetensors_reads(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("b", tensors)
    read = load_file(store.files()["b"])
    assert read.keys() == tensors.keys()
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype and torch.equal(read[name], x)
        assert torch.equal(store.shard("b").tensor(name), x)
    shard = store.shard("b")
    assert torch.equal(shard.rows(NAME, [4, 0, 4]), tensors[NAME][[4, 0, 4]])
    assert torch.equal(shard.span(NAME, 1, 4), tensors[NAME][1:4])


def test_the_index_tells_prompts_names_and_rows(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("c", tensors)
    store.commit("a", pd.DataFrame({"value": [1.0, 2.0, 3.0]}))
    store.write_index()
    index = pd.read_parquet(tmp_path / "index.parquet")
    assert list(index.columns) == ["unit", "prompt", "name", "shard", "rows", "sha256"]
    assert index["unit"].tolist() == ["a", "c", "c"]
    assert index["rows"].tolist() == [3, 2, 3]
    assert index["prompt"].tolist()[1:] == [7, 8] and index["name"].tolist()[1:] == [NAME] * 2
    assert all(s in f for s, f in zip(index["sha256"], index["shard"], strict=True))
    pd.testing.assert_frame_equal(index, store.index())


def test_tables_come_back_with_their_units(tmp_path):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("b", pd.DataFrame({"prompt": [3], "value": [0.5]}, index=[9]))
    store.commit("a", pd.DataFrame({"prompt": [1, 2], "value": [0.1, 0.2]}))
    frame = store.frame()
    assert frame["unit"].tolist() == ["a", "a", "b"] and frame["prompt"].tolist() == [1, 2, 3]
    assert UnitStore.open(tmp_path).frame().equals(frame)


def test_a_rerun_does_only_what_is_missing(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, UNITS, about={"made": "once"})
    store.commit("b", tensors)
    again = UnitStore(tmp_path, SPEC, UNITS)
    assert again.missing() == ["a", "c"]
    assert again.missing((1, 2)) == ["a", "c"] and again.missing((2, 2)) == []
    before = store.files()["b"].stat().st_mtime_ns
    again.commit("b", {NAME: torch.zeros(1, 1)})
    assert store.files()["b"].stat().st_mtime_ns == before
    assert UnitStore.open(tmp_path).about == {"made": "once"}


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_shards_count_from_one(tmp_path, shard):
    with pytest.raises(InputError, match=r"expected 1/2 to 2/2"):
        UnitStore(tmp_path, SPEC, UNITS).missing(shard)


def test_a_folder_of_another_spec_is_refused(tmp_path, tensors):
    UnitStore(tmp_path, SPEC, UNITS).commit("a", tensors)
    before = names_in(tmp_path)
    with pytest.raises(InputError, match=r"another spec: x\.y is 1 there and 2 here"):
        UnitStore(tmp_path, {"x": {"y": 2, "z": [1, 2]}}, UNITS)
    with pytest.raises(InputError, match="units"):
        UnitStore(tmp_path, SPEC, ["a"])
    assert names_in(tmp_path) == before


def test_a_folder_in_use_for_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"thesis\.tex"):
        UnitStore(tmp_path, SPEC, UNITS)
    with pytest.raises(InputError, match="is a file"):
        UnitStore(tmp_path / "thesis.tex", SPEC, UNITS)
    with pytest.raises(InputError, match="no results"):
        UnitStore.open(tmp_path)
    (tmp_path / "spec.json").write_text('{"spec": 1')
    with pytest.raises(InputError, match="not readable"):
        UnitStore.open(tmp_path)


def test_shards_without_their_spec_are_not_adopted(tmp_path, tensors):
    UnitStore(tmp_path, SPEC, UNITS).commit("a", tensors)
    (tmp_path / "spec.json").unlink()
    with pytest.raises(InputError, match="shards and no spec"):
        UnitStore(tmp_path, SPEC, UNITS)


def test_a_spec_tampered_with_is_refused(tmp_path, tensors):
    UnitStore(tmp_path, SPEC, UNITS).commit("a", tensors)
    path = tmp_path / "spec.json"
    path.write_text(path.read_text().replace('"y": 1', '"y": 2'))
    for spec in (SPEC, {"x": {"y": 2, "z": [1, 2]}}):
        with pytest.raises(InputError, match=r"spec\.json is not readable .*its hash is another"):
            UnitStore(tmp_path, spec, UNITS)


def test_another_job_that_begins_while_one_looks(tmp_path, tensors, monkeypatch):
    UnitStore(tmp_path, SPEC, UNITS).commit("a", tensors)
    held, calls = store_module._held, iter([None])
    monkeypatch.setattr(store_module, "_held", lambda folder: next(calls, held(folder)))
    assert UnitStore(tmp_path, SPEC, UNITS).missing() == ["b", "c"]


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        UnitStore(tmp_path, SPEC, UNITS)


def test_what_nfs_makes_of_open_files_is_no_stranger(tmp_path):
    (tmp_path / ".nfs0001").write_text("")
    assert UnitStore(tmp_path, SPEC, UNITS).missing() == UNITS


@pytest.mark.parametrize("units", [["a/b"], ["a", "a"], ["a-b"], [""]])
def test_units_are_file_names(tmp_path, units):
    with pytest.raises(InputError, match="each once"):
        UnitStore(tmp_path, SPEC, units)


def test_wrong_commits(tmp_path):
    store = UnitStore(tmp_path, SPEC, UNITS)
    with pytest.raises(InputError, match="no unit 'd'"):
        store.commit("d", {})
    with pytest.raises(InputError, match="complex64"):
        store.commit("a", {"x": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(InputError, match="is a list"):
        store.commit("a", [1])
    with pytest.raises(InputError, match="JSON cannot"):
        UnitStore(tmp_path / "x", {"a": torch.zeros(1)}, UNITS)
    with pytest.raises(InputError, match="holds no tables"):
        store.frame()


# ---- hashes


def test_a_shard_tampered_with_is_found(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, ["a", "b"])
    store.commit("a", tensors)
    store.commit("b", {k: v for k, v in tensors.items() if k != "flags"})
    store.write_index()
    assert store.verify() == []
    path = store.files()["b"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (told,) = store.verify()
    assert path.name in told and "not what was written" in told
    path.unlink()
    assert [line.split(":")[0] for line in store.verify()] == [
        "unit b is missing",
        f"{tmp_path / 'index.parquet'} is not that of the files",
    ]


def test_a_shard_cut_short_is_told(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("a", tensors)
    path = store.files()["a"]
    shard = store.shard("a")
    assert shard.entries
    whole = path.read_bytes()
    for n in (0, 4, 60, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(StoreError, match=r"shard|bytes"):
            store.shard("a").tensor(NAME)
    path.write_bytes(whole[:-30])
    with pytest.raises(StoreError, match="cut short"):
        [shard.tensor(name) for name in tensors]


def test_an_index_tampered_with_is_found_and_made_anew(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, ["a"])
    store.commit("a", tensors)
    store.write_index()
    (tmp_path / "index.parquet").write_bytes(b"nonsense")
    assert "run again" in store.verify()[0]
    store.write_index()
    assert store.verify() == []


# ---- two at once, and trouble


def test_temporary_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("a", tensors)
    dead = tmp_path / "shards" / ".part-0123"
    dead.write_bytes(b"half")
    with files._part(tmp_path / "shards") as (living, _):
        UnitStore(tmp_path, SPEC, UNITS)
        assert living.exists() and not dead.exists()


def test_two_writers_of_one_unit(tmp_path, tensors):
    other = {**tensors, NAME: tensors[NAME] + 1}  # another CPU's last bits
    stores = [UnitStore(tmp_path, SPEC, UNITS) for _ in range(2)]
    for unit in UNITS:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda s, x, u=unit: s.commit(u, x), stores, (tensors, other)))
    stores[0].write_index()
    index = stores[1].index()
    assert index.groupby(["unit", "prompt", "name"]).size().eq(1).all()
    assert stores[0].verify() == [] and stores[1].missing() == []


def test_of_two_that_begin_at_once_the_first_one_counts(tmp_path, tensors, monkeypatch):
    first, second = UnitStore(tmp_path, SPEC, UNITS), UnitStore(tmp_path, {"x": 2}, UNITS)
    write = files._write

    def slowly(file, chunks):
        digest = write(file, chunks)
        if not (tmp_path / "spec.json").exists():
            monkeypatch.setattr(files, "_write", write)
            first.begin()  # while the second one is about to name its file
        return digest

    monkeypatch.setattr(files, "_write", slowly)
    with pytest.raises(InputError, match=r"another spec: x is .* there and 2 here"):
        second.commit("a", tensors)
    first.commit("b", tensors)
    assert names_in(tmp_path) == [f"shards/{first.files()['b'].name}", "spec.json"]
    assert json.loads((tmp_path / "spec.json").read_text())["spec"] == SPEC


def test_a_file_system_without_links_will_do(tmp_path, tensors, monkeypatch):
    def refused(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(Path, "hardlink_to", refused)
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("a", tensors)
    assert UnitStore.open(tmp_path).missing() == ["b", "c"]
    assert names_in(tmp_path) == [f"shards/{store.files()['a'].name}", "spec.json"]


def test_a_file_system_without_locks_says_so(tmp_path, tensors, monkeypatch):
    import fcntl

    def none(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(StoreError, match="a file system without locks"):
        UnitStore(tmp_path / "x", SPEC, UNITS).commit("a", tensors)
    assert names_in(tmp_path) == []


def test_a_unit_without_tensors(tmp_path):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("a", {})
    assert store.shard("a").entries == {} and store.index()["rows"].tolist() == [0]


def test_a_full_disk(tmp_path, tensors, monkeypatch):
    store = UnitStore(tmp_path, SPEC, UNITS)
    store.commit("a", tensors)
    store.write_index()
    before = {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)}

    def full(file, chunks):
        file.write(chunks[0])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files, "_write", full)
        with pytest.raises(StoreError, match=r"no space .* make room and run again"):
            store.commit("b", tensors)
        with pytest.raises(StoreError, match="no space"):
            store.write_index()
    assert {name: (tmp_path / name).read_bytes() for name in names_in(tmp_path)} == before
    store.commit("b", tensors)
    assert UnitStore(tmp_path, SPEC, UNITS).missing() == ["c"]


def run(script, folder):
    script = textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=False
    )


WRITER = """
    import sys, torch
    from g4lens.errors import StoreError
    from g4lens.experiment.store import UnitStore
    store = UnitStore(sys.argv[1], {"s": 1}, ["a", "b"])
    store.commit("a", {"x": torch.zeros(100)})
    LIMIT
    try:
        store.commit("b", {"x": torch.zeros(10_000)})
    except StoreError as error:
        print(error)
"""


def test_a_file_too_large_for_the_disk(tmp_path):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
    limit += "; resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))"
    done = run(WRITER.replace("LIMIT", limit), tmp_path)
    assert done.stderr == "" and done.stdout.startswith("no space for another file")
    assert UnitStore.open(tmp_path).missing() == ["b"]
    assert not [name for name in names_in(tmp_path) if ".part-" in name]


def test_a_folder_that_cannot_be_written_to():
    with tempfile.TemporaryDirectory() as name:  # not below a folder that only root may enter
        tmp_path = Path(name)
        tmp_path.chmod(0o755)
        _check_read_only(tmp_path)


def _check_read_only(tmp_path):
    drop = "import os; os.chmod(sys.argv[1] + '/shards', 0o555)"
    drop += "; os.geteuid() or os.setuid(65534)"
    done = run(WRITER.replace("LIMIT", drop), tmp_path)
    assert done.stderr == "" and "cannot be written to (Permission denied)" in done.stdout
    assert UnitStore.open(tmp_path).missing() == ["b"]


def test_a_later_index_keeps_what_an_older_one_tells(tmp_path, tensors):
    store = UnitStore(tmp_path, SPEC, UNITS)
    for unit in ("c", "a", "b"):
        store.commit(unit, tensors)
        store.write_index()
    assert store.verify() == []
    assert json.loads((tmp_path / "spec.json").read_text())["sha256"] == store.hash
