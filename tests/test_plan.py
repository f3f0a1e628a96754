"""A plan tells what a run holds: measured in processes of their own, and part by part."""

import itertools
from dataclasses import replace

import pytest
import torch

import g4lens
from g4lens.errors import HookNameError, InputError
from g4lens.plan import RELEASED, Options, fitting, plan
from tests.peak import measured

pytestmark = pytest.mark.unchecked

E2B = RELEASED["E2B"]
CACHED = "blocks.*.hook_resid_post"


@pytest.mark.parametrize(
    "run",
    [
        {"model": "tiny", "context": 1024, "batch": 16},
        {"model": "tiny", "context": 512, "batch": 16, "read": "all", "cache": CACHED},
        {"model": "mid", "context": 2048},
        {"model": "mid", "context": 6000, "chunk": 1024, "cache": CACHED},
        {"model": "mid", "context": 8192, "chunk": 2048},
    ],
)
def test_measured_peaks(run):
    told = measured(**run)
    assert told["measured"] == pytest.approx(told["planned"], rel=0.1), told


@pytest.mark.parametrize("context", [1024, 65_536, 131_072])
@pytest.mark.parametrize("chunk", [None, 2048])
def test_the_released_geometry(context, chunk):
    options = Options(context=context, chunk=chunk, ple="disk")
    told = plan(E2B, options)
    assert 3.7e9 < told.parts["decoder"] < 3.8e9 and told.parts["PLE table"] == 0
    local, wide = 2 * 256 * 2, 2 * 512 * 2  # bytes of a position's keys and values
    last = context if chunk is None else min(chunk, context)
    kept = min(context, last + 511)
    assert told.parts["keys and values"] == 12 * kept * local + 3 * context * wide
    assert told.total == sum(told.parts.values())


def test_weights_are_those_of_the_model(model, cfg):
    told = plan(cfg, Options(context=8, dtype="float32"))
    assert told.weights == sum(4 * x.numel() for x in model.state_dict().values())
    half = plan(cfg, Options(context=8, dtype="bfloat16"))
    assert half.weights == told.weights / 2
    without = plan(cfg, Options(context=8, dtype="float32", vision=False, audio=False))
    assert without.parts["vision"] == without.parts["audio"] == 0
    disk = plan(cfg, Options(context=8, ple="disk", embed="ram"))
    assert disk.parts["PLE table"] == disk.parts["embedding"] == 0


def test_fewer_bits_need_less():
    by_bits = [
        plan(E2B, Options(context=64, quantize=q)).parts["decoder"] for q in (None, "int8", "int4")
    ]
    assert all(0.45 * a < b < 0.75 * a for a, b in itertools.pairwise(by_bits))


@pytest.mark.parametrize("names", [CACHED, ["hook_embed", "blocks.*.attn.hook_z"]])
@pytest.mark.parametrize("chunk", [None, 20])
def test_cached_bytes_are_those_of_a_cache(model, cfg, names, chunk):
    ids = torch.randint(3, 90, (2, 60))
    _, cache = model.run_with_cache(ids, names, chunk=chunk)
    options = Options(context=60, batch=2, chunk=chunk, dtype="float32", cache=names, read="all")
    held = sum(x.untyped_storage().nbytes() for x in cache._storages())
    assert plan(cfg, options).parts["cached"] == held


def test_memory_grows_by_the_keys_and_values_alone():
    """In chunks, twice those of global owners: the old ones live while new ones are joined."""
    a, b = (plan(E2B, Options(context=n, chunk=1024)).total for n in (65_536, 131_072))
    assert (b - a) / 65_536 == pytest.approx(2 * 3 * 2 * 512 * 2, rel=0.1)


def test_what_makes_it_fit():
    """Savings add up, the cheapest first."""
    few = replace(E2B, n_layers=5, layer_types=E2B.layer_types[:5], n_kv_shared_layers=0)
    options = Options(context=16_384)
    whole, disk = (plan(few, replace(options, ple=ple)) for ple in ("device", "disk"))
    assert fitting(few, options, whole.total).options == options
    assert fitting(few, options, whole.total - 1).options == disk.options
    chunked = fitting(few, options, disk.total - 1)
    assert chunked.options == replace(options, ple="disk", chunk=8192)
    assert chunked.total < disk.total
    assert fitting(few, options, 10**7) is None


def test_nothing_is_left_behind(model):
    with pytest.raises(HookNameError, match="no hook point matches"):
        plan(model.cfg, Options(context=8, cache="blocks.99.*"))
    assert not any(point.is_hung for point in model.hook_points.values())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"context": 0}, "context is 0, expected at least 1"),
        ({"batch": 0}, "batch is 0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"dtype": "bfloat"}, "Did you mean 'bfloat16'"),
        ({"quantize": "int5"}, "expected one of None, int8, int4"),
        ({"ple": "tape"}, "ple is 'tape', expected one of device, ram, disk"),
        ({"read": "some"}, "expected one of last, all"),
    ],
)
def test_wrong_options(wrong, says):
    with pytest.raises(InputError, match=says):
        Options(**{"context": 8, **wrong})


def test_a_longer_context_than_the_model_has():
    with pytest.raises(InputError, match="131,073 tokens is longer than the context of 131,072"):
        plan(E2B, Options(context=131_073))
    short = replace(E2B, n_ctx=100)
    with pytest.raises(InputError, match="longer than the context of 100"):
        plan(short, Options(context=101))
    assert g4lens.Gemma4Config.from_json(g4lens.sample("tiny")).n_ctx == 1024
