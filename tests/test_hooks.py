"""Hooks: what an edit reaches, under every way of running, and what is left behind."""

import copy
import pickle
import threading
from itertools import pairwise

import pytest
import torch

from g4lens.errors import HookError, HookNameError
from g4lens.hooks import Hook
from tests.conftest import unchecked

EDITED = [
    "hook_embed",
    "hook_ple_token",
    "hook_ple",
    "blocks.2.hook_resid_pre",
    "blocks.2.hook_attn_out",
    "blocks.3.hook_resid_mid",
    "blocks.3.mlp.hook_post",
    "blocks.3.mlp.hook_out",
    "blocks.3.hook_resid_pre_ple",
    "blocks.3.ple.hook_pre",
    "blocks.4.hook_ple_out",
    "blocks.4.hook_resid_post",
    "blocks.1.ln1.hook_normalized",
    "blocks.1.ln2_post.hook_scale",
    "blocks.4.attn.hook_q",
    "blocks.4.attn.hook_k",
    "blocks.5.attn.hook_v",
    "blocks.4.attn.hook_rot_q",
    "blocks.4.attn.hook_rot_k",
    "blocks.5.attn.hook_norm_v",
    "blocks.9.attn.hook_rot_k",
    "blocks.7.attn.hook_norm_v",
    "blocks.8.attn.hook_rot_k",
    "blocks.3.attn.hook_z",
    "blocks.3.attn.hook_out",
    "blocks.4.attn.hook_attn_scores",
    "blocks.9.attn.hook_pattern",
    "blocks.8.attn.hook_attn_scores",
]
POSITION, READ = 17, [-1, -4]


def edit_at(position: int):
    """Shrink and tilt what stands at a position, in place; of a matrix, that key's column."""

    def edit(x, hook: Hook):
        if "key_pos" in hook.axes and "query_pos" in hook.axes:
            batch, row = hook.at(position, "key_pos")
            x[batch, :, :, row] *= 0.5
        else:
            tilt = torch.linspace(-0.3, 0.3, x.shape[-1]) if x.shape[-1] > 1 else 0.0
            x[hook.at(position)] = x[hook.at(position)] * 0.5 + tilt

    return edit


def zero_in_place(x, hook: Hook):
    x[:] = 0


@pytest.mark.parametrize("name", EDITED)
def test_the_same_edit_under_every_way_of_running(model, tokens, name):
    """Full, with reads, padded, from a state, in chunks, behind a past: one result."""
    plain = model(tokens)
    hooks = {"fwd_hooks": [(name, edit_at(POSITION))]}
    full = model.run_with_hooks(tokens, **hooks)
    assert (full - plain).abs().max() > 1e-3, "the edit did nothing"

    def agrees(logits, expected=full[:, READ]):
        torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)

    agrees(model.run_with_hooks(tokens, **hooks), full)
    if "hook_pattern" not in name and int(hooks_layer(name)) <= model.cfg.horizon:
        agrees(model.run_with_hooks(tokens, read=READ, **hooks))
        agrees(model.run_with_hooks(tokens, read=READ, chunk=5, **hooks))
    agrees(model.run_with_hooks(tokens, chunk=7, **hooks), full)
    longer = torch.cat([tokens[0], tokens[1]])
    agrees(model.run_with_hooks([longer, tokens[0]], read=READ, **hooks)[1:], full[:1, READ])
    if name.startswith("blocks"):
        entering = model(tokens, stop=hooks_layer(name))
        agrees(model.run_with_hooks(state=entering, **hooks), full)
    if hooks_layer(name) >= 1 and "rot_k" not in name and "norm_v" not in name:
        past = model(tokens[:, :9], stop=model.cfg.n_layers).kv
        agrees(model.run_with_hooks(tokens[:, 9:], past=past, **hooks), full[:, 9:])


def hooks_layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks") else 0


@pytest.mark.parametrize("name", EDITED)
def test_generating_sees_the_same_edit(model, tokens, name):
    """Logits while generating equal those of full runs over the text so far, both edited."""
    hooks = [(name, edit_at(POSITION))]
    logits = []
    with model.hooks([*hooks, ("hook_logits", lambda x, hook: logits.append(x[:, -1]))]):
        out = model.generate(tokens, max_new_tokens=6, stop_tokens=[])
    text = torch.cat([tokens, torch.tensor([o.tokens for o in out])], dim=1)
    full = model.run_with_hooks(unchecked(text), fwd_hooks=hooks)
    torch.testing.assert_close(torch.stack(logits, 1), full[:, 22:-1], atol=2e-3, rtol=0)


def test_every_point_takes_an_edit_in_place_that_reaches_nothing_else(model, tokens):
    """`x[...] = 0` in a reader's keys or values leaves the owner and other readers alone."""
    _, plain = model.run_with_cache(tokens, ["*attn.hook_rot_k", "*attn.hook_norm_v"])
    for reader in (6, 7, 8):
        for point in ("rot_k", "norm_v"):
            name = f"blocks.{reader}.attn.hook_{point}"
            with model.hooks([(name, zero_in_place)]):
                _, cache = model.run_with_cache(tokens, f"*attn.hook_{point}")
            assert (cache[name] == 0).all()
            for other in range(10):
                if other != reader:
                    assert torch.equal(cache[point, other], plain[point, other]), (name, other)


def test_an_owners_edit_reaches_all_its_readers(model, tokens):
    with model.hooks([("blocks.5.attn.hook_norm_v", lambda x, hook: torch.zeros_like(x))]):
        _, cache = model.run_with_cache(tokens, "*attn.hook_norm_v")
    readers = model.cfg.readers(5)
    assert readers == (5, 6, 7, 8)
    for layer in range(10):
        assert bool((cache["norm_v", layer] == 0).all()) == (layer in readers)


@pytest.mark.unchecked
def test_edits_at_every_point_change_the_logits(model, seen_and_heard):
    """Whatever is named can be edited, in the towers too, in place, and the edit is not lost."""
    plain = model(seen_and_heard)

    def tilt(x, hook):
        x += torch.linspace(-1, 1, x.shape[-1]) if x.shape[-1] > 1 else 1.0

    for name in model.hook_points:
        changed = model.run_with_hooks(seen_and_heard, fwd_hooks=[(name, tilt)])
        assert not torch.equal(changed, plain), f"an edit of {name} changed nothing"


def test_an_owners_edit_happens_once_while_generating(model, tokens):
    """An owner sees the rows written in a pass; what it adds stays in what is kept, once."""
    seen, kept = [], []
    owner, reader = "blocks.5.attn.hook_rot_k", "blocks.8.attn.hook_rot_k"

    def add(x, hook):
        seen.append((hook.step, hook.key_positions.tolist()[0]))
        return x + 3

    with model.hooks([(owner, add), (reader, lambda x, hook: kept.append(x.clone()))]):
        model.generate(tokens, max_new_tokens=8, stop_tokens=[])
    assert [step for step, _ in seen] == list(range(8))
    assert seen[0][1] == list(range(23))
    assert [rows for _, rows in seen[1:]] == [[p] for p in range(23, 30)]
    window = model.cfg.sliding_window
    for before, after in pairwise(kept):
        assert torch.equal(after[:, -window:-1], before[:, -(window - 1) :])


def test_readers_see_every_prompt_position_while_generating(model, tokens):
    shapes = []
    with model.hooks([("blocks.8.hook_resid_post", lambda x, hook: shapes.append(tuple(x.shape)))]):
        model.generate(tokens, max_new_tokens=3, stop_tokens=[])
    assert shapes == [(2, 23, 32), (2, 1, 32), (2, 1, 32)]


def test_positions_steps_and_at(model, tokens):
    told = []
    short = tokens[1, :9]
    with model.hooks([("blocks.2.hook_resid_pre", lambda x, hook: told.append(hook))]):
        model.generate([tokens[0], short], max_new_tokens=2, stop_tokens=[])
    first, second = told
    assert first.positions[1].tolist() == [-1] * 14 + list(range(9))
    assert [x.tolist() for x in first.at(-1)] == [[0, 1], [22, 22]]
    assert [x.tolist() for x in first.at(12)] == [[0], [12]]
    assert [x.tolist() for x in first.at(99)] == [[], []]
    assert second.step == 1 and second.positions.tolist() == [[23], [9]]
    assert [x.tolist() for x in second.at(9)] == [[1], [0]]
    assert first.layer() == 2
    with pytest.raises(HookError, match="has no axis 'key_pos', its axes are batch pos d_model"):
        first.at(3, "key_pos")


def test_horizon_is_exact(model, tokens):
    """At the horizon or later, an unread position moves other logits by exactly 0."""
    plain, cfg = model(tokens), model.cfg

    def noise(x, hook):
        x[hook.at(10)] = torch.randn(x[hook.at(10)].shape)

    others = [p for p in range(23) if p != 10]
    for layer in range(cfg.n_layers):
        names = ["hook_resid_post"] + (
            ["attn.hook_q", "attn.hook_z", "hook_attn_out"] if layer == cfg.horizon else []
        )
        for name in names:
            changed = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.{name}", noise)])
            moved = (changed - plain)[:, others].abs().max()
            assert (moved == 0) == (layer >= cfg.horizon), (layer, name, moved)
            assert (changed - plain)[:, 10].abs().max() > 0


def test_nothing_is_left_after_the_block_or_an_error(model, tokens):
    plain = model(tokens)

    def fail(x, hook):
        raise RuntimeError("from the hook")

    with pytest.raises(RuntimeError, match="from the hook"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.*", fail)])
    with pytest.raises(RuntimeError), model.hooks([("*", fail)]):
        model.generate(tokens)
    assert not any(point.is_hung for point in model.hook_points.values())
    assert torch.equal(model(tokens), plain)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda x: x.flatten(2), r"shape \(2, 23, 32\), but the activation's is \(2, 23, 4, 8\)"),
        (lambda x: x.double(), "dtype torch.float64, but the activation's is torch.float32"),
        (lambda x: x.tolist(), "returned a list, expected a tensor or None"),
    ],
)
def test_a_wrong_return_value_names_itself(model, tokens, returned, says):
    with pytest.raises(HookError, match=says):
        model.run_with_hooks(
            tokens, fwd_hooks=[("blocks.3.attn.hook_z", lambda x, hook: returned(x))]
        )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("blocks.3.attn.hook_patern", "Did you mean 'blocks.3.attn.hook_pattern'"),
        ("blocks.*.hook_resid_pst", "no hook point matches"),
        (
            "blocks.8.attn.hook_k",
            r"Block 8 reads block 5's keys and values: use 'blocks.5.attn.hook_k'",
        ),
        (lambda name: False, "the predicate is true of no hook point"),
        ([], "empty list"),
    ],
)
def test_names_that_match_nothing(model, tokens, name, says):
    with pytest.raises(HookNameError, match=says):
        model.run_with_cache(tokens, name)
    with pytest.raises(HookNameError, match=says):
        model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: None)])


def test_points_that_a_run_does_not_compute(model, tokens):
    for run in (
        lambda: model.run_with_cache(tokens, "audio.*"),
        lambda: model.run_with_cache(tokens, "blocks.5.hook_resid_pre", stop=5),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[("vision.*", lambda x, hook: None)]),
        lambda: model.run_with_cache(
            state=model(tokens, stop=4), names_filter=["blocks.3.*", "blocks.5.*"]
        ),
    ):
        with pytest.raises(HookNameError, match="computed no activation of"):
            run()


def test_hooks_belong_to_their_thread(model, tokens):
    plain, other = model(tokens), []
    with model.hooks([("blocks.2.hook_resid_post", lambda x, hook: x * 0)]):
        thread = threading.Thread(target=lambda: other.append(model(tokens)))
        thread.start()
        thread.join()
        assert not torch.equal(model(tokens), plain)
    assert torch.equal(other[0], plain)


def test_copying_with_hooks_hung_raises(model, tokens):
    copies = (copy.copy, copy.deepcopy, pickle.dumps)
    with model.hooks([("blocks.2.hook_resid_post", lambda x, hook: None)]):
        for make in copies:
            with pytest.raises(HookError, match="has hooks hung"):
                make(model)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens), model(tokens))
    assert twin.hook_points["hook_embed"] is twin.hook_embed


def test_the_cache_holds_what_went_on_whichever_was_hung_first(model, tokens):
    name = "blocks.2.hook_resid_post"
    with model.hooks([(name, lambda x, hook: x * 0)]):
        _, cache = model.run_with_cache(tokens, name)
    assert (cache[name] == 0).all()


def test_backward_hooks_see_and_change_gradients(model, tokens):
    seen = {}

    def note(grad, hook):
        seen[hook.name] = grad, hook.positions
        return grad * 0 if hook.name.endswith("3.hook_resid_post") else None

    names = ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    with model.hooks(bwd_hooks=[(names, note)]):
        model(tokens)[:, -1, 5].sum().backward()
    assert list(seen) == names[::-1]
    assert (seen[names[1]][0] != 0).any()
    assert (seen[names[0]][0] == 0).all(), "block 3's gradient was zeroed on its way"
    assert seen[names[0]][1].tolist()[0] == list(range(23))
