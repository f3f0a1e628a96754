"""What a dictionary costs the model that has to live with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.analysis.groups import Group
from g4lens.analysis.readouts.activations import prompt_groups
from g4lens.analysis.readouts.dictionaries import Dictionary
from g4lens.errors import InputError
from g4lens.hooks import Hook, HookFn
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import widened

BUDGET = 2**28  # bytes of the logits of a batch that holds more than one prompt


@dataclass(frozen=True)
class LossRecovered:
    """How well a dictionary stands in for what it reconstructs. Losses are nats a token.

    Attributes:
        loss: of the model as it is.
        with_dictionary: with the reconstruction in place, without the error term.
        with_zero: with zeros in place.
        explained: share of the variance over rows that the reconstruction explains; NaN where all
            rows are the same.
        active: features that are active in a row, on average (L0).
        alive: share of the features that were active at all.
        n_tokens: predicted tokens that the losses are means over.
    """

    loss: float
    with_dictionary: float
    with_zero: float
    explained: float
    active: float
    alive: float
    n_tokens: int

    @property
    def recovered(self) -> float:
        """(with_zero - with_dictionary) / (with_zero - loss): 1 is as good as the model.

        NaN where zeros cost nothing, so that there is nothing to recover.
        """
        return _share(self.with_zero - self.with_dictionary, self.with_zero - self.loss)

    def __repr__(self) -> str:
        return (
            f"LossRecovered({self.recovered:.1%}: loss {self.loss:.3f}, with the dictionary "
            f"{self.with_dictionary:.3f}, with zeros {self.with_zero:.3f}, over {self.n_tokens:,} "
            f"tokens; {self.explained:.1%} of the variance, {self.active:.1f} active, "
            f"{self.alive:.0%} alive)"
        )


@torch.no_grad()
def loss_recovered(
    model: Gemma4, dictionary: Dictionary, prompts: Sequence[Any], read: Any = None
) -> LossRecovered:
    """The share of the loss between zeros and the model that a reconstruction gets back.

    The loss is the cross-entropy of the next token, soft tokens of pictures and sounds left out.
    Costs three runs of each prompt.

    It misleads as a percentage: zeros are so bad in a residual stream that a poor dictionary gets
    99 % back, so look at `with_dictionary - loss` too. And where the model itself knows nothing, as
    the bundled one before an answer begins, there is no loss to recover: name the places it knows
    in `read`.

    Args:
        model: the model.
        dictionary: what is put in place, at every position.
        prompts: a list of prompts of any kind, best such as it was not trained on.
        read: the positions whose next token is predicted, as `Pairs` name places: -2 is the last
            token of the prompt; by default all that have a next one.

    Raises:
        InputError, HookNameError: as `Dictionary.hooks`, or a position without a next token.
    """
    tally, kept = _Tally(len(dictionary)), list[Tensor]()

    def count(features: Tensor, hook: Hook) -> None:
        tally.features(features.flatten(0, 1))

    def keep(x: Tensor, hook: Hook) -> None:
        kept.append(widened(x.flatten(2).flatten(0, 1)))

    def zero(x: Tensor, hook: Hook) -> Tensor:
        return torch.zeros_like(x)

    point = dictionary.hook_out
    replaced = [*dictionary.hooks(model, edit=count), (point, keep)]
    runs: tuple[list[tuple[str, HookFn]], ...] = ([(point, keep)], replaced, [(point, zero)])
    for group in prompt_groups(model, prompts, max(1, BUDGET // (4 * model.cfg.d_vocab))):
        index, targets = _targets(model, group, slice(0, -1) if read is None else read)
        for i, hooks in enumerate(runs):
            logits = widened(model.run_with_hooks(group.clean, fwd_hooks=hooks, read=index))
            losses = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum")
            tally.losses[i] += float(losses)
        tally.n_tokens += int((targets >= 0).sum())
        tally.rows(*kept)
        kept.clear()
    if not tally.n_tokens:
        raise InputError("the prompts have no next token to predict, but for soft tokens")
    return tally.result()


def _targets(
    model: Gemma4, group: Group, read: Any
) -> tuple[Int[Tensor, "batch read"], Int[Tensor, "targets"]]:
    """The positions to read, and the token behind each, -100 where none counts."""
    cfg, tokens = model.cfg, group.clean.tokens
    places = group.places(read, "clean")
    if bool((places >= tokens.shape[1] - 1).any()):
        raise InputError(
            f"read is {read!r}: the last of {tokens.shape[1]} positions has no next token"
        )
    targets = tokens.gather(1, places.clamp(min=0) + 1)
    is_left_out = places < 0
    for placeholder in (cfg.image_id, cfg.audio_id, cfg.video_id):
        if placeholder is not None:
            is_left_out |= targets == placeholder
    targets = targets.masked_fill(is_left_out, -100)  # what cross_entropy leaves out
    return places.clamp(min=0), targets.flatten().to(model.device)


class _Tally:
    """Sums over rows and tokens."""

    def __init__(self, n_features: int):
        self.losses, self.n_tokens, self.n_rows = [0.0, 0.0, 0.0], 0, 0
        self.n_active, self.is_alive = 0, torch.zeros(n_features, dtype=torch.bool)
        self.missed = 0.0
        self.total: Tensor | float = 0.0
        self.squares = 0.0

    def features(self, features: Float[Tensor, "row feature"]) -> None:
        """Count which features are active."""
        is_active = features > 0
        self.n_active += int(is_active.sum())
        self.is_alive |= is_active.any(0).cpu()

    def rows(self, was: Float[Tensor, "row d"], now: Float[Tensor, "row d"]) -> None:
        """Add what was there and what was put there."""
        self.n_rows += len(was)
        self.missed += float((was - now).double().square().sum())
        self.squares += float(was.double().square().sum())
        self.total = self.total + was.double().sum(0)

    def result(self) -> LossRecovered:
        """The means."""
        mean = torch.as_tensor(self.total) / self.n_rows
        variance = self.squares - self.n_rows * float(mean.square().sum())
        loss, with_dictionary, with_zero = (total / self.n_tokens for total in self.losses)
        return LossRecovered(
            loss,
            with_dictionary,
            with_zero,
            explained=1 - _share(self.missed, variance),
            active=self.n_active / self.n_rows,
            alive=float(self.is_alive.float().mean()),
            n_tokens=self.n_tokens,
        )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
