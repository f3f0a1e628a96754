"""Tables with a row for each token: weights like all others, or rows read where they are stored.

E2B's table of per-layer embeddings is 4.7 of the model's 10.2 GB, and a pass reads the rows of its
tokens alone. So the table may stay in the file it came in. It is called as an `nn.Embedding` is:

    Table       a parameter on the device: moved, trained, copied and saved with the model
    HostTable   "ram": mapped from its file; "disk": each row read when it is asked for. No
                parameter: `.to(...)` and deepcopy leave it, a pickle holds the file's path

The mapped one shares its memory with whoever maps the same file. On disk nothing is mapped, so that
what happens to the file is an error and never a signal that kills the process.
"""

import json
import os
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from g4lens.errors import InputError, WeightsError

Place = Literal["device", "ram", "disk"]
PLACES: tuple[Place, ...] = ("device", "ram", "disk")
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
SLICE = 2**14  # rows multiplied at a time: 48 MiB of E2B's embedding

Rows = Float[Tensor, "*ids width"]


class Span(NamedTuple):
    """Where a tensor stands in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def spans(path: Path) -> dict[str, Span]:
    """Where each tensor stands in a safetensors file whose header is known to be sound."""
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n))
    header.pop("__metadata__", None)
    return {
        name: Span(DTYPES[x["dtype"]], tuple(x["shape"]), 8 + n + x["data_offsets"][0])
        for name, x in header.items()
    }


class Table(nn.Embedding):
    """A table that is a parameter."""

    def reset_parameters(self) -> None:
        """Draw the rows. The meta device has none, and would import torch's compiler for them."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, input: Int[Tensor, "*ids"]) -> Rows:
        """The rows of these ids, which may be on another device."""
        return super().forward(input.to(self.weight.device))

    def products(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes d_vocab"]:
        """The product of `x` with each row."""
        return F.linear(x, self.weight)


class HostTable(nn.Module):
    """A table that stays in its file, in the dtype it is stored in.

    Args:
        path: a safetensors file.
        name: the tensor's name in it.
        place: "ram" to map it, "disk" to read each row when it is asked for.

    Raises: WeightsError: the file cannot be opened.
    """

    def __init__(self, path: Path, name: str, place: Place):
        super().__init__()
        self.path, self.name, self.place = path, name, place
        try:
            self._fd = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._fd)
            self._size = os.fstat(self._fd).st_size
            self.dtype, (self.n_rows, self.width), self._start = spans(path)[name]
        except (OSError, ValueError, KeyError) as error:
            raise WeightsError(f"{path}: no table {name} can be read from it ({error!r})") from None
        self._mapped = self._map() if place == "ram" else None

    def forward(self, ids: Int[Tensor, "*ids"]) -> Rows:
        """The rows of these ids, on the CPU; ids on a device are waited for.

        Raises: InputError: no such row. WeightsError: the file was cut short, or cannot be read.
        """
        wanted, index = ids.cpu().unique(return_inverse=True)
        if len(outside := wanted[(wanted < 0) | (wanted >= self.n_rows)]):
            raise InputError(f"{self.name} has rows 0 to {self.n_rows - 1}, not {int(outside[0])}")
        breaks = (torch.nonzero(wanted.diff() != 1).flatten() + 1).tolist()
        runs = [
            self._between(int(wanted[a]), int(wanted[b - 1]) + 1)
            for a, b in pairwise([0, *breaks, len(wanted)])
            if b > a
        ]
        rows = torch.cat(runs) if runs else torch.empty(0, self.width, dtype=self.dtype)
        return rows[index]

    def products(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes d_vocab"]:
        """The product of `x` with each row, computed where `x` is, some rows at a time.

        Reads the whole table. Raises: WeightsError: as for rows.
        """
        out = x.new_empty(*x.shape[:-1], self.n_rows)
        for start in range(0, self.n_rows, SLICE):
            stop = min(start + SLICE, self.n_rows)
            out[..., start:stop] = F.linear(x, self._between(start, stop).to(x))
        return out

    def check(self) -> None:
        """Refuse a file that was cut short, wherever: other weights may be mapped from it.

        Raises: WeightsError.
        """
        if os.fstat(self._fd).st_size < self._size:
            raise self._cut()

    def _between(self, start: int, stop: int) -> Float[Tensor, "some width"]:
        """The rows from `start` up to `stop`."""
        self.check()
        if self._mapped is not None:
            return self._mapped[start:stop]
        rows = torch.empty(stop - start, self.width, dtype=self.dtype)
        left = rows.view(torch.uint8).numpy().data.cast("B")
        offset = self._start + start * self.width * self.dtype.itemsize
        while left:
            try:
                n = os.preadv(self._fd, [left], offset)
            except OSError as error:
                raise WeightsError(f"{self.path}: {self.name} cannot be read ({error})") from None
            if n == 0:
                raise self._cut()
            left, offset = left[n:], offset + n
        return rows

    def _cut(self) -> WeightsError:
        held = os.fstat(self._fd).st_size
        return WeightsError(
            f"{self.path}: cut short to {held:,} of {self._size:,} bytes while the model reads "
            f"{self.name} from it: restore the file and load the model anew"
        )

    def _map(self) -> Tensor:
        """All rows, mapped. Raises: WeightsError: another file has taken the place of ours."""
        if not self.path.exists() or not os.path.samestat(os.fstat(self._fd), self.path.stat()):
            raise WeightsError(f"{self.path}: is no more the file that {self.name} is read from")
        return safe_open(self.path, framework="pt").get_tensor(self.name)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """As a `Table` would: a model is saved whole, wherever its tables are."""
        mapped = self._map() if self._mapped is None else self._mapped
        destination[f"{prefix}weight"] = mapped

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostTable":
        return self  # it cannot change

    def __reduce__(self) -> Any:
        return HostTable, (self.path, self.name, self.place)

    def extra_repr(self) -> str:
        """Its size and place, for the printed module tree."""
        return f"{self.n_rows}, {self.width}, {self.place}"
