"""The two runs that an attribution compares: one with its activations, one with gradients too."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.analysis.cells import held_by
from g4lens.analysis.groups import Group, Side
from g4lens.analysis.metrics import Metric, checked, kl
from g4lens.cache import gradients_by
from g4lens.config import TextConfig
from g4lens.errors import InputError
from g4lens.hooks import Hook, HookPoint, Hung, edited_points, hang
from g4lens.model.gemma4 import Gemma4
from g4lens.watch import CONTRIBUTIONS

Places = Int[Tensor, "pairs places"]


class Run:
    """One pass over a side of a group, with the activations that were asked for.

    Args:
        model: the model.
        group: the pairs.
        side: which of their prompts.
        metric: of its logits, times the group's weight.
        names: the activations to keep.
        read: positions whose rows behind the horizon are wanted beside those that the metric reads.
    """

    grad = False

    def __init__(
        self,
        model: Gemma4,
        group: Group,
        side: Side,
        metric: Metric,
        names: Sequence[str],
        read: Places | None = None,
    ):
        self.n = group.length(side) + group.n_forced
        self.values: dict[str, Tensor] = {}
        self.held: dict[str, Tensor] = {}
        reads = group.reads(side)
        rows = reads if read is None or not read.numel() else torch.cat([reads, read], 1)
        if edited_points():  # an edit behind the horizon may reach positions that nobody else reads
            rows = torch.arange(self.n).expand(len(group), -1)
        logits = "hook_logits" if metric.is_capped else "hook_logits_pre_cap"
        hung = self._hung(model, [*names, logits])
        with torch.set_grad_enabled(self.grad):
            with hang(hung):
                model(group.batch(side), read=rows)
            found = self.values.pop(logits)
            mine = self._index(self.held.pop(logits), reads.to(found.device))
            found = metric(rows_of(found, mine), group.targets)
            self.metric = group.weight * checked(found, metric, len(group))

    def _hung(self, model: Gemma4, names: Sequence[str]) -> list[tuple[HookPoint, Hung]]:
        return [(point, Hung(savers=[self._save])) for point in model.matching(names)]

    def _save(self, x: Tensor, hook: Hook) -> None:
        self.values[hook.name], self.held[hook.name] = x, held_by(hook)

    def index(self, name: str, places: Places) -> Places:
        """Which rows of an activation hold these positions; -1 where it does not hold one."""
        return self._index(self.held[name], places)

    def _index(self, held: Int[Tensor, "pairs row"], places: Places) -> Places:
        places = places.to(held.device)
        where = held.new_full((len(held), self.n), -1)
        rows = torch.arange(held.shape[1], device=held.device).expand_as(held)
        where.scatter_(1, held, rows)
        return where.gather(1, places.clamp(min=0)).masked_fill(places < 0, -1)

    def rows(self, name: str, places: Places) -> Float[Tensor, "pairs places ..."]:
        """An activation at these positions; where it has no such row, something of no account."""
        return rows_of(self.values[name], self.index(name, places))


class Slopes(Run):
    """The same with the metric's gradient by each activation.

    `dropped` is the block that the gradient does not flow into when it is asked for: what the block
    adds to the stream counts as constant.

    Raises: InputError: a metric that does not depend on the logits in a differentiable way.
    """

    grad = True

    def __init__(
        self,
        model: Gemma4,
        group: Group,
        side: Side,
        metric: Metric,
        names: Sequence[str],
        drops: bool = False,
    ):
        self.dropped: int | None = None
        self.drops = drops
        super().__init__(model, group, side, metric, names)
        need_gradient(self.metric, metric)

    def _hung(self, model: Gemma4, names: Sequence[str]) -> list[tuple[HookPoint, Hung]]:
        blocks = range(model.cfg.n_layers) if self.drops else ()
        writes = [f"blocks.{i}.hook_{write}" for i in blocks for write in CONTRIBUTIONS]
        stopped = [(model.hook_points[name], Hung(gradients=[self._drop])) for name in writes]
        return [
            *stopped,
            *((p, Hung(gradients=[None])) for p in model.matching(names)),
            *super()._hung(model, names),
        ]

    def _drop(self, gradient: Tensor, hook: Hook) -> Tensor | None:
        return torch.zeros_like(gradient) if hook.layer() == self.dropped else None

    def gradients(self, dropped: int | None = None, keep: bool = False) -> dict[str, Tensor]:
        """By each activation, zeros where the metric does not depend on one.

        Args:
            dropped: the block to leave out.
            keep: more will be asked for.
        """
        self.dropped = dropped
        found = gradients_by(list(self.values.values()), self.metric, keep)
        return dict(zip(self.values, found, strict=True))


def need_gradient(values: Float[Tensor, "rows"], metric: Metric) -> None:
    """Raises: InputError: a metric that is not computed from the logits by differentiable steps."""
    if torch.is_inference_mode_enabled():
        raise InputError("torch.inference_mode() is on, where nothing has a gradient: leave it")
    if not values.requires_grad:
        raise InputError(
            f"metric {metric.name} gives no gradient: it must be computed from the logits by "
            "differentiable steps"
        )


def need_slope(is_flat: bool, metric: Metric) -> None:
    """Raises: InputError: a metric that is flat wherever its gradient was taken."""
    if is_flat:
        raise InputError(
            f"metric {metric.name} gives no gradient: its slope by every logit is zero"
        )


def need_way_down(metric: Metric) -> None:
    """Raises: InputError: KL(clean || this run), of the clean run itself."""
    if metric.fn is kl.fn:
        raise InputError(
            f"metric {metric.name} gives no gradient in clean runs: it is at its least there, and "
            "its slope nothing but rounding error. Take another metric, or the other direction"
        )


def rows_of(
    x: Float[Tensor, "pairs row ..."], index: Int[Tensor, "pairs places"]
) -> Float[Tensor, "pairs places ..."]:
    """Rows of each pair; `x` itself where those are all its rows in order."""
    every = torch.arange(x.shape[1], device=index.device)
    if index.shape[1] == len(every) and bool((index == every).all()):
        return x
    return x[torch.arange(len(x), device=x.device)[:, None], index.clamp(min=0)]


def pairs_that_fit(budget: int, need: int, n: int) -> int:
    """How many pairs of `n` tokens may run at once, if one takes `need` bytes.

    Raises: InputError: not even one.
    """
    if need > budget:
        raise InputError(
            f"budget is {budget / 2**20:,.1f} MiB, but the graph of one pair of {n:,} tokens takes "
            f"{need / 2**20:,.1f} MiB"
        )
    return budget // need


def graph_bytes(cfg: TextConfig, n: int, reads: int) -> int:
    """Memory that the graph of one prompt's pass takes, in float32."""
    total = cfg.n_layers * cfg.d_ple * 6 * n + 4 * reads * cfg.d_vocab
    for layer in range(cfg.n_layers):
        rows = n if layer <= cfg.horizon else reads
        heads = cfg.n_heads * cfg.d_head(layer)
        total += rows * (26 * cfg.d_model + 6 * cfg.d_mlp_at(layer) + 10 * heads)
    return 4 * total


def rows_held(cfg: TextConfig, name: str, n: int, reads: int) -> int:
    """Positions that a run holds of an activation: behind the horizon, but for keys, those read."""
    _, _, within = name.partition("blocks.")
    is_late = bool(within) and int(within.split(".")[0]) > cfg.horizon
    return reads if is_late and not name.endswith(("rot_k", "norm_v")) else n
