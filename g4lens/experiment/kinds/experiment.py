"""An experiment cut into units: a variant or control, times a fixed chunk of pairs."""

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import Metric, as_metric
from g4lens.analysis.pairs import Pairs
from g4lens.analysis.result import CONDITIONS, Result
from g4lens.analysis.runs import measure
from g4lens.cost import Cost
from g4lens.errors import InputError, listed
from g4lens.experiment.identity import model_identity, prompts_identity
from g4lens.experiment.kinds import controls
from g4lens.experiment.kinds.base import Baseline, Chunk, Control, Kind
from g4lens.experiment.kinds.chosen import CircuitRuns, SteeringRuns
from g4lens.experiment.kinds.edges import KnockoutRuns, PathRuns
from g4lens.experiment.kinds.lens import LensRuns
from g4lens.experiment.kinds.sweeps import AblationRuns, AttributionRuns, PatchingRuns
from g4lens.experiment.run_spec import Spec
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    import pandas as pd

KINDS: dict[str, type[Kind[Any]]] = {
    "patching": PatchingRuns,
    "ablation": AblationRuns,
    "knockout": KnockoutRuns,
    "path_patching": PathRuns,
    "attribution": AttributionRuns,
    "circuits": CircuitRuns,
    "steering": SteeringRuns,
    "logit_lens": LensRuns,
}
AT_ONCE = 16  # rows of logits
TIMED = 3  # passes that the time of one is judged by
CONTROLS: tuple[Control, ...] = ("random", "direction", "permuted")


@dataclass(frozen=True)
class _Job:
    """What a unit is."""

    variant: str
    baseline: Baseline
    chunk: int


class Experiment:
    """What a spec says, on a model and its pairs.

    A unit is one variant, or one control of it, on so many pairs, with all metrics. It follows from
    the spec, the model and the pairs alone: whoever computes it, and in whatever order, gets the
    same bits, on one kind of machine with one number of threads.

    Args:
        spec: what to run.
        model: the model.
        pairs: all of them.

    Attributes:
        units: their names, in order.
        cells: the columns of a frame that name a cell.
        absent: why a control that was asked for is not run.

    Raises: InputError: something that the model or the pairs do not have, or pairs that do not
        align; no pass is needed to see it.
    """

    def __init__(self, spec: Spec, model: Gemma4, pairs: Pairs):
        self.spec, self.model, self.pairs = spec, model, pairs
        discovery, self._numbers = self._split()
        args = spec.experiment
        self.kind = KINDS[args.kind](args, model, pairs, discovery, spec.seed)
        self.cells = list(self.kind.axes)
        asked = {name: getattr(spec.baselines, name) for name in CONTROLS}
        why = {name: self._why_not(name) for name in CONTROLS if asked[name]}
        self.absent = {name: reason for name, reason in why.items() if reason}
        self.baselines = [Baseline("none", 0, spec.seed)] + [
            Baseline(name, draw, spec.seed)
            for name in CONTROLS
            if name not in self.absent
            for draw in range(asked[name])
        ]
        self._jobs = dict(self._named_jobs())
        self.units = list(self._jobs)
        self._check()

    def _why_not(self, control: Control) -> str | None:
        """Why a control cannot be run; None if it can."""
        same = controls.permuted(self._measured, Baseline("permuted", 0, self.spec.seed))
        told = [[(pair.answer, pair.foil) for pair in pairs] for pairs in (same, self._measured)]
        if control == "permuted" and not self.kind.permutes and told[0] == told[1]:
            return "no pair has a foil, or another answer in its template"
        if control == "permuted" and not self._metrics(Baseline("permuted")):
            return f"{', '.join(self.spec.metrics)} depends on no label"
        return self.kind.absent(control)

    def _metrics(self, baseline: Baseline) -> list[str]:
        """The metrics that are measured: with permuted labels those that depend on any."""
        is_permuted = baseline.kind == "permuted"
        return [x for x in self.spec.metrics if not is_permuted or self.kind.is_labelled(x)]

    def __reduce__(self) -> tuple[Any, ...]:
        return Experiment, (self.spec, self.model, self.pairs)  # not what was made on the way

    def _split(self) -> tuple[Pairs | None, list[int]]:
        """The pairs to choose on, and the numbers of those to measure."""
        share = self.spec.discovery
        if share is None:
            return None, list(range(len(self.pairs)))
        try:
            found_on, measured = self.pairs.split(share, seed=self.spec.seed)
        except InputError as error:
            raise InputError(f"split: {error}") from None
        numbers = {id(pair): i for i, pair in enumerate(self.pairs)}
        return found_on, [numbers[id(pair)] for pair in measured]

    def _named_jobs(self) -> Iterator[tuple[str, _Job]]:
        n = -(-len(self._numbers) // self.spec.pairs_per_unit)
        for variant in self.kind.variants():
            for baseline in self.baselines:
                parts = [variant] if baseline.kind == "none" else [variant, str(baseline)]
                name = re.sub(r"[^A-Za-z0-9_.]", "_", ".".join(parts))
                for chunk in range(n):
                    yield f"{name}.{chunk:04}", _Job(variant, baseline, chunk)

    def _check(self) -> None:
        """Raises: InputError: whatever would be wrong with any unit, as far as no pass tells."""
        try:
            for _ in self._costs():
                pass
            for baseline in self.baselines:
                if baseline.kind == "random":
                    self.kind.drawn(self._of(range(len(self._numbers))), baseline)
        except InputError as error:
            raise InputError(f"experiment: {error}") from None

    def _costs(self) -> Iterator[tuple[str, str, Cost]]:
        """Of each variant and metric."""
        for metric in self.spec.metrics:
            groups = self._measured.on(self.model, metric)
            _check_labels(as_metric(metric), groups)
            for variant, options in self.kind.variants().items():
                yield variant, metric, self.kind.cost(options, groups, metric)

    # ---- what it follows from, and what it costs

    def identity(self) -> dict[str, Any]:
        """Everything that the results follow from, as JSON has it."""
        told = [
            [
                pair.clean,
                pair.corrupted,
                pair.answer,
                pair.foil,
                pair.template,
                {name: repr(place) for name, place in pair.positions.items()},
            ]
            for pair in self.pairs
        ]
        return {
            "kind": "run",
            "spec": self.spec.model_dump(mode="json"),
            "model": model_identity(self.model),
            "pairs": prompts_identity(told),
        }

    def plan(self) -> "pd.DataFrame":
        """What a run would cost, a row for each variant and control.

        Columns: variant, baseline, units, cells (of all pairs and metrics), removed (those that
        reach proves to change nothing), passes (what it amounts to, in forward passes over whole
        prompts), seconds, bytes (beside the model, at most).

        Costs a few plain passes of one pair, by which the time is judged.
        """
        import pandas as pd

        costs = {(variant, metric): cost for variant, metric, cost in self._costs()}
        seconds, n = self._seconds(), -(-len(self._numbers) // self.spec.pairs_per_unit)
        rows = []
        for variant, baseline in product(self.kind.variants(), self.baselines):
            each = [costs[variant, metric] for metric in self._metrics(baseline)]
            passes = sum(cost.passes for cost in each)
            rows.append(
                {
                    "variant": variant,
                    "baseline": str(baseline),
                    "units": n,
                    "cells": sum(cost.cells + cost.skipped for cost in each),
                    "removed": sum(cost.skipped for cost in each),
                    "passes": round(passes, 1),
                    "seconds": round(passes * seconds, 2),
                    "bytes": max(cost.bytes for cost in each),
                }
            )
        return pd.DataFrame(rows)

    def _seconds(self) -> float:
        """How long one pass over one pair takes."""
        group = self._measured[:1].on(self.model, "logit")[0]
        taken = []
        for _ in range(TIMED):
            start = time.perf_counter()
            measure(self.model, group, "clean", "logit")
            taken.append(time.perf_counter() - start)
        return min(taken)  # the first one pays for more than itself

    # ---- a unit

    def frame(self, unit: str) -> "pd.DataFrame":
        """A unit's numbers, a row for each cell, prompt and metric.

        Columns: variant, baseline, the cell's labels (`cells`), prompt (its number among all
        pairs), cluster, metric, value, base and target (the metric without intervention, and where
        it would go in full), and the conditions of `Result`.

        Raises: InputError: no such unit, or what the method raises.
        """
        import pandas as pd

        if unit not in self._jobs:
            raise InputError(f"no unit {unit!r}, there are {listed(self.units)}")
        job = self._jobs[unit]
        size = self.spec.pairs_per_unit
        some = range(len(self._numbers))[job.chunk * size : (job.chunk + 1) * size]
        chunk = self._of(some, job.baseline)
        options = self.kind.variants()[job.variant]
        frames = [
            self._tidy(self.kind.measure(options, job.baseline, chunk, metric), job, chunk, metric)
            for metric in self._metrics(job.baseline)
        ]
        return pd.concat(frames, ignore_index=True)

    def _of(self, some: range, baseline: Baseline | None = None) -> Chunk:
        """Some of the pairs that are measured, with permuted labels if these are the control."""
        permuted = baseline is not None and baseline.kind == "permuted" and not self.kind.permutes
        pairs = self._permuted(baseline) if permuted and baseline else self._measured
        return Chunk(pairs[list(some)], tuple(self._numbers[i] for i in some))

    @cached_property
    def _measured(self) -> Pairs:
        return self.pairs[self._numbers]

    def _permuted(self, baseline: Baseline) -> Pairs:
        return controls.permuted(self._measured, baseline)

    def _tidy(self, result: Result, job: _Job, chunk: Chunk, metric: str) -> "pd.DataFrame":
        """A result as rows, in the order of the columns above."""
        frame = result.to_frame().rename(columns={"pos": "position"})
        numbers = [chunk.numbers[i] for i in frame["pair"]]
        frame = frame.assign(
            variant=job.variant,
            baseline=str(job.baseline),
            prompt=numbers,
            cluster=[self.pairs.clusters[i] for i in numbers],
            metric=as_metric(metric).name,
        )
        cells = [axis if axis != "pos" else "position" for axis in (a.name for a in result.axes)]
        for name in cells:  # Parquet has no column of numbers and words
            if frame[name].dtype == object:
                frame[name] = frame[name].map(str)
        rest = [name for name in CONDITIONS if name != "metric"]
        known = ["variant", "baseline", *cells, "prompt", "cluster", "metric"]
        return frame[[*known, "value", "base", "target", *rest, "details"]]


def _check_labels(metric: Metric, groups: Sequence[Group]) -> None:
    """Raises: InputError: the metric does not find the answers and foils that it needs."""
    # KL needs none, and would run the clean side
    for group in groups if metric.is_normalised else ():
        for part in group.split(AT_ONCE):
            reads = part.targets.reads.shape[1]
            metric(torch.zeros(len(part), reads, group.cfg.d_vocab), part.targets)
