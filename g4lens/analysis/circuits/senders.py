"""What every sender of the graph writes in a run, and how it reaches a port."""

from typing import Any

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.analysis.circuits.graph import Graph, PortName
from g4lens.analysis.groups import SIDES, Group, Side
from g4lens.analysis.metrics import Metric
from g4lens.analysis.pairs import as_pairs
from g4lens.analysis.patching import SIDES_OF
from g4lens.cache import ActivationCache
from g4lens.config import TextConfig
from g4lens.errors import InputError
from g4lens.hooks import edited_points
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import widened

ENTRY = ("hook_embed", "hook_ple_context", "hook_ple_token")
WRITES = ("blocks.*.attn.hook_z", "blocks.*.hook_mlp_out", "blocks.*.hook_ple_out")


def aligned_groups(model: Gemma4, pairs: Any, metric: Metric, direction: str) -> list[Group]:
    """The groups of pairs that agree position by position, to be run without anybody's hooks.

    Raises: InputError: they do not agree; no such direction; or hooks hang on the model.
    """
    if direction not in SIDES_OF:
        raise InputError(f"direction is {direction!r}, expected 'noise' or 'denoise'")
    if hung := edited_points():
        raise InputError(
            f"a hook hangs on {hung[0].name}: edges are measured on the model as it is, without "
            "hooks"
        )
    groups = as_pairs(pairs).on(model, metric)
    for group in groups:
        n, m = (group.length(side) for side in SIDES)
        if n != m:
            raise InputError(
                f"pair {group.index[0]}: the clean prompt has {n} tokens and the corrupted one "
                f"{m}: edges are compared position by position"
            )
        group.check_aligned()
    return groups


def recorded(model: Gemma4, group: Group, side: Side, *more: str) -> ActivationCache:
    """A plain pass over one side, with what its senders write, and what more is named."""
    names = [*ENTRY, *WRITES, *more]
    with torch.no_grad():
        return model.run_with_cache(group.batch(side), names, read=group.reads(side))[1]


def writes(
    model: Gemma4, cache: ActivationCache, layer: int
) -> Float[Tensor, "sender batch pos d_model"]:
    """What each sender of a block adds to the stream: its heads, its MLP, its per-layer input."""
    heads = head_writes(model.blocks[layer], cache["z", layer])
    others = (cache[name, layer][None] for name in ("mlp_out", "ple_out"))
    return torch.cat([heads, *others])


def head_writes(
    block: Any, z: Float[Tensor, "batch pos head d_head"]
) -> Float[Tensor, "head batch pos d_model"]:
    """Each head's share of `hook_attn_out`, to which they sum: ln1_post has one scale for all."""
    weight = block.attn.o_proj.weight.unflatten(1, (z.shape[2], -1))
    results = einsum(
        z, weight, "batch pos head d_head, d_model head d_head -> head batch pos d_model"
    )
    mean_square = widened(results.sum(0)).square().mean(-1, keepdim=True)
    return results * (block.ln1_post.weight / (mean_square + block.ln1_post.eps).sqrt()).to(z.dtype)


def carried(model: Gemma4, graph: Graph) -> Float[Tensor, "senders ports"]:
    """What a write is multiplied by on its way along each edge: the layer scalars between.

    Zero where there is no edge, one into "value" ports.
    """
    blocks: Any = model.blocks
    upto = [blocks[0].scalar.new_ones(len(graph.senders))]  # from each sender to each block
    for layer, block in enumerate(blocks):
        upto.append(upto[-1].clone())
        upto[-1][: graph.senders_of(layer).stop] *= block.scalar
    into = [0 if port == "value" else graph.reads_at(node, port) for node, port in graph.ports]
    factors = torch.stack([upto[layer] for layer in into], dim=1)
    return factors * graph.allowed.to(factors)


class Differences:
    """What each sender writes in one run less what it writes in another, at least in float32.

    Args:
        model: the model.
        run, other: as `recorded` gives them.
        reads: the positions that go on at the horizon.

    Attributes:
        everywhere: of the senders before the horizon, `[sender, batch, pos, d_model]`.
        here: of all senders, at the positions read.
        ple: of embed and of ple_rows, what they send to "value" ports
            `[sender, batch, pos, layer, d_ple]`.
    """

    def __init__(
        self,
        model: Gemma4,
        run: ActivationCache,
        other: ActivationCache,
        reads: Int[Tensor, "batch reads"],
    ):
        graph, cfg = Graph(model.cfg), model.cfg
        embed = widened(run["hook_embed"]) - widened(other["hook_embed"])
        ahead = graph.senders_of(cfg.horizon).start
        self.cfg: TextConfig = cfg
        self.everywhere = embed.new_zeros(ahead, *embed.shape)
        self.here = embed.new_zeros(len(graph.senders), len(embed), reads.shape[1], cfg.d_model)
        self.everywhere[0] = embed  # ple_rows, the second, writes nothing to the stream
        for layer in range(cfg.n_layers):
            held = self.everywhere if layer < cfg.horizon else self.here
            mine, theirs = (widened(writes(model, one, layer)) for one in (run, other))
            torch.sub(mine, theirs, out=held[graph.senders_of(layer)])
        pairs = torch.arange(len(embed), device=embed.device)[:, None]
        self.here[:ahead] = self.everywhere[:, pairs, reads.to(embed.device)]
        self.ple = torch.stack([widened(run[name]) - widened(other[name]) for name in ENTRY[1:]])

    def seen(self, layer: int, port: PortName) -> Float[Tensor, "sender batch pos d_model"]:
        """Of the senders that may write to a port of a block, at the positions that it reads."""
        return self.everywhere if port in ("k", "v") or layer < self.cfg.horizon else self.here
