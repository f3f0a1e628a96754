"""Specs of runs: what they become, and how each mistake is told."""

import hashlib

import pytest

import g4lens
from g4lens import InputError
from g4lens.experiment.run_spec import Spec
from g4lens.experiment.spec import read_spec

HEAD = "name: x\nmodel: tiny\n"
PAIRS = "pairs: {task: capital, n: 6}\n"
KIND = "experiment: {kind: patching}\n"


def read(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    return read_spec(path, Spec)


@pytest.mark.parametrize(
    "kind",
    [
        "{kind: patching, site: [resid_pre, z], direction: noise, carry: [ple], positions: [end]}",
        "{kind: ablation, site: ple_out, value: [zero, mean, resample]}",
        "{kind: knockout, edges: [[image, end], [3, [1, 2]]], layers: [window, 3]}",
        "{kind: path_patching, senders: [head 3.1], receivers: [logits, [mlp 6, mlp 7]]}",
        "{kind: attribution, site: q, qk_fix: true}",
        "{kind: circuits, shares: [0.01, 1]}",
        "{kind: steering, layers: [3, 5], strengths: 2}",
        "{kind: logit_lens}",
    ],
)
def test_every_kind(tmp_path, kind):
    spec = read(tmp_path, f"{HEAD}{PAIRS}experiment: {kind}\n")
    assert spec.model.name == "tiny" and spec.metrics == ["logit_diff"]
    assert Spec.model_validate(spec.model_dump()) == spec
    chooses = spec.experiment.kind in ("circuits", "steering")
    assert spec.discovery == (0.5 if chooses else None)


def test_one_word_is_a_list_of_one(tmp_path):
    spec = read(tmp_path, f"{HEAD}{PAIRS}metrics: kl\nexperiment: {{kind: ablation, site: z}}\n")
    assert spec.metrics == ["kl"] and spec.experiment.site == ["z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{HEAD}{PAIRS}", r"s\.yaml: experiment is missing"),
        (f"{HEAD}{PAIRS}{KIND}metrcs: [kl]", "metrcs is unknown, expected.*'metrics'"),
        (f"{HEAD}{PAIRS}{KIND}metrics: [kl, logit_dif]", "metrics.*'logit_dif'.*'logit_diff'"),
        (f"{HEAD}{PAIRS}{KIND}metrics: [kl, kl]", "metrics.*twice"),
        (f"{HEAD}{PAIRS}{KIND}metrics: [os.system]", "no metric is called 'os.system'"),
        (f"{HEAD}{PAIRS}experiment: {{kind: ablate}}", r"experiment\.kind is 'ablate'.*'ablation'"),
        (f"{HEAD}{PAIRS}experiment: {{site: z}}", r"experiment\.kind is missing"),
        (
            f"{HEAD}{PAIRS}experiment: {{kind: patching, sites: z}}",
            r"experiment\.sites is unknown, expected kind, site.*'site'",
        ),
        (
            f"{HEAD}{PAIRS}experiment: {{kind: ablation, site: [z, ple_oot]}}",
            r"experiment\.site\[1\].*'ple_oot'.*'ple_out'",
        ),
        (
            f"{HEAD}{PAIRS}experiment: {{kind: ablation, value: men}}",
            r"experiment\.value\[0\] is 'men'",
        ),
        (f"{HEAD}{PAIRS}experiment: {{kind: steering}}", r"experiment\.layers is missing"),
        (f"{HEAD}{PAIRS}experiment: {{kind: knockout, edges: [[a]]}}", r"experiment\.edges\[0\]"),
        (f"{HEAD}{PAIRS}experiment: {{kind: circuits, shares: [2]}}", r"shares\[0\] is 2"),
        (f"{HEAD}{PAIRS}experiment: {{kind: circuits, shares: [1, 1]}}", "shares.*twice"),
        (
            f"{HEAD}{PAIRS}experiment: {{kind: steering, layers: [3, 3]}}",
            r"layers: \[3, 3\].*twice",
        ),
        (f"{HEAD}{PAIRS}experiment: {{kind: knockout, edges: [[a, b], [a, b]]}}", "edges.*twice"),
        (f"{HEAD}{PAIRS}experiment: {{kind: ablation, site: [z, pattern]}}", "'pattern' cannot be"),
        (
            f"{HEAD}{PAIRS}experiment: {{kind: ablation, site: [z, ple_out], post_norm: frozen}}",
            "experiment: post_norm 'frozen' goes with z and mlp_post, not with 'ple_out'",
        ),
        (f"{HEAD}{PAIRS}experiment: {{kind: patching, carry: [kv, kv]}}", "carry.*twice"),
        (
            f"{HEAD}{PAIRS}experiment: {{kind: steering, layers: [3], strengths: [.inf]}}",
            r"experiment\.strengths\[0\] is inf: .*finite",
        ),
        (f"{HEAD}{PAIRS}{KIND}metrics: [os.system]", "Metrics: logit_diff, logit, prob"),
        (f"{HEAD}{PAIRS}experiment: {{kind: patching, heads: []}}", r"experiment\.heads"),
        (f"{HEAD}{PAIRS}{KIND}baselines: {{randm: 0}}", r"baselines\.randm is unknown.*'random'"),
        (f"{HEAD}{PAIRS}{KIND}statistics: {{alpha: 0.9}}", r"statistics\.alpha is 0\.9"),
        (f"{HEAD}{KIND}pairs: {{task: captal, n: 3}}", r"pairs.*'captal'.*'capital'"),
        (f"{HEAD}{KIND}pairs: {{task: capital}}", "pairs: n is missing"),
        (f"{HEAD}{KIND}pairs: {{task: capital, n: 0}}", r"pairs\.n is 0"),
        (f"{HEAD}{KIND}pairs: {{}}", "neither of task and file"),
        (f"{HEAD}{KIND}pairs: {{task: capital, n: 3, file: p.jsonl}}", "both of task and file"),
        (f"{HEAD}{KIND}pairs: {{file: p.jsonl, n: 3}}", "n does not go with file"),
    ],
)
def test_mistakes(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        read(tmp_path, text)


def test_pairs_of_a_file(tmp_path):
    model = g4lens.load("tiny")
    path = tmp_path / "p.jsonl"
    g4lens.tasks.pairs("capital", 6).to_jsonl(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def load(given):
        return read(tmp_path, f"{HEAD}{KIND}pairs: {given}").pairs.load(tmp_path, model)

    assert len(load(f"{{file: p.jsonl, sha256: {digest}}}")) == 6
    assert len(load("{file: p.jsonl, filter: true}")) == 6
    with pytest.raises(InputError, match="has the sha256"):
        load(f"{{file: p.jsonl, sha256: '{'0' * 64}'}}")
    with pytest.raises(InputError, match="outside the spec's folder"):
        load("{file: ../p.jsonl}")
    with pytest.raises(InputError, match="no file"):
        load("{file: q.jsonl}")
    lonely = [g4lens.Pair("a", "b", " c")]
    g4lens.Pairs(lonely).to_jsonl(tmp_path / "lonely.jsonl")
    with pytest.raises(InputError, match=r"pairs\.filter: pair 0 has no foil"):
        load("{file: lonely.jsonl, filter: true}")
    (tmp_path / "x.jsonl").write_text(
        '{"clean": [{"image": "no.png"}], "corrupted": "b", "answer": "c"}'
    )
    with pytest.raises(InputError, match="line 1: no image"):
        load("{file: x.jsonl}")
    path.write_text("")
    with pytest.raises(InputError, match="no pairs"):
        load("{file: p.jsonl}")
