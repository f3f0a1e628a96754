"""What is in which file of a store, told by the files themselves."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from g4lens.errors import StoreError
from g4lens.experiment import tables
from g4lens.experiment.shards import Shard

if TYPE_CHECKING:
    import pyarrow as pa

BESIDE = (".offsets", ".positions", ".tokens")  # what may stand beside an activation, of its name


def build(files: Mapping[str, Path], older: Path | None = None) -> "pa.Table":
    """The index of the files of units: unit, prompt, name, shard, rows, sha256.

    Args:
        files: by unit, in the order that the index will have.
        older: an index whose rows are taken for the files that it knows, which costs less.

    Raises: StoreError: a file that cannot be read.
    """
    import pyarrow as pa

    known = {} if older is None or not older.exists() else _by_shard(older)
    parts = [known.get(path.name) or _entries(unit, path) for unit, path in files.items()]
    return pa.concat_tables(parts).combine_chunks() if parts else _schema().empty_table()


def _by_shard(path: Path) -> "dict[str, pa.Table]":
    """An index cut into what it tells of each file; nothing if it cannot be used."""
    import numpy as np
    import pyarrow as pa

    try:
        table = tables.read(path).cast(_schema())
    except (StoreError, pa.ArrowException, ValueError):
        return {}
    shards = table["shard"].combine_chunks().dictionary_encode()
    steps = np.diff(shards.indices.to_numpy(), prepend=-1, append=-1)
    cuts = np.flatnonzero(steps).tolist()  # the rows of a file stand together
    spans = pairwise(cuts)
    return {shards[start].as_py(): table.slice(start, end - start) for start, end in spans}


def _entries(unit: str, path: Path) -> "pa.Table":
    """The rows of the index for one file."""
    import pyarrow as pa

    prompts: list[int | None] = [None]
    names: list[str | None] = [None]
    if path.suffix == ".parquet":
        rows = [tables.n_rows(path)]
    elif "prompts" not in (shard := Shard(path)).entries:
        rows = [max((e.shape[0] for e in shard.entries.values() if e.shape), default=0)]
    else:
        own, each = shard.tensor("prompts").tolist(), hook_names(shard)
        prompts, names = own * len(each), [name for name in each for _ in own]
        rows = [n for name in each for n in offsets(shard, name).diff().tolist()]
    n, digest = len(rows), path.stem.rpartition("-")[2]
    columns: dict[str, Any] = {
        "unit": [unit] * n,
        "prompt": prompts,
        "name": names,
        "shard": [path.name] * n,
        "rows": rows,
        "sha256": [digest] * n,
    }
    return pa.table(columns, schema=_schema())


def hook_names(shard: Shard) -> list[str]:
    """The activations of a shard, in order of name."""
    return sorted(n for n in shard.entries if "hook_" in n and not n.endswith(BESIDE))


def offsets(shard: Shard, name: str) -> Tensor:
    """Where the rows of each prompt begin in an activation, and where the last ones end."""
    return beside(shard, name, "offsets")


def beside(shard: Shard, name: str, what: str) -> Tensor:
    """An activation's own offsets, positions or tokens, or those that all of the shard share."""
    return shard.tensor(f"{name}.{what}" if has_own(shard, name) else what)


def has_own(shard: Shard, name: str) -> bool:
    """Does an activation have rows at other places than the rest of its shard?"""
    return f"{name}.offsets" in shard.entries


def _schema() -> "pa.Schema":
    import pyarrow as pa

    text, number = pa.string(), pa.int64()
    kinds = {"unit": text, "prompt": number, "name": text, "shard": text, "rows": number}
    return pa.schema({**kinds, "sha256": text})
