"""The sampling loop."""

from dataclasses import replace

import pytest
import torch

from g4lens.errors import InputError
from g4lens.generate import Sampler
from g4lens.inputs.batch import prepare
from tests.conftest import unchecked


def greedily(model, tokens, n):
    for _ in range(n):
        likeliest = model(unchecked(tokens))[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, likeliest], dim=1)
    return tokens[:, -n:].tolist()


def test_greedy_equals_full_runs(model, tokens):
    out = model.generate(tokens, max_new_tokens=20, stop_tokens=[])
    assert [list(o.tokens) for o in out] == greedily(model, tokens, 20)


@pytest.mark.parametrize("chunk", [None, 7])
def test_unequal_prompts_give_what_each_gives_alone(model, tokens, chunk):
    prompts = [tokens[0], tokens[1, :9], tokens[1, 2:18]]
    together = model.generate(prompts, max_new_tokens=10, stop_tokens=[], chunk=chunk)
    for prompt, out in zip(prompts, together, strict=True):
        assert out.tokens == model.generate(prompt[None], max_new_tokens=10, stop_tokens=[]).tokens


def test_with_picture_and_sound(model, seen_and_heard):
    out = model.generate(seen_and_heard, max_new_tokens=5, stop_tokens=[])
    batch = prepare(seen_and_heard, None, model.cfg)
    for token in out.tokens:
        assert token == model(batch)[0, -1].argmax()
        ids = torch.cat([batch.tokens, torch.tensor([[token]])], dim=1)
        batch = replace(batch, tokens=ids, positions=unchecked(ids).positions)


def test_stop_tokens_end_each_row_by_itself(model, tokens):
    free = [o.tokens for o in model.generate(tokens, max_new_tokens=8, stop_tokens=[])]
    stop = free[0][2]
    stopped = model.generate(tokens, max_new_tokens=8, stop_tokens=[stop])
    for row, out in zip(free, stopped, strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        assert out.tokens == row[:end]


def test_hooks_hold_while_generating(model, tokens):
    plain = model.generate(tokens, max_new_tokens=4, stop_tokens=[])

    def favour(x, hook):
        x[..., 42] = 100.0

    with model.hooks([("hook_logits", favour)]):
        steered = model.generate(tokens, max_new_tokens=4, stop_tokens=[])
    assert [o.tokens for o in steered] == [(42,) * 4] * 2
    assert [o.tokens for o in model.generate(tokens, max_new_tokens=4, stop_tokens=[])] == [
        o.tokens for o in plain
    ]


def test_sampling_follows_the_distribution():
    random = torch.Generator().manual_seed(0)
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, -1)

    def shares(**options):
        drawn = Sampler(**{"temperature": 1.0, **options}).draw(logits, random)
        return torch.bincount(drawn, minlength=4) / len(drawn)

    torch.testing.assert_close(shares(), torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)
    torch.testing.assert_close(
        shares(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0
    )
    torch.testing.assert_close(
        shares(top_p=0.79), torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0
    )
    assert shares(top_p=0.4).tolist() == [1, 0, 0, 0]
    assert shares(top_k=2, top_p=0.6).tolist() == [1, 0, 0, 0], "top_p counts what top_k leaves"
    squared = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    torch.testing.assert_close(shares(temperature=0.5), squared / squared.sum(), atol=0.03, rtol=0)


def test_a_seed_repeats(model, tokens):
    def run(seed):
        return [
            o.tokens for o in model.generate(tokens, max_new_tokens=8, temperature=2.0, seed=seed)
        ]

    assert run(1) == run(1) != run(2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": 5}, "change nothing at temperature 0"),
        ({"max_new_tokens": 1000}, "exceed the context of 512: at most 489 fit"),
        ({"stop_tokens": ["x"]}, "has no tokenizer"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_wrong_arguments(model, tokens, options, says):
    with pytest.raises(InputError, match=says):
        model.generate(tokens, **options)
