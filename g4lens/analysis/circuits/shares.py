"""What runs of circuits bring about, as shares of the way from the empty one to the full one."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool
from torch import Tensor

from g4lens.analysis.circuits.graph_run import circuit_metric
from g4lens.analysis.metrics import as_metric
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.result import OTHER_RUN, Axis, Correction, Result, What
from g4lens.analysis.runs import gathered, measure
from g4lens.cost import Cost
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASSES = 5.0  # plain ones that a run of the graph takes, measured on the bundled model
SomePairs = Pairs | Pair | Sequence[Pair]
CARRIES = {
    "noise": "noise: the clean run in the circuit, the corrupted one elsewhere",
    "denoise": "denoise: the corrupted run in the circuit, the clean one elsewhere",
}


@dataclass(frozen=True, eq=False, repr=False)
class Shares(Result):
    """A result whose `recovered` has a name of its own in pictures and tables.

    Attributes:
        share: the name: "faithfulness", "gap", "added".
    """

    share: str = field(kw_only=True)

    def summary(
        self,
        of: What = "recovered",
        confidence: float = 0.95,
        n_resamples: int = 2000,
        correction: Correction = "max_t",
    ) -> Any:
        """As `Result.summary`; the column of shares has their name."""
        frame = super().summary(of, confidence, n_resamples, correction)
        return frame.rename(columns={"recovered": self.share})

    def plot(self, of: What = "recovered", ax: "Axes | None" = None) -> "Axes":
        """As `Result.plot`; the axis of shares has their name."""
        ax = super().plot(of, ax)
        ax.set_title(f"{self.about['method']}\n{self.about['direction']}", fontsize=9)
        if of == "recovered":
            ax.set_ylabel(self.share, fontsize=8)
        return ax


def measured(
    model: Gemma4,
    pairs: SomePairs,
    keep: Bool[Tensor, "circuits senders ports"],
    along: Axis,
    metric: Any,
    direction: Direction,
    about: dict[str, str],
    budget: int,
    share: str,
) -> Shares:
    """The metric of circuits, between that of the empty one and that of the full one."""
    pairs, metric = as_pairs(pairs), as_metric(metric)
    per_pair = circuit_metric(model, pairs, metric, keep=keep, direction=direction, budget=budget)
    groups = pairs.on(model, metric)
    target, base = (
        gathered(groups, lambda group, side=side: measure(model, group, side, metric))
        for side in SIDES_OF[direction]
    )
    told = {
        "ablation_value": OTHER_RUN,
        "positions": "all",
        "direction": CARRIES[direction],
        "metric": metric.name,
    }
    cells = len(keep) * len(pairs)
    cost = Cost(cells, passes=PASSES * cells + 3 * len(pairs), plain_passes=cells)
    return Shares(
        per_pair.T,
        (along,),
        base,
        target,
        pairs.clusters,
        about | told,
        model.cfg,
        cost,
        metric.is_normalised,
        share=share,
    )
