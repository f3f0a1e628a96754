"""Kinds that choose on discovery pairs and measure on others: circuits and steering."""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch

from g4lens.analysis.circuits.circuit import Circuit
from g4lens.analysis.circuits.edge_attribution import edge_attribution
from g4lens.analysis.circuits.extraction import extract_circuit
from g4lens.analysis.circuits.faithfulness import faithfulness
from g4lens.analysis.circuits.graph import Graph
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.groups import SIDES, Group
from g4lens.analysis.pairs import Pairs
from g4lens.analysis.result import Axis, Result
from g4lens.analysis.sites import checked_layers, site_named
from g4lens.analysis.subspaces.function_vectors import function_vector
from g4lens.analysis.vectors import Direction, difference_of_means, steering
from g4lens.cost import Cost
from g4lens.errors import InputError
from g4lens.experiment.files import put
from g4lens.experiment.kinds.base import A, Baseline, Chunk, Control, Kind
from g4lens.experiment.kinds.controls import permuted, turned
from g4lens.experiment.run_spec import Circuits, Steering
from g4lens.experiment.shards import encoded

T = TypeVar("T")


class Choosing(Kind[A]):
    """Choices are made once and kept."""

    permutes = True

    @property
    def discovery(self) -> Pairs:
        """The pairs to choose on. Raises: InputError: none were set apart."""
        if self.found_on is None:
            raise InputError("no pairs were set apart to choose on")
        return self.found_on

    def _once(self, key: str, make: Callable[[], T]) -> T:
        kept: dict[str, Any] = self.__dict__.setdefault("_kept", {})
        if key not in kept:
            kept[key] = make()
        return kept[key]


class CircuitRuns(Choosing[Circuits]):
    """Circuits of growing size: faithfulness."""

    axes = ("share",)

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each direction."""
        return {name: {"direction": name} for name in self.args.direction}

    def absent(self, control: Control) -> str | None:
        """Random circuits, and those of permuted labels."""
        return "a circuit is no direction" if control == "direction" else None

    def measure(
        self, options: dict[str, Any], baseline: Baseline, chunk: Chunk, metric: str
    ) -> Result:
        """The metric of the circuits of all shares."""
        circuits = self.circuits(options["direction"], metric, baseline)
        result = faithfulness(self.model, chunk.pairs, circuits, metric, **options)
        kept = torch.stack([circuit.keep for circuit in circuits.values()])
        about = {
            **result.about,
            "discovery": f"{len(self.discovery)} pairs",
            "edges": ", ".join(str(len(circuit)) for circuit in circuits.values()),
            "circuits": hashlib.sha256(kept.numpy().tobytes()).hexdigest()[:12],
        }
        axes = (Axis("share", tuple(self.args.shares)),)
        return replace(result, axes=axes, about=about)

    def circuits(self, direction: Any, metric: str, baseline: Baseline) -> dict[str, Circuit]:
        """The circuit of each share; of a control as many edges, at random or of its labels."""
        args = self.args
        if baseline.kind == "random":
            real = self.circuits(direction, metric, Baseline("none", 0, baseline.seed))
            shift = 1000 * baseline.seed + baseline.draw
            return {name: circuit.shuffled(shift) for name, circuit in real.items()}

        def make() -> dict[str, Circuit]:
            is_control = baseline.kind == "permuted"
            pairs = permuted(self.discovery, baseline) if is_control else self.discovery
            scores = edge_attribution(self.model, pairs, metric, args.steps, direction)
            n = int(Graph(self.model.cfg).allowed.sum())
            return {
                str(share): extract_circuit(
                    self.model,
                    scores,
                    int(share * n),
                    ranking=args.ranking,
                    search=args.search,
                )
                for share in args.shares
            }

        return self._once(f"{direction} {metric} {baseline}", make)

    def keep(self, folder: Path, metrics: Sequence[str]) -> None:
        """A file for each circuit, which `Circuit.from_json` reads."""
        for direction, metric in product(self.args.direction, metrics):
            circuits = self.circuits(direction, metric, Baseline("none", 0, self.seed))
            for share, circuit in circuits.items():
                circuit.to_json(folder / f"{direction}.{metric}.{share}.json")

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """The scores once, and three passes for each circuit."""
        for group in [*groups, *self.discovery.on(self.model, metric)]:
            group.check_aligned()
        n = sum(map(len, groups))
        cells = n * len(self.args.shares)
        scores = len(self.discovery) * (1 + 4 * (self.args.steps or 1))
        return Cost(cells, 0, 3 * cells + 2 * n + scores, cells, BUDGET)


class SteeringRuns(Choosing[Steering]):
    """Steering: dose and response."""

    axes = ("layer", "strength")

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each way to make a vector."""
        return {name: {"vector": name} for name in self.args.vector}

    def absent(self, control: Control) -> str | None:
        """A vector of the whole stream has no others of its kind, but random ones."""
        return "the random direction is its control" if control == "random" else None

    def is_labelled(self, metric: str) -> bool:
        """The vector is made of pairs that are turned round, whatever is measured."""
        return True

    def measure(
        self, options: dict[str, Any], baseline: Baseline, chunk: Chunk, metric: str
    ) -> Result:
        """The metric of each block and strength."""
        args = self.args
        results = [
            steering(
                self.model,
                chunk.pairs,
                metric,
                self.direction(options["vector"], layer, baseline),
                args.strengths,
                args.side,
                args.steered,
                progress=False,
            )
            for layer in args.layers
        ]
        first = results[0]
        site = first.about["site"].split(" of ")[0]
        return replace(
            first,
            per_pair=torch.stack([result.per_pair for result in results], 1),
            axes=(Axis("layer", tuple(args.layers)), *first.axes),
            about={**first.about, "site": site, "discovery": f"{len(self.discovery)} pairs"},
        )

    def direction(self, vector: str, layer: int, baseline: Baseline) -> Direction:
        """What is added in a block: of a control, of the same length."""
        real = self._found(vector, layer, self.discovery, "")
        if baseline.kind == "direction":
            draws = random.Random(baseline.seeded(vector, layer))
            return real.random(draws.getrandbits(31))
        if baseline.kind == "permuted":
            pairs = self._once(str(baseline), lambda: turned(self.discovery, baseline))
            other = self._found(vector, layer, pairs, str(baseline))
            vectors = other.vectors * (real.norms / other.norms)[:, None]
            return replace(other, vectors=vectors, name=f"{real.name} of permuted labels")
        return real

    def _found(self, vector: str, layer: int, pairs: Pairs, whose: str) -> Direction:
        args = self.args
        if vector == "function_vector":
            found = self._once(
                f"{vector} {whose}",
                lambda: function_vector(self.model, pairs, args.n_heads, progress=False),
            )
            return found.at(layer)
        return self._once(
            f"{vector} {layer} {whose}",
            lambda: difference_of_means(self.model, pairs, None, layer, args.site, args.positions),
        )

    def keep(self, folder: Path, metrics: Sequence[str]) -> None:
        """A file of vectors, named by what made them and the block."""
        own, found = Baseline("none", 0, self.seed), {}
        for vector, layer in product(self.args.vector, self.args.layers):
            direction = self.direction(vector, layer, own)
            found[f"{vector}.{layer}.{direction.site}"] = direction.vectors[0]
        put(folder, encoded(found), lambda _: "directions.safetensors")

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """A pass for each block and strength, and the finding."""
        args, cfg, n = self.args, self.model.cfg, sum(map(len, groups))
        is_function = options["vector"] == "function_vector"
        most = cfg.n_layers * cfg.n_heads
        if is_function and args.n_heads > most:
            raise InputError(f"n_heads is {args.n_heads}, expected 1 to {most}")
        checked_layers(cfg, site_named(args.site), list(args.layers))
        if args.steered is not None:
            for group in groups:
                group.places(args.steered, args.side)
        for group in self.discovery.on(self.model, metric):
            for side in SIDES:
                group.places(args.positions, side)
        cells = n * len(args.layers) * len(args.strengths)
        found = 2 * len(self.discovery) * len(args.layers)
        if is_function:
            found = len(self.discovery) * most
        return Cost(cells, 0, cells + 2 * n + found, cells, BUDGET)
