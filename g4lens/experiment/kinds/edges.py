"""Kinds that cut or exchange edges: attention knockout, path patching."""

from collections.abc import Sequence
from typing import Any, cast

from g4lens.analysis.circuits.graph import Graph, Node
from g4lens.analysis.circuits.path_patching import Port, path_patching
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.groups import Group
from g4lens.analysis.knockout import knockout, knockout_cost
from g4lens.analysis.pairs import Pairs
from g4lens.analysis.result import Result
from g4lens.analysis.scope import label
from g4lens.cost import Cost
from g4lens.errors import InputError, did_you_mean
from g4lens.experiment.kinds.base import (
    NO_VECTOR,
    Baseline,
    Chunk,
    Control,
    Drawn,
    Kind,
    relabelled,
)
from g4lens.experiment.kinds.controls import other_heads, other_places
from g4lens.experiment.run_spec import Knockout, PathPatching
from g4lens.model.gemma4 import Gemma4


class KnockoutRuns(Kind[Knockout]):
    """Attention knockout."""

    axes = ("edge", "layer", "layers")

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each type of block."""
        return {
            "all_blocks" if kind is None else f"{kind}_blocks": {"layer_type": kind}
            for kind in self.args.layer_type
        }

    def absent(self, control: Control) -> str | None:
        """Other sources of the same targets are always there to be drawn."""
        return NO_VECTOR if control == "direction" else None

    def measure(
        self, options: dict[str, Any], baseline: Baseline, chunk: Chunk, metric: str
    ) -> Result:
        """The cut of every edge in every window; the random one cuts as many other sources."""
        given, edges = self._given(options), self._edges
        if baseline.kind != "random":
            return knockout(self.model, chunk.pairs, metric, edges=edges, **given, progress=False)
        other = self.drawn(chunk, baseline)
        new = {old: name for name, old in other.names.items()}
        drawn = [(new[label(source)], target) for source, target in edges]
        pairs = other.chunk.pairs
        result = knockout(self.model, pairs, metric, edges=drawn, **given, progress=False)
        called = [f"{source} -> {target}" for source, target in edges]
        was = [f"{source} -> {target}" for source, target in drawn]
        names = dict(zip(was, called, strict=True))
        return relabelled(result, "edge", names, f"sources{other.fewer}")

    def drawn(self, chunk: Chunk, baseline: Baseline) -> Drawn:
        """As many other positions for each source, none behind all that look at it."""
        sources = list({str(source): source for source, _ in self.args.edges}.values())
        targets: dict[int | str, list[Any]] = {}
        for source, target in self.args.edges:
            targets.setdefault(label(source), []).append(target)
        return other_places(self.model, chunk, sources, baseline, targets)

    @property
    def _edges(self) -> list[tuple[Any, Any]]:
        return [(source, target) for source, target in self.args.edges]

    def _given(self, options: dict[str, Any]) -> dict[str, Any]:
        """The method's own arguments but the edges."""
        layers: Any = self.args.layers
        window = tuple(layers) if layers and layers[0] == "window" else layers
        return {"layers": window, "side": self.args.side, **options}

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """The blocks from each window's first on, where the cut matters."""
        return knockout_cost(self.model, groups, edges=self._edges, **self._given(options))


class PathRuns(Kind[PathPatching]):
    """Path patching."""

    axes = ("sender", "receiver")

    def __init__(
        self,
        args: PathPatching,
        model: Gemma4,
        pairs: Pairs,
        found_on: Pairs | None,
        seed: int,
    ):
        super().__init__(args, model, pairs, found_on, seed)
        self.graph = graph = Graph(model.cfg)
        nodes = {str(node): node for node in graph.nodes}
        ports = {graph.port_name(i): port for i, port in enumerate(graph.ports)}
        self.senders = None if args.senders is None else _known(args.senders, nodes)
        self.receivers: Any = None
        if args.receivers is not None:
            each = [r if isinstance(r, list) else [r] for r in args.receivers]
            self.receivers = [_known(some, {**ports, **nodes}) for some in each]

    def variants(self) -> dict[str, dict[str, Any]]:
        """Each direction."""
        return {name: {"direction": name} for name in self.args.direction}

    def absent(self, control: Control) -> str | None:
        """Only heads have others of their kind in their block."""
        if control == "direction":
            return NO_VECTOR
        if control == "random" and not self._heads:
            return "no senders are named that have others of their kind in their block"
        return None

    @property
    def _heads(self) -> list[Node]:
        """The senders that are heads, of blocks that have others."""
        heads = [node for node in self.senders or [] if node.head is not None]
        n = self.model.cfg.n_heads
        return [x for x in heads if sum(y.layer == x.layer for y in heads) < n]

    def measure(
        self, options: dict[str, Any], baseline: Baseline, chunk: Chunk, metric: str
    ) -> Result:
        """Every edge asked for; the random ones begin at other heads of the senders' blocks."""
        senders, names = self.senders, {}
        if baseline.kind == "random":
            drawn: dict[Node, Node] = {}
            for layer in dict.fromkeys(node.layer for node in self._heads):
                mine = [node.head for node in self._heads if node.layer == layer]
                n, heads = self.model.cfg.n_heads, [h for h in mine if h is not None]
                for old, new in other_heads(heads, n, baseline, layer).items():
                    drawn[Node("head", layer, old)] = Node("head", layer, new)
            senders = list(drawn.values())
            names = {str(new): str(old) for old, new in drawn.items()}
        receivers = cast("list[Node | Port] | None", self.receivers)
        given = {"readers": self.args.readers, **options}
        result = path_patching(
            self.model, chunk.pairs, metric, senders, receivers, **given, progress=False
        )
        called = ", ".join(f"{new} for {old}" for new, old in names.items())
        return relabelled(result, "sender", names, called) if names else result

    def cost(self, options: dict[str, Any], groups: Sequence[Group], metric: str) -> Cost:
        """A pass through the blocks from the receiver on for each edge."""
        for group in groups:
            group.check_aligned()
        n = sum(map(len, groups))
        senders = len(self.senders or self.graph.senders)
        cells = n * senders * len(self.receivers or self.graph.ports)
        live = cells if self.receivers else n * int(self.graph.allowed.sum())
        return Cost(live, cells - live, live / 2 + 5 * n, cells, BUDGET)


def _known(names: Sequence[str], known: dict[str, Any]) -> list[Any]:
    """What names of nodes and ports mean. Raises: InputError: there is none of this name."""
    for name in names:
        if name not in known:
            raise InputError(
                f"experiment: no node or port is called {name!r}.{did_you_mean(name, known)}"
            )
    return [known[name] for name in names]
