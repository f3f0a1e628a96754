"""Specs: what they become, and how each mistake is told."""

import pytest

from g4lens import HookNameError, InputError
from g4lens.experiment.spec import CacheSpec, check_names, read_spec

GOOD = {"model": "tiny", "prompts": "p.jsonl", "names": "[hook_embed]"}


def spec(tmp_path, **changes):
    path = tmp_path / "s.yaml"
    lines = {k: v for k, v in {**GOOD, **changes}.items() if v is not None}
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return path


def test_a_spec(tmp_path):
    found = read_spec(spec(tmp_path), CacheSpec)
    assert found.model.name == "tiny" and found.names == ["hook_embed"]
    assert found.positions == "all" and found.prompts_per_unit == 32
    whole = read_spec(
        spec(
            tmp_path, model="{name: tiny, dtype: bfloat16}", names="hook_ple", positions="[0, -1]"
        ),
        CacheSpec,
    )
    assert whole.model.dtype == "bfloat16" and whole.names == ["hook_ple"]
    assert whole.positions == [0, -1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nams": "x"}, r"s\.yaml: nams is unknown, expected model.* Did you mean 'names'"),
        ({"model": "{name: tiny, dtpe: float32}"}, r"model\.dtpe is unknown.*'dtype'"),
        ({"model": None}, "model is missing"),
        ({"model": "{name: tiny, dtype: int8}"}, r"model\.dtype is 'int8'"),
        ({"names": "[]"}, "names is"),
        ({"names": "[3]"}, r"names\[0\] is 3"),
        ({"positions": "lst"}, "positions is 'lst', expected one of all.*'last'"),
        ({"positions": "1:2:3"}, "positions is"),
        ({"positions": "[]"}, "expected a word"),
        ({"prompts_per_unit": "'4'"}, "prompts_per_unit is '4'"),
        ({"prompts_per_unit": "0"}, "prompts_per_unit is 0"),
        ({"dtype": "float8"}, "dtype is 'float8', expected one of float64, .* Did you mean 'float"),
        ({"dtype": "float32\nmodel: tiny"}, r"s\.yaml: model is there twice"),
        ({"model": "{name: tiny, dtype: float32, dtype: float64}"}, "dtype is there twice"),
        ({"prompts": "&a [*a]"}, "prompts is"),
        ({"model": "!!python/object/apply:os.system [exit]"}, "not readable as YAML"),
        ({"model": "[1"}, "not readable as YAML"),
    ],
)
def test_mistakes(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_spec(spec(tmp_path, **changes), CacheSpec)


def test_no_spec_at_all(tmp_path):
    with pytest.raises(InputError, match="no file"):
        read_spec(tmp_path / "s.yaml", CacheSpec)
    (tmp_path / "s.yaml").write_text("just words")
    with pytest.raises(InputError, match="found a str, expected keys"):
        read_spec(tmp_path / "s.yaml", CacheSpec)
    with pytest.raises(InputError, match="not readable"):
        read_spec(tmp_path, CacheSpec)


def test_names_are_checked_without_weights(tmp_path):
    found = read_spec(spec(tmp_path), CacheSpec)
    skeleton = found.model.skeleton(tmp_path)
    assert skeleton.device.type == "meta"
    check_names(["blocks.*.hook_resid_post"], skeleton, "s.yaml")
    with pytest.raises(HookNameError, match=r"s\.yaml: names\[1\].*blocks\.3\.hook_resid_post"):
        check_names(["hook_embed", "blocks.3.hook_resid_pst"], skeleton, "s.yaml")
