"""The manifest of a run: what it follows from, what it was done with, and who did it."""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from g4lens.analysis.result import Result
from g4lens.analysis.selfcheck import selfcheck
from g4lens.experiment import version
from g4lens.experiment.attempts import attempts
from g4lens.experiment.record import provenance
from g4lens.experiment.record.summary import Key, has_sign
from g4lens.experiment.store import UnitStore

if TYPE_CHECKING:
    from g4lens.experiment.run import Job

SCHEMA = 2
CODE = ("version", "source", "commit", "diff")


def manifest_of(
    store: UnitStore, job: "Job", frame: Any, found: Mapping[Key, Result], notes: list[str]
) -> dict[str, Any]:
    """All of a manifest but the hashes of the record's files and its own.

    Costs the self-checks, a few dozen passes over the pairs of one unit.

    Args:
        store: the units, all there.
        job: what they are of.
        frame: their rows.
        found: the results.
        notes: what is to be said of the statistics.
    """
    spec, origin, alpha = job.spec, job.model.origin, job.spec.statistics.alpha
    checked = selfcheck(job.model, job.pairs[: spec.pairs_per_unit], spec.metrics[0])
    units = _units(store)
    return {
        "schema": SCHEMA,
        "run": run_id(store),
        "name": spec.name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "spec": store.spec["spec"],
        "seeds": {"experiment": spec.seed, "pairs": spec.pairs.seed, "statistics": spec.seed},
        "model": {
            "name": None if origin is None else spec.model.name,
            "revision": None if origin is None else origin.revision,
            **store.spec["model"],
        },
        "pairs": {
            **store.spec["pairs"],
            "dropped": job.pairs.dropped,
            "measured": int(frame["prompt"].nunique()),
            "clusters": int(frame["cluster"].nunique()),
        },
        "media": provenance.media_files(job.pairs, job.path.parent),
        "code": version.code(),
        "computed_with": _codes(units),
        "packages": provenance.packages(),
        "machine": provenance.machine(job.model),
        "checks": [{**vars(one), "passed": bool(one.passed)} for one in checked],
        "absent": job.experiment.absent,
        "notes": notes,
        "tolerance": _tolerance(frame, job),
        "power": {
            f"{key.variant}, {key.metric}": result.power_note(alpha)
            for key, result in found.items()
            if key.baseline == "none" and len(set(result.clusters)) > 1 and has_sign(result)
        },
        "units": {
            unit: {**told, "code": told["code"] and told["code"]["source"]}
            for unit, told in units.items()
        },
    }


def run_id(store: UnitStore) -> str:
    """What a run is called: the beginning of the hash of all that its units follow from."""
    return store.hash[:16]


def hash_of(manifest: Mapping[str, Any]) -> str:
    """The hash of a manifest, without that hash."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _units(store: UnitStore) -> dict[str, dict[str, Any]]:
    """Each unit's hash, and what is known of its making: of one without logs nothing."""
    tried = attempts(store.folder)
    none = dict.fromkeys(("attempts", "seconds", "worker", "code"))
    return {
        unit: {"sha256": path.stem.rpartition("-")[2], **none, **tried.get(unit, {})}
        for unit, path in store.files().items()
    }


def _codes(units: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each code that units were computed with, and how many."""
    counted: dict[str | None, dict[str, Any]] = {}
    for unit in units.values():
        code = unit["code"] or dict.fromkeys(CODE)
        counted.setdefault(code["source"], {**code, "units": 0})["units"] += 1
    return list(counted.values())


def _tolerance(frame: Any, job: "Job") -> dict[str, float]:
    """How far each metric may lie off when a unit is run again elsewhere.

    A share of the largest number that it takes: other processors add up in another order.
    """
    precise = str(job.model.embed.ple_context.weight.dtype) in ("torch.float32", "torch.float64")
    largest = frame.groupby("metric")[["value", "base", "target"]].agg(lambda x: x.abs().max())
    share = 1e-4 if precise else 5e-2
    return {str(name): share * max(1.0, float(row.max())) for name, row in largest.iterrows()}
