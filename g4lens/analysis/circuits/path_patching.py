"""Path patching: swap what one component sends to another, and nothing else.

    sender's write in the OTHER run ──> ports of the receivers
    everything else that they read      as in this run
    what comes behind the receivers     computed anew

So it asks of an edge what activation patching asks of a node (Goldowsky-Dill et al. 2023, arXiv
2304.05969; Wang et al. 2022, arXiv 2211.00593). Only direct edges count here: an MLP between sender
and receiver is a receiver of its own, where Wang et al. let it recompute.
"""

import time
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.circuits.graph import Graph, Node, PortName
from g4lens.analysis.circuits.graph_run import run_bytes
from g4lens.analysis.circuits.path_runs import PathRuns, first_block
from g4lens.analysis.circuits.senders import aligned_groups
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import Metric, as_metric, logit_diff
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.result import OTHER_RUN, Axis, Result, axis
from g4lens.analysis.runs import gathered, measure
from g4lens.cost import Cost
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4

Readers = Literal["one", "all"]
Port = tuple[Node, PortName]
Receiver = Node | Port | Sequence[Node | Port]


@torch.no_grad()
def path_patching(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    metric: Any = logit_diff,
    senders: Sequence[Node] | None = None,
    receivers: Sequence[Receiver] | None = None,
    direction: Direction = "noise",
    readers: Readers = "one",
    budget: int = BUDGET,
    progress: bool = True,
) -> Result:
    """Patch the edges from each sender to each receiver, at all positions, a cell at a time.

    With b the run that is patched, o the other and S the layer scalars between, a cell is the
    metric of b where the receiver's ports read

        their input in b  +  S (write of the sender in o  -  its write in b)

    in place of their input in b. Equal to a run of the graph with those edges taken out
    (`circuit_metric`). Costs, for each cell and pair, a pass through the blocks from the receiver
    on; two plain passes beside that.

    It misleads as activation patching does, and in one more way: a head's write is its share of
    the block's output with ln1_post at the scale of b or of o, which its siblings decide too.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        metric: as `activation_patching` takes it.
        senders: nodes; all of them by default.
        receivers: each a node, which means all its ports at once, a port `(node, name)`, or
            several of either, patched together; by default every port of the model by itself.
        direction: "noise" patches clean runs with corrupted writes, "denoise" the reverse.
        readers: a key or value that blocks share, "one": as the head named sees it, or "all":
            as every head and block that reads it does.
        budget: bytes of memory beside the model.
        progress: show a bar.

    Returns: A result with axes sender and receiver. Where a sender has no edge to a receiver the
        cell is the metric of b itself. `EdgeScores.of_paths` makes a score of each edge of it.

    Raises: InputError: no such node, port or direction; pairs that differ in length; hooks hung on
        the model.
    """
    began, metric = time.perf_counter(), as_metric(metric)
    if readers not in ("one", "all"):
        raise InputError(f"readers is {readers!r}, expected 'one' or 'all'")
    groups = aligned_groups(model, pairs, metric, direction)
    edges = _Edges(Graph(model.cfg), senders, receivers, readers)
    base, target = (
        gathered(groups, lambda group, side=side: measure(model, group, side, metric))
        for side in SIDES_OF[direction]
    )
    from tqdm.auto import tqdm

    total = int(edges.live.sum()) * len(as_pairs(pairs))
    with tqdm(total=total, unit="edge", leave=False, delay=1.0, disable=not progress) as bar:

        def cells(group: Group) -> Float[Tensor, "pairs sender receiver"]:
            most = max(1, budget // (2 * run_bytes(edges.graph, group)))
            parts = group.split(most)
            return torch.cat([edges.patched(model, p, metric, direction, most, bar) for p in parts])

        per_pair = gathered(groups, cells)
    about = {
        "method": "path patching",
        "direction": direction,
        "granularity": "edges",
        "ablation_value": OTHER_RUN,
        "positions": "all",
        "readers": readers,
        "metric": metric.name,
    }
    return Result(
        per_pair=per_pair,
        axes=edges.axes(),
        base=base,
        target=target,
        clusters=as_pairs(pairs).clusters,
        about=about,
        cfg=model.cfg,
        cost=edges.cost(len(per_pair), budget, time.perf_counter() - began),
        is_normalised=metric.is_normalised,
    )


class _Edges:
    """What is patched: the rows of the senders, the columns of each receiver, the edges there are.

    Raises: InputError: no such node or port.
    """

    def __init__(
        self,
        graph: Graph,
        senders: Sequence[Node] | None,
        receivers: Sequence[Receiver] | None,
        readers: Readers,
    ):
        self.graph = graph
        self.senders = graph.senders if senders is None else senders
        self.receivers = cast("Sequence[Receiver]", graph.ports if receivers is None else receivers)
        self.rows = torch.tensor([graph.row(node) for node in self.senders])
        self.columns = [_columns(graph, receiver, readers) for receiver in self.receivers]
        allowed = graph.allowed[self.rows]
        self.live = torch.stack([allowed[:, ports].any(1) for ports in self.columns], 1)

    def patched(
        self, model: Gemma4, part: Group, metric: Metric, direction: Direction, most: int, bar: Any
    ) -> Float[Tensor, "pairs sender receiver"]:
        """All cells of these pairs, at most `most` rows in a pass."""
        runs = PathRuns(model, part, metric, direction)
        unpatched = measure(model, part, SIDES_OF[direction][0], metric)
        table = unpatched[:, None, None].repeat(1, *self.live.shape)
        for i, ports in enumerate(self.columns):
            (which,) = self.live[:, i].nonzero(as_tuple=True)
            for some in which.split(max(1, most // len(part))) if len(which) else ():
                table[:, some, i] = runs.measured(self.rows[some], ports)
                bar.update(len(some) * len(part))
        return table

    def axes(self) -> tuple[Axis, Axis]:
        """Their names."""
        labels = [_label(self.graph, receiver) for receiver in self.receivers]
        return axis("sender", [str(node) for node in self.senders]), axis("receiver", labels)

    def cost(self, n_pairs: int, budget: int, seconds: float) -> Cost:
        """What the run took."""
        cells, n = self.live.numel() * n_pairs, self.graph.cfg.n_layers
        behind = torch.tensor([1 - first_block(self.graph, ports) / n for ports in self.columns])
        return Cost(
            cells=int(self.live.sum()) * n_pairs,
            skipped=cells - int(self.live.sum()) * n_pairs,
            plain_passes=cells,
            passes=n_pairs * (float((self.live.sum(0) * behind).sum()) + 5),
            bytes=budget,
            seconds=seconds,
        )


# ---- which ports


def _parts(receiver: Receiver) -> list[Node | Port]:
    """A receiver as a list: a node, or a port, is a list of one."""
    if isinstance(receiver, Node | str):
        return [receiver]
    if len(receiver) == 2 and isinstance(receiver[1], str):
        return [cast("Port", tuple(receiver))]
    return cast("list[Node | Port]", list(receiver))


def _columns(graph: Graph, receiver: Receiver, readers: Readers) -> list[int]:
    """The columns that a receiver means. Raises: InputError: the model has no such port."""
    found: set[int] = set()
    for part in _parts(receiver):
        if isinstance(part, Node | str):
            mine = {i for i, (node, _) in enumerate(graph.ports) if node == part}
            found |= mine or {graph.column(cast("Node", part), "in")}  # which says what is wrong
        else:
            found.add(graph.column(*part))
    if not found:
        raise InputError("a receiver is empty, expected a node, a port or several of them")
    alike = (graph.alike(column) if readers == "all" else [column] for column in found)
    return sorted(set().union(*alike))


def _label(graph: Graph, receiver: Receiver) -> str:
    return ", ".join(
        str(part) if isinstance(part, Node) else graph.port_name(graph.column(*part))
        for part in _parts(receiver)
    )
