"""Which code this is: the version, the hash of all files, and the commit of a checkout."""

import hashlib
import subprocess
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from g4lens.experiment.files import sha256

PACKAGE = Path(__file__).parents[1]


@cache
def code() -> dict[str, Any]:
    """The version of g4lens, as it was when this process first asked.

    `source` is the hash of all its files, however they came here; `commit` and `diff`, the hash of
    what differs from it, are those of a git checkout, and None where the package lies in none.
    """
    # a checkout that merely surrounds an installed package does not track it
    is_tracked = _git("ls-files", "--error-unmatch", "__init__.py") is not None
    commit = _git("rev-parse", "HEAD") if is_tracked else None
    diff = _git("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--", ".") if commit else None
    return {
        "version": import_module("g4lens").__version__,  # which itself imports all modules
        "source": source(),
        "commit": commit.decode().strip() if commit else None,
        "diff": hashlib.sha256(diff).hexdigest() if diff else None,
    }


@cache
def source() -> str:
    """The hash of the package's own files."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".js", ".css", ".jinja"):
            digest.update(f"{path.relative_to(PACKAGE).as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def _git(*args: str) -> bytes | None:
    """What git says in the package's folder; None where it fails or is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *args], capture_output=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
