"""Does a circuit do what the model does, when everything outside it carries the other run?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.circuits.circuit import Circuit
from g4lens.analysis.circuits.extraction import (
    Ranking,
    Scores,
    Search,
    extract_circuit,
    score_values,
)
from g4lens.analysis.circuits.graph import Graph
from g4lens.analysis.circuits.shares import Shares, SomePairs, measured
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.patching import Direction
from g4lens.analysis.result import axis
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Circuits = Circuit | Mapping[str, Circuit]


def faithfulness(
    model: Gemma4,
    pairs: SomePairs,
    circuits: Circuits,
    metric: Any = logit_diff,
    *,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> Shares:
    """How much of the model's behaviour a circuit alone brings about.

        f(C) = (m(C) - m(empty)) / (m(M) - m(empty))

    m(C) is the mean metric of a run in which the circuit's edges carry the clean run and all others
    the corrupted one, m(M) of the clean run, m(empty) of the corrupted one. 1 is all of it; more,
    or less than 0, is possible: an edge left out may have worked against the answer.

    Costs a plain pass over each side, and what `circuit_metric` costs for each circuit.

    It misleads on the pairs that the circuit was found on: take others (`Pairs.split`). It depends
    on what the rest is replaced by, on the granularity and on the metric (Miller et al. 2024,
    arXiv 2407.08734): `about` tells all of them. A large circuit is faithful whatever it holds:
    compare with `circuit.shuffled()`, an equally large one. Whether something else could do it too
    is what `completeness` asks.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        circuits: one, or several by name.
        metric: as `activation_patching` takes it.
        direction: which run the circuit carries; "denoise" exchanges the sides.
        budget: bytes of memory beside the model.

    Returns:
        A cell for each circuit; `.recovered` is f, `.bootstrap_ci("recovered")` its interval. In
        pictures and in `summary` it is called "faithfulness".

    Raises: InputError: a circuit of another model; or as `circuit_metric`.
    """
    named = {"circuit": circuits} if isinstance(circuits, Circuit) else dict(circuits)
    if not named:
        raise InputError("no circuits, expected at least one")
    for circuit in named.values():
        circuit.check(model)
    keep = torch.stack([circuit.keep for circuit in named.values()])
    kinds = " and ".join(sorted({f"{circuit.granularity}s" for circuit in named.values()}))
    return measured(
        model,
        pairs,
        keep,
        axis("circuit", list(named)),
        metric,
        direction,
        {"method": "faithfulness", "granularity": kinds},
        budget,
        "faithfulness",
    )


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """Faithfulness against the size of the circuit.

    Attributes:
        result: the metric at each share of the edges or nodes.
        n_asked: how many edges or nodes that share is, rounded down.
        n_edges: how many edges were left of them after pruning.
    """

    result: Shares
    n_asked: tuple[int, ...]
    n_edges: tuple[int, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """How much of the model each circuit was allowed."""
        return tuple(float(share) for share in self.result.axes[0].labels)

    @property
    def empty(self) -> tuple[float, ...]:
        """The shares at which no edge was left: they round to none, or all were pruned away."""
        return tuple(s for s, n in zip(self.shares, self.n_edges, strict=True) if n == 0)

    @property
    def area(self) -> float:
        """The integral of f over the share: MIB's CPR, where the ranking is "signed"."""
        return self._integral(self.result.recovered)

    @property
    def distance(self) -> float:
        """The integral of |1 - f| over the share: MIB's CMD, where the ranking is "absolute"."""
        return self._integral((1 - self.result.recovered).abs())

    def _integral(self, values: Float[Tensor, "share"]) -> float:
        return float(torch.trapezoid(values.double(), torch.tensor(self.shares).double()))

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Faithfulness against the share, on a logarithmic axis; hollow where no edge was left."""
        from g4lens.plots.axes import axes_of
        from g4lens.plots.sweeps import BLUE

        ax = axes_of(ax, (5, 3))
        values = self.result.recovered.tolist()
        ax.semilogx(self.shares, values, color=BLUE, linewidth=1)
        for share, value, n in zip(self.shares, values, self.n_edges, strict=True):
            ax.plot(share, value, "o", color=BLUE, markerfacecolor=BLUE if n else "white")
        ax.axhline(1, color="black", linestyle="--", linewidth=0.8)
        ax.axhline(0, color="black", linewidth=0.6)
        ax.set_xlabel(f"share of the {self.result.about['granularity']}", fontsize=8)
        ax.set_ylabel("faithfulness", fontsize=8)
        hollow = " (hollow: no edge left)" if self.empty else ""
        ax.set_title(self.result.about["direction"] + hollow, fontsize=9)
        return ax

    def __repr__(self) -> str:
        rows = zip(self.shares, self.n_asked, self.n_edges, self.result.recovered, strict=True)
        lines = (
            f"\n  {share:<6g} {asked:>7,} asked {n:>7,} edges left   f {float(f):6.3f}"
            for share, asked, n, f in rows
        )
        about = ", ".join(f"{name} {value}" for name, value in self.result.about.items())
        empty = f"; empty at {', '.join(map(str, self.empty))}" if self.empty else ""
        return (
            f"FaithfulnessCurve(area {self.area:.4f}, distance {self.distance:.4f}{empty})\n  "
            f"{about}{''.join(lines)}"
        )


def faithfulness_curve(
    model: Gemma4,
    pairs: SomePairs,
    scores: Scores,
    metric: Any = logit_diff,
    *,
    ranking: Ranking = "signed",
    search: Search = "threshold",
    shares: Sequence[float] = SHARES,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> FaithfulnessCurve:
    """The faithfulness of the circuits of the best edges or nodes, from few to all of them.

    For each share k of n the circuit is that of `extract_circuit(model, scores, int(k * n))`;
    `.area` and `.distance` integrate by trapezoids over k, from the least share to 1. These are the
    measures of MIB (Mueller et al. 2025, arXiv 2504.13151): in its code, which has these ten shares
    and this rounding, the table of CPR is made of the areas of signed rankings, that of CMD of the
    distances of absolute ones. So ask once with each ranking. Nothing below the least share counts:
    even f = 1 everywhere gives an area of 0.999.

    Costs as `faithfulness` for as many circuits as there are shares.

    It misleads in small models, where small shares round to no edge at all (`.empty`); and four
    fifths of the area are those of circuits of a fifth of the model and more.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        scores: of edges or nodes, as `extract_circuit` takes them.
        metric: as `activation_patching` takes it.
        ranking: as `extract_circuit` takes it.
        search: as `extract_circuit` takes it.
        shares: of all edges, or of the nodes that have a score.
        direction: as `faithfulness` takes it.
        budget: bytes of memory beside the model.

    Raises: InputError: shares that do not grow from above 0 to at most 1; or as `extract_circuit`
        and `faithfulness`.
    """
    if not shares or min(shares) <= 0 or max(shares) > 1 or sorted({*shares}) != list(shares):
        raise InputError(f"shares are {tuple(shares)}, expected growing numbers above 0, up to 1")
    graph = Graph(model.cfg)
    values = score_values(graph, scores)
    there = graph.allowed if values.ndim == 2 else ~values.isnan()
    n_asked = tuple(int(share * int(there.sum())) for share in shares)
    found = [extract_circuit(model, scores, n, ranking=ranking, search=search) for n in n_asked]
    about = {"method": "faithfulness curve", "granularity": f"{found[0].granularity}s"}
    result = measured(
        model,
        pairs,
        torch.stack([circuit.keep for circuit in found]),
        axis("share", list(shares)),
        metric,
        direction,
        about | {"ranking": ranking, "search": search},
        budget,
        "faithfulness",
    )
    return FaithfulnessCurve(result, n_asked, tuple(map(len, found)))


def circuit_transfer(
    model: Gemma4,
    pairs: Mapping[str, SomePairs],
    circuits: Circuits,
    metric: Any = logit_diff,
    *,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> Any:
    """Does a circuit found on some prompts do the same work on others, such as paraphrases?

    Circuits that share few edges can be equally good on each other's prompts, and such that share
    many can fail there: this asks what overlap cannot tell.

    Costs as `faithfulness` on every set of pairs.

    Args:
        model: the model.
        pairs: sets of pairs by name.
        circuits: one, or several by name.
        metric: as `activation_patching` takes it.
        direction: as `faithfulness` takes it.
        budget: bytes of memory beside the model.

    Returns:
        A pandas frame with a row for each set and circuit: faithfulness, how many pairs and
        templates.

    Raises: InputError: as `faithfulness`.
    """
    import pandas as pd

    rows = []
    for name, some in pairs.items():
        result = faithfulness(model, some, circuits, metric, direction=direction, budget=budget)
        for circuit, value in zip(result.axes[0].labels, result.recovered.tolist(), strict=True):
            rows.append(
                {
                    "pairs": name,
                    "circuit": circuit,
                    "faithfulness": value,
                    "n": len(result.per_pair),
                    "templates": len({*result.clusters}),
                }
            )
    return pd.DataFrame(rows)
