"""Fused and explicit attention agree wherever queries and keys stand."""

import pytest
import torch

from g4lens.attention import Sight, attention_pattern, explicit_attention, visible
from g4lens.hooks import HookPoint, Hung, hang
from g4lens.state import Rows

WINDOW = 8


def qkv(batch, n_queries, n_keys, heads=4, kv_heads=2, d=16):
    random = torch.Generator().manual_seed(n_queries + n_keys)
    shapes = (
        (batch, n_queries, heads, d),
        (batch, n_keys, kv_heads, d),
        (batch, n_keys, kv_heads, d),
    )
    return (torch.randn(shape, generator=random) for shape in shapes)


def explicit(q, k, v, mask):
    return edited(q, k, v, mask)


def edited(q, k, v, mask, scores=None, pattern=None):
    """Explicit attention with functions hung on its two points."""
    points = HookPoint("batch head query_pos key_pos"), HookPoint("batch head query_pos key_pos")
    edits = [(p, Hung(edits=[fn])) for p, fn in zip(points, (scores, pattern), strict=True) if fn]
    with hang(edits):
        return explicit_attention(q, k, v, mask, *points)


@pytest.mark.parametrize("window", [WINDOW, 1000])
@pytest.mark.parametrize(
    ("n_queries", "n_keys"),
    [(40, 40), (41, 50), (17, 40), (16, 16), (8, 8), (5, 40), (1, 40), (40, 43), (1, 1), (0, 9)],
)
def test_fused_equals_explicit(n_queries, n_keys, window):
    q, k, v = qkv(2, n_queries, n_keys)
    positions = torch.arange(n_keys).expand(2, -1)
    keys = Rows(positions, 0)
    sight = Sight(
        keys
        if n_queries == n_keys
        else Rows(positions[:, n_keys - n_queries :], n_keys - n_queries)
    )
    fused = sight.attend(q, k, v, keys, window)
    torch.testing.assert_close(
        fused, explicit(q, k, v, sight.mask(keys, window)), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("window", [WINDOW, 30, 1000])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_nothing_and_is_finite(window, side):
    q, k, v = qkv(2, 40, 40)
    pad, real = torch.full((11,), -1), torch.arange(29)
    padded = torch.cat([pad, real] if side == "left" else [real, pad])
    rows = Rows(torch.stack([torch.arange(40), padded]))
    fused = Sight(rows).attend(q, k, v, rows, window)
    torch.testing.assert_close(
        fused, explicit(q, k, v, Sight(rows).mask(rows, window)), atol=2e-6, rtol=1e-5
    )
    assert (fused[1][padded < 0] == 0).all()
    alone = Rows(real[None], 0)
    where = padded >= 0
    unpadded = Sight(alone).attend(*(x[1:, where] for x in (q, k, v)), alone, window)
    torch.testing.assert_close(fused[1:, where], unpadded, atol=2e-6, rtol=1e-5)


def test_rows_without_open_key_give_zeros_and_finite_gradients():
    q, k, v = qkv(1, 6, 6)
    q.requires_grad_()
    rows = Rows(torch.arange(6)[None], 0)
    closed = edited(q, k, v, Sight(rows).mask(rows, 3), scores=lambda s, hook: s - torch.inf)
    assert (closed == 0).all()
    assert torch.autograd.grad(closed.sum(), q)[0].isfinite().all()


def test_the_mask_holds_after_edits():
    q, k, v = qkv(1, 12, 12)
    rows = Rows(torch.arange(12)[None], 0)
    mask = Sight(rows).mask(rows, 4)
    seen = []
    edited(q, k, v, mask, lambda s, hook: s * 0, lambda p, hook: seen.append(p))
    assert (seen[0][~mask.expand_as(seen[0])] == 0).all()
    opened = edited(q, k, v, mask, pattern=lambda p, hook: torch.ones_like(p))
    window_sums = torch.stack([v[:, max(0, i - 3) : i + 1].sum(1) for i in range(12)], 1)
    torch.testing.assert_close(opened, window_sums.repeat_interleave(2, dim=2))


def test_pattern_is_at_least_float32():
    scores = torch.randn(1, 1, 3, 5)
    assert attention_pattern(scores.bfloat16()).dtype == torch.float32
    assert attention_pattern(scores.double()).dtype == torch.float64


def test_window_counts_the_query_itself():
    sees = visible(torch.arange(10), torch.arange(10), 4)
    assert sees.sum(-1).tolist() == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]
