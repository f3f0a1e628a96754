"""Files that are there whole or not at all, whatever is killed and whoever else writes.

A file is written under a temporary name, behind a lock, and renamed when it is complete. The lock
dies with its process, so a temporary file without one is a dead process's and can go.
"""

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from g4lens.errors import StoreError

PART = ".part-"
PIECE = 2**20  # bytes; Linux takes twice the time for writes of 4 MiB
UNKNOWN = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # to some file systems: locks, links
Chunk = bytes | memoryview


def put(
    folder: Path, chunks: Sequence[Chunk], name: Callable[[str], str], *, replace: bool = True
) -> Path:
    """Write a file.

    Args:
        folder: where; made if need be.
        chunks: its content, in pieces.
        name: its name, from the sha256 of its content.
        replace: a file of that name; else it stays, and of several writers the first one's counts.

    Raises:
        StoreError: no space, no permission; nothing is left behind, other files are untouched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _part(folder) as (part, file):
            digest = _write(file, chunks)
            file.flush()
            target = folder / name(digest)
            if replace:
                part.replace(target)
            else:
                _claim(target, part)
            return target
    except OSError as error:
        raise failed(folder, error) from None


def sweep(folder: Path) -> None:
    """Delete what killed processes left half written in a folder and in those below it.

    Files being written now are left alone.
    """
    import fcntl

    for part in folder.rglob(f"{PART}*"):
        try:
            with part.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink(missing_ok=True)
        except OSError:  # somebody writes it, or it is gone, or not ours to delete
            continue


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Of all who enter such a block with this file, one at a time is in it.

    Raises: StoreError: no permission, or a file system without locks.
    """
    import fcntl

    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise failed(path.parent, error) from None


def sha256(path: Path) -> str:
    """The hash of a file's content. Raises: StoreError: it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from None


def failed(folder: Path, error: OSError) -> StoreError:
    """The error that says why nothing could be written to a folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StoreError(
            f"no space for another file in {folder} ({os.strerror(error.errno)}): what is there is "
            "complete, make room and run again"
        )
    reason = error.strerror or str(error)
    if error.errno in (*UNKNOWN, errno.ENOLCK):
        return StoreError(
            f"{folder} is on a file system without locks ({reason}): give a folder elsewhere, or "
            "have it mounted with flock"
        )
    return StoreError(
        f"{folder} cannot be written to ({reason}): give another folder, or change its rights"
    )


@contextmanager
def _part(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A locked file to write to, which is deleted if it still has its name at the end."""
    import fcntl

    while True:
        part = folder / f"{PART}{uuid.uuid4().hex}"
        with part.open("xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if part.exists():  # not swept away before it had its lock
                    yield part, file
                    return
            finally:
                part.unlink(missing_ok=True)


def _claim(target: Path, part: Path) -> None:
    """Give a file its name, unless another has it."""
    try:
        target.hardlink_to(part)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in (*UNKNOWN, errno.EPERM, errno.EMLINK):
            raise
        part.replace(target)  # a file system without links


def _write(file: BinaryIO, chunks: Sequence[Chunk]) -> str:
    """Write and hash, piece by piece: what was just hashed is still in the processor's cache."""
    digest = hashlib.sha256()
    for chunk in map(memoryview, chunks):
        for start in range(0, len(chunk), PIECE):
            piece = chunk[start : start + PIECE]
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()
