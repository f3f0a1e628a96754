"""A folder of results that fills unit by unit and can be left and taken up at any moment.

    spec.json                             what the results follow from, and its hash
    shards/UNIT-SHA256.safetensors        one file a unit: tensors, or
    shards/UNIT-SHA256.parquet            a table
    index.parquet                         what is in which file

A unit is done when its file is there: it comes by a rename, and its name tells its hash. So a rerun
does what is missing, and two writers of one unit do no harm. The index is made of the files.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from g4lens.errors import InputError, StoreError, listed
from g4lens.experiment import index, tables
from g4lens.experiment.files import PART, put, sha256, sweep
from g4lens.experiment.shards import Shard, encoded

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SHARDS, SPEC, INDEX = "shards", "spec.json", "index.parquet"
UNIT = re.compile(r"[A-Za-z0-9_.]+")
FILE = re.compile(r"([A-Za-z0-9_.]+)-[0-9a-f]{64}\.(safetensors|parquet)")


class UnitStore:
    """The results of work that is cut into units.

    Nothing is written before the first commit.

    Args:
        folder: where; made if need be.
        spec: everything that the results follow from, as JSON has it: another one never shares the
            folder.
        units: the names of the units, in order: letters, digits, `_` and `.`.
        about: what else should be known of the results; not compared.

    Raises:
        InputError: the folder holds results of another spec, or something else; a spec that is no
            JSON; a unit's name that is no file name, or comes twice.
    """

    def __init__(
        self,
        folder: str | Path,
        spec: Mapping[str, Any],
        units: Sequence[str],
        about: Mapping[str, Any] | None = None,
    ):
        self.folder, self.units = Path(folder), list(units)
        self.about = dict(about or {})
        self.spec = json.loads(_canonical(spec))
        wrong = [unit for unit in self.units if not UNIT.fullmatch(unit)]
        if wrong or len(set(self.units)) != len(self.units):
            raise InputError(f"units {listed(wrong or self.units)}: expected names, each once")
        self._refuse_others()
        sweep(self.folder)

    @classmethod
    def open(cls, folder: str | Path) -> "UnitStore":
        """The store in a folder. Raises: InputError: there is none, or it cannot be read."""
        held = _held(Path(folder))
        if held is None:
            raise InputError(f"{folder} holds no results: it has no {SPEC}")
        return cls(folder, held["spec"], held["units"], held["about"])

    @property
    def hash(self) -> str:
        """The sha256 of the spec and the units' names."""
        return _hash(self.spec, self.units)

    def __repr__(self) -> str:
        return f"UnitStore({str(self.folder)!r}, {len(self.files())} of {len(self.units)} units)"

    # ---- filling

    def missing(self, shard: tuple[int, int] = (1, 1)) -> list[str]:
        """The units still to be done, of every n-th from the k-th on.

        Args:
            shard: `(k, n)`, k from 1 to n: what one of n jobs does.

        Raises: InputError: k is not from 1 to n.
        """
        k, n = shard
        if not 1 <= k <= n:
            raise InputError(f"shard {k}/{n}, expected 1/{n} to {n}/{n}")
        done = self.files()
        return [unit for unit in self.units[k - 1 :: n] if unit not in done]

    def begin(self) -> None:
        """Make the folder, if it is not there. Raises: InputError: others were faster."""
        if not (self.folder / SPEC).exists():
            whole = {"spec": self.spec, "units": self.units, "about": self.about}
            text = json.dumps({"sha256": self.hash, **whole}, indent=1)
            put(self.folder, [text.encode() + b"\n"], lambda _: SPEC, replace=False)
            self._refuse_others()  # of several that begin at once, the first one's counts

    def commit(self, unit: str, content: "Mapping[str, Tensor] | pd.DataFrame") -> None:
        """Keep a unit's result: whole, or not at all. A unit that is there already stays.

        Args:
            unit: its name.
            content: tensors by name, or a data frame (its index is not kept).

        Raises:
            InputError: no such unit. StoreError: no space, no permission.
        """
        if unit not in self.units:
            raise InputError(f"no unit {unit!r} in this store, which has {listed(self.units)}")
        if any(FILE.fullmatch(path.name) for path in self._shards.glob(f"{unit}-*")):
            return
        self.begin()
        if isinstance(content, Mapping):
            chunks, suffix = encoded(content), "safetensors"
        else:
            chunks, suffix = [tables.encoded(tables.of_frame(content))], "parquet"
        put(self._shards, chunks, lambda digest: f"{unit}-{digest}.{suffix}")

    def write_index(self) -> None:
        """Bring `index.parquet` up to date with the units that are there.

        Of several writers the last one writes the whole: each looks again after its own writing.
        What killed ones left half written goes.

        Raises: StoreError: no space, no permission, a file that cannot be read.
        """
        written = None
        while written != (files := self.files()):
            table = index.build(files, self.folder / INDEX)
            put(self.folder, [tables.encoded(table)], lambda _: INDEX)
            written = files
        sweep(self.folder)

    # ---- reading

    def files(self) -> dict[str, Path]:
        """The file of each unit that is done, in the order of the units."""
        found: dict[str, Path] = {}
        for path in sorted(self._shards.glob("*")):
            if named := FILE.fullmatch(path.name):
                found.setdefault(named[1], path)  # a second one came of two writers
        return {unit: found[unit] for unit in self.units if unit in found}

    def shard(self, unit: str) -> Shard:
        """The tensors of a unit. Raises: InputError: it is not there, or a table."""
        path = self._file(unit)
        if path.suffix != ".safetensors":
            raise InputError(f"{path} is a table: use frame()")
        return Shard(path)

    def frame(self) -> "pd.DataFrame":
        """The tables of all units that are done, one below the other, with the unit before them.

        Raises: StoreError: a file that cannot be read. InputError: no unit holds a table.
        """
        import pandas as pd

        files = {u: p for u, p in self.files().items() if p.suffix == ".parquet"}
        if not files:
            raise InputError(f"{self.folder} holds no tables")
        frames = [tables.read(path).to_pandas() for path in files.values()]
        return pd.concat(frames, keys=files, names=["unit", None]).reset_index("unit")

    def index(self) -> "pd.DataFrame":
        """What is in which file: unit, prompt, name, shard, rows, sha256.

        A row for each prompt and name of a unit of tensors (`prompts` and `offsets` among them);
        for a unit of another kind a single one, without prompt and name.

        Raises: StoreError: a file that cannot be read.
        """
        return self.entries().to_pandas()

    def entries(self) -> "pa.Table":
        """The same as an Arrow table, for those who have millions of rows."""
        return index.build(self.files(), self.folder / INDEX)

    def verify(self) -> list[str]:
        """Compare every file with its hash, and the index with the files.

        Costs a read of everything. What was tampered with is named; a hash tells of accidents and
        of changes by hand, not of somebody who renames the file as well.

        Returns: one line for each thing that is wrong.
        """
        wrong = []
        files = self.files()
        for unit in self.units:
            if unit not in files:
                wrong.append(f"unit {unit} is missing: run again")
        for path in files.values():
            if sha256(path) not in path.name:
                wrong.append(f"{path} is not what was written: delete it and run again")
        try:
            same = tables.read(self.folder / INDEX).equals(index.build(files))
        except StoreError as error:
            return [*wrong, f"{error}: run again"]
        return wrong if same else [*wrong, f"{self.folder / INDEX} is not that of the files"]

    # ---- inside

    @property
    def _shards(self) -> Path:
        return self.folder / SHARDS

    def _file(self, unit: str) -> Path:
        files = self.files()
        if unit not in files:
            raise InputError(f"{self.folder} has no unit {unit!r}, it has {listed(files)}")
        return files[unit]

    def _refuse_others(self) -> None:
        """Raises: InputError: the folder is in use for something else, or cannot be read."""
        try:
            if self.folder.exists() and not self.folder.is_dir():
                raise InputError(f"{self.folder} is a file, expected a folder")
            held = _held(self.folder)
            strangers = self._strangers() if held is None else []
            if strangers and (self.folder / SPEC).exists():  # another job has begun meanwhile
                held, strangers = _held(self.folder), []
        except OSError as error:
            raise InputError(f"{self.folder} cannot be read ({error.strerror})") from None
        if strangers:
            raise InputError(
                f"{self.folder} holds {listed(strangers, 4)} and no {SPEC}: give an empty folder, "
                "or a new one"
            )
        ours = {"spec": self.spec, "units": self.units}
        if held is not None and (changed := differences({k: held[k] for k in ours}, ours)):
            raise InputError(
                f"{self.folder} holds results of another spec: {listed(changed, 4)}; give another "
                "folder"
            )

    def _strangers(self) -> list[str]:
        """What is in the folder and may not be there before the first unit is."""
        if not self.folder.is_dir():
            return []
        begun = any(FILE.fullmatch(path.name) for path in self._shards.glob("*"))
        ours = () if begun else (SHARDS,)
        found = [path.name for path in self.folder.iterdir() if path.name not in ours]
        # NFS gives such names to what is open and has none
        return [name for name in found if not name.startswith((PART, ".nfs"))]


def _canonical(x: Any) -> str:
    """JSON that is the same for the same thing."""
    try:
        return json.dumps(
            x, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"a spec holds what JSON cannot: {error}") from None


def _hash(spec: Any, units: Any) -> str:
    return hashlib.sha256(_canonical({"spec": spec, "units": units}).encode()).hexdigest()


def _held(folder: Path) -> dict[str, Any] | None:
    """What `spec.json` says; None where there is none. Raises: InputError: it was tampered with."""
    path = folder / SPEC
    try:
        if not path.is_file():
            return None
        held = json.loads(path.read_text("utf-8"))
        if not isinstance(held["about"], dict):
            raise ValueError("no spec of a store")
        if held["sha256"] != _hash(held["spec"], held["units"]):
            raise ValueError("its hash is another")
        return held
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is not readable as the spec of results ({error})") from None


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Where two things that JSON can hold differ, each with both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = sorted(theirs.keys() | ours.keys())
        pairs = ((theirs.get(k), ours.get(k), f"{path}.{k}".lstrip(".")) for k in keys)
        return [line for a, b, at in pairs for line in differences(a, b, at)]
    if theirs == ours:
        return []
    a, b = (text if len(text) <= 40 else f"{text[:37]}..." for text in (repr(theirs), repr(ours)))
    return [f"{path.removeprefix('spec.')} is {a} there and {b} here"]
