"""What every kind of experiment has: variants, controls, and a measurement of some pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import as_metric
from g4lens.analysis.pairs import Pairs
from g4lens.analysis.result import Axis, Result
from g4lens.cost import Cost
from g4lens.model.gemma4 import Gemma4

Control = Literal["none", "random", "direction", "permuted"]
A = TypeVar("A")
NO_VECTOR = "no direction is part of it"


@dataclass(frozen=True)
class Baseline:
    """What stands in the place of the thing itself.

    Attributes:
        kind: "none" is the thing itself.
        draw: which of several draws.
        seed: of the whole experiment.
    """

    kind: Control = "none"
    draw: int = 0
    seed: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}.{self.draw}"

    def seeded(self, *what: object) -> str:
        """What a generator of random numbers begins with, for one thing to be drawn."""
        return " ".join(map(str, (self.seed, self, *what)))


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some of the pairs, and their numbers among all."""

    pairs: Pairs
    numbers: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a control takes in the place of what is named.

    Attributes:
        chunk: the pairs, which name its positions.
        names: by the name of each of its places what the place in its stead is called.
        fewer: where there are not as many other positions, how few there are.
    """

    chunk: Chunk
    names: dict[Any, Any]
    fewer: str = ""


class Kind(Generic[A]):
    """A kind of experiment on one model.

    Args:
        args: what the spec says of it.
        model: the model.
        pairs: all pairs.
        found_on: those of them to choose on, where some were set apart.
        seed: of draws.

    Attributes:
        axes: the columns that name a cell.
        permutes: are labels permuted by the kind itself, in what it chooses, and not in what it
            measures?
    """

    axes: ClassVar[Sequence[str]] = ("layer", "head", "position")
    permutes: ClassVar[bool] = False

    def __init__(self, args: A, model: Gemma4, pairs: Pairs, found_on: Pairs | None, seed: int):
        self.args, self.model, self.pairs = args, model, pairs
        self.found_on, self.seed = found_on, seed

    def variants(self) -> dict[str, dict[str, Any]]:
        """By name what each variant sets."""
        raise NotImplementedError

    def absent(self, control: Control) -> str | None:
        """Why there is no such control here; None if there is."""
        raise NotImplementedError

    def measure(
        self, options: dict[str, Any], baseline: Baseline, chunk: Chunk, metric: str
    ) -> Result:
        """All cells of one variant, for some pairs."""
        raise NotImplementedError

    def is_labelled(self, metric: str) -> bool:
        """Can labels that are exchanged change anything in this metric?"""
        return as_metric(metric).is_normalised  # KL knows neither answer nor foil

    def drawn(self, chunk: Chunk, baseline: Baseline) -> Drawn:
        """The positions of a control. Raises: InputError: there are none to draw from."""
        return Drawn(chunk, {})

    def keep(self, folder: Path, metrics: Sequence[str]) -> None:
        """Write what was chosen, if anything was, to files of a folder that need not be there."""

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """What all pairs cost, as `Pairs.on` gives them, without seconds.

        Raises: InputError: what `measure` would raise, as far as no pass tells.
        """
        raise NotImplementedError


def relabelled(result: Result, axis: str, names: dict[Any, Any], drawn: str) -> Result:
    """A control, its cells called like those that it is compared with."""
    axes = tuple(
        Axis(a.name, tuple(names[x] for x in a.labels)) if a.name == axis else a
        for a in result.axes
    )
    return replace(result, axes=axes, about={**result.about, "drawn": drawn})
