"""What a run of the decoder has computed so far: enough to go on from there.

The residual stream alone is not the state: later blocks also read the per-layer embeddings and the
keys and values that owner blocks have written. `State` holds all three, and says which positions
its rows are. A run may hold fewer rows than the prompt: those behind a shared prefix, one chunk, a
decoding step, or only the positions whose logits are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.errors import InputError

Positions = int | slice | Sequence[int] | Tensor  # a tensor: [read], or [batch, read]
KeyOrValue = Float[Tensor, "batch key_pos kv_head d_head"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Which positions the rows of a tensor are.

    Attributes:
        positions: counted over each prompt's own tokens, -1 at padding.
        first: where it is known without a look at the tensor that every prompt of the batch holds
            `first, first + 1, ...`, that position; else None. It decides between kernels, so that
            nothing has to be read back from the device.
    """

    positions: Int[Tensor, "batch row"]
    first: int | None = None

    def __len__(self) -> int:
        return self.positions.shape[1]

    @property
    def end(self) -> int | None:
        """One past the last position, where `first` is known."""
        return None if self.first is None else self.first + len(self)

    @classmethod
    def seen(cls, positions: Int[Tensor, "batch row"]) -> "Rows":
        """Rows whose `first` is found by a look at the tensor."""
        first = int(positions[0, 0]) if positions.numel() else -1
        steps = torch.arange(positions.shape[1], device=positions.device) + first
        return cls(positions, first if first >= 0 and bool((positions == steps).all()) else None)

    def find(self, wanted: Int[Tensor, "batch read"]) -> Int[Tensor, "batch read"]:
        """The indices of the rows that hold these positions.

        Raises:
            InputError: a position that no row holds.
        """
        hit = wanted[:, :, None] == self.positions[:, None, :]
        if not hit.any(-1).all():
            batch, missing = torch.nonzero(~hit.any(-1))[0].tolist()
            raise InputError(
                f"position {int(wanted[batch, missing])} of prompt {batch} is not among the "
                f"{len(self)} positions held"
            )
        return hit.long().argmax(-1)

    def take(self, index: Int[Tensor, "batch read"]) -> "Rows":
        """The rows at these indices."""
        return Rows(self.positions.gather(1, index))

    def slice(self, start: int, stop: int) -> "Rows":
        """The rows from index `start` up to `stop`."""
        return Rows(
            self.positions[:, start:stop], None if self.first is None else self.first + start
        )

    def then(self, more: "Rows") -> "Rows":
        """These rows and, behind them, `more`."""
        joined = torch.cat([self.positions, more.positions], dim=1)
        return Rows(joined, self.first if self.end is not None and self.end == more.first else None)


@dataclass(eq=False)
class KeyValues:
    """The keys and values that owner blocks have written, after norm and rotation, by block.

    Adding to it never changes tensors that it holds, so a shared prefix can serve many runs.

    Attributes:
        keys, values: by block, `[batch, key_pos, kv_head, d_head]`.
        rows: by block, which positions those are.
        keep: hold on to keys that have left the window of all positions still to come.
    """

    keys: dict[int, KeyOrValue] = field(default_factory=dict)
    values: dict[int, KeyOrValue] = field(default_factory=dict)
    rows: dict[int, Rows] = field(default_factory=dict)
    keep: bool = False

    def copy(self) -> "KeyValues":
        """A container of its own for the same tensors."""
        return KeyValues(dict(self.keys), dict(self.values), dict(self.rows), self.keep)

    def end(self) -> Int[Tensor, "batch"]:
        """One past the last position held, for each prompt."""
        positions = [rows.positions.amax(1) for rows in self.rows.values()]
        known = [rows.end for rows in self.rows.values() if rows.end is not None]
        if len(known) == len(positions):  # then there is nothing to wait for
            return torch.full((len(positions[0]),), max(known))
        return torch.stack(positions).amax(0).cpu() + 1

    def write(self, layer: int, k: KeyOrValue, v: KeyOrValue, rows: Rows, window: int) -> None:
        """Add rows to those of a block; drop what has left the window of all that come after.

        A block's older rows may be those of a batch of one: a prefix that all prompts share.
        """
        if layer in self.keys:
            held = self.rows[layer]
            drop = 0 if self.keep else max(0, len(held) - (window - 1))
            k, v = (
                torch.cat([old[:, drop:].expand(len(new), -1, -1, -1), new], dim=1)
                for old, new in ((self.keys[layer], k), (self.values[layer], v))
            )
            rows = self._joined(held, drop, rows)
        self.keys[layer], self.values[layer], self.rows[layer] = k, v, rows

    def _joined(self, held: Rows, drop: int, rows: Rows) -> Rows:
        """Blocks that held the same rows share the joined ones: masks are made once for each."""
        key = (id(held), drop, id(rows))
        if key not in self._memo:
            old = held.slice(drop, len(held))
            old = Rows(old.positions.expand(len(rows.positions), -1), old.first)
            self._memo[key] = (held, rows, old.then(rows))
        return self._memo[key][-1]

    def __post_init__(self) -> None:
        # the joined rows with what they were made of, kept so that no id is used anew
        self._memo: dict[tuple[int, int, int], tuple[Rows, Rows, Rows]] = {}


@dataclass(frozen=True, eq=False)
class State:
    """Everything that the blocks from `layer` on will read.

    Attributes:
        layer: the next block to run; `n_layers` when all have run.
        resid: the residual stream that enters it, `[batch, row, d_model]`.
        ple: the per-layer embeddings of all blocks, `[batch, row, layer, d_ple]`.
        kv: keys and values of the owner blocks before `layer`; those of later owners, if any, are
            the past that they will add to.
        rows: the positions that the rows are.
        lengths: the number of tokens of each prompt, `[batch]`, on the CPU.
    """

    layer: int
    resid: Float[Tensor, "batch row d_model"]
    ple: Float[Tensor, "batch row layer d_ple"]
    kv: KeyValues
    rows: Rows
    lengths: Int[Tensor, "batch"]

    @classmethod
    def joined(cls, pieces: Sequence["State"], first: int | None) -> "State":
        """The states that the chunks of a prompt end in, as one.

        Args:
            pieces: in order; the last one's keys and values are those of all.
            first: the first position, where the rows are known to follow each other.
        """
        positions = torch.cat([piece.rows.positions for piece in pieces], dim=1)
        return replace(
            pieces[-1],
            resid=torch.cat([piece.resid for piece in pieces], dim=1),
            ple=torch.cat([piece.ple for piece in pieces], dim=1),
            rows=Rows(positions, first),
        )

    def take(self, index: Int[Tensor, "batch read"]) -> "State":
        """The same with only the rows at these indices; keys and values are untouched."""
        return replace(
            self,
            resid=take_rows(self.resid, index),
            ple=take_rows(self.ple, index),
            rows=self.rows.take(index),
        )


def take_rows(
    x: Float[Tensor, "batch ..."], index: Int[Tensor, "batch read"], dim: int = 1
) -> Float[Tensor, "batch ..."]:
    """The rows of `x` along `dim` at these indices, for each prompt its own."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    full = (*x.shape[:dim], index.shape[1], *x.shape[dim + 1 :])
    return x.gather(dim, index.to(x.device).reshape(shape).expand(full))


def absolute(positions: Positions, lengths: Int[Tensor, "batch"]) -> Int[Tensor, "batch read"]:
    """Positions counted over each prompt's own tokens, negative from its end, counted from 0.

    Args:
        positions: one for all prompts, several (a slice or a list), or a tensor with a row for each
            prompt.
        lengths: the number of tokens of each prompt, on the CPU.

    Raises:
        InputError: a position outside a prompt, or a slice that takes unequal numbers from the
            prompts.
    """
    counts = lengths.tolist()
    if isinstance(positions, slice):
        rows = [list(range(*positions.indices(n))) for n in counts]
        if len({len(row) for row in rows}) > 1:
            raise InputError(
                f"{positions} takes {sorted({len(row) for row in rows})} positions from prompts of "
                f"{sorted(set(counts))} tokens, expected as many from each"
            )
    elif isinstance(positions, Tensor) and positions.ndim == 2:
        rows = positions.tolist()
        if len(rows) != len(counts):
            raise InputError(f"positions for {len(rows)} prompts, but there are {len(counts)}")
    else:
        flat = positions.tolist() if isinstance(positions, Tensor) else positions
        one = list(flat) if isinstance(flat, Sequence) else [flat]
        rows = [one for _ in counts]
    for row, n in zip(rows, counts, strict=True):
        for p in row:
            if not isinstance(p, int) or isinstance(p, bool) or not -n <= p < n:
                raise InputError(f"position {p!r} is outside a prompt of {n} tokens")
    return torch.tensor(
        [[p % n for p in row] for row, n in zip(rows, counts, strict=True)], dtype=torch.int64
    ).reshape(len(counts), -1)
