"""Run a model once and keep its activations, or a scalar's gradients by them."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from g4lens.cache import ActivationCache, Decoder
from g4lens.config import Gemma4Config
from g4lens.errors import InputError
from g4lens.hooks import HookedModule, HookPoint, Hung, NamesFilter, asked_for, edited_points, hang
from g4lens.inputs.batch import prepare
from g4lens.inputs.processor import Processor
from g4lens.state import State

STREAMS = ("resid_pre", "resid_mid", "resid_pre_ple", "resid_post")
CONTRIBUTIONS = ("attn_out", "mlp_out", "ple_out")
CACHED_BY_DEFAULT = (
    "hook_embed",
    "hook_ple*",
    *(f"blocks.*.hook_{name}" for name in (*STREAMS, *CONTRIBUTIONS)),
    *(f"blocks.*.attn.hook_{name}" for name in ("rot_q", "rot_k", "norm_v", "z")),
)


class WithGrads(NamedTuple):
    """What `run_with_grads` returns.

    Attributes:
        value: the objective, detached.
        cache: the activations that went on.
        grads: the gradient of the objective by each of them, under the same names, as backward
            hooks leave it.
    """

    value: Tensor
    cache: ActivationCache
    grads: ActivationCache


class Watched(HookedModule):
    """A model whose runs can be watched."""

    cfg: Gemma4Config
    processor: Processor | None

    def run_with_cache(
        self,
        inputs: Any = None,
        names_filter: NamesFilter | None = None,
        *,
        device: torch.device | str | None = None,
        spill: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """Run once and keep activations.

        Args:
            inputs: as for a plain call.
            names_filter: a name, a glob (`*` also matches dots), a list of them or a predicate. By
                default the decoder's residual streams, contributions, rot_q, rot_k, norm_v, z and
                per-layer embeddings: from these every pattern and decomposition follows.
            device: where to move each activation as it is made; by default it stays.
            spill: what to hold in the place of each activation as it is made, such as a copy on
                disk: `experiment.scratch.Scratch(folder)`. With `chunk`, memory then holds those
                of one chunk.
            **kwargs: `read`, `stop`, `state`, `past`, `chunk`, as for a plain call.

        Returns:
            What the plain call returns, and the cache.

        Raises:
            HookNameError: a filter matches nothing, or nothing that this run computes.
            InputError: as the plain call.
        """
        inputs, cache, points, asked = self._watch(inputs, names_filter, kwargs.get("state"))
        save = cache.saver(device, keep_graph=False, spill=spill)
        with hang([(point, Hung(savers=[save])) for point in points], asked):
            return self(inputs, **kwargs), cache

    def run_with_grads(
        self,
        inputs: Any,
        objective: Callable[[Tensor], Tensor],
        names_filter: NamesFilter | None = None,
        **kwargs: Any,
    ) -> WithGrads:
        """Run once and differentiate a scalar of the logits by the activations.

        Args:
            inputs: as for a plain call.
            objective: logits to a scalar.
            names_filter: as for `run_with_cache`.
            **kwargs: as for a plain call, without `stop`.

        Returns:
            The value, the activations, and its gradient by each: zeros where it does not depend on
                one.

        Raises:
            InputError: the objective is no scalar, or gives no gradient. HookNameError: as
                `run_with_cache`.
        """
        inputs, cache, points, asked = self._watch(inputs, names_filter, kwargs.get("state"))
        save = cache.saver(None, keep_graph=True)
        hung = [(point, Hung(gradients=[None], savers=[save])) for point in points]
        with torch.enable_grad():
            with hang(hung, asked):
                out = self(inputs, **kwargs)
            value = objective(out)  # which may run the model: what is watched is this run alone
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"the objective returned {found}, expected a tensor of one element")
        if not value.requires_grad:
            raise InputError(
                "the objective gives no gradient: it must be computed from the logits by "
                "differentiable steps"
            )
        return WithGrads(value.detach(), *cache.differentiated(value))

    def _watch(
        self, inputs: Any, names_filter: NamesFilter | None, state: State | None
    ) -> tuple[Any, ActivationCache, list[HookPoint], list[tuple[str, set[HookPoint]]]]:
        """Prepared inputs, an empty cache for them, the points to watch, what was asked for."""
        if state is None:
            inputs = prepare(inputs, self.processor, self.cfg)
        lengths = inputs.lengths if state is None else state.lengths
        edited = {point.name for point in edited_points()}
        if names_filter is None:
            points, asked = self.matching(CACHED_BY_DEFAULT), []
            kept = (name for name in self.hook_points if self._edits_pattern(name, edited))
            points += [self.hook_points[name] for name in kept]
        else:
            points, asked = self.matching(names_filter), asked_for(self, names_filter)
        cache = ActivationCache(cast("Decoder", self), lengths, frozenset(edited))
        return inputs, cache, points, asked

    def _edits_pattern(self, name: str, edited: set[str]) -> bool:
        """Is this a decoder pattern that a hook has a hand in, so that it cannot be rebuilt?"""
        attn, _, point = name.rpartition(".")
        at_work = {f"{attn}.hook_attn_scores", f"{attn}.hook_pattern"} & edited
        return point == "hook_pattern" and name.startswith("blocks.") and bool(at_work)
