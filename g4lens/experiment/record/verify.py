"""Is a run what it says? Hashes exactly, and some units once more.

What must agree: every file with its hash, and the model, the pairs and the spec with those that the
run began with. What need not: code, packages and machine, which are reported. Units that are run
again must agree within the tolerance that the run holds, since another processor gives other last
bits.
"""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from g4lens.errors import G4LensError, InputError, StoreError
from g4lens.experiment import tables, version
from g4lens.experiment.files import sha256
from g4lens.experiment.record import provenance
from g4lens.experiment.record.manifest import run_id
from g4lens.experiment.store import differences

if TYPE_CHECKING:
    from g4lens.experiment.record.folder import Run
    from g4lens.experiment.run import Job

NUMBERS = ("value", "base", "target")


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        problems: what is not as the run says.
        notes: what is different and may be.
        units: of each unit that was run again, the largest difference of each metric.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    units: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Is the run what it says?"""
        return not self.problems

    def __repr__(self) -> str:
        lines = [f"FAIL  {line}" for line in self.problems]
        lines += [f"note  {line}" for line in self.notes]
        for unit, off in self.units.items():
            told = ", ".join(f"{metric} {x:.2g}" for metric, x in off.items())
            lines.append(f"run   {unit}: largest difference {told}")
        return "\n".join([*lines, "verified" if self.passed else "NOT verified"])


def verify(run: "Run", k: int = 3, seed: int | None = None, progress: bool = True) -> Verdict:
    """Compare a run with its hashes and with its inputs of today, and run some units again.

    Costs a read of all files and weights, and the units.

    Args:
        run: complete, with its record.
        k: how many units to run again.
        seed: draws them; by default others every time.
        progress: show a bar.

    Raises: InputError: the run is not complete, or fewer than 0 units are asked for.
    """
    if k < 0:
        raise InputError(f"units is {k}, expected 0 or more")
    problems = run.store.verify()
    try:
        manifest = run.manifest
    except StoreError as error:
        return Verdict((*problems, str(error)))
    problems += [*changed(run, manifest), *_exchanged(run, manifest)]
    if manifest["run"] != run_id(run.store):
        return Verdict(tuple(problems))
    told = _told(manifest)
    try:
        job = run.job()
    except G4LensError as error:  # a picture is gone, or the weights
        return Verdict((*problems, f"the inputs cannot be taken: {error}"), told)
    others, notes = _inputs(run, job, manifest)
    if others:
        said = "no unit was run again: the inputs are others"
        return Verdict((*problems, *others, said), (*told, *notes))
    units = random.Random(seed).sample(run.store.units, min(k, len(run.store.units)))
    off: dict[str, dict[str, float]] = {}
    from tqdm.auto import tqdm

    ordered = sorted(units, key=run.store.units.index)
    for unit in tqdm(ordered, unit="unit", leave=False, delay=1.0, disable=not progress):
        try:
            held = tables.read(run.store.files()[unit]).to_pandas()
        except (KeyError, StoreError):
            continue  # the store has told of it
        wrong, off[unit] = _compared(unit, held, job.experiment.frame(unit), manifest["tolerance"])
        problems += wrong
    return Verdict(tuple(problems), (*told, *notes), off)


def changed(run: "Run", manifest: dict[str, Any]) -> list[str]:
    """The files of a record that are not what was written, or all of it if it is another's."""
    if manifest["run"] != (own := run_id(run.store)):
        return [f"{run.folder} has the manifest of run {manifest['run']}, it is {own}: run again"]
    wrong = []
    for name, digest in manifest["files"].items():
        path = run.folder / name
        if not path.is_file():
            wrong.append(f"{path} is missing: run again")
        elif sha256(path) != digest:
            wrong.append(f"{path} is not what was written: run again")
    return wrong


def _exchanged(run: "Run", manifest: dict[str, Any]) -> list[str]:
    """The units that are not those of the record."""
    held = manifest["units"]
    return [
        f"unit {unit} is not the one that the record is of"
        for unit, path in run.store.files().items()
        if unit in held and held[unit]["sha256"] not in path.name
    ]


def _told(manifest: dict[str, Any]) -> tuple[str, ...]:
    """What the record itself says against its numbers."""
    failed = [check["name"] for check in manifest["checks"] if not check["passed"]]
    notes = [f"self-check {name!r} failed when the record was written" for name in failed]
    writer = manifest["code"]["source"]
    for code in manifest["computed_with"]:
        if code["source"] != writer:
            known = code["source"] and f"{code['version']}, source {code['source'][:12]}..."
            notes.append(
                f"{code['units']} units were computed with {known or 'a code that is not known'}, "
                f"the record with source {writer[:12]}..."
            )
    return tuple(notes)


def _inputs(run: "Run", job: "Job", manifest: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
    """What the run follows from that is another now, and what else is."""
    then, now = run.store.spec, job.experiment.identity()
    media = provenance.media_files(job.pairs, job.path.parent)
    wrong = _said("media", manifest["media"], media)
    for name in sorted(then.keys() | now.keys()):
        theirs, ours = then.get(name, {}), now.get(name, {})
        if name == "model":
            theirs, ours = ({k: v for k, v in x.items() if k != "device"} for x in (theirs, ours))
        wrong += _said(name, theirs, ours)
    notes = _said("device", then["model"]["device"], now["model"]["device"])
    notes += _said("code", manifest["code"], version.code())
    notes += provenance.few(_said("packages", manifest["packages"], provenance.packages()))
    notes += _said("machine", manifest["machine"], provenance.machine(job.model))
    return wrong, tuple(notes)


def _said(name: str, theirs: Any, ours: Any) -> list[str]:
    return [
        line.replace(" there and ", " in the run and ").removesuffix(" here") + " now"
        for line in differences(theirs, ours, name)
    ]


def _compared(
    unit: str, held: Any, again: Any, tolerance: dict[str, float]
) -> tuple[list[str], dict[str, float]]:
    """Where a unit's rows are others, and the largest difference of each metric."""
    if list(held) != list(again) or len(held) != len(again):
        return [f"unit {unit} has other rows when it is run again"], {}
    words = [name for name in held if name not in NUMBERS]
    other = [name for name in words if list(held[name]) != list(again[name])]
    wrong = [f"unit {unit} has another {name} when it is run again" for name in other]
    off: dict[str, float] = {}
    for metric, rows in held.groupby("metric", sort=False):
        pairs = ((rows[name], again.loc[rows.index, name]) for name in NUMBERS)
        off[str(metric)] = max(_distance(a.to_numpy(), b.to_numpy()) for a, b in pairs)
        if off[str(metric)] > (most := tolerance[str(metric)]):
            wrong.append(
                f"unit {unit}, {metric}: {off[str(metric)]:.3g} away when it is run again, "
                f"expected at most {most:.2g}"
            )
    return wrong, off


def _distance(a: Any, b: Any) -> float:
    """The largest difference; infinite where one of them is a number and the other none."""
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nan_to_num(np.abs(a.astype(float) - b)).max(initial=0))
