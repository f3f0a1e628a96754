"""Attribution patching: activation patching to first order, every cell at once.

    denoise    (a of clean - a of corrupted) . dm/da in the corrupted run
    noise      (a of corrupted - a of clean) . dm/da in the clean run

Nanda 2022, "Attribution Patching: Activation Patching At Industrial Scale". Two passes and one
backward pass give what activation patching takes a pass for in each cell. AtP* (Kramar et al. 2024,
arXiv 2403.00745) mends two ways in which the slope at a point says nothing of the step: a softmax
that is saturated (`qk_fix`), and direct and indirect effects that cancel (`grad_drop`).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.engine import BUDGET, pass_bytes
from g4lens.analysis.gradients.attention_slopes import SEEN, Sums, readers_of
from g4lens.analysis.gradients.compared import Compared, places_side_by_side
from g4lens.analysis.gradients.slopes import (
    Run,
    Slopes,
    graph_bytes,
    need_slope,
    need_way_down,
    pairs_that_fit,
    rows_held,
)
from g4lens.analysis.groups import SIDES, Group, Side
from g4lens.analysis.metrics import Metric, as_metric, logit_diff
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.result import OTHER_RUN, Result
from g4lens.analysis.scope import Scope
from g4lens.analysis.sites import Site, site_named
from g4lens.cost import Cost, activation_width
from g4lens.errors import InputError
from g4lens.hooks import edited_points
from g4lens.model.gemma4 import Gemma4

MATRICES = ("attn_scores", "pattern")
PER_HEAD = ("pattern", "k@head", "v@head")  # whose gradients follow from that of z
FIXED = ("q", "rot_q", "k", "rot_k", "k@head")  # what the softmax stands behind


@dataclass(frozen=True, eq=False, repr=False)
class Sizes(Result):
    """What GradDrop gives: sizes of effects, without sign."""

    def permutation_pvalue(self, *args: Any, **options: Any) -> NoReturn:
        """There is none: flipping signs tests effects that have some.

        Raises: InputError: always.
        """
        raise InputError(
            "grad_drop averages absolute values: its cells have no sign to flip, so no p-values; "
            "take them with grad_drop=False"
        )


def attribution_patching(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    metric: Any = logit_diff.pre_cap,
    site: str | Sequence[str] = "resid_pre",
    direction: Direction = "denoise",
    layers: Sequence[int] | None = None,
    positions: Any = None,
    heads: Sequence[int] | None = None,
    qk_fix: bool = False,
    grad_drop: bool = False,
    budget: int = BUDGET,
    progress: bool = True,
) -> Any:
    """Estimate every cell of a map that `activation_patching` would run, or of several maps.

    A cell is the sum over its positions and channels of (the other run's activation - this run's)
    times the metric's gradient in this run: the change of the metric, were it linear. Costs two
    passes and one backward pass for all sites together, about three to five plain passes;
    `grad_drop` a backward pass for each block.

    It misleads where the step is not small. A saturated softmax hides queries and keys: `qk_fix`
    computes their patterns anew, for a key in all blocks that read it. Behind a post-norm, and in
    any norm, the slope is that at the old length: a write that is much of the vector is judged too
    large or too small, up to a sign. An AND is invisible denoised, an OR noised, as for patching,
    but also where a threshold is far off and the gradient nothing. Effects of one unit along two
    roads that cancel: `grad_drop`. Compare the largest cells with `activation_patching`.

    Args:
        model: the model.
        pairs: what to compare.
        metric: as `activation_patching` takes it. By default that before the soft cap, whose slope
            would shrink all cells; name the same metric there to compare.
        site: one of its sites, or several: a list of `g4lens.analysis.sites.SITES` costs no more
            passes than one of them.
        direction: "denoise" or "noise".
        layers: the blocks, for each site the same; all that have it by default.
        positions: as for `activation_patching`.
        heads: as there.
        qk_fix: for "q", "rot_q", "k", "rot_k" and "k@head", recompute the softmax.
        grad_drop: for each block in turn leave out the gradient that flows through what it adds to
            the stream; a cell is the sum of the absolute values over blocks, divided by their
            number less one, as in the paper (a unit's own block gives it nothing). It has no sign.
        budget: bytes of memory beside the model; decides how many pairs run at once.
        progress: show a bar.

    Returns: a result like that of `activation_patching`, base 0 and target what putting the whole
        other run in place would change, so `recovered` is comparable cell by cell; for several
        sites one by name.

    Raises: InputError: as `activation_patching`; a metric that gives no gradient, as KL of clean
        runs; a budget that cannot hold one pair; hooks on scores or patterns where those must be
        rebuilt.
    """
    begun, metric, pairs = time.perf_counter(), as_metric(metric), as_pairs(pairs)
    if direction not in SIDES_OF:
        raise InputError(f"direction is {direction!r}, expected 'denoise' or 'noise'")
    if direction == "noise":
        need_way_down(metric)
    names = [site] if isinstance(site, str) else list(dict.fromkeys(site))
    if not names:
        raise InputError("site is an empty list, expected at least one")
    groups, (base, source) = pairs.on(model, metric), SIDES_OF[direction]
    scopes = _scopes(model, names, groups, base, (layers, positions, heads))
    job = _Job(model, metric, base, source, scopes, qk_fix, grad_drop)
    parts = [part for group in groups for part in job.fitting(group, budget)]
    cells, total = job.run(parts, len(pairs), progress)
    n_passes = (2 + (model.cfg.n_layers if grad_drop else 1)) * len(pairs)
    cost = Cost(0, 0, n_passes, 0, budget, time.perf_counter() - begun)
    about = {
        "method": "attribution patching" + " with QK fix" * qk_fix + " and GradDrop" * grad_drop,
        "direction": direction,
        "ablation_value": OTHER_RUN,
        "metric": metric.name,
    }
    results = {
        scope.site.name: (Sizes if grad_drop else Result)(
            per_pair=found,
            axes=scope.axes,
            base=torch.zeros(len(pairs)),
            target=total,
            clusters=pairs.clusters,
            about=about | {"site": scope.site.name, "positions": _told(positions, scope)},
            cfg=model.cfg,
            cost=replace(cost, cells=found.numel(), plain_passes=found.numel()),
            is_normalised=metric.is_normalised,
        )
        for scope, found in zip(scopes, cells, strict=True)
    }
    return results[names[0]] if isinstance(site, str) else results


def _scopes(
    model: Gemma4, names: Sequence[str], groups: Sequence[Group], base: Side, where: tuple[Any, ...]
) -> list[Scope]:
    """The cells of each site. Raises: InputError: as `attribution_patching` of places and sides."""
    scopes = [Scope.of(model.cfg, site_named(name), groups, base, *where) for name in names]
    if any(scope.is_by_index for scope in scopes):
        for group in groups:
            group.check_aligned()
    return scopes


def _told(positions: Any, scope: Scope) -> str:
    """What a result says of its positions."""
    return str(positions or ("all" if scope.site.heads == "query" else "each"))


class _Job:
    """All sites of a call: what to keep of either run, and what to make of it."""

    def __init__(
        self,
        model: Gemma4,
        metric: Metric,
        base: Side,
        source: Side,
        scopes: list[Scope],
        qk_fix: bool,
        grad_drop: bool,
    ):
        self.model, self.cfg, self.metric = model, model.cfg, metric
        self.base: Side = base
        self.source: Side = source
        self.scopes, self.qk_fix, self.grad_drop = scopes, qk_fix, grad_drop
        self.last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        self.names = list(dict.fromkeys([*self._names(is_base=True), self.last]))
        self.source_names = list(dict.fromkeys(self._names(is_base=False)))
        self.is_flat = True
        rebuilt = {f"blocks.{i}.attn.hook_{x}" for i in range(model.cfg.n_layers) for x in MATRICES}
        if self.rebuilds and (at := [p.name for p in edited_points() if p.name in rebuilt]):
            raise InputError(
                f"hooks hang on {at[0]}, which these sites rebuild from queries and keys"
            )

    @property
    def rebuilds(self) -> bool:
        """Are patterns rebuilt from queries and keys?"""
        return any(self._is_per_head(scope.site) for scope in self.scopes)

    def _is_per_head(self, site: Site) -> bool:
        return site.name in PER_HEAD or (self.qk_fix and site.name in FIXED)

    def _names(self, is_base: bool) -> list[str]:
        """The activations to keep of one run."""
        names = []
        for scope in self.scopes:
            site = scope.site
            for layer in scope.layers:
                if site.kind == "ple":
                    names.append(f"hook_{site.name}")
                elif not self._is_per_head(site):
                    names.append(site.full_name(layer))
                elif is_base:
                    readers = readers_of(self.cfg, site.name, layer)
                    names += [f"blocks.{r}.{x}" for r in readers for x in (*SEEN, "attn.hook_z")]
                elif site.name == "pattern":
                    names += [f"blocks.{layer}.{x}" for x in SEEN]
                else:
                    names.append(site.full_name(layer))
        return names

    def fitting(self, group: Group, budget: int) -> list[Group]:
        """A group in parts whose graph, activations and gradients fit the budget."""
        cfg, reads = self.cfg, group.targets.reads.shape[1]
        rows = [group.rows[side][0] for side in SIDES]
        n = max(row.tokens.shape[1] for row in rows)
        kept = [*self.names, *self.source_names]  # of the one gradients, of the other values
        held = 4 * sum(
            rows_held(cfg, name, n, reads) * activation_width(cfg, name) for name in kept
        )
        matrices = 14 * 4 * cfg.n_heads * n * n if self.rebuilds else 0
        tower = max(pass_bytes(self.cfg, row, reads) for row in rows)
        need = max(graph_bytes(cfg, n, reads) + held + matrices, tower)
        return group.split(pairs_that_fit(budget, need, n))

    def run(
        self, parts: list[Group], n_pairs: int, progress: bool
    ) -> tuple[list[Float[Tensor, "pairs ..."]], Float[Tensor, "pairs"]]:
        """The cells of each scope, and what the whole other run would change."""
        from tqdm.auto import tqdm

        per_pair = [torch.zeros(n_pairs, *scope.shape) for scope in self.scopes]
        n, total = sum(map(len, parts)), torch.zeros(n_pairs)
        with tqdm(total=n, unit="pair", leave=False, delay=1.0, disable=not progress) as bar:
            for part in parts:
                for cells, more in zip(per_pair, self._part(part, total), strict=True):
                    cells.index_add_(0, torch.tensor(part.index), more.float().cpu())
                bar.update(len(part))
        need_slope(self.is_flat, self.metric)
        return per_pair, total

    def _part(self, group: Group, total: Tensor) -> list[Tensor]:
        n = group.length(self.base) + group.n_forced
        sums = [places_side_by_side(group, scope, self.base, n) for scope in self.scopes]
        reads = group.reads(self.base)
        asked = [s.source[:, (s.base[:, :, None] == reads[:, None]).any(2).any(0)] for s in sums]
        source = Run(
            self.model,
            group,
            self.source,
            self.metric,
            self.source_names,
            torch.cat(asked, 1).clamp(min=0),
        )
        base = Slopes(self.model, group, self.base, self.metric, self.names, self.grad_drop)
        change = (source.metric - base.metric.detach()).float().cpu()
        total.index_add_(0, torch.tensor(group.index), change)
        blocks = range(self.cfg.n_layers) if self.grad_drop else (None,)
        found = [torch.zeros(len(group), *scope.shape) for scope in self.scopes]
        for block in blocks:
            grads = base.gradients(block, keep=block is not None and block < len(blocks) - 1)
            self.is_flat &= not bool(grads[self.last].any())
            runs = Compared(self.cfg, base, source, grads, self.qk_fix)
            with torch.no_grad():
                for layer in range(self.cfg.n_layers):
                    self._block(layer, sums, runs, found)
        return found

    def _block(self, layer: int, sums: list[Sums], runs: "Compared", found: list[Tensor]) -> None:
        """Add one block's cells of every site."""
        for whole, scope, each in zip(found, self.scopes, sums, strict=True):
            labels: dict[str, list[Any]] = {a.name: list(a.labels) for a in scope.axes}
            if layer not in labels["layer"]:
                continue
            per_head = self._is_per_head(scope.site)
            cells = (runs.heads if per_head else runs.linear)(self.model, scope.site, layer, each)
            if "head" in labels:
                cells = cells[:, :, labels["head"]].transpose(1, 2)
            elif cells.ndim == 3:
                cells = cells.sum(2)
            cells = (cells if "pos" in labels else cells[..., 0]).to(whole)
            if self.grad_drop:
                cells = cells.abs() / max(self.cfg.n_layers - 1, 1)
            whole[:, labels["layer"].index(layer)] += cells
