"""What is at hand: the bundled notebooks and data, and this machine's memory.

Notebooks and data are inside the package in a wheel, beside it in a checkout.
"""

import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path

import torch

from g4lens.errors import G4LensError, InputError, did_you_mean, listed

FOLDERS = ("data", "notebooks")


def bundled(*parts: str) -> Path:
    """The path of a file or folder that comes with g4lens.

    Args:
        parts: its path, beginning with `"data"` or `"notebooks"`: `bundled("data", "tiny")`.

    Returns:
        An absolute path that exists. In a wheel it is not a place to write to.

    Raises:
        InputError: the path leaves those folders, or nothing is there; with near names.
        G4LensError: this installation carries neither folder.
    """
    root = _root()
    return _find("/".join(parts), base=root, within=[root / folder for folder in FOLDERS])


def sample(name: str) -> Path:
    """The path of a bundled sample, wherever the program or notebook that asks was copied.

    Args:
        name: the file's path inside the data folder: `sample("images/corners.png")`.

    Raises:
        InputError: the path leaves the data folder, or nothing is there; with near names.
        G4LensError: this installation carries no data.
    """
    data = _root() / "data"
    return _find(name, base=data, within=[data])


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    if device.type == "meta":
        return 2**62
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return int(found[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _find(name: str, base: Path, within: list[Path]) -> Path:
    path = (base / name).resolve()
    if not any(path.is_relative_to(folder) for folder in within):
        folders = listed(folder.name for folder in within)
        raise InputError(f"{name!r} is outside the bundled folders, expected a path in: {folders}.")
    if not path.exists():
        known = (known.relative_to(base).as_posix() for known in _files(within))
        raise InputError(f"No bundled file is named {name!r}.{did_you_mean(name, known)}")
    return path


def _files(folders: Iterable[Path]) -> Iterable[Path]:
    return (path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file())


def _root() -> Path:
    package = Path(__file__).resolve().parent
    if (package / "_bundled").is_dir():
        return package / "_bundled"
    if _is_checkout(package.parent):
        return package.parent
    raise G4LensError(
        f"g4lens in {package} has no notebooks and no data: expected {package / '_bundled'}, or a "
        "checkout of g4lens around it. Install it again from a wheel or a checkout."
    )


def _is_checkout(folder: Path) -> bool:
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return project.get("project", {}).get("name") == "g4lens"
