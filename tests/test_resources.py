"""The bundled files are found, and nothing else is."""

import shutil
from pathlib import Path

import pytest

from g4lens import resources
from g4lens.errors import G4LensError, InputError

ROOT = Path(__file__).parents[1]


def test_a_sample_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resources.sample("images/corners.png") == ROOT / "data/images/corners.png"


@pytest.mark.parametrize("parts", [("data",), ("data", "tiny"), ("data/tiny/config.json",)])
def test_files_and_folders_are_found_by_their_parts(parts):
    assert resources.bundled(*parts) == ROOT.joinpath(*parts)


def test_a_wrong_name_says_the_near_one():
    with pytest.raises(InputError, match=r"'images/corner.png'.*Did you mean 'images/corners.png'"):
        resources.sample("images/corner.png")
    with pytest.raises(InputError, match=r"Did you mean 'data/tiny/config.json'"):
        resources.bundled("data", "tiny", "confg.json")


@pytest.mark.parametrize("name", ["../README.md", "/etc/hostname", "images/../../g4lens", ".."])
def test_a_sample_cannot_leave_the_data_folder(name):
    with pytest.raises(InputError, match="outside the bundled folders"):
        resources.sample(name)


@pytest.mark.parametrize("parts", [("README.md",), ("data", ".."), ("g4lens", "cli.py"), ()])
def test_only_the_two_folders_are_bundled(parts):
    with pytest.raises(InputError, match="data, notebooks"):
        resources.bundled(*parts)


@pytest.mark.parametrize("pyproject", [None, "not toml", "", '[project]\nname = "another"\n'])
def test_somebody_elses_folder_is_not_taken_for_the_checkout(tmp_path, monkeypatch, pyproject):
    if pyproject is not None:
        (tmp_path / "pyproject.toml").write_text(pyproject)
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "g4lens" / "resources.py"))
    with pytest.raises(G4LensError, match="no notebooks and no data"):
        resources.sample("images/corners.png")


def test_the_bundled_copy_comes_before_a_checkout(tmp_path, monkeypatch):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    copy = tmp_path / "g4lens" / "_bundled" / "data" / "a.txt"
    copy.parent.mkdir(parents=True)
    copy.touch()
    monkeypatch.setattr(resources, "__file__", str(tmp_path / "g4lens" / "resources.py"))
    assert resources.sample("a.txt") == copy
