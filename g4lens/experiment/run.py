"""An experiment into a folder: what is missing is computed, and the record is written.

spec ─ model and pairs ─ units, one by one into a store ─ the record of the whole
"""

import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from g4lens.analysis.pairs import Pairs
from g4lens.experiment.engine import Engine, fill
from g4lens.experiment.kinds import Experiment
from g4lens.experiment.media import check_media
from g4lens.experiment.run_spec import Spec
from g4lens.experiment.spec import read_spec
from g4lens.experiment.store import UnitStore
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    from g4lens.experiment.record import Run


@dataclass(frozen=True, eq=False)
class Job:
    """A spec with everything that it names.

    Attributes:
        path: of the spec.
        spec, model, pairs, experiment: what it says.
    """

    path: Path
    spec: Spec
    model: Gemma4
    pairs: Pairs
    experiment: Experiment

    def store(self, out: str | Path) -> UnitStore:
        """The folder of its results. Raises: InputError: it holds something else."""
        about: dict[str, Any] = {
            "path": os.path.relpath(self.path.resolve(), Path(out).resolve()),
            "absent": self.experiment.absent,
            "threads": torch.get_num_threads(),
            "g4lens": import_module("g4lens").__version__,  # which itself imports all modules
            "torch": torch.__version__,
        }
        return UnitStore(out, self.experiment.identity(), self.experiment.units, about)


def prepare(path: str | Path) -> Job:
    """Read a spec, and load and check what it names. Nothing is written.

    Raises:
        InputError: the spec, its pairs or their pictures and sounds cannot be taken, or do not fit
            the model or each other. And what `g4lens.load` raises.
    """
    path = Path(path)
    spec, home = read_spec(path, Spec), path.parent
    model = spec.model.load(home)
    pairs = spec.pairs.load(home, model)
    for i, pair in enumerate(pairs):
        for side in ("clean", "corrupted"):
            check_media(getattr(pair, side), model.cfg, f"pair {i}")
    return Job(path, spec, model, pairs, Experiment(spec, model, pairs))


def run(
    path: str | Path,
    out: str | Path,
    *,
    engine: Engine = "local",
    shard: tuple[int, int] = (1, 1),
    address: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> "Run":
    """Do what a spec file says, into a folder; what is there already is kept.

    Call again with the same arguments after a kill, or from other jobs at the same time: units are
    whole or absent, and follow from the spec alone. The record is written by whoever finds that no
    unit is missing any more, and anew where a file of it is not what was written.

    Args:
        path: the spec, a YAML file: see `run_spec.Spec`.
        out: a folder: new, empty, or with results of this very spec.
        engine: "local" computes here, "ray" in workers; see `engine.fill`.
        shard: `(k, n)` does every n-th unit from the k-th on, k from 1: one of n jobs.
        address: of a Ray cluster; by default one is started on this machine.
        workers: of Ray, how many; by default as many as there is room for.
        progress: show a bar.

    Raises:
        InputError: the spec or the folder cannot be taken; nothing has been written.
        StoreError: no space, no permission.
    """
    from g4lens.experiment.record import Run

    job = prepare(path)
    store = job.store(out)
    is_done = not store.missing()
    fill(
        store,
        job.experiment.frame,
        job.model,
        engine=engine,
        shard=shard,
        address=address,
        workers=workers,
        progress=progress,
    )
    found = Run(out)
    if not store.missing() and not (is_done and found.is_whole):
        found.write_record(job)
    return found
