"""Runs of the plain model in which some senders are swapped on their way to some ports.

The receivers are computed from their changed inputs inside hooks, and everything behind them by
the model: a run begins at the first block that a port reads.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.analysis.circuits.graph import OF_HEADS, Graph, PortName
from g4lens.analysis.circuits.receivers import attended
from g4lens.analysis.circuits.senders import Differences, carried, recorded
from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import Metric, checked
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.plain import Edit, keep
from g4lens.analysis.runs import logits_at
from g4lens.analysis.trunk import entry_names
from g4lens.model.gemma4 import Gemma4
from g4lens.model.text import Run
from g4lens.state import KeyValues, Rows, State, take_rows

Ports = dict[PortName, list[int]]  # of one block: by port the heads, of others [0]


class PathRuns:
    """Both runs of a group, and what its senders write in either.

    Args:
        model: the model.
        group: the pairs.
        metric: what is measured.
        direction: "noise" swaps the corrupted writes into the clean run.
    """

    def __init__(self, model: Gemma4, group: Group, metric: Metric, direction: Direction):
        self.model, self.cfg, self.group, self.metric = model, model.cfg, group, metric
        self.graph = Graph(model.cfg)
        this, other = SIDES_OF[direction]
        self.reads = group.reads(this).to(model.device)
        self.base = recorded(model, group, this, *entry_names(self.cfg, range(self.cfg.n_layers)))
        theirs = recorded(model, group, other)
        self.differences = Differences(model, theirs, self.base, self.reads)
        self.factors = carried(model, self.graph).to(self.base["hook_embed"])

    def measured(
        self, rows: Int[Tensor, "sender"], ports: list[int]
    ) -> Float[Tensor, "pairs sender"]:
        """The metric where each of these senders reaches these ports as in the other run."""
        swap = _Swap(self, rows, first_block(self.graph, ports))
        reads = swap.each(self.reads)
        hooks = swap.hooks(ports)
        logits = logits_at(self.model, reads, self.metric.is_capped, hooks, state=swap.state)
        targets = self.group.targets.take(torch.arange(len(self.group)).repeat(len(rows)))
        values = checked(self.metric(logits, targets), self.metric, len(logits))
        return self.group.weight * values.view(len(rows), -1).float().cpu().T


def first_block(graph: Graph, ports: list[int]) -> int:
    """The block at which a run must begin so that these ports can be changed."""
    return min(graph.cfg.n_layers - 1, *(graph.reads_at(*graph.ports[i]) for i in ports))


class _Swap:
    """One run: of each pair a row for each sender, senders outermost."""

    def __init__(self, runs: PathRuns, senders: Int[Tensor, "sender"], first: int):
        self.runs, self.cfg, self.senders, self.first = runs, runs.cfg, senders, first
        self.blocks: Any = runs.model.blocks
        self.seen: dict[str, Tensor] = {}
        self.state = self._entering(first)
        rows = Rows(self.each(runs.base.positions("hook_embed")), first=0)
        self.everywhere = Run(self.cfg, self.state.ple, rows, self.state.lengths)
        rows = rows.take(self.each(runs.reads))
        self.behind = Run(self.cfg, self.state.ple, rows, self.state.lengths)

    def each(self, x: Tensor) -> Tensor:
        """The same for each sender."""
        return x.repeat(len(self.senders), *[1] * (x.ndim - 1))

    def _entering(self, layer: int) -> State:
        """What enters a block in the run that is changed."""
        state, kv = self.runs.base.state(layer), KeyValues()
        memo: dict[int, Rows] = {}

        def rows(held: Rows) -> Rows:
            return memo.setdefault(id(held), Rows(self.each(held.positions), held.first))

        for owner, keys in state.kv.keys.items():
            kv.keys[owner], kv.values[owner] = map(self.each, (keys, state.kv.values[owner]))
            kv.rows[owner] = rows(state.kv.rows[owner])
        resid, ple, lengths = map(self.each, (state.resid, state.ple, state.lengths))
        return State(layer, resid, ple, kv, rows(state.rows), lengths)

    # ---- what is written where

    def hooks(self, columns: list[int]) -> list[Edit]:
        """Write what the receivers make of their changed inputs."""
        by_layer: dict[int, Ports] = {}
        for node, port in (self.runs.graph.ports[i] for i in columns):
            layer = self.cfg.n_layers if node.layer is None else node.layer
            by_layer.setdefault(layer, {}).setdefault(port, []).append(node.head or 0)
        return [hook for layer, ports in by_layer.items() for hook in self._in_block(layer, ports)]

    def _in_block(self, layer: int, ports: Ports) -> list[Edit]:
        at, hooks = f"blocks.{layer}.", []
        if layer == self.cfg.n_layers:
            final = f"blocks.{layer - 1}.hook_resid_post"
            return [(final, lambda x, hook: x + self._change(layer, "in"))]
        if ports.keys() & set(OF_HEADS):
            computed = {layer, self.cfg.kv_source(layer)} - {*range(self.first)}
            hooks += [keep(f"blocks.{i}.hook_resid_pre", self.seen) for i in computed]
            hooks.append((f"{at}attn.hook_z", lambda z, hook: self._heads(z, layer, ports)))
        if "in" in ports:
            hooks.append(keep(f"{at}hook_resid_mid", self.seen))
            hooks.append((f"{at}hook_mlp_out", lambda x, hook: self._mlp(layer)))
        if ports.keys() & {"gate", "value"}:
            hooks.append(keep(f"{at}hook_resid_pre_ple", self.seen))
            hooks.append((f"{at}hook_ple_out", lambda x, hook: self._ple(layer, ports)))
        return hooks

    def _heads(self, z: Tensor, layer: int, ports: Ports) -> None:
        """Put the z of heads whose q, k or v is changed in its place."""
        heads = sorted({head for port in OF_HEADS for head in ports.get(port, [])})
        streams = []
        for port in OF_HEADS:
            x = self._entered(layer if port == "q" else self.cfg.kv_source(layer))
            if port == "q" and layer == self.cfg.horizon:
                x = take_rows(x, self.each(self.runs.reads))
            mine = ports.get(port, [])
            changed = x + self._change(layer, port) if mine else x
            streams.append(torch.stack([changed if head in mine else x for head in heads]))
        here = self.everywhere if layer < self.cfg.horizon else self.behind
        z[:, :, heads] = attended(self.runs.model, layer, heads, streams, here, self.everywhere)

    def _entered(self, layer: int) -> Tensor:
        """The stream that entered a block, in this run or before it began."""
        if layer < self.first:
            return self.each(self.runs.base["resid_pre", layer])
        return self.seen[f"blocks.{layer}.hook_resid_pre"]

    def _mlp(self, layer: int) -> Tensor:
        block = self.blocks[layer]
        x = self.seen[f"blocks.{layer}.hook_resid_mid"] + self._change(layer, "in")
        return block.ln2_post(block.mlp(block.ln2(x)))

    def _ple(self, layer: int, ports: Ports) -> Tensor:
        block, x = self.blocks[layer], self.seen[f"blocks.{layer}.hook_resid_pre_ple"]
        x = x + self._change(layer, "gate") if "gate" in ports else x
        value = self.each(self.runs.base["hook_ple"][:, :, layer])
        if "value" in ports:
            change = self.runs.differences.ple[self.senders.clamp(max=1)][..., layer, :]
            value = value + self._carried(change, layer, "value")
        if layer >= self.cfg.horizon:
            value = take_rows(value, self.each(self.runs.reads))
        return block.ln_ple_post(block.ple(x, value))

    def _change(self, layer: int, port: PortName) -> Float[Tensor, "batch pos d_model"]:
        """What the senders' swapped writes change in the stream that a port reads."""
        held = self.runs.differences.seen(layer, port)
        return self._carried(held[self.senders.clamp(max=len(held) - 1)], layer, port)

    def _carried(self, change: Tensor, layer: int, port: PortName) -> Tensor:
        """Times the scalars on the way, in the model's dtype; zero where there is no edge."""
        is_final = layer == self.cfg.n_layers
        column = -1 if is_final else self.runs.graph.columns(layer, port).start
        factor = self.runs.factors[self.senders.to(change.device), column]
        return (change * factor[:, None, None, None]).flatten(0, 1).to(factor)
