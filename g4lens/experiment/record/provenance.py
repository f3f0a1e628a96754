"""Where numbers come from: packages, machine, pictures and sounds."""

import os
import platform
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

from g4lens.analysis.pairs import Pairs
from g4lens.experiment.files import sha256
from g4lens.experiment.media import media
from g4lens.model.gemma4 import Gemma4

MOST = 8  # packages told one by one


def packages() -> dict[str, str]:
    """Every installed package and its version."""
    found = {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"]}
    return {name: found[name] for name in sorted(found, key=str.lower)}


def few(lines: list[str]) -> list[str]:
    """Lines about packages, the first few and how many more there are."""
    more = len(lines) - MOST
    return lines if more <= 0 else [*lines[:MOST], f"{more} more packages are others"]


def machine(model: Gemma4) -> dict[str, Any]:
    """What the numbers are computed on and how."""
    on_gpu = model.device.type == "cuda"
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(model.device) if on_gpu else _processor(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "dtype": str(model.embed.ple_context.weight.dtype).removeprefix("torch."),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def media_files(pairs: Pairs, home: Path) -> dict[str, str]:
    """The hash of each file that pairs name, by its path from the spec's folder on."""
    sides = (side for pair in pairs for side in (pair.clean, pair.corrupted))
    paths = {x.source for side in sides for x in media(side) if isinstance(x.source, Path)}
    named = {os.path.relpath(path, home): path for path in paths}
    return {name: sha256(named[name]) for name in sorted(named)}


def _processor() -> str:
    """The processor's name, which Linux tells in a file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
