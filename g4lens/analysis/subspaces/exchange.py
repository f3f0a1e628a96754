"""Interchange interventions at one place: a run of one side, with part of the other side's value.

    x  <-  x + (other - x) Q^T Q        Q [k, d], orthonormal rows

Each exchange enters at the unit's block, so that an analysis which makes many of them pays for the
blocks above it only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.analysis.cells import Places
from g4lens.analysis.groups import SIDES, Group, Side
from g4lens.analysis.metrics import Metric
from g4lens.analysis.pairs import Pairs
from g4lens.analysis.plain import Edit, put, rows_at
from g4lens.analysis.reach import cells as reached
from g4lens.analysis.runs import measure
from g4lens.analysis.scope import Scope, places_of
from g4lens.analysis.sites import Unit, site_named
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import widened
from g4lens.state import State

KINDS = ("stream", "head", "kv", "neuron")
NO_FOIL = "an exchange goes both ways and needs a foil in every pair"


@dataclass(frozen=True, eq=False)
class Exchange:
    """Runs of one side of some pairs, ready to receive the other side's values.

    Attributes:
        model: the model.
        unit: where.
        group: the pairs.
        side: whose runs these are.
        state: what enters the unit's block.
        places: the unit's positions on this side, -1 where a pair has fewer.
        own, other: the values there, of this side and of the other, at least in float32.
    """

    model: Gemma4
    unit: Unit
    group: Group
    side: Side
    state: State
    places: Places
    own: Float[Tensor, "pairs places *head d"]
    other: Float[Tensor, "pairs places *head d"]

    @property
    def point(self) -> str:
        """The hook point."""
        return site_named(self.unit.site).full_name(self.unit.layer)

    @property
    def reads(self) -> Int[Tensor, "pairs 1"]:
        """The last position of each prompt."""
        return self.group.reads(self.side)

    @property
    def wanted(self) -> Int[Tensor, "pairs"]:
        """The other side's answer. Raises: InputError: a pair has no foil."""
        targets = self.group.targets
        ids = targets.answer_ids if self.side == "corrupted" else targets.foil_ids
        if ids is None:
            raise InputError(NO_FOIL)
        return ids[:, 0].to(self.model.device)

    def along(self, basis: Float[Tensor, "k d"] | None) -> Float[Tensor, "pairs places *head d"]:
        """The difference between the sides along the basis; None: all of it."""
        difference = self.other - self.own
        return difference if basis is None else difference @ basis.T @ basis

    def logits(
        self, change: Float[Tensor, "pairs places *head d"]
    ) -> Float[Tensor, "pairs 1 d_vocab"]:
        """Behind each prompt, with this added at the places."""
        edits = [self._edit(change)]
        return self.model.run_with_hooks(state=self.state, read=self.reads, fwd_hooks=edits)

    def measured(
        self, change: Float[Tensor, "pairs places *head d"], metric: Metric
    ) -> Float[Tensor, "pairs"]:
        """The same as a metric sees it."""
        edits = [self._edit(change)]
        return measure(self.model, self.group, self.side, metric, edits, self.state)

    def _edit(self, change: Float[Tensor, "pairs places *head d"]) -> Edit:
        return put(self.point, self.own + change, self.places, self.unit.head)


def exchanges(
    model: Gemma4, pairs: Pairs, unit: Unit, size: int = 16, metric: Any = "logit"
) -> list[Exchange]:
    """All exchanges at a unit, from either side into the other, at most `size` pairs in each.

    `metric` is what will be measured of them, at the last position.

    Costs a run of both sides up to the unit's block, and keeps what enters it.

    Raises: InputError: no such place, one that nothing reads, or prompts that cannot be compared.
    """
    site = site_named(unit.site)
    if site.kind not in KINDS:
        raise InputError(f"site {unit.site!r} has no subspaces, expected a stream, head or neurons")
    if site.heads == "query" and unit.head is None:
        raise InputError(f"site {unit.site!r} is divided into heads: name one")
    groups = pairs.on(model, metric)
    positions = "all" if unit.position is None else [unit.position]
    heads = None if unit.head is None else [unit.head]
    scope = Scope.of(model.cfg, site, groups, "clean", [unit.layer], positions, heads)
    if scope.is_by_index:
        for group in groups:
            group.check_aligned()
    found = [
        exchange
        for group in groups
        for part in group.split(size)
        for exchange in _both_ways(model, scope, unit, part)
    ]
    if not any(_is_live(exchange) for exchange in found):
        raise InputError(
            f"nothing that is read sees {unit}: an exchange there changes no answer (from block "
            f"{model.cfg.horizon} on positions read nothing new of each other)"
        )
    return found


def _both_ways(model: Gemma4, scope: Scope, unit: Unit, group: Group) -> Iterator[Exchange]:
    point = scope.site.full_name(unit.layer)
    places = places_of(group, scope.spots[0], "clean", group.length("clean"))
    states: list[State] = []
    values: list[Tensor] = []
    for side, at in zip(SIDES, places, strict=True):
        with torch.no_grad():
            state = model(group.batch(side), stop=unit.layer)
            _, cache = model.run_with_cache(None, point, state=state, stop=unit.layer + 1)
        rows = widened(rows_at(cache[point], at))
        values.append(rows if unit.head is None else rows[:, :, unit.head])
        states.append(state)
    for i, side in enumerate(SIDES):
        yield Exchange(model, unit, group, side, states[i], places[i], values[i], values[1 - i])


def _is_live(exchange: Exchange) -> bool:
    """Can what is read see any of the places?"""
    group, unit = exchange.group, exchange.unit
    n, reads = group.length(exchange.side), exchange.reads[0].tolist()
    live = reached(exchange.model.cfg, n, reads, unit.site)[unit.layer]
    return bool(((exchange.places >= 0) & live[exchange.places.clamp(min=0)]).any())
