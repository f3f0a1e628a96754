"""The sampling loop: greedy or at a temperature, with keys and values kept from token to token.

Hooks hung around it act at every step: `hook.step` is 0 in the prompt's pass, then 1, 2, ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.config import Gemma4Config
from g4lens.errors import InputError
from g4lens.inputs.batch import Batch, prepare
from g4lens.inputs.chat import Reply, parse
from g4lens.inputs.processor import Processor
from g4lens.inputs.prompt import Prompt
from g4lens.inputs.tokenizer import Tokenizer
from g4lens.state import State

Logits = Float[Tensor, "batch d_vocab"]
Tokens = Int[Tensor, "batch"]


@runtime_checkable
class Generator(Protocol):
    """What the loop needs of a model."""

    cfg: Gemma4Config
    processor: Processor | None

    def prefill(self, batch: Batch, chunk: int | None) -> tuple[Logits, State]:
        """The logits behind each prompt, and the state that its next token follows."""
        ...

    def advance(self, tokens: Tokens, state: State, step: int) -> tuple[Logits, State]:
        """The logits behind one more token of each prompt, and the new state."""
        ...


@dataclass(frozen=True)
class Generation:
    """What a model wrote.

    Attributes:
        tokens: the ids it generated, the one that stopped it included.
        text: the same as text, without special tokens; None for a model without tokenizer.
        prompt: the prompt with the generated tokens behind it, thoughts and tool calls marked in
            `Token.role`; None where the input was no text or Prompt.
        reply: text, thoughts and tool calls apart. Reading it raises InputError for a malformed
            call.
    """

    tokens: tuple[int, ...]
    text: str | None
    prompt: Prompt | None
    raw: str | None

    @property
    def reply(self) -> Reply:
        """What was written, parsed. Raises: InputError: a malformed call, or no tokenizer."""
        if self.raw is None:
            raise InputError("a model without tokenizer gives ids only, nothing to parse")
        return parse(self.raw)

    def __str__(self) -> str:
        return self.text if self.text is not None else str(list(self.tokens))


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from logits. Temperature 0 takes the likeliest.

    Raises: InputError: a value out of range, or one that has no effect at temperature 0.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected more than 0 and at most 1")
        if self.temperature == 0 and not self.top_k is self.top_p is self.seed is None:
            raise InputError(
                "top_k, top_p and seed change nothing at temperature 0: set a temperature"
            )

    def generator(self) -> torch.Generator:
        """Random numbers, on the CPU so that a seed gives the same text on every device."""
        random = torch.Generator()
        random.seed() if self.seed is None else random.manual_seed(self.seed)
        return random

    def draw(self, logits: Logits, random: torch.Generator) -> Tokens:
        """One token for each row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scaled = logits.float().cpu() / self.temperature
        ordered, order = scaled.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        if self.top_k is not None:
            probs = probs[:, : self.top_k] / probs[:, : self.top_k].sum(-1, keepdim=True)
        if self.top_p is not None:  # nothing beyond the smallest set that holds top_p
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0)
        pick = torch.multinomial(probs, 1, generator=random)
        return order.gather(1, pick)[:, 0].to(logits.device)


def generate(
    model: Generator,
    inputs: Any,
    max_new_tokens: int = 40,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int | str] | None = None,
    chunk: int | None = None,
) -> Generation | list[Generation]:
    """Let a model go on.

    Args:
        model: the model.
        inputs: as for a plain call of it.
        max_new_tokens: at most so many.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
        top_k: sample from the so many likeliest only.
        top_p: sample from the fewest tokens, of those that top_k leaves, that together have this
            probability.
        seed: makes sampling repeatable.
        stop_tokens: ids or texts of single tokens that end it; by default the config's
            end-of-sequence ids and the tokenizer's end-of-turn token.
        chunk: fill the prompt so many positions at a time.

    Returns:
        A `Generation`; for a list, or several rows of ids, a list of them.

    Raises:
        InputError: what is wrong with an argument.
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    batch, stops = _checked(model, inputs, max_new_tokens, stop_tokens)
    rows: list[list[int]] = [[] for _ in range(len(batch.tokens))]
    for step in _steps(model, batch, max_new_tokens, sampler, stops, chunk):
        for row, token in zip(rows, step, strict=True):
            if not row or row[-1] not in stops:
                row.append(token)
    made = [_generation(model, batch, i, row, stops) for i, row in enumerate(rows)]
    single = isinstance(inputs, str | Prompt) or (
        len(made) == 1 and not isinstance(inputs, list | tuple)
    )
    return made[0] if single else made


def stream(
    model: Generator,
    inputs: Any,
    max_new_tokens: int = 40,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int | str] | None = None,
    chunk: int | None = None,
) -> Iterator[str]:
    """The text that `generate` would return for one prompt, in pieces as they are made.

    Arguments and errors are those of `generate`; also InputError for more than one prompt or a
    model without tokenizer.
    """
    sampler = Sampler(temperature, top_k, top_p, seed)
    batch, stops = _checked(model, inputs, max_new_tokens, stop_tokens)
    if len(batch.tokens) != 1 or model.processor is None:
        raise InputError(
            f"stream takes one prompt and a model with tokenizer, found {len(batch.tokens)} prompts"
        )
    steps = _steps(model, batch, max_new_tokens, sampler, stops, chunk)
    return _pieces(model.processor.tokenizer, steps)


def _pieces(tokenizer: Tokenizer, steps: Iterator[list[int]]) -> Iterator[str]:
    ids, said = list[int](), ""
    for (token,) in steps:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special=True)
        if not text.endswith("\ufffd"):  # half of a character: wait for the rest
            yield text[len(said) :]
            said = text
    if (text := tokenizer.decode(ids, skip_special=True)) != said:
        yield text[len(said) :]


def _steps(
    model: Generator,
    batch: Batch,
    n: int,
    sampler: Sampler,
    stops: frozenset[int],
    chunk: int | None,
) -> Iterator[list[int]]:
    """One token for each prompt at a time, until all have stopped."""
    random, done = sampler.generator(), [False] * len(batch.tokens)
    logits: Tensor | None = None
    state: State | None = None
    tokens: Tensor | None = None
    for step in range(n):
        with torch.no_grad():
            if tokens is None or state is None:
                logits, state = model.prefill(batch, chunk)
            else:
                logits, state = model.advance(tokens, state, step)
            tokens = sampler.draw(logits, random)
        drawn = tokens.tolist()
        yield drawn
        done = [over or token in stops for over, token in zip(done, drawn, strict=True)]
        if all(done):
            return


def _checked(
    model: Generator, inputs: Any, max_new_tokens: int, stop_tokens: Sequence[int | str] | None
) -> tuple[Batch, frozenset[int]]:
    cfg, tokenizer = model.cfg, model.processor and model.processor.tokenizer
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    batch = prepare(inputs, model.processor, cfg)
    if (longest := int(batch.lengths.max())) + max_new_tokens > cfg.n_ctx:
        raise InputError(
            f"{longest:,} tokens and {max_new_tokens:,} new ones exceed the context of "
            f"{cfg.n_ctx:,}: at most {max(0, cfg.n_ctx - longest):,} fit"
        )
    if stop_tokens is None:
        end_of_turn = (
            {tokenizer.special[END_OF_TURN]}
            if tokenizer and END_OF_TURN in tokenizer.special
            else set()
        )
        return batch, frozenset(cfg.eos_ids) | end_of_turn
    if tokenizer is None and any(isinstance(token, str) for token in stop_tokens):
        raise InputError("stop_tokens holds texts, but this model has no tokenizer: give ids")
    return batch, frozenset(
        tokenizer.id_of(t) if tokenizer and isinstance(t, str) else int(t) for t in stop_tokens
    )


END_OF_TURN = "<turn|>"


def _generation(
    model: Generator, batch: Batch, row: int, ids: list[int], stops: frozenset[int]
) -> Generation:
    if model.processor is None:
        return Generation(tuple(ids), None, None, None)
    decode = model.processor.tokenizer.decode
    prompt = None if batch.prompts is None else model.processor.extend(batch.prompts[row], ids)
    raw = decode(ids[:-1] if ids and ids[-1] in stops else ids)
    return Generation(tuple(ids), decode(ids, skip_special=True), prompt, raw)
