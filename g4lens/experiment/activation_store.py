"""Activations on disk: look one up, go through all in a shuffled order, export them."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from g4lens.errors import CacheError, InputError, did_you_mean, listed
from g4lens.experiment.export import Piece, write_dataset
from g4lens.experiment.index import beside, has_own
from g4lens.experiment.shards import Shard
from g4lens.experiment.store import UnitStore


class _Place(NamedTuple):
    """Where activations of one unit are: their file, and the rows of each prompt in it."""

    shard: Shard
    first: int  # number of the unit's first prompt
    offsets: list[int]
    positions: np.ndarray  # a list of them would take five times the memory
    lengths: list[int]

    def span(self, prompt: int) -> tuple[int, int]:
        """The first row of a prompt, and one past its last."""
        return self.offsets[prompt - self.first], self.offsets[prompt - self.first + 1]


class ActivationStore:
    """What `cache_activations` or `g4lens cache` has put into a folder.

    A prompt is known by its number, an activation by its hook point's name, a row by its position
    in the prompt. Units that are not there yet are as if their prompts did not exist.

    Args:
        folder: the folder.

    Attributes:
        names: of the activations.
        prompts: the numbers of those that are there.
        spec: what the activations follow from.

    Raises: InputError: the folder holds no activations.
    """

    def __init__(self, folder: str | Path):
        self.store = UnitStore.open(folder)
        self.spec = self.store.spec
        if self.spec.get("kind") != "activations":
            raise InputError(f"{folder} holds results of kind {self.spec.get('kind')!r}")
        self.names: list[str] = list(self.spec["names"])
        self._files = self.store.files()
        per_unit, n = int(self.spec["prompts_per_unit"]), int(self.spec["prompts"]["n"])
        units = {unit: i for i, unit in enumerate(self.store.units)}
        self._unit_of = {
            p: unit
            for unit in self._files
            for p in range(units[unit] * per_unit, min((units[unit] + 1) * per_unit, n))
        }
        self.prompts = list(self._unit_of)
        # Small beside the rows, and slow to read: 1,000 vectors may lie in as many files
        self._shard = lru_cache(maxsize=4096)(self.store.shard)
        self._place = lru_cache(maxsize=4096)(self._read_place)

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.store.folder)!r}: {len(self)} of "
            f"{self.spec['prompts']['n']} prompts, {len(self.names)} activations: "
            f"{listed(self.names, 3)})"
        )

    @property
    def n_rows(self) -> int:
        """Rows of all activations together."""
        return int(self.store.entries()["rows"].to_numpy().sum())

    # ---- looking up

    def __getitem__(self, key: tuple[int, str] | tuple[int, str, int]) -> Shaped[Tensor, "..."]:
        """`store[prompt, name]` has all rows `[row, ...]`, `store[prompt, name, position]` one.

        Raises: CacheError: no such prompt, name or position.
        """
        if len(key) == 3:
            prompt, name, position = key
            return self.take(name, [prompt], [position])[0]
        prompt, name = key
        place = self._at(prompt, name)
        return place.shard.span(name, *place.span(prompt))

    def take(
        self, name: str, prompts: Sequence[int], positions: Sequence[int]
    ) -> Shaped[Tensor, "row ..."]:
        """The rows at these positions of these prompts, in any order and of any units.

        Args:
            name: of the activation.
            prompts: their numbers.
            positions: one for each, negative from the prompt's end.

        Raises: CacheError: no such prompt, name or position. InputError: unequal numbers of both.
        """
        if len(prompts) != len(positions) or len(prompts) == 0:
            raise InputError(f"{len(prompts)} prompts and {len(positions)} positions")
        found: dict[Path, tuple[Shard, list[int], list[int]]] = {}
        for k, (prompt, position) in enumerate(zip(prompts, positions, strict=True)):
            place = self._at(prompt, name)
            _, order, rows = found.setdefault(place.shard.path, (place.shard, [], []))
            order.append(k)
            rows.append(_row(place, name, prompt, position))
        read = torch.cat([shard.rows(name, rows) for shard, _, rows in found.values()])
        order = torch.tensor([k for _, some, _ in found.values() for k in some])
        return torch.empty_like(read).index_copy_(0, order, read)

    def positions(self, prompt: int, name: str) -> list[int]:
        """Which positions the rows of an activation are. Raises: CacheError: no such one."""
        place = self._at(prompt, name)
        return place.positions[slice(*place.span(prompt))].tolist()

    def tokens(self, prompt: int, name: str) -> Int[Tensor, "row"]:
        """The token ids at the rows of an activation. Raises: CacheError: no such one."""
        place = self._at(prompt, name)
        return beside(place.shard, name, "tokens")[slice(*place.span(prompt))]

    def _at(self, prompt: int, name: str) -> _Place:
        if name not in self.names:
            near = did_you_mean(name, self.names)
            raise CacheError(f"no activation {name!r}, there are {listed(self.names, 6)}.{near}")
        if prompt not in self._unit_of:
            n = self.spec["prompts"]["n"]
            todo = f", of which {len(self)} are there" if 0 <= prompt < n else ""
            raise CacheError(f"no prompt {prompt}, the set has 0 to {n - 1}{todo}")
        unit = self._unit_of[prompt]
        return self._place(unit, name if has_own(self._shard(unit), name) else "")

    def _read_place(self, unit: str, name: str) -> _Place:
        """Of an activation with rows of its own, or of all others."""
        shard = self._shard(unit)
        return _Place(
            shard,
            int(shard.tensor("prompts")[0]),
            beside(shard, name, "offsets").tolist(),
            beside(shard, name, "positions").numpy(),
            shard.tensor("lengths").tolist(),
        )

    # ---- all of them

    def batches(
        self, name: str, size: int, seed: int = 0, buffer: int = 2**28
    ) -> Iterator[Shaped[Tensor, "row ..."]]:
        """Every row of an activation once, in an order that a seed decides: an epoch of training.

        Units come in a random order, and rows are mixed among those of as many units as fit into
        the buffer: over sets larger than it, the mixing is not over the whole.

        Args:
            name: of the activation.
            size: rows of each batch but the last.
            seed: another one gives another order, on any machine.
            buffer: bytes of rows to mix at a time; while they are mixed, twice as many are held.

        Raises: CacheError: no such activation. InputError: a size that is none.
        """
        if name not in self.names:
            self._at(-1, name)
        if size < 1:
            raise InputError(f"size is {size}, expected at least 1")
        random = torch.Generator().manual_seed(seed)
        units = list(self._files)
        order = [units[i] for i in torch.randperm(len(units), generator=random).tolist()]
        held: list[Tensor] = []
        for i, unit in enumerate(order):
            held.append(self._shard(unit).tensor(name))
            if i + 1 < len(order) and sum(x.nbytes for x in held) < buffer:
                continue
            mixed = torch.cat(held)
            held.clear()
            mixed = mixed[torch.randperm(len(mixed), generator=random)]
            whole = len(mixed) if i + 1 == len(order) else len(mixed) - len(mixed) % size
            yield from (mixed[k : min(k + size, whole)] for k in range(0, whole, size))
            held.append(mixed[whole:].clone())  # a view would keep all of it
            del mixed

    def to_arrow(self, folder: str | Path, name: str, context_size: int | None = None) -> int:
        """Export an activation as a Hugging Face dataset in the layout that SAELens reads.

        Give the folder to SAELens as `cached_activations_path`, with this name as `hook_name`, this
        `context_size`, and `d_in` the product of the axes behind the rows. bfloat16 becomes
        float32.

        Args:
            folder: where; new or empty.
            name: of the activation.
            context_size: rows of each sequence of the dataset. The rows of all prompts are cut
                into such one behind the other, whatever prompt they are of, and less than one at
                the end is dropped. By default the rows of a prompt, if all have as many.

        Returns: the number of sequences.

        Raises: CacheError: no such activation. InputError: no prompts yet, prompts of unequal rows
            and no context_size, a folder in use, `datasets` is not installed. StoreError: no space,
            no permission.
        """
        if not self.prompts:
            raise InputError(f"{self.store.folder} has no unit yet: run it first")
        counts = {stop - start for p in self.prompts for start, stop in [self._at(p, name).span(p)]}
        if context_size is None and len(counts) != 1:
            raise InputError(
                f"prompts have {min(counts)} to {max(counts)} rows: give context_size, the rows of "
                "each sequence of the dataset"
            )
        context_size = min(counts) if context_size is None else context_size
        if context_size < 1:
            raise InputError(f"context_size is {context_size}, expected at least 1")
        d_in = self[self.prompts[0], name].flatten(1).shape[1]
        return write_dataset(Path(folder), name, self._pieces(name), context_size, d_in)

    def _pieces(self, name: str) -> Iterator[Piece]:
        for unit in self._files:
            shard = self._shard(unit)
            yield shard.tensor(name).flatten(1), beside(shard, name, "tokens")

    def verify(self) -> list[str]:
        """Compare every file with its hash. Returns: one line for each thing that is wrong."""
        return self.store.verify()


def _row(place: _Place, name: str, prompt: int, position: int) -> int:
    """The row of a position. Raises: CacheError: it is not held."""
    start, stop = place.span(prompt)
    wanted = position if position >= 0 else place.lengths[prompt - place.first] + position
    row = bisect_left(place.positions, wanted, start, stop)
    if row == stop or place.positions[row] != wanted:
        there = listed(map(str, place.positions[start:stop])) or "none"
        raise CacheError(f"{name} of prompt {prompt} is not held at position {position}: {there}")
    return row
