"""What 8 or 4 bits make of a model's predictions, on prompts of one's own.

One model is loaded after the other, so that both never stand in memory; what the first predicted
waits on disk. `g4lens verify-quant` is the same from the command line.
"""

import gc
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from g4lens.errors import G4LensError, InputError
from g4lens.inputs.prompt import Prompt
from g4lens.load import load
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import widened
from g4lens.quantize import KINDS, Kind, check_kind

if TYPE_CHECKING:
    import pandas as pd

ROWS = 32  # positions compared at a time: 32 MiB of E2B's logits in float32


@dataclass(frozen=True)
class QuantisationError:
    """How far predictions in fewer bits are from those in full, for each prompt.

    Attributes:
        kl: mean over the prompt's positions of `sum_v p(v) (log p(v) - log q(v))`, in nats; p is
            the full model's distribution of the next token, q the quantised one's.
        agreement: the share of the positions at which both have the same likeliest token.
        n_positions: over how many positions of the prompt.
    """

    kl: tuple[float, ...]
    agreement: tuple[float, ...]
    n_positions: tuple[int, ...]

    @property
    def total_kl(self) -> float:
        """`kl` over the positions of all prompts."""
        return self._mean(self.kl)

    @property
    def total_agreement(self) -> float:
        """`agreement` over the positions of all prompts."""
        return self._mean(self.agreement)

    def to_frame(self) -> "pd.DataFrame":
        """A row for each prompt: kl, agreement, positions."""
        import pandas as pd

        return pd.DataFrame(
            {"kl": self.kl, "agreement": self.agreement, "positions": self.n_positions}
        )

    def _mean(self, x: Sequence[float]) -> float:
        weighted = sum(a * n for a, n in zip(x, self.n_positions, strict=True))
        return weighted / sum(self.n_positions)


def quantisation_error(
    name: str | Path,
    prompts: Sequence[Any],
    quantize: Kind,
    progress: bool = True,
    **options: Any,
) -> QuantisationError:
    """Compare a model in fewer bits with the same model in bfloat16, prompt by prompt.

    Costs two loads, a pass of each over every prompt, and disk for the logits of all positions: in
    E2B half a megabyte a token, in a temporary folder.

    A small divergence on easy text says little about other text: measure on prompts like those
    that the model is to be studied on. And equal predictions do not make equal activations: check
    a finding itself at both precisions.

    Args:
        name: as `load` takes it.
        prompts: texts, tuples of parts for `model.prompt`, lists of messages for `model.chat`,
            Prompts, or ids; as `read_prompts` gives them.
        quantize: "int8" or "int4".
        progress: show a bar.
        options: of `load` for both models; `dtype` is "bfloat16" unless given.

    Raises:
        InputError: no prompts, one that the model cannot take, an unknown quantisation, or what
            `load` refuses.
    """
    if quantize is None:
        raise InputError(f"quantize is None, expected one of {', '.join(KINDS)}")
    check_kind(quantize)
    if not prompts:
        raise InputError("no prompts, expected at least one")
    options = {"dtype": "bfloat16", **options}
    from tqdm.auto import tqdm

    found: list[tuple[float, float, int]] = []
    with (
        tempfile.TemporaryDirectory(prefix="g4lens-") as folder,
        torch.no_grad(),
        tqdm(
            total=2 * len(prompts), unit="pass", leave=False, delay=1.0, disable=not progress
        ) as bar,
    ):
        kept = [Path(folder) / f"{i}.safetensors" for i in range(len(prompts))]
        model = load(name, **options)
        for i, path in enumerate(kept):
            save_file({"logits": _logits(model, prompts[i], i)}, path)
            bar.update()
        del model
        gc.collect()
        model = load(name, quantize=quantize, **options)
        for i, path in enumerate(kept):
            found.append(_compared(load_file(path)["logits"], _logits(model, prompts[i], i)))
            path.unlink()
            bar.update()
    kl, agreement, n = zip(*found, strict=True)
    return QuantisationError(kl, agreement, n)


def _logits(model: Gemma4, prompt: Any, i: int) -> Float[Tensor, "pos d_vocab"]:
    try:
        return model(_made(model, prompt))[0].cpu().contiguous()
    except G4LensError as error:
        raise InputError(f"prompt {i}: {error}") from None


def _made(model: Gemma4, prompt: Any) -> Prompt | Tensor:
    """The inputs of one prompt, from any of the forms that `read_prompts` gives."""
    if isinstance(prompt, Prompt):
        return prompt
    if isinstance(prompt, str):
        return model.prompt(prompt)
    if isinstance(prompt, Tensor):
        return prompt.view(1, -1)
    if all(isinstance(part, Mapping) for part in prompt):
        return model.chat(list(prompt))
    return model.prompt(*prompt)


def _compared(
    full: Float[Tensor, "pos d_vocab"], quantised: Float[Tensor, "pos d_vocab"]
) -> tuple[float, float, int]:
    """Divergence, agreement and number of positions."""
    kl = same = 0.0
    for a, b in zip(full.split(ROWS), quantised.split(ROWS), strict=True):
        log_p, log_q = (widened(x).log_softmax(-1) for x in (a, b))
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
    return kl / len(full), same / len(full), len(full)
