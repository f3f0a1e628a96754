"""A run of the model as a graph: every port reads a sum of its own.

    input of a port  =  sum over its edges of   write of the sender in THIS run,       if kept
                                                write of the sender in the OTHER run,  if not

each write times the layer scalars that it passes on its way. What a head writes is its share of the
block's attention output behind ln1_post, whose scale is that of all heads of this very run. The
model's own modules compute everything else, so keeping all edges is the run itself and keeping none
is the other run, to float error and without a special case.

With direction "noise", as circuits are read, this run is the clean one and the other the corrupted
one; "denoise" swaps the roles.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from g4lens.analysis.circuits.graph import Graph, PortName
from g4lens.analysis.circuits.receivers import attended
from g4lens.analysis.circuits.senders import (
    ENTRY,
    aligned_groups,
    carried,
    head_writes,
    recorded,
    writes,
)
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import Metric, as_metric, checked, logit_diff
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.runs import gathered
from g4lens.cache import ActivationCache
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4
from g4lens.model.text import Run
from g4lens.state import Rows, take_rows

STREAMS = ("blocks.*.hook_resid_pre", "blocks.*.hook_resid_mid", "blocks.*.hook_resid_pre_ple")
Keep = Bool[Tensor, "*runs senders ports"] | Float[Tensor, "*runs senders ports"]


def circuit_metric(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    metric: Any = logit_diff,
    *,
    keep: Keep,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> Float[Tensor, "*runs pairs"]:
    """The metric of each pair where only some edges carry this run, and the rest the other one.

    Costs a plain pass over the other run, and for each run of the graph one to three: every head
    computes keys and values of its own, which in a reader block are many more than the owner's.
    Several `keep` at once go through in one batch, which pays in small models.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        metric: as `activation_patching` takes it.
        keep: which edges of `Graph(model.cfg)` are kept; numbers between 0 and 1 mix both runs.
        direction: "noise" begins at the clean run and takes edges from it, "denoise" at the
            corrupted one.
        budget: bytes of memory beside the model; sets the size of batches, of one run at least.

    Raises: InputError: `keep` of another shape; pairs that differ in length; hooks hung on the
        model, which a run of the graph could not honour; or as `activation_patching`.
    """
    graph, metric = Graph(model.cfg), as_metric(metric)
    if keep.shape[-2:] != graph.shape:
        raise InputError(
            f"keep is {tuple(keep.shape)}, expected {graph.shape}: a row for each sender, a column "
            "for each port of Graph(model.cfg)"
        )
    runs = keep.reshape(-1, *graph.shape)
    groups = aligned_groups(model, pairs, metric, direction)

    def measured(group: Group) -> Float[Tensor, "pairs runs"]:
        most = max(1, budget // run_bytes(graph, group))  # pairs times runs in a batch
        parts = []
        for part in group.split(most):
            at_once = runs.split(max(1, most // len(part)))
            found = [graph_run(model, part, metric, some, direction) for some in at_once]
            parts.append(torch.cat(found).float().cpu().T)
        return torch.cat(parts)

    with torch.no_grad():
        return gathered(groups, measured).T.reshape(*keep.shape[:-2], -1)


def run_bytes(graph: Graph, group: Group) -> int:
    """Memory that one pair takes in one run of the graph, in float32, at its peak."""
    cfg = graph.cfg
    n, reads = group.rows["clean"][0].tokens.shape[1], group.targets.reads.shape[1]
    ahead = graph.senders_of(cfg.horizon).start
    widest = max(2 * cfg.d_model + 4 * cfg.d_head(i) for i in range(cfg.n_layers))
    numbers = n * (2 * ahead * cfg.d_model + 3 * cfg.n_heads * widest)
    numbers += n * 6 * cfg.n_layers * cfg.d_model
    numbers += reads * (2 * len(graph.senders) * cfg.d_model + 4 * cfg.d_vocab)
    return 4 * numbers


def streams_read(model: Gemma4) -> list[str]:
    """The points where ports read the stream."""
    return [*STREAMS, f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]


# ---- the run


def graph_run(
    model: Gemma4, group: Group, metric: Metric, keep: Keep, direction: Direction = "noise"
) -> Float[Tensor, "runs pairs"]:
    """The metric of one group, for several `keep` [runs, senders, ports] at once.

    Differentiable in `keep`, under `torch.autograd.graph.allow_mutation_on_saved_tensors`.
    """
    this, other = SIDES_OF[direction]
    with torch.no_grad():
        _, begun = model.run_with_cache(group.batch(this), list(ENTRY), stop=0)
        theirs = recorded(model, group, other, *streams_read(model))
    resid = _GraphRun(model, group, keep, begun, theirs, group.reads(this)).final()
    pre_cap = model.embed.tokens.products
    logits = model.unembed(resid) if metric.is_capped else pre_cap(model.ln_final(resid))
    targets = group.targets.take(torch.arange(len(group)).repeat(len(keep)))
    values = checked(metric(logits, targets), metric, len(resid))
    return group.weight * values.view(len(keep), -1)


class _GraphRun:
    """One pass. Runs and pairs are one batch axis, except in `deltas`.

    Attributes:
        deltas: of each sender so far, its write in this run less that in the other, at the
            positions that go on.
        keys: the same at all positions, of the senders that keys and values may read.
    """

    def __init__(
        self,
        model: Gemma4,
        group: Group,
        keep: Tensor,
        begun: ActivationCache,
        theirs: ActivationCache,
        reads: Tensor,
    ):
        self.model, self.cfg, self.graph, self.theirs = model, model.cfg, Graph(model.cfg), theirs
        self.blocks: Any = model.blocks
        self.n_runs, self.reads = len(keep), reads.to(model.device)
        embed, ple = begun["hook_embed"], begun["hook_ple_token"]
        self.weights = keep.to(embed) * carried(model, self.graph).to(embed)
        n_pairs, n = embed.shape[:2]
        positions = torch.arange(n, device=model.device).expand(self.n_runs * n_pairs, -1)
        self.all = Run(self.cfg, ple, Rows(positions, first=0), torch.full((len(positions),), n))
        self.here = self.all
        self.ple = [
            (begun[name] - theirs[name], theirs[name])
            for name in ENTRY[1:]  # as embed and ple_rows send them
        ]
        first = self.graph.senders_of(self.cfg.horizon).start
        self.keys = embed.new_zeros(first, self.n_runs, n_pairs, n, self.cfg.d_model)
        self.keys[0] = embed - theirs["hook_embed"]  # ple_rows writes nothing to the stream
        self.deltas = self.keys

    def final(self) -> Float[Tensor, "batch reads d_model"]:
        """The final residual stream at the positions read."""
        for layer in range(self.cfg.n_layers):
            if layer == self.cfg.horizon:
                self._go_on_with_reads()
            block, sent = self.blocks[layer], self.graph.senders_of(layer)
            mlp, ple = sent.stop - 2, sent.stop - 1
            theirs = writes(self.model, self.theirs, layer).split((ple - sent.start - 1, 1, 1))
            self._send(sent.start, head_writes(block, self._attended(layer)), theirs[0])
            (x,) = self._input(self.theirs["resid_mid", layer], layer, "in", mlp)
            self._send(mlp, block.ln2_post(block.mlp(block.ln2(x)))[None], theirs[1])
            (x,) = self._input(self.theirs["resid_pre_ple", layer], layer, "gate", ple)
            written = block.ln_ple_post(block.ple(x, self._value(layer)))
            self._send(ple, written[None], theirs[2])
        stream = self.theirs["resid_post", self.cfg.n_layers - 1]
        return self._mixed(stream, self.deltas, slice(-1, None))[0]

    def _go_on_with_reads(self) -> None:
        """From the horizon on only the positions read can still matter."""
        index = self.reads.repeat(self.n_runs, 1)
        self.here = Run(self.cfg, self.all.ple, self.all.rows.take(index), self.all.lengths)
        self.ple = [(take_rows(a, self.reads), take_rows(b, self.reads)) for a, b in self.ple]
        _, n_runs, n_pairs, _, d_model = self.keys.shape
        n_reads, pair = self.reads.shape[1], torch.arange(n_pairs)[:, None]
        self.deltas = self.keys.new_zeros(
            len(self.graph.senders), n_runs, n_pairs, n_reads, d_model
        )
        self.deltas[: len(self.keys)] = self.keys[:, :, pair, self.reads]

    def _attended(self, layer: int) -> Float[Tensor, "batch pos head d_head"]:
        """What each head reads, with a query, keys and values of its own."""
        source = self.cfg.kv_source(layer)
        stream, written = self.theirs["resid_pre", layer], self.theirs["resid_pre", source]
        if layer == self.cfg.horizon:
            stream = take_rows(stream, self.reads)
        before = [self.graph.senders_of(i).start for i in (layer, source)]
        q = self._input(stream, layer, "q", before[0])
        k, v = (self._input(written, layer, port, before[1]) for port in ("k", "v"))
        heads = range(self.cfg.n_heads)
        return attended(self.model, layer, heads, (q, k, v), self.here, self.all)

    def _value(self, layer: int) -> Float[Tensor, "batch pos d_ple"]:
        """This block's embedding of the token: what embed and ple_rows send of it."""
        column = self.graph.columns(layer, "value")
        total: Any = 0.0
        for sender, (delta, theirs) in enumerate(self.ple):
            weight = self.weights[:, sender, column, None, None]
            total = total + theirs[:, :, layer] + weight * delta[:, :, layer]
        return total.flatten(0, 1)

    def _input(
        self, stream: Tensor, layer: int, port: PortName, before: int
    ) -> Float[Tensor, "port batch pos d_model"]:
        """What each head's, or the one, port of a block reads of the `before` first senders."""
        deltas = self.keys if port in ("k", "v") else self.deltas
        return self._mixed(stream, deltas[:before], self.graph.columns(layer, port))

    def _mixed(
        self, stream: Tensor, deltas: Tensor, columns: slice
    ) -> Float[Tensor, "port batch pos d_model"]:
        """The other run's stream, and of each edge that is kept what this run adds to it."""
        mixed = einsum(
            deltas,
            self.weights[:, : len(deltas), columns],
            "sender run pair pos d, run sender port -> port run pair pos d",
        )
        return (stream + mixed).flatten(1, 2)

    def _send(self, first: int, written: Tensor, theirs: Tensor) -> None:
        """Note what senders, from a row on, have written at the positions that go on."""
        delta = written.unflatten(1, (self.n_runs, -1)) - theirs[:, None]
        self.deltas[first : first + len(written)] = delta
