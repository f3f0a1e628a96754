"""The folder of a run, and the record that is written into it.

    spec.json, shards/, index.parquet     the units, by `UnitStore`
    attempts/                             who tried them, and when
    metrics.parquet                       a row for each unit, cell, prompt and metric
    summary.parquet                       a row for each cell, with its statistics
    figures/*.svg, *.pdf                  the same bytes whenever the numbers are the same
    report.html                           all of it on a page that needs nothing else
    chosen/                               circuits or steering vectors, if any were chosen
    manifest.json                         what it follows from, and the hash of every file above

The manifest comes last: a folder that has one has a whole record.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g4lens.errors import InputError, StoreError, listed
from g4lens.experiment import tables
from g4lens.experiment.files import alone, put, sha256
from g4lens.experiment.record import page
from g4lens.experiment.record.figures import Drawn, figures
from g4lens.experiment.record.manifest import SCHEMA, hash_of, manifest_of
from g4lens.experiment.record.summary import (
    cell_columns,
    results,
    summary,
    with_plain_cells,
)
from g4lens.experiment.record.verify import Verdict, changed, verify
from g4lens.experiment.run import Job, prepare
from g4lens.experiment.store import SPEC, UnitStore

if TYPE_CHECKING:
    import pandas as pd

MANIFEST, METRICS, SUMMARY, REPORT = (
    "manifest.json",
    "metrics.parquet",
    "summary.parquet",
    "report.html",
)
FIGURES, CHOSEN = "figures", "chosen"


class Run:
    """A run in its folder.

    Args:
        folder: as `g4lens run` fills it.

    Attributes:
        folder: where.
        store: its units.

    Raises: InputError: there is no run in it.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.store = UnitStore.open(folder)
        if (kind := self.store.spec.get("kind")) != "run":
            raise InputError(f"{folder} holds {kind}, expected a run")

    def __repr__(self) -> str:
        missing = len(self.store.missing())
        state = "recorded" if self.is_recorded else f"{missing} units missing"
        return f"Run({str(self.folder)!r}, {len(self.store.units)} units, {state})"

    @property
    def is_recorded(self) -> bool:
        """Is the record written?"""
        return (self.folder / MANIFEST).is_file()

    @property
    def is_whole(self) -> bool:
        """Is it written, of this very run, and is every file of it as it was written?

        Costs a read of the record's files.
        """
        try:
            return self.is_recorded and not changed(self, self.manifest)
        except StoreError:
            return False

    # ---- reading

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the run follows from and what it was done with; see `manifest_of`.

        Raises:
            InputError: the run is not complete. StoreError: the manifest is not what was written.
        """
        path = self.folder / MANIFEST
        if not self.is_recorded:
            missing = self.store.missing()
            raise InputError(
                f"{self.folder} has no {MANIFEST}: {len(missing)} of {len(self.store.units)} units "
                "are missing, run it to its end"
            )
        try:
            held = json.loads(path.read_text("utf-8"))
            if held["schema"] == SCHEMA and held["sha256"] == hash_of(held):
                return held
            older = held["schema"] != SCHEMA
            why = f"schema {held['schema']}, not {SCHEMA}" if older else "its hash is another"
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            why = repr(error)
        raise StoreError(f"{path} is not what was written ({why}): run again")

    @property
    def metrics(self) -> "pd.DataFrame":
        """A row for each unit, cell, prompt and metric: value, base, target, and the conditions.

        Raises: as `manifest`, for the table.
        """
        return self._table(METRICS)

    @property
    def summary(self) -> "pd.DataFrame":
        """A row for each cell of each variant, baseline and metric; see `summary`. Raises: so."""
        return self._table(SUMMARY)

    def _table(self, name: str) -> "pd.DataFrame":
        path = self.folder / name
        if sha256(path) != self.manifest["files"][name]:
            raise StoreError(f"{path} is not what was written: run again")
        return tables.read(path).to_pandas()

    def job(self) -> Job:
        """What the run is, prepared again from its spec file. Raises: InputError: as `prepare`."""
        return prepare(self.folder / self.store.about["path"])

    def verify(self, k: int = 3, seed: int | None = None, progress: bool = True) -> Verdict:
        """Compare hashes of inputs and files, and run `k` units again; see `verify`."""
        return verify(self, k, seed, progress)

    # ---- writing

    def write_record(self, job: Job | None = None) -> None:
        """Write the record of a complete run; what is there is replaced, file by file.

        Costs the self-checks, a few dozen passes over the pairs of one unit, and the statistics.

        Args:
            job: what the run is; by default it is prepared again.

        Raises:
            InputError: units are missing, or the spec or what it names is another by now.
            StoreError: no space, no permission, or a unit that is not what was written.
        """
        if missing := self.store.missing():
            raise InputError(f"{self.folder} has no units {listed(missing, 4)} yet: run again")
        for path in self.store.files().values():
            if sha256(path) not in path.name:
                raise StoreError(f"{path} is not what was written: delete it and run again")
        if job is None:
            job = self.job()
            job.store(self.folder)  # the spec file may be another by now
        files = self._files(job)
        with alone(self.folder / SPEC):  # others may have come to the end at the same time
            for name, content in files.items():
                path = self.folder / name
                put(path.parent, [content], lambda _, path=path: path.name)
        self.__dict__.pop("manifest", None)

    def _files(self, job: Job) -> dict[str, bytes]:
        """The record's files by name, the manifest last."""
        frame = self._rows(job)
        found = results(frame, job.model.cfg, job.spec)
        table, notes = summary(found, job.spec, cell_columns(frame))
        drawn = figures(found, table, job.spec.statistics.alpha)
        manifest = manifest_of(self.store, job, frame, found, notes)
        files = {
            METRICS: tables.encoded(tables.of_frame(frame)),
            SUMMARY: tables.encoded(tables.of_frame(table)),
            **_figure_files(drawn),
            REPORT: page.rendered(manifest, found, table, drawn, job).encode(),
        }
        job.experiment.kind.keep(self.folder / CHOSEN, job.spec.metrics)
        kept = sorted((self.folder / CHOSEN).glob("[!.]*"))
        manifest["files"] = {
            **{name: hashlib.sha256(x).hexdigest() for name, x in files.items()},
            **{f"{CHOSEN}/{path.name}": sha256(path) for path in kept},
        }
        manifest["sha256"] = hash_of(manifest)
        return {**files, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}

    def _rows(self, job: Job) -> Any:
        """The rows of all units, the columns that name a cell behind the baseline."""
        frame = self.store.frame()
        names = [name for name in job.experiment.cells if name in frame]
        first = ["unit", "variant", "baseline", *names]
        rest = [name for name in frame if name not in first]
        return with_plain_cells(frame[first + rest], names)


def _figure_files(drawn: list[Drawn]) -> dict[str, bytes]:
    return {
        f"{FIGURES}/{one.name}.{kind}": content
        for one in drawn
        for kind, content in one.files.items()
    }
