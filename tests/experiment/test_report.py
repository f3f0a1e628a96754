"""The page of a run, and runs side by side."""

import json
import re
import shutil
from html.parser import HTMLParser

import pandas as pd
import pytest

from g4lens import cli
from g4lens.errors import InputError, StoreError
from g4lens.experiment.record import Comparison, compare
from g4lens.experiment.record.manifest import hash_of
from tests.experiment.recorded import (
    HOSTILE,
    SPEC,
    change_weights,
    done,
    moved,
    pictured,
    respecified,
    written,
)

pytestmark = pytest.mark.unchecked


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return done(written(tmp_path_factory.mktemp("report") / "home", title=f"'{HOSTILE}'"))


@pytest.fixture(scope="module")
def others(recorded):
    """Another spec on the same inputs."""
    home = recorded.folder.parent
    return done(respecified(home, "other.yaml", SPEC.replace("zero", "mean")), "other")


class Page(HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


def page_of(run):
    return Page((run.folder / "report.html").read_text())


def test_the_page_has_what_an_appendix_needs(recorded):
    page, manifest = page_of(recorded), recorded.manifest
    text = " ".join(page.text.split())
    for heading in ("Results", "Figures", "Conditions", "Prompts", "Checks", "Provenance", "Again"):
        assert heading in text
    for check in manifest["checks"]:
        assert check["name"] in text
    assert "It is of one cell by itself: among many cells some intervals miss the truth" in text
    assert "random, a control" not in text  # none was run
    assert "permuted, a control: answer and foil exchanged in half of each template" in text
    for told in (
        manifest["run"],
        manifest["model"]["weights"]["model.safetensors"],
        manifest["pairs"]["sha256"],
        manifest["code"]["source"],
        *manifest["notes"],
        *manifest["units"],
        "all 10 passed",
        "12 in",
        *manifest["absent"].values(),
        "g4lens verify DIR",
    ):
        assert told in text, told
    row = recorded.summary.query("variant == 'mlp_out.zero' and baseline == 'none'").iloc[0]
    ends = [f"{row[name]:.3g}".replace("-", "\u2212") for name in ("base", "target")]
    assert f"base {ends[0]}, target {ends[1]}" in text
    assert f"{row['mean']:.3g}".replace("-", "\u2212") in text


def test_every_figure_stands_in_the_page(recorded):
    sources = [a["src"] for tag, a in page_of(recorded).elements if tag == "img"]
    figures = [name for name in recorded.manifest["files"] if name.endswith(".svg")]
    assert len(figures) == 3
    assert sum(source.startswith("data:image/svg+xml") for source in sources) == 3
    assert all(source.startswith("data:image/") for source in sources)
    assert all(a["alt"] for tag, a in page_of(recorded).elements if tag == "img")


def test_texts_that_attack_are_only_shown(recorded):
    page = page_of(recorded)
    assert page.text.count(HOSTILE) >= 5  # title, heading, two prompts, cluster, spec
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "iframe", "object", "embed", "form", "base"}
    known = {"lang", "charset", "name", "content", "http-equiv", "class", "scope", "src", "alt"}
    known |= {"rowspan", "tabindex", "role", "aria-label"}
    assert {name for _, attributes in page.elements for name in attributes} <= known
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    for path in (recorded.folder / "figures").glob("*.svg"):
        assert "<script" not in path.read_text()


def test_pictures_of_prompts_are_in_the_page_and_paths_are_not(tmp_path):
    run = done(pictured(tmp_path / "home"))
    page = page_of(run)
    assert any(a.get("src", "").startswith("data:image/jpeg") for _, a in page.elements)
    for name in ("report.html", "manifest.json", "spec.json"):
        assert str(tmp_path) not in (run.folder / name).read_text()


def test_runs_of_the_same_inputs_stand_side_by_side(recorded, others):
    several = compare([recorded.folder, others.folder])
    assert list(several.runs) == ["run", "other"]
    assert any("experiment.value is ['zero'] in run and ['mean'] in other" in line
               for line in several.differences)  # fmt: skip
    for name, run in several.runs.items():
        mine = several.table[name].dropna(how="all")
        assert len(mine) == len(run.summary)
        assert sorted(mine["mean"]) == sorted(run.summary["mean"])
    assert set(several.long["run"]) == {"run", "other"}
    assert "mlp_out.zero, logit_diff" in repr(several)


def test_runs_of_other_kinds_keep_their_own_cells_and_conditions(recorded, tmp_path):
    """A map of blocks and heads beside one of edges: no cell is lost or taken for another."""
    whole = recorded.summary
    cut = whole.query("variant == 'z.zero'").rename(columns={"head": "edge"})
    cut = cut.assign(edge="from " + cut["edge"].astype(str), variant="cut", site="attn_scores")
    first = ["variant", "baseline", "metric", "edge", "layer"]
    cut = cut[[*first, *(name for name in cut if name not in first)]]
    several = Comparison({"run": recorded, "cut": recorded}, {"run": whole, "cut": cut}, None, ())
    rows = [row for row in several.rows(5) if row["of"] == "cut, logit_diff"]
    own = cut.query("baseline == 'none'")
    cells = [f"layer {x.layer}, edge {x.edge}" for x in own.itertuples()]
    assert sorted(row["cell"] for row in rows) == sorted(cells)
    assert rows[0]["runs"][0]["share"] == "\u2013"  # the other run has none
    said = (
        "share lost: method ablation, site attn_scores, granularity layer x head, positions all, "
        "direction noise, ablation value zero"
    )
    assert rows[0]["conditions"] == [said]
    assert f"({said})" in repr(several)
    several.write(tmp_path / "both.html")
    values = ("cut", "cut", "logit_diff", "ablation", "attn_scores", "layer x head", "all", "noise")
    row = "".join(f'<td class="said">{value}</td>' for value in values)
    assert row in (tmp_path / "both.html").read_text()


def test_the_same_cells_share_a_row(recorded, tmp_path):
    copy = moved(recorded, tmp_path / "home").folder
    copy = copy.rename(copy.parent / "copy")
    several = compare([recorded.folder, copy])
    pd.testing.assert_frame_equal(several.table["run"], several.table["copy"])
    for row in several.rows(5):
        assert row["runs"][0] == row["runs"][1]
    assert several.differences == ()


def test_the_page_of_several(recorded, others, tmp_path):
    compare([recorded.folder, others.folder]).write(tmp_path / "both.html")
    page = Page((tmp_path / "both.html").read_text())
    assert "2 runs side by side" in page.text
    assert "['mean'] in other" in page.text
    assert HOSTILE in page.text
    assert "script" not in {tag for tag, _ in page.elements}
    assert sum(tag == "img" for tag, _ in page.elements) == 4


def test_weights_that_changed_under_their_name_are_not_merged(recorded, tmp_path):
    home = tmp_path / "home"
    moved(recorded, home)
    shutil.rmtree(home / "run")
    change_weights(home)
    changed = done(home / "spec.yaml", "changed")
    with pytest.raises(InputError) as error:
        compare([recorded.folder, changed.folder])
    said = str(error.value)
    assert re.search(
        r"weights.model.safetensors is '\w+\.\.\. in run and '\w+\.\.\. in changed", said
    )
    assert "though both name the model 'model'" in said


@pytest.mark.parametrize(
    ("part", "key", "said"),
    [
        ("model", "inputs", r"inputs \(tokenizer, .*\) is '\w+\.\.\. in run and '0000"),
        ("model", "config", r"config is '\w+\.\.\. in run and '0000"),
        ("pairs", "sha256", r"pairs.sha256 is '\w+\.\.\. in run and '0000"),
    ],
)
def test_each_hash_that_differs_is_named(recorded, tmp_path, part, key, said):
    other = moved(recorded, tmp_path / "home")
    held = {**other.manifest, part: {**other.manifest[part], key: "0" * 64}}
    held["sha256"] = hash_of(held)
    (other.folder / "manifest.json").write_text(json.dumps(held))
    other.folder.rename(tmp_path / "other")
    with pytest.raises(InputError, match=f"run and other cannot be merged: {said}"):
        compare([recorded.folder, tmp_path / "other"])


def test_other_pairs_are_not_merged(recorded, tmp_path):
    other = done(pictured(tmp_path / "home"), "other")
    with pytest.raises(InputError, match=r"run and other cannot be merged: .*pairs.sha256 is"):
        compare([recorded.folder, other.folder])


def test_what_cannot_be_compared(recorded, tmp_path):
    with pytest.raises(InputError, match="no runs, expected at least one"):
        compare([])
    with pytest.raises(InputError, match="a run is there twice"):
        compare([recorded.folder, recorded.folder])
    again = moved(recorded, tmp_path / "home")
    (again.folder / "summary.parquet").write_bytes(b"")
    with pytest.raises(StoreError, match=r"summary.parquet is not what was written"):
        compare([again.folder])


def test_the_command(recorded, others, tmp_path, capsys):
    folders = [str(recorded.folder), str(others.folder)]
    assert cli.main(["report", *folders, "--out", str(tmp_path / "both.html")]) == 0
    assert "mlp_out.zero, logit_diff" in capsys.readouterr().out
    assert (tmp_path / "both.html").is_file()
    assert cli.main(["report", *folders, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"] == ["run", "other"]
    assert len(told["cells"]) == len(recorded.summary) + len(others.summary)
    assert cli.main(["report", *folders, str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err
