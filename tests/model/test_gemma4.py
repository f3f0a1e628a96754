"""What a call of the model refuses, and that it says so before it computes."""

import pytest
import torch

import g4lens
from g4lens.errors import InputError
from g4lens.model import gemma4
from g4lens.resources import free_memory
from tests.conftest import small_config


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"read": 23}, "position 23 is outside a prompt of 23 tokens"),
        ({"read": [-24]}, "position -24 is outside"),
        ({"read": 1.5}, "position 1.5 is outside"),
        (
            {"read": torch.zeros(3, 1, dtype=torch.int64)},
            "positions for 3 prompts, but there are 2",
        ),
        ({"stop": 11}, "stop is 11, expected 0 to 10"),
        ({"stop": -1}, "stop is -1"),
        ({"chunk": 0}, "chunk is 0, expected at least 1"),
    ],
)
def test_wrong_arguments(model, tokens, options, says):
    with pytest.raises(InputError, match=says):
        model(tokens, **options)


def test_slices_must_take_as_many_from_each_prompt(model, tokens):
    prompts = [tokens[0], tokens[1, :9]]
    assert model(prompts, read=slice(-3, None)).shape == (2, 3, 100)
    with pytest.raises(InputError, match=r"takes \[9, 23\] positions from prompts of \[9, 23\]"):
        model(prompts, read=slice(None))


def test_inputs_or_a_state_but_not_both(model, tokens):
    state = model(tokens, stop=4)
    for call in (lambda: model(), lambda: model(tokens, state=state)):
        with pytest.raises(InputError, match="give either inputs or state="):
            call()
    with pytest.raises(InputError, match="past= and chunk= go with inputs"):
        model(state=state, chunk=3)
    with pytest.raises(InputError, match="stop is 3, expected 4 to 10"):
        model(state=state, stop=3)
    with pytest.raises(InputError, match=r"past is a State, expected keys .* state\.kv"):
        model(tokens, past=state)
    with pytest.raises(InputError, match=r"chunk is 1\.5, expected at least 1"):
        model(tokens, chunk=1.5)


def test_logits_that_would_not_fit(model, tokens, monkeypatch):
    monkeypatch.setattr(gemma4, "free_memory", lambda device: 10_000)
    with pytest.raises(InputError, match=r"logits of 46 positions need .* as in read=-1"):
        model(tokens)
    assert model(tokens, read=-1).shape == (2, 1, 100)


def test_free_memory_is_that_of_this_machine():
    assert 2**26 < free_memory(torch.device("cpu")) < 2**50


def test_tokens_by_text_and_id():
    model = g4lens.load("tiny", device="cpu")
    paris = model.token_ids(" Paris")
    assert paris.ndim == 0 and model.token_ids([" Paris", int(paris)]).tolist() == [paris] * 2
    with pytest.raises(InputError, match=r"'Paris or Rome' is \d+ tokens .*, expected exactly one"):
        model.token_ids("Paris or Rome")
    with pytest.raises(InputError, match="has no tokenizer"):
        g4lens.Gemma4(small_config()).token_ids("x")
