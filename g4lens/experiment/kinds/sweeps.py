"""Kinds that sweep the cells of a site: patching, ablation, attribution."""

import random
from collections.abc import Sequence
from functools import cached_property
from itertools import product
from typing import Any, ClassVar, cast

from g4lens.analysis.ablation import ablation
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.gradients.attribution_patching import attribution_patching
from g4lens.analysis.groups import Group, Side
from g4lens.analysis.metrics import Metric, as_metric
from g4lens.analysis.patching import SIDES_OF, activation_patching
from g4lens.analysis.reach import cells as reached
from g4lens.analysis.reference import Reference
from g4lens.analysis.result import Result
from g4lens.analysis.scope import Scope, Spot, is_all
from g4lens.analysis.sites import site_named
from g4lens.cost import Cost, cone_flop, forward_flop
from g4lens.experiment.kinds.base import (
    NO_VECTOR,
    A,
    Baseline,
    Chunk,
    Control,
    Drawn,
    Kind,
    relabelled,
)
from g4lens.experiment.kinds.controls import other_heads, other_places
from g4lens.experiment.run_spec import Ablation, Attribution, Patching


class SiteSweep(Kind[A]):
    """Maps of a site's cells: block, head, position."""

    method: ClassVar[Any]
    shared: ClassVar[Sequence[str]]  # arguments that all variants take as they are

    def absent(self, control: Control) -> str | None:
        """Other heads, or other positions, must be there to be drawn."""
        if control == "direction":
            return NO_VECTOR
        if control == "random" and not (self._spare_heads or self._named_places):
            return "the map holds every unit of its kind in its blocks"
        return None

    @property
    def _spare_heads(self) -> bool:
        """Do the heads that are named leave others?"""
        args: Any = self.args
        if args.heads is None:
            return False
        of_queries = all(site_named(site).heads == "query" for site in args.site)
        cfg = self.model.cfg
        return len(args.heads) < (cfg.n_heads if of_queries else cfg.n_kv_heads)

    @property
    def _named_places(self) -> list[Any] | None:
        places = cast("Any", self.args).positions
        return None if places is None or is_all(places) else list(places)

    def measure(
        self, options: dict[str, Any], baseline: Baseline, chunk: Chunk, metric: str
    ) -> Result:
        """A map of some pairs."""
        given = self._given(options)
        if baseline.kind != "random":
            return self._run(chunk, metric, baseline, given)
        if self._spare_heads:
            n = self._n_heads(options["site"])
            drawn = other_heads(given["heads"], n, baseline)
            result = self._run(chunk, metric, baseline, {**given, "heads": list(drawn.values())})
            called = ", ".join(f"head {new} for {old}" for old, new in drawn.items())
            return relabelled(result, "head", {new: old for old, new in drawn.items()}, called)
        other = self.drawn(chunk, baseline)
        places = list(other.names)
        result = self._run(other.chunk, metric, baseline, {**given, "positions": places})
        result.about["positions"] = str(given["positions"])
        return relabelled(result, "pos", other.names, f"positions{other.fewer}")

    def drawn(self, chunk: Chunk, baseline: Baseline) -> Drawn:
        """As many other positions for each place that is named."""
        if self._spare_heads:
            return Drawn(chunk, {})
        return other_places(self.model, chunk, self._named_places or [], baseline)

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """By the cone of every cell that reach leaves."""
        given, cfg = self._given(options), self.model.cfg
        site, side = site_named(given["site"]), self._side(given)
        scope = Scope.of(
            cfg, site, groups, side, given["layers"], given["positions"], given["heads"]
        )
        if scope.is_by_index and self._compares:
            for group in groups:
                group.check_aligned()
        n_live, passes = 0, 0.0
        for group in groups:
            n, reads = group.length(side) + group.n_forced, group.reads(side)[0].tolist()
            live, whole = reached(cfg, n, reads, site.name), forward_flop(cfg, n, len(reads))
            firsts: dict[str, Any] = {}
            for spot in scope.spots:
                key = repr(spot.position)
                if key not in firsts:
                    firsts[key] = _places(group, spot, side)
                touched = [p for p in firsts[key] if live[spot.layer, p]]
                if touched:
                    n_live += len(group)
                    flop = cone_flop(cfg, spot.layer, min(touched), n, len(reads))
                    passes += len(group) * flop / whole
            passes += 2 * len(group)
        total = len(scope.spots) * sum(map(len, groups))
        return Cost(n_live, total - n_live, passes, total, BUDGET)

    # ---- what the method takes

    _compares: ClassVar[bool] = True  # position by position with the other side

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        """The method's own arguments."""
        return {name: getattr(self.args, name) for name in self.shared} | options

    def _side(self, given: dict[str, Any]) -> Side:
        """Whose runs are edited."""
        return SIDES_OF[given["direction"]][0]

    def _run(self, chunk: Chunk, metric: str, baseline: Baseline, given: dict[str, Any]) -> Result:
        return type(self).method(self.model, chunk.pairs, metric, **given, progress=False)

    def _n_heads(self, site: str) -> int:
        cfg = self.model.cfg
        return cfg.n_heads if site_named(site).heads == "query" else cfg.n_kv_heads


class PatchingRuns(SiteSweep[Patching]):
    """Activation patching."""

    method = staticmethod(activation_patching)
    shared = ("carry", "layers", "positions", "heads")

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each site in each direction."""
        return _sites_and("direction", self.args.site, self.args.direction)


class AttributionRuns(SiteSweep[Attribution]):
    """Attribution patching."""

    method = staticmethod(attribution_patching)
    shared = ("layers", "positions", "heads", "qk_fix", "grad_drop")

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each site in each direction."""
        return _sites_and("direction", self.args.site, self.args.direction)

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """Two passes and a backward pass, which is worth two."""
        cells = int(super().cost(options, groups, metric).plain_passes)
        n_backward = self.model.cfg.n_layers if self.args.grad_drop else 1
        return Cost(cells, 0, sum(map(len, groups)) * (2 + 2 * n_backward), cells, BUDGET)


class AblationRuns(SiteSweep[Ablation]):
    """Ablation."""

    shared = ("post_norm", "layers", "positions", "heads", "bos")
    _compares = False

    @cached_property
    def _references(self) -> dict[tuple[str, ...], Reference]:
        return {}

    def absent(self, control: Control) -> str | None:
        """What is taken away can be turned into another direction."""
        return None if control == "direction" else super().absent(control)

    def _run(self, chunk: Chunk, metric: str, baseline: Baseline, given: dict[str, Any]) -> Result:
        """Means and draws are those of all pairs, whichever are measured."""
        turned = baseline.kind == "direction"
        draws = baseline if turned else Baseline("none", 0, self.seed)
        return ablation(
            self.model,
            chunk.pairs,
            metric,
            **given,
            seed=random.Random(draws.seeded("values", chunk.numbers[0])).getrandbits(31),
            reference=self._reference(given, as_metric(metric)),
            turned=turned,
            progress=False,
        )

    def _reference(self, given: dict[str, Any], metric: Metric) -> Reference:
        """What stands in the place of the ablated, made once."""
        key = (given["site"], given["value"], metric.name if metric.forced else "")
        if key not in self._references:
            groups, args = self.pairs.on(self.model, metric), self.args
            self._references[key] = Reference(self.model, groups, *key[:2], args.layers, args.bos)
        return self._references[key]

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """Those of the cells; the reference is checked, and costs a pass over all prompts."""
        self._reference(self._given(options), as_metric(metric))
        return super().cost(options, groups, metric)

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each site with each value."""
        return _sites_and("value", self.args.site, self.args.value)

    def _side(self, given: dict[str, Any]) -> Side:
        return "clean"


def _sites_and(name: str, sites: Sequence[str], others: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {
        f"{site}.{other}": {"site": site, name: other} for site, other in product(sites, others)
    }


def _places(group: Group, spot: Spot, side: Side) -> list[int]:
    """All positions that a cell covers in any pair of a group."""
    if spot.position is None:
        return list(range(group.length(side) + group.n_forced))
    return sorted({p for p in group.places(spot.position, side).flatten().tolist() if p >= 0})
