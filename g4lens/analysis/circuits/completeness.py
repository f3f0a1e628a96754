"""Is a circuit all that does the work, and is each of its parts needed?

Both questions take parts away, at random: K from the circuit, and K from the whole model.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from g4lens.analysis.circuits.circuit import Circuit
from g4lens.analysis.circuits.graph import Edge, Node
from g4lens.analysis.circuits.shares import Shares, SomePairs, measured
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.patching import Direction
from g4lens.analysis.result import axis
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4

Keep = Bool[Tensor, "senders ports"]


def completeness(
    model: Gemma4,
    pairs: SomePairs,
    circuit: Circuit,
    metric: Any = logit_diff,
    *,
    n_subsets: int = 10,
    seed: int = 0,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> Shares:
    """Does the model without some parts do what the circuit without them does?

        m(C - K) - m(M - K)    for K nothing, all of C, single parts, random halves of C

    A circuit that is faithful but leaves out a second way to the same answer agrees with the model
    for K nothing, and no more when K takes its own way (Wang et al. 2022, arXiv 2211.00593, who
    take the absolute value of the difference of means).

    Costs as `faithfulness` for 4 (1 + n_subsets) circuits.

    It misleads by what it does not try: a bad K may exist that was not drawn.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        circuit: its parts are edges or nodes, as `circuit.granularity` says.
        metric: as `activation_patching` takes it.
        n_subsets: so many parts, drawn or all, are taken away alone, and as many random halves.
        seed: of the draw.
        direction: as `faithfulness` takes it.
        budget: bytes of memory beside the model.

    Returns:
        A cell for each K, of which `.values` is the difference, near zero for a complete circuit,
        and `.recovered` the same as a share of m(M) - m(empty). In pictures and in `summary` that
        share is called "gap".

    Raises: InputError: a circuit without parts, fewer than no subsets; or as `faithfulness`.
    """
    parts = _parts(circuit, model, n_subsets)
    draw = random.Random(seed)
    alone = parts if len(parts) <= n_subsets else draw.sample(parts, n_subsets)
    subsets = {"nothing": [], "everything": parts} | {str(part): [part] for part in alone}
    for i in range(n_subsets):
        subsets[f"half {i + 1}"] = draw.sample(parts, len(parts) // 2)
    taken = [_union(circuit, subset) for subset in subsets.values()]
    keep = [circuit.keep & ~k for k in taken] + [circuit.graph.allowed & ~k for k in taken]
    along = axis("removed", [f"{side}{name}" for side in ("", "model ") for name in subsets])
    about = {"method": "completeness", "granularity": f"{circuit.granularity}s"}
    result = measured(
        model, pairs, torch.stack(keep), along, metric, direction, about, budget, "gap"
    )
    mine, models = result.per_pair.chunk(2, dim=1)
    return _difference(result, mine - models, list(subsets), "removed")


def minimality(
    model: Gemma4,
    pairs: SomePairs,
    circuit: Circuit,
    metric: Any = logit_diff,
    *,
    n_subsets: int = 3,
    seed: int = 0,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> Shares:
    """What does each part of a circuit add, where it adds most?

        m(C - K) - m(C - K - v)    of the K that makes the mean of it largest in size

    K is nothing, or a random half of the circuit, so that a part that others stand in for is seen
    where they are gone (Wang et al. 2022, arXiv 2211.00593, who choose K by hand).

    Costs as `faithfulness` for parts * (1 + n_subsets) * 2 circuits: small circuits only.

    It misleads upwards: the largest of several noisy differences is large. Test what you claim on
    other pairs with `completeness` or `faithfulness` of the circuit without the part.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        circuit: its parts are edges or nodes, as `circuit.granularity` says.
        metric: as `activation_patching` takes it.
        n_subsets: random halves to try besides nothing.
        seed: of the draw.
        direction: as `faithfulness` takes it.
        budget: bytes of memory beside the model.

    Returns:
        A cell for each part; `.recovered` is what it adds as a share of m(M) - m(empty). In
        pictures and in `summary` that share is called "added".

    Raises: InputError: a circuit without parts, fewer than no subsets; or as `faithfulness`.
    """
    parts = _parts(circuit, model, n_subsets)
    draw = random.Random(seed)
    halves = [[], *(draw.sample(parts, len(parts) // 2) for _ in range(n_subsets))]
    without = [circuit.keep & ~_union(circuit, half) for half in halves]
    alone = [circuit.of_part(part) for part in parts]
    # on the one side v is there, whether it was drawn into K or not
    keep = [k | (circuit.keep & v) for k in without for v in alone]
    keep += [k & ~v for k in without for v in alone]
    along = axis("run", range(len(keep)))
    about = {"method": "minimality", "granularity": f"{circuit.granularity}s"}
    result = measured(
        model, pairs, torch.stack(keep), along, metric, direction, about, budget, "added"
    )
    mine, less = (half.unflatten(1, (len(halves), -1)) for half in result.per_pair.chunk(2, dim=1))
    worth = mine - less
    best = worth.mean(0).abs().argmax(0).expand(len(worth), 1, -1)
    return _difference(result, worth.gather(1, best)[:, 0], list(map(str, parts)), "part")


def _parts(circuit: Circuit, model: Gemma4, n_subsets: int) -> Sequence[Edge | Node]:
    circuit.check(model)
    if n_subsets < 0:
        raise InputError(f"n_subsets is {n_subsets}, expected at least 0")
    if not circuit.parts:
        raise InputError("the circuit is empty: it has no part to take away")
    return circuit.parts


def _union(circuit: Circuit, parts: Sequence[Edge | Node]) -> Keep:
    """All edges that go with some parts."""
    taken = torch.zeros_like(circuit.keep)
    for part in parts:
        taken |= circuit.of_part(part)
    return taken


def _difference(result: Shares, worth: Tensor, labels: list[str], name: str) -> Shares:
    """Differences of runs in place of the runs, as shares of the way from empty to full."""
    return replace(
        result,
        per_pair=worth,
        axes=(axis(name, labels),),
        base=torch.zeros_like(result.base),
        target=result.target - result.base,
    )
