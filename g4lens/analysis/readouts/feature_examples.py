"""Where a feature is most active: the first thing to look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.analysis.logit_lens import text_of
from g4lens.analysis.readouts.activations import prompt_groups, taken
from g4lens.analysis.readouts.dictionaries import Dictionary
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    from pandas import DataFrame

CONTEXT = 6  # tokens shown on either side


@dataclass(frozen=True, eq=False, repr=False)
class FeatureExamples:
    """The rows where some features are most active, and how often each is at all.

    Attributes:
        features: which.
        values: how active, the most active first; zero where a feature has fewer examples.
        prompts, positions, tokens: where that is, and the token that stands there.
        frequency: share of all rows where the feature is active.
        texts: for each feature and example the text before the token, the token, the text behind.
    """

    features: tuple[int, ...]
    values: Float[Tensor, "feature example"]
    prompts: Int[Tensor, "feature example"]
    positions: Int[Tensor, "feature example"]
    tokens: Int[Tensor, "feature example"]
    frequency: Float[Tensor, "feature"]
    texts: tuple[tuple[tuple[str, str, str], ...], ...]

    def __repr__(self) -> str:
        lines = [
            f"feature {feature} ({share:.2%} of rows): "
            + ", ".join(
                f"{token!r} {value:.3g}"
                for (_, token, _), value in zip(texts, values.tolist(), strict=True)
                if value > 0
            )
            for feature, share, texts, values in zip(
                self.features, self.frequency.tolist(), self.texts, self.values, strict=True
            )
        ]
        return "\n".join(lines)

    def to_frame(self) -> "DataFrame":
        """A row for each feature and example, the most active first."""
        import pandas as pd

        columns = ["feature", "value", "before", "token", "behind", "prompt", "pos"]
        return pd.DataFrame(
            columns=columns,
            data=[
                {
                    "feature": feature,
                    "value": value,
                    "before": before,
                    "token": token,
                    "behind": behind,
                    "prompt": int(self.prompts[i, j]),
                    "pos": int(self.positions[i, j]),
                }
                for i, feature in enumerate(self.features)
                for j, ((before, token, behind), value) in enumerate(
                    zip(self.texts[i], self.values[i].tolist(), strict=True)
                )
                if value > 0
            ],
        )


def feature_examples(
    model: Gemma4,
    dictionary: Dictionary,
    prompts: Sequence[Any],
    features: int | Sequence[int],
    top: int = 8,
) -> FeatureExamples:
    """The positions of the prompts where features are most active.

    Costs a run of each prompt up to the block that the dictionary reads, and its encoder.

    It misleads twice. The strongest examples are the extremes: what a feature does where it is
    weakly active, which is most of the time, they do not show. And a reader finds a story for any
    eight of them; look at what an ablation changes, and at the features of an untrained model.

    Args:
        model: the model.
        dictionary: whose features.
        prompts: a list of prompts of any kind.
        features: one or several.
        top: examples of each.

    Raises: InputError, HookNameError: as `Dictionary.check`, no such feature, no example asked
        for, or no prompts.
    """
    dictionary.check(model)
    chosen = [features] if isinstance(features, int) else list(features)
    if bad := [i for i in chosen if not 0 <= i < len(dictionary)]:
        raise InputError(f"there is no feature {bad[0]}, expected 0 to {len(dictionary) - 1}")
    if top < 1:
        raise InputError(f"top is {top}, expected at least 1")
    best = [torch.zeros(len(chosen), top)] + [torch.zeros(len(chosen), top, dtype=torch.int64)] * 3
    n_rows, n_active, ids = 0, torch.zeros(len(chosen)), dict[int, list[int]]()
    own = dictionary.to("cpu")
    for group in prompt_groups(model, prompts):
        (part,) = taken(model, group, [dictionary.hook_in])
        ids |= zip(group.index, group.clean.tokens.tolist(), strict=True)
        values = own.encode(part.values)[:, chosen].T.float()
        n_rows += len(part.values)
        n_active += (values > 0).sum(1)
        where = (part.prompts, part.positions, part.tokens)
        found = [values, *(x.expand_as(values) for x in where)]
        both = [torch.cat(pair, dim=1) for pair in zip(best, found, strict=True)]
        order = both[0].topk(top).indices
        best = [x.gather(1, order) for x in both]
    values, of_prompt, positions, tokens = best
    texts = tuple(
        tuple(_around(model, ids[prompt], at) for prompt, at in zip(*row, strict=True))
        for row in zip(of_prompt.tolist(), positions.tolist(), strict=True)
    )
    return FeatureExamples(
        tuple(chosen), values, of_prompt, positions, tokens, n_active / n_rows, texts
    )


def _around(model: Gemma4, ids: list[int], at: int) -> tuple[str, str, str]:
    """The text before a token, its own, and the text behind."""
    texts = [text_of(model, id_) for id_ in ids[max(0, at - CONTEXT) : at + CONTEXT + 1]]
    middle = min(at, CONTEXT)
    return "".join(texts[:middle]), texts[middle], "".join(texts[middle + 1 :])
