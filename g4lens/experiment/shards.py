"""One file of tensors, in the safetensors format: written in one go, read row by row.

    8 bytes: length of the header | header, JSON: dtype, shape, place of each tensor | their bytes

Rows are read by `os.preadv`, not through a map: a file cut short under a map kills the process.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from g4lens.errors import InputError, StoreError, listed
from g4lens.experiment.files import Chunk

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes; that of the safetensors library too


def encoded(tensors: Mapping[str, Tensor]) -> list[Chunk]:
    """Tensors as the pieces of a file, without a copy of contiguous ones on the CPU.

    Raises: InputError: a dtype that the format, or this reader, does not know.
    """
    header: dict[str, Any] = {}
    pieces: list[Chunk] = []
    end = 0
    # The widest first, so that every tensor begins at a multiple of its element's size
    for name, x in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if x.dtype not in CODES:
            raise InputError(f"{name} is {x.dtype}, expected one of {listed(map(str, CODES))}")
        flat = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        begin, end = end, end + flat.numel()
        header[name] = {
            "dtype": CODES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [begin, end],
        }
        if flat.numel():
            pieces.append(flat.numpy().data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *pieces]


class Entry(NamedTuple):
    """Where a tensor stands in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one element of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class Shard:
    """A file of tensors to read from. No file stays open between calls.

    Raises: StoreError: it is no such file, or cut short.
    """

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every tensor by name."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                length = int.from_bytes(file.read(8), "little")
                if length > min(size, LONGEST_HEADER):
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                raw = json.loads(file.read(length))
            raw.pop("__metadata__", None)
            found = {name: _entry(value, 8 + length) for name, value in raw.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StoreError(
                f"{self.path} is not readable as a shard ({error}): delete it and run again"
            ) from None
        ends = (e.start + math.prod(e.shape) * e.dtype.itemsize for e in found.values())
        if max(ends, default=8 + length) != size:
            raise StoreError(
                f"{self.path} has {size} bytes, not those that its header tells of: delete it and "
                "run again"
            )
        return found

    def tensor(self, name: str) -> Tensor:
        """A whole tensor. Raises: StoreError: it is not there, or the file is cut short."""
        entry = self._entry(name)
        n = math.prod(entry.shape) * entry.dtype.itemsize
        return self._read(entry, [(entry.start, n)]).reshape(entry.shape)

    def rows(self, name: str, index: Sequence[int]) -> Tensor:
        """Some rows of a tensor, `[row, ...]`, in the order asked for. Raises: as `tensor`."""
        entry = self._entry(name)
        size = entry.row_bytes
        read = self._read(entry, [(entry.start + i * size, size) for i in index])
        return read.reshape(len(index), *entry.shape[1:])

    def span(self, name: str, start: int, stop: int) -> Tensor:
        """The rows from `start` up to `stop`. Raises: as `tensor`."""
        entry = self._entry(name)
        size = entry.row_bytes
        read = self._read(entry, [(entry.start + start * size, (stop - start) * size)])
        return read.reshape(stop - start, *entry.shape[1:])

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise StoreError(f"{self.path} holds no {name!r}")
        return self.entries[name]

    def _read(self, entry: Entry, spans: Sequence[tuple[int, int]]) -> Tensor:
        """Spans of the file, one behind the other."""
        whole = torch.empty(sum(n for _, n in spans), dtype=torch.uint8)
        view, at = whole.numpy().data, 0
        try:
            with self.path.open("rb", buffering=0) as file:
                for start, n in spans:
                    _read_into(file.fileno(), view[at : at + n], start)
                    at += n
        except (OSError, EOFError) as error:
            raise StoreError(f"{self.path} cannot be read: {error}") from None
        return whole.view(entry.dtype)


def _entry(raw: Any, base: int) -> Entry:
    begin, end = raw["data_offsets"]
    entry = Entry(DTYPES[raw["dtype"]], tuple(raw["shape"]), base + begin)
    size = math.prod(entry.shape) * entry.dtype.itemsize
    if min((begin, *entry.shape)) < 0 or end - begin != size:
        raise ValueError(f"a tensor of shape {entry.shape} at {begin} to {end}")
    return entry


def _read_into(file: int, view: memoryview, start: int) -> None:
    """Fill `view` from the file's byte `start` on: one call reads at most 2 GiB."""
    while len(view):
        n = os.preadv(file, [view], start)
        if n == 0:
            raise EOFError("it was cut short")
        view, start = view[n:], start + n
