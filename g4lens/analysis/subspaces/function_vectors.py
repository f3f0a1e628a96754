"""Function vectors: what a few heads write when a prompt shows a task by examples.

    effect of a head  =  metric of a prompt that does not show the task, with the head's z at the
                         end set to its mean over prompts that do  -  metric without that
    v_l               =  sum over the best heads of  S(block of h, l) * mean over prompts of write_h

(Todd et al. 2023, arXiv 2310.15213.) `write_h` is the head's part of what its block's attention
adds to the stream at the last position, behind ln1_post with its scale frozen, and `S(j, l)` the
product of the layer scalars of blocks j to l-1 (for a head past l, the inverse of that from l to
j-1): a write is worth in block l what it is worth where it is made.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.cells import Cell, Change, Changes
from g4lens.analysis.engine import BUDGET
from g4lens.analysis.groups import Group
from g4lens.analysis.metrics import as_metric
from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.result import Result
from g4lens.analysis.scope import Scope
from g4lens.analysis.sites import SITES, Unit, checked_layers
from g4lens.analysis.sweep import Progress, Sweep
from g4lens.analysis.trunk import Trunk, entry_names
from g4lens.analysis.vectors import Direction
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import widened
from g4lens.model.text import Block

AT_ONCE = 16  # prompts in one pass


@dataclass(frozen=True, eq=False, repr=False)
class FunctionVector:
    """What some heads write at the last position, on the mean.

    Attributes:
        heads: the most effective first.
        effects: every head's effect: the sweep that chose them.
        writes: what each adds to the stream in its block, in float32 on the CPU.
        scalars: the layer scalars of all blocks.
        stream_norms: the mean length of the stream that enters each block at the last position.
    """

    heads: tuple[Unit, ...]
    effects: Result
    writes: Float[Tensor, "head d_model"]
    scalars: Float[Tensor, "layer"]
    stream_norms: Float[Tensor, "layer"]

    def at(self, layer: int) -> Direction:
        """The vector in the units of the stream that enters a block: for `steer` and `steering`.

        Raises: InputError: no such block.
        """
        checked_layers(self.effects.cfg, SITES["resid_pre"], [layer])
        to_the_end = self.scalars.flip(0).cumprod(0).flip(0)
        carried = torch.stack([to_the_end[unit.layer] for unit in self.heads]) / to_the_end[layer]
        vector = (carried[:, None] * self.writes).sum(0, keepdim=True)
        name = f"function vector of {len(self.heads)} heads"
        return Direction(vector, "resid_pre", (layer,), self.stream_norms[layer, None], name)

    def __repr__(self) -> str:
        names = ", ".join(f"L{unit.layer}H{unit.head}" for unit in self.heads)
        return f"FunctionVector({names}; {len(self.effects.base)} pairs)"


def function_vector(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    n_heads: int = 10,
    metric: Any = "log_prob",
    budget: int = BUDGET,
    progress: Progress = True,
) -> FunctionVector:
    """Choose the heads that carry a task, and sum their mean writes.

    A head's effect is the mean change of the metric when its z at the last position of the
    corrupted run is its mean over all clean ones: a head that only copies what its own prompt says
    brings nothing. Todd et al. measure the probability of the answer (metric "prob"), on other
    prompts than those of the mean, and choose heads by the mean over several tasks. Costs a run of
    the clean prompts, and a sweep over all heads as `activation_patching` makes it.

    It misleads where the clean prompts share more than the task, such as an answer: the mean keeps
    it. Of a single pair the mean is the pair's own z. Try the vector on prompts without examples
    (`steering`), beside `Direction.random` of it.

    Args:
        model: the model.
        pairs: clean prompts show the task by examples and end where the answer follows; corrupted
            ones do not, such as the same with its examples' answers shuffled.
        n_heads: how many heads.
        metric: as for `activation_patching`.
        budget: bytes of memory beside the model.
        progress: as for `activation_patching`.

    Raises: InputError: n_heads out of range; as `activation_patching`; a sweep that was stopped.
    """
    cfg, metric, pairs = model.cfg, as_metric(metric), as_pairs(pairs)
    if not 1 <= n_heads <= cfg.n_layers * cfg.n_heads:
        raise InputError(f"n_heads is {n_heads}, expected 1 to {cfg.n_layers * cfg.n_heads}")
    groups = pairs.on(model, metric)
    scope = Scope.of(cfg, SITES["z"], groups, "corrupted", positions=["end"])
    means = _Means(model, pairs)
    put = _TaskMeans(model, scope, means.z)
    about = {
        "method": "mean patching",
        "direction": "denoise",
        "site": "z",
        "ablation_value": "mean of the clean runs",
        "positions": "end",
        "metric": metric.name,
    }
    effects = Sweep(model, pairs, metric, scope, groups, "corrupted", put, budget).run(
        about, progress
    )
    if not effects.is_complete:
        raise InputError("the sweep over heads was stopped before its end")
    order = effects.effect.mean(0).flatten().sort(descending=True, stable=True).indices[:n_heads]
    heads = tuple(Unit("z", i // cfg.n_heads, i % cfg.n_heads, "end") for i in order.tolist())
    blocks = cast("list[Block]", list(model.blocks))
    scalars = torch.cat([widened(block.scalar.detach()).cpu() for block in blocks])
    return FunctionVector(heads, effects, means.writes(heads), scalars, means.stream_norms)


class _Means:
    """Means over the clean runs at their last position.

    Attributes:
        z: each head's, by block.
        scaled: the same of z over the scale of ln1_post, of which a head's write is a linear map.
        stream_norms: the length of the stream that enters each block.
    """

    @torch.no_grad()
    def __init__(self, model: Gemma4, pairs: Pairs):
        self.blocks, layers = cast("list[Block]", list(model.blocks)), range(model.cfg.n_layers)
        names = ("attn.hook_z", "ln1_post.hook_scale", "hook_resid_pre")
        z: list[Any] = [0.0 for _ in layers]
        scaled: list[Any] = [0.0 for _ in layers]
        norms = torch.zeros(len(layers), dtype=torch.float64)
        for group in pairs.on(model, "logit"):
            for part in group.split(AT_ONCE):
                points = [f"blocks.{layer}.{name}" for layer in layers for name in names]
                _, cache = model.run_with_cache(part.clean, points, read=-1)
                for i in layers:
                    head, scale, stream = (
                        cache[f"blocks.{i}.{name}"][:, -1].cpu().double() for name in names
                    )
                    z[i] = z[i] + head.sum(0) / len(pairs)
                    scaled[i] = scaled[i] + (head / scale[..., None]).sum(0) / len(pairs)
                    norms[i] += stream.norm(dim=-1).sum() / len(pairs)
        self.z, self.scaled, self.stream_norms = z, scaled, norms.float()

    def writes(self, heads: Sequence[Unit]) -> Float[Tensor, "head d_model"]:
        """What each of some heads adds to the stream."""
        found = []
        for unit in heads:
            block, scaled = self.blocks[unit.layer], self.scaled[unit.layer]
            out = block.attn.o_proj.weight.detach().unflatten(1, (len(scaled), -1))[:, unit.head]
            write = einsum(
                out.cpu().double(), scaled[unit.head], "d_model d_head, d_head -> d_model"
            )
            found.append(write * cast(Tensor, block.ln1_post.weight).detach().cpu())
        return torch.stack(found).float()


class _TaskMeans:
    """The cells of the sweep: one head's mean at the last position of the corrupted runs."""

    def __init__(self, model: Gemma4, scope: Scope, z: list[Float[Tensor, "head d_head"]]):
        self.model, self.scope, self.z = model, scope, z

    def names(self) -> list[str]:
        """The activations kept of the corrupted runs."""
        return entry_names(self.model.cfg, self.scope.layers)

    def cells(self, group: Group) -> tuple[Callable[[], Trunk], list[Cell]]:
        """The corrupted run, made when it is asked for, and a cell for each head."""
        places, found = group.places("end", "corrupted"), []
        for spot in self.scope.spots:
            value = self.z[spot.layer][spot.head or 0].expand(len(group), 1, -1)
            change = Change(SITES["z"].full_name(spot.layer), value, places, spot.head)
            changes = Changes((change,))
            first = int(places.min())
            found.append(Cell(spot.index, spot.layer, first, lambda rows, made=changes: made))
        return cache(lambda: Trunk(self.model, group, "corrupted", self.names())), found
