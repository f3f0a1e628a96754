"""Activations as a dataset of Hugging Face's, in the layout that SAELens trains on.

SAELens reads its `cached_activations_path` by `datasets.load_from_disk`: a column of shape
`(context_size, d_in)` under the hook point's name, and the `token_ids` of its rows.
"""

import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.errors import InputError, StoreError
from g4lens.experiment.files import failed, put

STATE = "state.json"  # comes last: without it there is no dataset
MOST = 2**28  # numbers written at a time: Arrow's lists count to 2**31
Piece = tuple[Float[Tensor, "row d_in"], Int[Tensor, "row"]]


def write_dataset(
    folder: Path, name: str, pieces: Iterable[Piece], context_size: int, d_in: int
) -> int:
    """Write a dataset.

    Args:
        folder: where; new or empty.
        name: of the column of activations.
        pieces: rows and their token ids, a file's worth at a time.
        context_size: rows of each sequence; what is left at the end is dropped.
        d_in: numbers of each row.

    Returns: the number of sequences.

    Raises: InputError: `datasets` is not installed, or the folder holds something. StoreError: it
        cannot be written to.
    """
    if find_spec("datasets") is None:
        raise InputError("this export needs the library of SAELens: pip install datasets")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is in use: give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _write(folder, name, _sequences(pieces, context_size), (context_size, d_in))
    except StoreError:  # of what is read
        raise
    except OSError as error:
        raise failed(folder, error) from None
    finally:
        if not (folder / STATE).exists():  # leave no half of a dataset
            for path in folder.glob("*"):
                path.unlink()


def _sequences(pieces: Iterable[Piece], n: int) -> Iterator[Piece]:
    """Whole sequences of `n` rows, several at a time; what a piece leaves goes to the next."""
    rest: Piece | None = None
    for x, ids in pieces:
        if rest is not None:
            x, ids = torch.cat([rest[0], x]), torch.cat([rest[1], ids])
        whole = len(x) - len(x) % n
        if whole:
            size = n * max(1, MOST // (n * x.shape[1]))
            yield from zip(x[:whole].split(size), ids[:whole].split(size), strict=True)
        rest = x[whole:], ids[whole:]


def _write(folder: Path, name: str, pieces: Iterable[Piece], shape: tuple[int, int]) -> int:
    from datasets import Array2D, DatasetInfo, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    source = iter(pieces)
    first = next(source, None)
    if first is None:
        raise InputError(f"fewer rows than one sequence of {shape[0]}")
    # Arrow knows no bfloat16
    kind = "float32" if first[0].dtype == torch.bfloat16 else str(first[0].dtype)
    column: dict[str, Any] = {name: Array2D(shape=shape, dtype=kind.removeprefix("torch."))}
    features = Features({**column, "token_ids": List(Value("int32"), length=shape[0])})
    file, n = "data-00000-of-00001.arrow", 0
    writer = ArrowWriter(features=features, path=str(folder / file))
    for x, ids in chain([first], source):
        x = x.float() if x.dtype == torch.bfloat16 else x
        rows: Any = x.reshape(-1, *shape).numpy()  # annotated there as lists
        token_ids: Any = ids.reshape(-1, shape[0]).int().numpy()
        writer.write_batch({name: rows, "token_ids": token_ids})
        n += len(rows)
    writer.finalize()
    DatasetInfo(features=features).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": file}],
        "_fingerprint": "0" * 16,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    put(folder, [json.dumps(state, indent=1).encode()], lambda _: STATE)
    return n
