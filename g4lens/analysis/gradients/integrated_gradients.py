"""Integrated gradients: what each token, tile of a picture, moment of a sound adds to the metric.

    m(input) - m(baseline)  =  sum over positions of  (x - x') . integral of dm/dx along the way

x is what the decoder is given at a position: its embedding (of a soft token, what the tower made of
it) and its per-layer embeddings. Both go together from the baseline to the input in a straight
line; ids have no values in between (Sundararajan et al. 2017, arXiv 1703.01365).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.engine import BUDGET, pass_bytes
from g4lens.analysis.gradients.slopes import graph_bytes, need_gradient, need_slope, pairs_that_fit
from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import Metric, as_metric, checked, logit_diff
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.result import Result, axis
from g4lens.analysis.runs import gathered
from g4lens.analysis.scope import label, position_cells
from g4lens.cost import Cost
from g4lens.errors import InputError, did_you_mean
from g4lens.hooks import Hung, hang
from g4lens.inputs.prompt import Prompt
from g4lens.model.gemma4 import Gemma4
from g4lens.state import KeyValues, State

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Baseline = Literal["corrupted", "zero", "mean", "pad"]
BASELINES = ("corrupted", "zero", "mean", "pad")
PARTS = ("embedding", "per-layer embedding")


@dataclass(frozen=True, eq=False, repr=False)
class InputAttribution(Result):
    """A result with axes part (embedding, per-layer embedding) and pos.

    Base is 0 and target the difference of the metric between input and baseline.

    Attributes:
        missing: by pair, that difference less the sum over all positions: what the steps left out.
        prompts: of each pair, the prompt, where it is known.
        is_by_token: is each position of its prompt a cell of its own?
    """

    missing: Float[Tensor, "pairs"] = field(kw_only=True)
    prompts: tuple[Prompt | None, ...] = field(kw_only=True)
    is_by_token: bool = field(kw_only=True)

    @property
    def error(self) -> float:
        """The largest gap between sum and difference, as a share of the mean difference."""
        scale = self.target.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
        return float(self.missing.abs().max() / scale)

    def tokens(self, pair: int = 0) -> Float[Tensor, "pos"]:
        """Of one pair, each position's whole share: embedding and per-layer embedding together."""
        return self.per_pair[pair].sum(0)

    def plot(self, of: str = "values", ax: "Axes | None" = None, pair: int = 0) -> "Axes":
        """One prompt: its tokens tinted, heat on its pictures, marks on its spectrograms.

        Args:
            of: "values", or "recovered" for shares of the difference.
            ax: where to draw; by default a new figure.
            pair: whose prompt.

        Raises: InputError: no such pair or `of`, a prompt given as ids, cells that are not its
            tokens, or shares of no difference.
        """
        from g4lens import plots

        if of not in ("values", "recovered"):
            raise InputError(f"of is {of!r}, expected 'values' or 'recovered'")
        if not 0 <= pair < len(self.prompts):
            raise InputError(f"no pair {pair}, expected 0 to {len(self.prompts) - 1}")
        prompt, total = self.prompts[pair], float(self.target[pair])
        if prompt is None or not self.is_by_token:
            raise InputError(
                "a picture of the input needs its tokens: give text, parts or a Prompt, and leave "
                "positions= out"
            )
        if of == "recovered" and not total:
            raise InputError(f"pair {pair}: input and baseline have the same metric: plot 'values'")
        values = self.tokens(pair)
        ax = plots.over_input(values if of == "values" else values / total, prompt, ax)
        about = f"{self.about['metric']}, {total:+.3g} from {self.about['baseline']}"
        ax.set_title(about, fontsize=9)
        return ax


def integrated_gradients(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    metric: Any = logit_diff.pre_cap,
    baseline: Baseline = "corrupted",
    steps: int = 32,
    positions: Any = None,
    budget: int = BUDGET,
    progress: bool = True,
) -> InputAttribution:
    """Share out the metric's change from a baseline to the clean prompt over what is read.

    The integral is a Gauss-Legendre sum over `steps` points. Costs a forward and a backward pass
    for each, and two more; towers run once. `error` says how well the sum meets the difference: if
    it is more than a few per cent, take more steps.

    It misleads as to causes: a position's share counts all roads from there, those by way of other
    positions too. Points on the way are no prompts, and the model may do there what it never does.
    The first norm divides the length out, so from "zero" nearly everything happens at the very
    beginning, which needs many steps. What does not differ from the baseline gets exactly nothing.

    Args:
        model: the model.
        pairs: what to attribute: the metric on clean prompts. A prompt without a counterpart stands
            on both sides of its pair.
        metric: as `activation_patching` takes it; by default before the soft cap.
        baseline: "corrupted", position by position; "zero"; "mean", that of the prompt's own
            positions; "pad", what the model reads at padding. In the last three <bos> stays.
        steps: points on the way.
        positions: None: each position; or places, as for `activation_patching`.
        budget: bytes of memory beside the model.
        progress: show a bar.

    Raises: InputError: no such baseline or place, sides that cannot be compared, a metric that
        gives no gradient, fewer than one step, a budget that cannot hold one prompt.
    """
    begun, metric, pairs = time.perf_counter(), as_metric(metric), as_pairs(pairs)
    way = _Way(model, metric, baseline, steps, budget)
    groups = pairs.on(model, metric)
    cells = position_cells(positions, groups, "clean")
    if baseline == "corrupted":
        for group in groups:
            group.check_aligned()
    with way.bar(len(pairs) * len(metric.legs), progress):
        whole = gathered(groups, lambda group: way.shares(group, cells))
    need_slope(way.is_flat, metric)
    *shares, missing, target = whole.split([len(cells), len(cells), 1, 1], 1)
    prompts = {i: p for g in groups for i, p in zip(g.index, g.prompts["clean"], strict=True)}
    n = (2 * steps + 2) * len(pairs)
    cost = Cost(len(cells) * len(pairs), 0, n, n, budget, time.perf_counter() - begun)
    found = InputAttribution(
        per_pair=torch.stack(shares, 1),
        axes=(axis("part", PARTS), axis("pos", [label(cell) for cell in cells])),
        base=torch.zeros(len(pairs)),
        target=target[:, 0],
        clusters=pairs.clusters,
        about={
            "method": "integrated gradients",
            "baseline": baseline,
            "steps": str(steps),
            "metric": metric.name,
        },
        cfg=model.cfg,
        cost=cost,
        missing=missing[:, 0],
        prompts=tuple(prompts[i] for i in range(len(pairs))),
        is_by_token=positions is None,
    )
    found.about["error"] = f"{found.error:.1e}"
    return found


class _Way:
    """The straight line from the baseline to the input.

    Raises: InputError: no such baseline, or fewer than one step.
    """

    def __init__(self, model: Gemma4, metric: Metric, baseline: Baseline, steps: int, budget: int):
        if baseline not in BASELINES:
            raise InputError(
                f"baseline is {baseline!r}, expected {', '.join(BASELINES)}."
                f"{did_you_mean(baseline, BASELINES)}"
            )
        if not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps is {steps}, expected at least 1")
        self.model, self.metric, self.baseline, self.budget = model, metric, baseline, budget
        points, weights = np.polynomial.legendre.leggauss(steps)
        self.points = torch.tensor((1 + points) / 2)
        self.weights = torch.tensor(weights / 2)
        self.is_flat = True

    def bar(self, n: int, progress: bool) -> Any:
        """Shown while pairs are done."""
        from tqdm.auto import tqdm

        self._bar = tqdm(total=n, unit="pair", leave=False, delay=1.0, disable=not progress)
        return self._bar

    def shares(self, group: Group, cells: list[Any]) -> Float[Tensor, "pairs all"]:
        """Both parts of each cell, what is missing, and the difference they are shares of."""
        found = []
        for part in group.split(self._at_once(group)):
            start, end = self._ends(part)
            over = self._integral(part, start, end)
            columns = []
            for each in over:
                for cell in cells:
                    places = part.places(cell, "clean").to(each.device)
                    columns.append((each.gather(1, places.clamp(min=0)) * (places >= 0)).sum(1))
            with torch.no_grad():
                at_end, at_start = (self._metric(part, x, x.resid, x.ple) for x in (end, start))
                change = at_end - at_start
            missing = change - sum(each.sum(1) for each in over)
            found.append(torch.stack([*columns, missing, change], 1).float().cpu())
            self._bar.update(len(part))
        return torch.cat(found)

    def _at_once(self, group: Group) -> int:
        """How many rows, a prompt at a point each, the budget holds."""
        cfg, row, reads = self.model.cfg, group.rows["clean"][0], group.targets.reads.shape[1]
        n = row.tokens.shape[1]
        need = graph_bytes(cfg, n, reads) + 12 * n * (cfg.d_model + cfg.n_layers * cfg.d_ple)
        need = max(need, pass_bytes(cfg, row, reads))
        return pairs_that_fit(self.budget, need, n)

    @torch.no_grad()
    def _ends(self, group: Group) -> tuple[State, State]:
        """What the decoder is given at the baseline and at the input."""
        end = self.model(group.clean, stop=0)
        if self.baseline == "corrupted":
            return self.model(group.corrupted, stop=0), end
        tokens = group.clean.tokens.to(end.resid.device)
        kept = tokens == self.model.cfg.bos_id
        kept[:, group.length("clean") :] = True  # a forced continuation is no input
        other = {"resid": torch.zeros_like(end.resid), "ple": torch.zeros_like(end.ple)}
        if self.baseline == "mean":
            there = (~kept)[..., None].to(end.resid)
            for name, x in (("resid", end.resid), ("ple", end.ple.flatten(2))):
                mean = (x * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
                other[name] = mean.expand_as(x).reshape(other[name].shape)
        elif self.baseline == "pad":
            pad = torch.full_like(tokens, self.model.cfg.pad_id)
            begun = self.model.begin(pad, end.rows, end.lengths)
            other = {"resid": begun.resid, "ple": begun.ple}
        for name, x in other.items():
            where = kept.reshape(*kept.shape, *[1] * (x.ndim - 2))
            other[name] = torch.where(where, getattr(end, name), x)
        return replace(end, **other), end

    def _integral(
        self, group: Group, start: State, end: State
    ) -> tuple[Float[Tensor, "pairs pos"], Float[Tensor, "pairs pos"]]:
        """Of the embedding and of the per-layer embeddings, by position."""
        steps = [end.resid - start.resid, end.ple - start.ple]
        slopes = [torch.zeros_like(step) for step in steps]
        n = max(1, self._at_once(group) // len(group))
        for points, weights in zip(self.points.split(n), self.weights.split(n), strict=True):
            x = [
                torch.cat([from_ + float(point) * step for point in points]).requires_grad_()
                for from_, step in zip((start.resid, start.ple), steps, strict=True)
            ]
            with torch.enable_grad():
                value = self._metric(group, start, *x)
            need_gradient(value, self.metric)
            found = torch.autograd.grad(value, x, torch.ones_like(value))
            self.is_flat &= not any(bool(each.any()) for each in found)
            for slope, each in zip(slopes, found, strict=True):
                by_point = each.unflatten(0, (len(points), len(group)))
                slope += torch.tensordot(weights.to(by_point), by_point, 1)
        embed, ple = (slope * step for slope, step in zip(slopes, steps, strict=True))
        return embed.sum(-1), ple.sum((-1, -2))

    def _metric(
        self,
        group: Group,
        entered: State,
        resid: Float[Tensor, "rows pos d_model"],
        ple: Float[Tensor, "rows pos layer d_ple"],
    ) -> Float[Tensor, "rows"]:
        """The metric of inputs that stand point by point, pair by pair."""
        times = len(resid) // len(group)
        rows = replace(entered.rows, positions=entered.rows.positions.repeat(times, 1))
        state = State(0, resid, ple, KeyValues(), rows, entered.lengths.repeat(times))
        reads = group.reads("clean").repeat(times, 1)
        kept: list[Tensor] = []
        point = self.model.hook_logits if self.metric.is_capped else self.model.hook_logits_pre_cap
        with hang([(point, Hung(savers=[lambda x, hook: kept.append(x)]))]):
            self.model(state=state, read=reads)
        targets = group.targets.take(torch.arange(len(group)).repeat(times))
        return group.weight * checked(self.metric(kept[0], targets), self.metric, len(reads))
