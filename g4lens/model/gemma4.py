"""Gemma 4: the decoder, joined by the towers that let it see and hear.

    picture ─ vision tower ─┐
    sound ─── audio tower ──┤ soft tokens, in place of the placeholders
    text ──── embedding ────┴─ decoder ── logits

Source: `Gemma4Model` in transformers' `models/gemma4/modeling_gemma4.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.config import Gemma4Config
from g4lens.errors import InputError
from g4lens.generate import generate, stream
from g4lens.hooks import HookPoint, at_rows, running
from g4lens.inputs.batch import Batch, prepare
from g4lens.inputs.processor import Processor
from g4lens.inputs.prompt import Prompt
from g4lens.model.audio import AudioTower
from g4lens.model.text import Read, Soft, TextModel
from g4lens.model.vision import VisionTower
from g4lens.resources import free_memory
from g4lens.state import KeyValues, Positions, Rows, State, absolute
from g4lens.tables import HostTable
from g4lens.watch import Watched

Inputs = str | Tensor | Prompt | Batch | Mapping[str, Any] | Sequence[Any]


class Gemma4(TextModel, Watched):
    """A Gemma 4 model of which every activation can be read, replaced and differentiated.

    Args:
        cfg: the numbers that define it.
        processor: what turns text, pictures and sounds into its inputs; without one it takes ids
            and mappings of tensors only.
    """

    cfg: Gemma4Config

    def __init__(self, cfg: Gemma4Config, processor: Processor | None = None):
        super().__init__(cfg)
        self.vision = None if cfg.vision is None else VisionTower(cfg.vision, cfg.d_model)
        self.audio = None if cfg.audio is None else AudioTower(cfg.audio, cfg.d_model)
        self.processor = processor
        self.origin: Any = None  # what load() says of where the weights are from
        self.register_hook_points()

    @property
    def device(self) -> torch.device:
        """Where the decoder's weights are."""
        return cast(Tensor, self.ln_final.weight).device

    @property
    def dtype(self) -> torch.dtype:
        """What the residual stream is computed in."""
        return cast(Tensor, self.ln_final.weight).dtype

    @property
    def source(self) -> Any:
        """Path, revision, hashes and load options: what rebuilds this very model elsewhere.

        Each time, the weights are compared with their files; where the system says that they are
        the files' own pages, without reading them.

        Raises:
            InputError: the model was made in memory. WeightsError: its weights were edited since.
        """
        if self.origin is None:
            raise InputError("this model was made in memory, not loaded: it has no source")
        self.origin.check(self)
        return self.origin

    # ---- running

    def forward(
        self,
        inputs: Inputs | None = None,
        *,
        read: Positions | None = None,
        stop: int | None = None,
        state: State | None = None,
        past: KeyValues | None = None,
        chunk: int | None = None,
    ) -> Any:
        """Next-token logits, after the soft cap.

        Args:
            inputs: text, ids `[batch, pos]`, a Prompt, a list of them (left-padded), or a mapping
                with the names that transformers' Gemma 4 processor uses.
            read: the positions whose logits are wanted, counted over each prompt's own tokens,
                negative from its end; only what they need is computed.
            stop: run only the blocks before this one and return the `State` that enters it.
            state: enter at a block, in place of `inputs`; as `cache.state(layer)` or `stop` give
                it.
            past: keys and values of the positions before the inputs, as a `State` of theirs holds
                them.
            chunk: run so many positions at a time, with the same result.

        Returns:
            `[batch, pos, d_vocab]`, with `read` `[batch, reads, d_vocab]`; with `stop` a `State`.

        Raises:
            InputError: what is wrong with the inputs or the positions.
        """
        self._check(inputs, stop, state, past, chunk)
        with running():
            if state is None:
                batch = prepare(inputs, self.processor, self.cfg)
                index = None
                if read is not None:
                    index = Rows(batch.positions).find(absolute(read, batch.lengths))
                if stop is None:
                    self._check_fits(batch.tokens.numel() if index is None else index.numel())
                out = self._run_batch(batch, index, stop, past, chunk)
            else:
                held = state.rows.positions
                index = (
                    None
                    if read is None
                    else state.rows.find(absolute(read, state.lengths).to(held.device))
                )
                out = self.run(state, stop, index)
            return out if stop is not None else self.unembed(out.resid)

    def _run_batch(
        self,
        batch: Batch,
        index: Read | None,
        stop: int | None = None,
        past: KeyValues | None = None,
        chunk: int | None = None,
    ) -> State:
        """Run prepared inputs through the blocks, all at once or chunk by chunk.

        `index` names the rows to read, on the CPU. Chunks read what any prompt of the batch reads.
        """
        for part in self.embed.modules():  # before weights are read that the same file may hold
            if isinstance(part, HostTable):
                part.check()
        n, soft = batch.tokens.shape[1], self._soft_tokens(batch)
        kv = KeyValues(keep=stop is not None) if past is None else past
        rows, lengths = self._rows(batch, kv)
        tokens = batch.tokens  # on the CPU: a host table has nothing to wait for
        if chunk is None or chunk >= n:
            read = None if index is None else index.to(self.device)
            return self.run(self.begin(tokens, rows, lengths, soft, kv), stop, read)
        columns = None if index is None else index.unique()
        pieces: list[State] = []
        for start in range(0, n, chunk):
            end, read = min(start + chunk, n), None
            if columns is not None:
                asked = columns[(columns >= start) & (columns < end)] - start
                read = asked.expand(len(tokens), -1).to(self.device)
            here = rows.slice(start, end)
            some = _columns(soft, start, end)
            # unnamed, so that what entered one chunk is gone before the next
            done = self.run(self.begin(tokens[:, start:end], here, lengths, some, kv), stop, read)
            kv = done.kv
            pieces.append(replace(done, kv=KeyValues()))  # else each keeps what all before it wrote
        pieces[-1] = replace(pieces[-1], kv=kv)
        whole = State.joined(pieces, rows.first if index is None else None)
        if index is not None and columns is not None:
            whole = whole.take(torch.searchsorted(columns, index).to(self.device))
        at_rows(whole.rows.positions, lengths)
        return whole

    def _rows(self, batch: Batch, past: KeyValues) -> tuple[Rows, Int[Tensor, "batch"]]:
        """The positions of a batch behind its past, and the number of tokens up to its end."""
        positions, lengths = batch.positions, batch.lengths
        first = None if batch.is_padded else 0
        if past.rows:
            end = past.end()
            positions = torch.where(positions >= 0, positions + end[:, None], -1)
            lengths = lengths + end
            first = int(end[0]) if first == 0 and bool((end == end[0]).all()) else None
        return Rows(positions.to(self.device), first), lengths

    def _soft_tokens(self, batch: Batch) -> Soft:
        """Where soft tokens stand, on the CPU, and what the towers make of pictures and sounds."""
        soft: list[tuple[Tensor, Tensor]] = []
        if (
            self.vision is not None
            and batch.pixels is not None
            and batch.patch_positions is not None
        ):
            packing = self.vision.packing(batch.patch_positions)
            told = self._here(batch.pixels, batch.patch_positions, packing)
            soft.append(((batch.tokens == self.cfg.image_id).nonzero(), self.vision(*told)))
        if self.audio is not None and batch.mel is not None and batch.mel_mask is not None:
            packing = self.audio.packing(batch.mel_mask)
            told = self._here(batch.mel, batch.mel_mask, packing)
            soft.append(((batch.tokens == self.cfg.audio_id).nonzero(), self.audio(*told)))
        return soft

    def _here(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """The same on the model's device."""
        return [None if x is None else x.to(self.device) for x in tensors]

    def begin(
        self,
        tokens: Int[Tensor, "batch pos"],
        rows: Rows,
        lengths: Int[Tensor, "batch"],
        soft: Soft = (),
        past: KeyValues | None = None,
    ) -> State:
        """As `TextModel.begin`; placeholders look up the pad row, in both tables."""
        for placeholder in (self.cfg.image_id, self.cfg.audio_id, self.cfg.video_id):
            if placeholder is not None:
                tokens = tokens.masked_fill(tokens == placeholder, self.cfg.pad_id)
        return super().begin(tokens, rows, lengths, soft, past)

    # ---- generating

    def prefill(
        self, batch: Batch, chunk: int | None
    ) -> tuple[Float[Tensor, "batch d_vocab"], State]:
        """The logits behind each prompt, and the state that the next tokens follow.

        Computes what the last position needs, and every position where somebody watches a block
        from the horizon on.
        """
        self._check_chunk(chunk)
        last = Rows(batch.positions).find(absolute(-1, batch.lengths))
        watched = any(
            point.is_hung
            for block in self.blocks[self.cfg.horizon :]
            for point in block.modules()
            if isinstance(point, HookPoint)
        )
        with running():
            state = self._run_batch(batch, None if watched else last, chunk=chunk)
            state = state.take(last.to(self.device)) if watched else state
            if not batch.is_padded:
                state = replace(state, rows=Rows(state.rows.positions, batch.tokens.shape[1] - 1))
            at_rows(state.rows.positions, state.lengths)
            return self.unembed(state.resid)[:, 0], state

    def advance(
        self,
        tokens: Int[Tensor, "batch"],
        state: State,
        step: int,
    ) -> tuple[Float[Tensor, "batch d_vocab"], State]:
        """The logits behind one more token of each prompt, the `step`-th, and the new state."""
        before = state.rows
        rows = Rows(before.positions + 1, before.end)
        with running(step):
            state = self.run(self.begin(tokens[:, None], rows, state.lengths, past=state.kv))
            return self.unembed(state.resid)[:, 0], state

    def generate(self, inputs: Inputs, max_new_tokens: int = 40, **options: Any) -> Any:
        """Let the model go on. Arguments, results and errors: `g4lens.generate.generate`."""
        return generate(self, inputs, max_new_tokens, **options)

    def stream(self, inputs: Inputs, max_new_tokens: int = 40, **options: Any) -> Iterator[str]:
        """The text that `generate` would return, piece by piece as it is made."""
        return stream(self, inputs, max_new_tokens, **options)

    # ---- text, pictures and sounds

    def prompt(self, *parts: Any) -> Prompt:
        """Text, `Image`s and `Audio`s in the order given, behind exactly one <bos>.

        Raises: InputError: a part that cannot be taken, or no processor or tower for it.
        """
        return self._processor().prompt(*parts)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> Prompt:
        """A conversation, rendered by the checkpoint's own template, up to the model's turn.

        Args:
            messages: `{"role": ..., "content": text or a list of parts}`.
            thinking: switch reasoning on.
            tools: declarations of the functions the model may call.

        Raises: InputError: a message or tool that the template cannot take.
        """
        return self._processor().chat(messages, thinking=thinking, tools=tools)

    def token_ids(self, tokens: Any) -> Int[Tensor, "*batch"]:
        """An id, a text of one token, or several of either, as ids. Raises: InputError: neither."""
        if isinstance(tokens, Tensor):
            return tokens.to(self.device)
        if isinstance(tokens, str):
            ids = self._processor().tokenizer.encode(tokens)
            if len(ids) != 1:
                pieces = [self._processor().tokenizer.token_text(i) for i in ids]
                raise InputError(f"{tokens!r} is {len(ids)} tokens {pieces}, expected exactly one")
            return torch.tensor(ids[0], device=self.device)
        if isinstance(tokens, Sequence):
            return torch.stack([self.token_ids(token) for token in tokens])
        return torch.as_tensor(tokens, device=self.device)

    def _processor(self) -> Processor:
        if self.processor is None:
            raise InputError(
                "this model has no tokenizer: give it ids [batch, pos], or load it from a folder"
            )
        return self.processor

    # ---- checks

    def _check(
        self, inputs: Any, stop: int | None, state: State | None, past: Any, chunk: int | None
    ) -> None:
        if (inputs is None) == (state is None):
            raise InputError("give either inputs or state=, which enters in their place")
        if state is not None and (past is not None or chunk is not None):
            raise InputError(
                "state= brings its own keys and values and rows: past= and chunk= go with inputs"
            )
        if past is not None and not isinstance(past, KeyValues):
            raise InputError(
                f"past is a {type(past).__name__}, expected keys and values: those of a state are "
                "state.kv"
            )
        first = 0 if state is None else state.layer
        if stop is not None and not first <= stop <= self.cfg.n_layers:
            raise InputError(f"stop is {stop}, expected {first} to {self.cfg.n_layers}")
        self._check_chunk(chunk)

    def _check_chunk(self, chunk: int | None) -> None:
        if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
            raise InputError(f"chunk is {chunk!r}, expected at least 1 position, a whole number")

    def _check_fits(self, n_positions: int) -> None:
        """Refuse a read whose logits could not be held: 1 MiB a position in E2B, in float32."""
        size = self.dtype.itemsize
        need = 2 * n_positions * self.cfg.d_vocab * size  # before and after the cap
        free = free_memory(self.device)
        if need > free:
            raise InputError(
                f"the logits of {n_positions:,} positions need {need / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free on {self.device}: name the positions you need, "
                "as in read=-1"
            )


def _columns(soft: Soft, start: int, end: int) -> Soft:
    """The soft tokens that stand in some columns of the batch."""
    parts = []
    for where, embeddings in soft:
        (here,) = ((where[:, 1] >= start) & (where[:, 1] < end)).nonzero(as_tuple=True)
        shifted = where[here] - torch.tensor([0, start])
        parts.append((shifted, embeddings[here.to(embeddings.device)]))
    return parts
