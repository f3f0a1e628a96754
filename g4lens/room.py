"""Is there room for a model? Told before any of it is loaded, with the options that make it fit."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from g4lens.errors import InputError
from g4lens.quantize import packed_bytes
from g4lens.resources import free_memory
from g4lens.source import Source
from g4lens.weights import TABLES, Checkpoint

# What may be given up for room, the cheapest first.
SAVINGS: tuple[dict[str, Any], ...] = (
    {"ple": "disk"},
    {"dtype": None},
    {"vision": False, "audio": False},
    {"embed": "disk"},
    {"quantize": "int8"},
    {"quantize": "int4"},
)


def check_memory(
    files: Checkpoint, names: Mapping[str, str], source: Source, device: torch.device
) -> None:
    """Refuse weights that a device has no memory for.

    Args:
        files: holds them.
        names: the released name of each.
        source: how they are to be loaded.
        device: where they are to go.

    Raises: InputError: what is needed, what is free, and which options need less.
    """
    need, free = needed(files, names, source, device), free_memory(device)
    if need <= free:
        return
    smaller, less = source, need
    for saving in SAVINGS:
        saved = replace(smaller, **saving)
        if (now := needed(files, names, saved, device)) < less:  # a table may be mapped as it is
            smaller, less = saved, now
        if less <= free:
            break
    changes = {x: getattr(smaller, x) for saving in SAVINGS for x in saving}
    options = [f"{x}={value!r}" for x, value in changes.items() if value != getattr(source, x)]
    still = "they need" if less <= free else "they would still need"
    with_them = f"; with {', '.join(options)} {still} {less / 1e9:.1f} GB" if options else ""
    raise InputError(
        f"the weights of {source.name} need {need / 1e9:.1f} GB on {device}, but {free / 1e9:.1f} "
        f"GB of memory are free{with_them}"
    )


def needed(
    files: Checkpoint, names: Mapping[str, str], source: Source, device: torch.device
) -> int:
    """Bytes of a device's memory that the weights take when all that a pass reads has been read.

    Arguments are those of `check_memory`.
    """
    stored = files.dtype(names["embed.tokens.weight"])
    wanted = stored if source.dtype is None else getattr(torch, source.dtype)
    tables = {f"{table}.weight": option for option, table in TABLES.items()}
    elsewhere = {name for name, option in tables.items() if getattr(source, option) != "device"}
    total = 0
    for ours, theirs in names.items():
        is_mapped = device.type == "cpu" and files.dtype(theirs) == wanted
        is_rows = is_mapped and ours == f"{TABLES['ple']}.weight"  # of which a pass reads a few
        if ours in elsewhere or is_rows or ours.startswith(tuple(f"{t}." for t in source.without)):
            continue
        shape = files.shapes[theirs]
        is_linear = len(shape) == 2 and ours.endswith(".weight") and ours not in tables
        if source.quantize is not None and is_linear:
            total += packed_bytes(source.quantize, shape, wanted.itemsize)
        else:
            total += wanted.itemsize * math.prod(shape)
    return total
