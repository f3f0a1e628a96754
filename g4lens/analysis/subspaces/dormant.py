"""Does a subspace carry a variable, or does it only wake a pathway that sleeps in every run?

A direction v may move an answer though the model's answer depends on nothing that varies along v:

    v  =  (a + b) / sqrt(2)      a varies with the variable, nothing reads it
                                 b is read, and is the same in every run

Exchanging along v carries a's difference over into b (Makelov et al. 2023, arXiv 2311.17030). So
the change that an exchange makes is split, once by what the outputs see and once by what varies
between the sides, and each part is made by itself. Of a subspace that carries the variable, the
part that varies does all that the whole does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.gradients.slopes import Slopes, need_slope, rows_of
from g4lens.analysis.metrics import Metric, as_metric, logit_diff
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.runs import measure
from g4lens.analysis.sites import Unit
from g4lens.analysis.subspaces.das import checked_basis
from g4lens.analysis.subspaces.exchange import Exchange, exchanges
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4

PARTS = ("whole", "seen", "unseen", "varying", "still")


@dataclass(frozen=True, repr=False)
class Dormancy:
    """What each part of a subspace's exchange does by itself.

    Attributes:
        recovered: the share of the metric that a part of the change brings back: "whole"; what the
            outputs see of it, "seen", and what not, "unseen"; what lies along differences between
            the sides, "varying", and what not, "still".
        shares: how much of the subspace lies in each part, in squared length.
    """

    recovered: dict[str, float]
    shares: dict[str, float]

    @property
    def illusory(self) -> float:
        """What of the effect is gone when only the part that varies is exchanged.

        About 0 of a subspace that carries the variable; the whole effect of an illusion.
        """
        return self.recovered["whole"] - self.recovered["varying"]

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{part} {self.recovered[part]:.2f} ({self.shares[part]:.2f} of it)" for part in PARTS
        )
        return f"Dormancy(recovered by {parts}; illusory {self.illusory:.2f})"


@torch.no_grad()
def dormant_check(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    unit: Unit,
    basis: Float[Tensor, "k d"],
    metric: Any = logit_diff,
    direction: Direction = "denoise",
    share: float = 0.99,
) -> Dormancy:
    """Make the parts of a subspace's exchange one by one.

    With P the projection onto a span, the change `(other - x) Q^T Q` is split into its `P` and its
    `1 - P`. Seen is the span of the metric's gradients by the activation, in the runs of both
    sides; varying that of the differences between the sides. Of either as many singular vectors
    count as hold `share` of the squared length, every pair weighing the same.

    Costs a forward and backward pass of either side, and six forward passes of one.

    It misleads where a softmax, a gate or the soft cap is saturated: a gradient shows what is seen
    nearby and can miss what matters further away. With few pairs both spans are small. And a
    direction may vary in other prompts that is still in these.

    Args:
        model: the model.
        pairs: held out of the search, as `Subspace.held_out`.
        unit: where the subspace lies.
        basis: orthonormal rows, as `Subspace.basis`.
        metric: as for `activation_patching`, of the last position.
        direction: as for `activation_patching`.
        share: of squared length.

    Raises: InputError: as `das`; a metric that is teacher-forced, never normalised or gives no
        gradient, a share outside 0 to 1, or both sides with the same mean metric.
    """
    metric = as_metric(metric)
    if metric.forced or not metric.is_normalised:
        raise InputError(
            f"metric {metric.name} is teacher-forced or never normalised, expected one of the last "
            "token of which a share can be recovered"
        )
    if direction not in SIDES_OF:
        raise InputError(f"direction is {direction!r}, expected 'denoise' or 'noise'")
    if not 0 < share <= 1:
        raise InputError(f"share is {share}, expected more than 0 and at most 1")
    ready = exchanges(model, as_pairs(pairs), unit, metric=metric)
    basis = checked_basis(basis, ready[0].own)
    seen = _projection(_gradients(ready, metric), share)
    varying = _projection([(one.other - one.own)[one.places >= 0] for one in ready], share)
    one = torch.eye(basis.shape[1]).to(basis)
    spans = dict(zip(PARTS, (one, seen, one - seen, varying, one - varying), strict=True))
    some = [ready_one for ready_one in ready if ready_one.side == SIDES_OF[direction][0]]
    base, target = _mean(some, metric, 0 * one), _target(some, metric, SIDES_OF[direction][1])
    if abs(target - base) < 1e-6 * max(abs(target), abs(base), 1e-30):
        raise InputError(f"both sides have the same mean {metric.name}, {base:.4g}")
    return Dormancy(
        recovered={
            name: (_mean(some, metric, basis.T @ basis @ span) - base) / (target - base)
            for name, span in spans.items()
        },
        shares={
            name: float((basis @ span).square().sum()) / len(basis) for name, span in spans.items()
        },
    )


def _gradients(ready: list[Exchange], metric: Metric) -> list[Float[Tensor, "rows *head d"]]:
    """The metric's gradients by the activation at the unit's places, of each side's runs."""
    found, is_flat = [], True
    for one in ready:
        final = f"blocks.{one.model.cfg.n_layers - 1}.hook_resid_post"
        run = Slopes(one.model, one.group, one.side, metric, [one.point, final])
        slopes = run.gradients()
        is_flat &= not bool(slopes[final].any())
        index = run.index(one.point, one.places)
        rows = rows_of(slopes[one.point], index)[index >= 0]
        found.append((rows if one.unit.head is None else rows[:, one.unit.head]).to(one.own))
    need_slope(is_flat, metric)
    return found


def _projection(rows: list[Tensor], share: float) -> Float[Tensor, "d d"]:
    """Onto the span that holds a share of the squared length of these vectors, made unit ones."""
    x = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
    length = x.norm(dim=-1, keepdim=True)
    x = (x / length)[length[:, 0] > 0]
    if not len(x):
        return x.new_zeros(x.shape[1], x.shape[1])
    _, size, directions = torch.linalg.svd(x, full_matrices=False)
    held = size.square().cumsum(0) / size.square().sum()
    kept = directions[: 1 + int((held < share).sum())]
    return kept.T @ kept


def _mean(some: list[Exchange], metric: Metric, through: Float[Tensor, "d d"]) -> float:
    """The mean metric with the difference between the sides added through a matrix."""
    values = [one.measured((one.other - one.own) @ through, metric) for one in some]
    return float(torch.cat(values).mean())


def _target(some: list[Exchange], metric: Metric, side: Any) -> float:
    return float(torch.cat([measure(one.model, one.group, side, metric) for one in some]).mean())
