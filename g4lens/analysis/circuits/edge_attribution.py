"""Edge attribution patching: what every edge is worth, from one gradient.

    score(u -> port)  =  S (write of u in the OTHER run - in this one)  .  dm / d input of port

summed over positions, S the layer scalars between: to first order, what `path_patching` measures
(EAP, Syed et al. 2023, arXiv 2310.10348). With `steps`, the gradient is the mean over runs between
the two, whose input embeddings and per-layer embeddings are mixed together (EAP-IG, Hanna et al.
2024, arXiv 2403.17806).

The gradient by each port's input follows from one backward pass over the plain model: an MLP, a
per-layer input and the logits read the stream through one norm, and a head's query, key and value
through its own share of the attention, differentiated block by block.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.circuits.edge_scores import EdgeScores
from g4lens.analysis.circuits.graph import OF_HEADS, Graph, PortName
from g4lens.analysis.circuits.graph_run import run_bytes
from g4lens.analysis.circuits.receivers import attend, by_head
from g4lens.analysis.circuits.senders import ENTRY, Differences, aligned_groups, carried, recorded
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.gradients.slopes import (
    graph_bytes,
    need_gradient,
    need_slope,
    need_way_down,
    pairs_that_fit,
)
from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import Metric, as_metric, checked, logit_diff
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.patching import SIDES_OF, Direction
from g4lens.analysis.result import OTHER_RUN
from g4lens.analysis.runs import gathered
from g4lens.cost import Cost
from g4lens.errors import InputError
from g4lens.hooks import Hook, Hung, hang
from g4lens.model.gemma4 import Gemma4
from g4lens.model.text import Run
from g4lens.state import KeyValues, Rows, State, take_rows

READ = (  # where a port's input can be followed back to the stream
    "attn.hook_q", "attn.hook_z", "ln1.hook_scale", "ln1.hook_normalized",
    "ln2.hook_scale", "ln2.hook_normalized", "ple.hook_pre",
)  # fmt: skip
OWNED = ("attn.hook_k", "attn.hook_v")


def edge_attribution(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    metric: Any = logit_diff,
    steps: int | None = None,
    direction: Direction = "noise",
    budget: int = BUDGET,
) -> EdgeScores:
    """Estimate the effect of patching each edge, of all edges at once, by EAP or EAP-IG.

    Costs two plain passes, and for each step a pass with gradients, the backward pass of every
    head's attention, and the products of writes with gradients: EAP about three to five plain
    passes, EAP-IG with five steps ten to twenty; more in models so small that calls cost more than
    arithmetic.

    It misses what a slope does not show. A softmax that is saturated, or a gate that is shut, has
    none: in `planted.get("edges")` the edges that decide where a head looks score zero in EAP, and
    of the two heads of `planted.get("or_gate")` neither is found when denoising. EAP-IG sees such
    an edge only if a step falls where the softmax turns, and there the slope is steep. In the model
    of "edges" that is the exact middle, where two names tie: an odd number of steps meets it and
    ranks all edges right, with scores up to thousands of times the effect; an even number steps
    over it and is as blind as EAP. Trust the order of scores, not their size, and compare numbers
    of steps. Post-norms and the final norm divide by a scale that moves to first order even where
    a write is swapped for another of the same size: edges of no effect then score a few percent of
    the largest.

    Args:
        model: the model.
        pairs: prompts that agree position by position.
        metric: as `activation_patching` takes it, differentiable.
        steps: None: EAP, the gradient of this run; n: EAP-IG, the mean of the gradients in the
            middles of n equal parts of the way from this run to the other. (The authors' code
            takes the end of each part that is nearer to the corrupted run.)
        direction: "noise" estimates what becomes of the clean run with corrupted edges, "denoise"
            the reverse.
        budget: bytes of memory beside the model; sets the size of batches.

    Returns: The estimated change of the metric for each edge and pair, all positions together.

    Raises: InputError: a metric without gradient, as KL of clean runs; fewer than one step; pairs
        that differ in length; a budget too small for one; hooks hung on the model.
    """
    began, metric = time.perf_counter(), as_metric(metric)
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise InputError(f"steps is {steps!r}, expected at least 1, or None for EAP")
    if steps is None and direction == "noise":
        need_way_down(metric)
    shares = [0.0] if steps is None else [(i + 0.5) / steps for i in range(steps)]
    graph, is_flat = Graph(model.cfg), list[bool]()
    groups = aligned_groups(model, pairs, metric, direction)
    parts = [part for group in groups for part in group.split(_at_once(graph, group, budget))]

    def scores(part: Group) -> Float[Tensor, "pairs senders ports"]:
        edges = _Edges(model, part, metric, direction)
        found = edges.scores(shares)
        is_flat.append(edges.is_flat)
        return found

    per_pair = gathered(parts, scores)
    need_slope(all(is_flat), metric)
    about = {
        "method": "EAP" if steps is None else "EAP-IG",
        "direction": direction,
        "steps": str(steps or 1),
        "granularity": "edges",
        "ablation_value": OTHER_RUN,
        "positions": "all",
        "metric": metric.name,
    }
    n_edges = len(per_pair) * int(graph.allowed.sum())
    cost = Cost(
        cells=n_edges,
        passes=len(per_pair) * (2 + 3 * len(shares)),
        plain_passes=n_edges,
        bytes=budget,
        seconds=time.perf_counter() - began,
    )
    return EdgeScores(graph, per_pair, as_pairs(pairs).clusters, about, cost)


def _at_once(graph: Graph, group: Group, budget: int) -> int:
    """How many pairs may run at once: one takes the writes of a run, and the graph of another."""
    n, reads = group.rows["clean"][0].tokens.shape[1], group.targets.reads.shape[1]
    return pairs_that_fit(budget, run_bytes(graph, group) + graph_bytes(graph.cfg, n, reads), n)


class _Edges:
    """The writes of both runs of a group, and gradients between them."""

    def __init__(self, model: Gemma4, group: Group, metric: Metric, direction: Direction):
        self.model, self.cfg, self.group, self.metric = model, model.cfg, group, metric
        self.graph = Graph(model.cfg)
        this, other = SIDES_OF[direction]
        self.reads = group.reads(this).to(model.device)
        mine, theirs = recorded(model, group, this), recorded(model, group, other)
        self.ends = [[run[name] for name in ENTRY] for run in (mine, theirs)]
        with torch.no_grad():
            self.differences = Differences(model, theirs, mine, self.reads)
        self.rows, self.lengths = Rows(mine.positions("hook_embed"), first=0), mine.lengths
        self.is_flat = True

    def scores(self, shares: Sequence[float]) -> Float[Tensor, "pairs senders ports"]:
        """The mean over gradients taken at these shares of the way to the other run."""
        total = self.differences.here.new_zeros(len(self.group), *self.graph.shape)
        for share in shares:
            self._add(total, *self._slopes(share))
        factors = carried(self.model, self.graph).to(total)
        return (total * factors / len(shares)).float().cpu()

    def _slopes(self, share: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Activations of a run between the two, and the metric's gradient by some of them."""
        embed, context, token = (torch.lerp(a, b, share) for a, b in zip(*self.ends, strict=True))
        ple = (context + token).requires_grad_()
        state = State(0, embed.requires_grad_(), ple, KeyValues(), self.rows, self.lengths)
        final = f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"
        logits = "hook_logits" if self.metric.is_capped else "hook_logits_pre_cap"
        names = [logits, final]
        for layer in range(self.cfg.n_layers):
            points = READ + OWNED * self.cfg.owns_kv(layer)
            names += [f"blocks.{layer}.{point}" for point in points]
        seen: dict[str, Tensor] = {}

        def save(x: Tensor, hook: Hook) -> None:
            seen[hook.name] = x

        hung = [(self.model.hook_points[name], Hung(savers=[save])) for name in names]
        with torch.enable_grad():
            with hang(hung):
                self.model(state=state, read=self.reads)
            values = self.metric(seen[logits], self.group.targets)  # kl runs the clean prompts
            total = self.group.weight * checked(values, self.metric, len(self.group)).sum()
        need_gradient(values, self.metric)
        ends = ("attn.hook_z", "ln2.hook_normalized", "ple.hook_pre", final)
        by = {name: x for name, x in seen.items() if name.endswith(ends)} | {"hook_ple": ple}
        grads = torch.autograd.grad(total, list(by.values()))
        self.is_flat &= not any(bool(grad.any()) for grad in grads)
        return {name: x.detach() for name, x in seen.items()}, dict(zip(by, grads, strict=True))

    @torch.no_grad()
    def _add(self, total: Tensor, seen: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
        """Add what each edge is worth by these gradients, without the layer scalars."""
        everywhere = Run(self.cfg, grads["hook_ple"], self.rows, self.lengths)
        behind = Run(self.cfg, grads["hook_ple"], self.rows.take(self.reads), self.lengths)
        blocks: Any = self.model.blocks
        for layer in range(self.cfg.n_layers):
            block, at = blocks[layer], f"blocks.{layer}."
            here = everywhere if layer < self.cfg.horizon else behind
            for port, slope in self._heads(
                layer, seen, grads[f"{at}attn.hook_z"], here, everywhere
            ):
                self._score(total, layer, port, slope)
            slope = _through_norm(seen, f"{at}ln2", grads[f"{at}ln2.hook_normalized"])
            self._score(total, layer, "in", slope[None])
            self._score(
                total, layer, "gate", (grads[f"{at}ple.hook_pre"] @ block.ple.gate.weight)[None]
            )
            total[:, :2, self.graph.columns(layer, "value")] += einsum(
                self.differences.ple[:, :, :, layer],
                grads["hook_ple"][:, :, layer].to(total),
                "sender pair pos d, pair pos d -> pair sender",
            )[..., None]
        slope = grads[f"blocks.{self.cfg.n_layers - 1}.hook_resid_post"]
        total[:, :, -1] += einsum(
            self.differences.here, slope.to(total), "sender pair pos d, pair pos d -> pair sender"
        )

    def _heads(
        self, layer: int, seen: dict[str, Tensor], slope: Tensor, here: Run, everywhere: Run
    ) -> list[tuple[PortName, Float[Tensor, "head batch pos d_model"]]]:
        """The gradient by the stream that each head's q, k and v reads, from that by its z."""
        source, group = self.cfg.kv_source(layer), self.cfg.n_heads // self.cfg.n_kv_heads
        q = seen[f"blocks.{layer}.attn.hook_q"].clone().requires_grad_()
        k, v = (
            seen[f"blocks.{source}.{point}"].repeat_interleave(group, 2).requires_grad_()
            for point in OWNED
        )
        with torch.enable_grad():
            z = attend(self.model, layer, q, k, v, here, everywhere)
        slopes, found = torch.autograd.grad(z, (q, k, v), slope), []
        for port, grad, owner in zip(OF_HEADS, slopes, (layer, source, source), strict=True):
            reader: Any = self.model.blocks[owner]
            weight = by_head(reader.attn, port, range(self.cfg.n_heads), self.cfg.n_heads)
            back = einsum(
                grad,
                weight * reader.ln1.weight,
                "batch pos head d_head, head d_head d_model -> head batch pos d_model",
            )
            rows = self.reads if port == "q" and layer == self.cfg.horizon else None
            found.append((port, _through_norm(seen, f"blocks.{owner}.ln1", back, rows)))
        return found

    def _score(
        self,
        total: Tensor,
        layer: int,
        port: PortName,
        slope: Float[Tensor, "port pair pos d_model"],
    ) -> None:
        columns = self.graph.columns(layer, port)
        n = int(self.graph.allowed[:, columns.start].nonzero()[-1]) + 1  # senders that came before
        total[:, :n, columns] += einsum(
            self.differences.seen(layer, port)[:n],
            slope.to(total),
            "sender pair pos d, port pair pos d -> pair sender port",
        )


def _through_norm(
    seen: dict[str, Tensor], norm: str, slope: Tensor, rows: Tensor | None = None
) -> Tensor:
    """The gradient by what a norm is given, from that by what it makes of it, before its gain."""
    scale, normalized = seen[f"{norm}.hook_scale"], seen[f"{norm}.hook_normalized"]
    if rows is not None:
        scale, normalized = take_rows(scale, rows), take_rows(normalized, rows)
    return (slope - normalized * (slope * normalized).mean(-1, keepdim=True)) / scale
