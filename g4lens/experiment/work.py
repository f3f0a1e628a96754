"""Activations of prompts, unit by unit: what a unit holds and how it is computed.

    prompts of a unit ─ batches of like length ─ passes up to the last block named ─ rows ─ tensors

A unit's tensors: each activation under its hook name, `[row, ...]`, the rows of its prompts one
behind the other; `prompts`, their numbers; `lengths`, their tokens; `offsets`, where the rows of
each begin, and where the last ones end; `positions` and `tokens`, a position and an id for each
row. What a tower hands over has rows at its soft tokens alone, and so has its own: `NAME.offsets`,
`NAME.positions`, `NAME.tokens`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from g4lens.cost import activation_width
from g4lens.errors import G4LensError, InputError, did_you_mean, listed
from g4lens.experiment.identity import model_identity, prompts_identity
from g4lens.experiment.media import check_media
from g4lens.experiment.scratch import Scratch
from g4lens.experiment.selection import Selection, chosen, told
from g4lens.inputs.batch import Batch, prepare
from g4lens.inputs.prompt import Prompt
from g4lens.model.gemma4 import Gemma4

# Both fixed, so that the same call makes the same batches and so the same bits
POSITIONS = 4096  # of a batch, padding included
BUDGET = 2**30  # bytes of activations of a batch
DTYPES = ("float64", "float32", "bfloat16", "float16")
PACKED = {"vision.hook_image_tokens": "image_id", "audio.hook_audio_tokens": "audio_id"}


@dataclass
class Work:
    """What is to be cached.

    Attributes:
        model: the model.
        prompts: as `cache_activations` takes a list.
        names: of hook points.
        positions: as `parsed` returns them.
        dtype: to store in; None as computed.
        per_unit: prompts of each unit but the last.
        chunk: positions that go through the model at a time; None for all.
        scratch: makes room on disk for what chunks leave and a unit holds; None keeps it in memory.

    Raises: InputError: an empty list, a point without a row for each position, an unknown dtype, a
        number that is none.
    """

    model: Gemma4
    prompts: Sequence[Any]
    names: Sequence[str]
    positions: Selection
    dtype: str | None
    per_unit: int
    chunk: int | None = None
    scratch: Scratch | None = None

    def __post_init__(self) -> None:
        if not self.prompts:
            raise InputError("an empty list of prompts, expected at least one")
        if type(self.per_unit) is not int or self.per_unit < 1:
            raise InputError(f"prompts_per_unit is {self.per_unit!r}, expected at least 1")
        if self.chunk is not None and (type(self.chunk) is not int or self.chunk < 1):
            raise InputError(f"chunk is {self.chunk!r}, expected at least 1 position")
        if self.dtype is not None and self.dtype not in DTYPES:
            near = did_you_mean(str(self.dtype), DTYPES)
            raise InputError(f"dtype is {self.dtype!r}, expected one of {listed(DTYPES)}.{near}")
        if rowless := [name for name in self.names if not self._has_rows(name)]:
            raise InputError(
                f"{listed(rowless, 4)}: no row for each position of the prompt. Patterns follow "
                "from hook_rot_q and hook_rot_k; of the towers there are "
                f"{listed(PACKED)}"
            )
        n = -(-len(self.prompts) // self.per_unit)
        self.units = [f"{i:06}" for i in range(n)]
        self.stop = self._stop()

    def _has_rows(self, name: str) -> bool:
        axes = self.model.hook_points[name].axes
        in_decoder = not name.startswith(("vision.", "audio."))
        return name in PACKED or (
            in_decoder and axes[:2] in (("batch", "pos"), ("batch", "key_pos"))
        )

    def _stop(self) -> int | None:
        """The block before which a run may stop; None if it needs them all and the logits."""
        if any(name.startswith(("ln_final.", "hook_logits")) for name in self.names):
            return None
        layers = [int(found[1]) for n in self.names if (found := re.match(r"blocks\.(\d+)\.", n))]
        return max(layers) + 1 if layers else 0

    def identity(self) -> dict[str, Any]:
        """Everything that the results follow from."""
        return {
            "kind": "activations",
            "model": model_identity(self.model),
            "prompts": prompts_identity(self.prompts),
            "names": list(self.names),
            "positions": told(self.positions),
            "dtype": self.dtype,
            "prompts_per_unit": self.per_unit,
            **({} if self.chunk is None else {"chunk": self.chunk}),  # other bits, though few
        }

    def about(self) -> dict[str, Any]:
        """What else to know: where the model is from, versions."""
        origin = self.model.origin
        return {
            "model": None if origin is None else origin.name,
            "revision": None if origin is None else origin.revision,
            "g4lens": import_module("g4lens").__version__,  # which itself imports all modules
            "torch": torch.__version__,
        }

    # ---- prompts

    def prompt(self, i: int) -> Prompt | Tensor:
        """The i-th prompt, made. Raises: InputError: what is wrong with it."""
        row = self.prompts[i]
        try:
            if isinstance(row, Prompt):
                return row
            if isinstance(row, str):
                return self.model.prompt(row)
            parts = list(row) if isinstance(row, list | tuple) else []
            if parts and all(isinstance(part, Mapping) for part in parts):
                return self.model.chat(parts)
            if parts and not all(isinstance(part, int) for part in parts):
                return self.model.prompt(*parts)
            return torch.as_tensor(row)
        except (G4LensError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"prompt {i}: {error}") from None

    def check(self, units: Sequence[str]) -> None:
        """Look for what would stop the work later on. Of media only the headers are read.

        Unless no other prompt has a position that is wanted.

        Raises: InputError: the prompt, and what is wrong with it.
        """
        n_rows, with_media = 0, list[int]()
        for i in (i for unit in units for i in self._prompts_of(unit)):
            if check_media(self.prompts[i], self.model.cfg, f"prompt {i}"):
                with_media.append(i)
            else:
                self._batch([i], made := [self.prompt(i)])
                n_rows += len(self._chosen(i, made[0]))
        if n_rows or len(units) < len(self.units):
            return
        if not any(self._chosen(i, self.prompt(i)) for i in with_media):  # decoded up to the first
            raise InputError(f"positions {told(self.positions)!r}: no prompt has any")

    def _batch(self, index: Sequence[int], made: Sequence[Prompt | Tensor]) -> Batch:
        try:
            batch = prepare(list(made), self.model.processor, self.model.cfg)
        except InputError as error:
            raise InputError(f"prompts {listed(map(str, index))}: {error}") from None
        return batch

    def _prompts_of(self, unit: str) -> range:
        first = self.per_unit * int(unit)
        return range(first, min(first + self.per_unit, len(self.prompts)))

    def _chosen(self, i: int, made: Prompt | Tensor) -> list[int]:
        tokens = made.tokens if isinstance(made, Prompt) else None
        try:
            return chosen(self.positions, len(made), tokens)
        except InputError as error:
            raise InputError(f"prompt {i}: {error}") from None

    # ---- one unit

    def tensors(self, unit: str) -> dict[str, Tensor]:
        """The activations of a unit's prompts, and what their rows are.

        Raises: InputError: a prompt that the model cannot take.
        """
        index = self._prompts_of(unit)
        made = [self.prompt(i) for i in index]
        ids = [p.ids if isinstance(p, Prompt) else p.to(torch.int64) for p in made]
        wanted = [self._chosen(i, prompt) for i, prompt in zip(index, made, strict=True)]
        rows = Rows(wanted, ids)
        out: dict[str, Tensor] = {
            "prompts": torch.tensor(index),
            "lengths": torch.tensor([len(prompt) for prompt in made]),
            **vars(rows),
        }
        places = {name: rows for name in self.names if name not in PACKED}
        for name in self._packed:
            soft = [
                [p for p in where if x[p] == self._packed[name]]
                for x, where in zip(ids, wanted, strict=True)
            ]
            places[name] = Rows(soft, ids)
            out |= {f"{name}.{k}": v for k, v in vars(places[name]).items()}
        for group in self._batches([len(prompt) for prompt in made]):
            batch = self._batch([index[i] for i in group], [made[i] for i in group])
            for name, x in self._run(batch, [wanted[i] for i in group]):
                if name not in out:
                    n = len(places[name].positions)
                    room = torch.empty if self.scratch is None else self.scratch.empty
                    out[name] = room((n, *x.shape[1:]), dtype=self._stored(x.dtype))
                out[name][places[name].of(group)] = x.to("cpu", out[name].dtype)
        for name in self._packed.keys() - out.keys():  # no prompt of the unit has any
            kind = self._stored(self.model.dtype)
            out[name] = torch.empty(0, self.model.cfg.d_model, dtype=kind)
        return out

    @property
    def _packed(self) -> dict[str, int | None]:
        """The placeholders of what is wanted of the towers."""
        return {n: getattr(self.model.cfg, PACKED[n]) for n in self.names if n in PACKED}

    def _stored(self, computed: torch.dtype) -> torch.dtype:
        return computed if self.dtype is None else getattr(torch, self.dtype)

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Prompts of like length together, as many as the positions of one batch allow."""
        cfg = self.model.cfg
        widths = [
            cfg.d_vocab if name.startswith("hook_logits") else activation_width(cfg, name)
            for name in self.names
        ]
        most = min(POSITIONS, BUDGET // (4 * sum(widths)))
        group: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if group and lengths[i] * (len(group) + 1) > most:
                yield group
                group = []
            group.append(i)
        yield group

    def _run(
        self, batch: Batch, wanted: Sequence[Sequence[int]]
    ) -> Iterator[tuple[str, Float[Tensor, "row ..."]]]:
        """The rows wanted of each activation that the batch has, prompt by prompt."""
        names = [
            name
            for name in self.names
            if name not in PACKED or (batch.tokens == self._packed[name]).any()
        ]
        if not names:
            return
        counts = {len(where) for where in wanted}
        n = batch.tokens.shape[1]
        # As many of each: from the horizon on only these are computed
        read = torch.tensor(wanted) if len(counts) == 1 and 0 < min(counts) < n else None
        with torch.no_grad():
            _, cache = self.model.run_with_cache(
                batch, names, stop=self.stop, read=read, chunk=self.chunk, spill=self.scratch
            )
        mask = torch.zeros(len(wanted), n, dtype=torch.bool)
        for row, where in zip(mask, wanted, strict=True):
            row[where] = True
        for name in names:
            x = cache[name]
            if name in PACKED:
                soft = batch.tokens == self._packed[name]
                keep = _at(mask, batch.positions)[soft]
            else:
                keep = _at(mask, cache.positions(name).cpu())
            yield name, x[keep.to(x.device)]


class Rows:
    """Which rows of a unit's tensor belong to which prompt.

    Args:
        wanted: the positions of each prompt's rows, in order.
        ids: the tokens of each prompt.

    Attributes:
        offsets: where the rows of each prompt begin, and where the last ones end.
        positions: of all rows, prompt by prompt.
        tokens: the ids there.
    """

    offsets: Int[Tensor, "end"]
    positions: Int[Tensor, "row"]
    tokens: Int[Tensor, "row"]

    def __init__(self, wanted: Sequence[Sequence[int]], ids: Sequence[Int[Tensor, "pos"]]):
        flat = [p for where in wanted for p in where]
        self.offsets = torch.tensor([0, *map(len, wanted)]).cumsum(0)
        self.positions = torch.tensor(flat, dtype=torch.int64)
        self.tokens = torch.cat([x[list(w)] for x, w in zip(ids, wanted, strict=True)])

    def of(self, prompts: Sequence[int]) -> Int[Tensor, "row"]:
        """The rows of some prompts, in their order."""
        spans = [torch.arange(int(self.offsets[i]), int(self.offsets[i + 1])) for i in prompts]
        return torch.cat(spans)


def _at(
    mask: Bool[Tensor, "batch pos"], positions: Int[Tensor, "batch row"]
) -> Bool[Tensor, "batch row"]:
    """The mask of absolute positions, read at the positions that rows hold; never at padding."""
    return mask.gather(1, positions.clamp(min=0)) & (positions >= 0)
