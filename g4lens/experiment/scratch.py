"""Room for activations that memory does not hold: files without a name, mapped.

The system writes pages back to disk when it needs their memory, and forgets the file when no tensor
is left that shows it, after a kill too.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from g4lens.errors import StoreError
from g4lens.experiment.files import PIECE


class Scratch:
    """Makes tensors that lie in a folder's disk.

    Called with a tensor it returns its copy there, which is what `run_with_cache(spill=...)` takes.

    Args:
        folder: on a disk with room; made if need be. Not in memory, as /dev/shm and often /tmp are.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __call__(self, x: Tensor) -> Tensor:
        """A copy on disk. Raises: StoreError: no space, no permission."""
        return self.empty(x.shape, x.dtype).copy_(x)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros on disk. Raises: StoreError: no space, no permission."""
        n = prod(shape) * dtype.itemsize
        if n == 0:
            return torch.empty(*shape, dtype=dtype)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                _reserve(file, n)
                held = mmap.mmap(file.fileno(), n)
        except OSError as error:
            raise StoreError(
                f"{self.folder}: no room for {n / 1e9:.2f} GB of activations ({error.strerror})"
            ) from None
        return torch.frombuffer(held, dtype=dtype).reshape(tuple(shape))


def _reserve(file: BinaryIO, n: int) -> None:
    """Take `n` bytes of the disk: a hole in a mapped file would kill when no space is left."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n)
        return
    for start in range(0, n, PIECE):  # macOS has no such call
        file.write(bytes(min(PIECE, n - start)))
    file.flush()
