"""Dictionaries of features: sparse autoencoders and transcoders, hung on a model.

    f     =  act((x - b_dec) W_enc + b_enc)          few entries are not zero
    x'    =  f W_dec + b_dec                          the reconstruction
    error =  y - x'                                   what the dictionary has no word for

A sparse autoencoder reads and writes one hook point (y = x). A transcoder reads one and writes
another, say what an MLP gets and what it gives; it does not subtract `b_dec`, and may have a linear
way past the features, `W_skip x`. The activation is relu, TopK (Gao et al. 2024, arXiv 2406.04093)
or JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.readouts.activations import width_of
from g4lens.analysis.vectors import is_at
from g4lens.errors import HookError, InputError
from g4lens.hooks import Hook, HookFn
from g4lens.model.gemma4 import Gemma4
from g4lens.state import Positions

Edit = Callable[[Tensor, Hook], Tensor | None]


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """Features of one hook point, or from one to another.

    Attributes:
        W_enc, b_enc, W_dec, b_dec: the weights; a feature is a row of `W_dec`.
        hook_in: the hook point that it reads. Heads lie side by side.
        hook_out: the one that it reconstructs; the same for a sparse autoencoder.
        k: so many features at most are active (TopK); None: no limit.
        threshold: a feature below its own is off (JumpReLU); None: zero, which is relu.
        W_skip: the linear way past the features, or None.
        centred: is `b_dec` subtracted from the input first?
    """

    W_enc: Float[Tensor, "d_in feature"]
    b_enc: Float[Tensor, "feature"]
    W_dec: Float[Tensor, "feature d_out"]
    b_dec: Float[Tensor, "d_out"]
    hook_in: str
    hook_out: str
    k: int | None = None
    threshold: Float[Tensor, "feature"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    centred: bool = True

    def __post_init__(self) -> None:
        """Refuse what contradicts itself. Raises: InputError."""
        self._check_shapes()
        if self.k is not None and (self.threshold is not None or not 1 <= self.k <= len(self)):
            raise InputError(
                f"k is {self.k}: expected 1 to {len(self)} features, and no threshold beside it"
            )
        if self.centred and self.is_transcoder:
            raise InputError(
                f"a transcoder ({self.hook_in} to {self.hook_out}) does not subtract b_dec, which "
                "belongs to its output: centred=False"
            )

    def _check_shapes(self) -> None:
        """A matrix that lies the other way round is the commonest fault of a converted file."""
        if self.W_enc.ndim != 2 or self.b_dec.ndim != 1:
            raise InputError(
                f"W_enc is {tuple(self.W_enc.shape)} and b_dec {tuple(self.b_dec.shape)}, expected "
                "[d_in, feature] and [d_out]"
            )
        (d_in, n), d_out = self.W_enc.shape, len(self.b_dec)
        expected = {
            "b_enc": (n,),
            "W_dec": (n, d_out),
            "threshold": (n,),
            "W_skip": (d_out, d_in),
            "b_dec": (d_out if self.is_transcoder else d_in,),
        }
        for name, shape in expected.items():
            x = getattr(self, name)
            if x is not None and tuple(x.shape) != shape:
                raise InputError(
                    f"{name} is {tuple(x.shape)}, expected {shape}: W_enc is [d_in, feature], here "
                    f"{tuple(self.W_enc.shape)}, and b_dec [d_out], here {tuple(self.b_dec.shape)}"
                )

    def __len__(self) -> int:
        return len(self.b_enc)

    @property
    def is_transcoder(self) -> bool:
        """Does it write another hook point than it reads?"""
        return self.hook_in != self.hook_out

    @property
    def activation(self) -> str:
        """Which features stay: "relu", "topk" or "jumprelu"."""
        if self.threshold is not None:
            return "jumprelu"
        return "relu" if self.k is None else "topk"

    def __repr__(self) -> str:
        kind = "transcoder" if self.is_transcoder else "sparse autoencoder"
        where = self.hook_in + (f" to {self.hook_out}" if self.is_transcoder else "")
        active = "" if self.k is None else f", {self.k} active at most"
        return (
            f"Dictionary({kind} of {where}: {len(self):,} features, {self.activation}{active}; "
            f"{self.W_enc.shape[0]} wide)"
        )

    def to(self, place: Any) -> "Dictionary":
        """The same on another device or in another dtype."""
        moved = {
            name: x.to(place)
            for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
            if (x := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    # ---- what it computes

    def encode(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows feature"]:
        """How active each feature is, in units of the input, in the dictionary's dtype."""
        x = x.to(self.W_enc.dtype)
        pre = (x - self.b_dec if self.centred else x) @ self.W_enc + self.b_enc
        if self.threshold is not None:
            return pre.relu() * (pre > self.threshold)
        if self.k is None:
            return pre.relu()
        top = pre.relu().topk(self.k, sorted=False)
        return torch.zeros_like(pre).scatter(-1, top.indices, top.values)

    def decode(self, features: Float[Tensor, "*rows feature"]) -> Float[Tensor, "*rows d_out"]:
        """The sum of the features' vectors and `b_dec`; the linear way past them left out."""
        return features @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """What it takes the output to be, all ways together."""
        return self._from(self.encode(x), x)

    def _from(self, features: Tensor, x: Tensor) -> Tensor:
        out = self.decode(features)
        return out if self.W_skip is None else out + x.to(out.dtype) @ self.W_skip.T

    # ---- in a model

    def check(self, model: Gemma4) -> None:
        """Does it fit this model?

        Raises:
            HookNameError: the model has no such hook point.
            InputError: a hook point is of another width, or has no row for each position.
        """
        for name, width in ((self.hook_in, len(self.W_enc)), (self.hook_out, len(self.b_dec))):
            if (found := width_of(model, name)) != width:
                raise InputError(
                    f"{name} of this model is {found} wide, the dictionary's side there {width}"
                )

    def hooks(
        self,
        model: Gemma4,
        error: bool = False,
        ablate: Sequence[int] = (),
        edit: Edit | None = None,
        positions: Positions | None = None,
    ) -> list[tuple[str, HookFn]]:
        """Hooks that put the reconstruction in place of what the model computed.

            with model.hooks(dictionary.hooks(model)):                       # as it reconstructs
            with model.hooks(dictionary.hooks(model, error=True, ablate=[7])):  # less one feature

        With the error term and no edit nothing changes, so what does change is the edit's doing.
        Without it everything downstream also lives with what the dictionary leaves out. Costs, for
        each position, as much as two matrices of `d x features`.

        Args:
            model: where they will hang.
            error: add what the reconstruction of the unedited features misses.
            ablate: features to set to zero.
            edit: `fn(features, hook) -> features | None`, on `[batch, pos, feature]`, behind
                `ablate`.
            positions: those of the prompt, counted over each prompt's own tokens; all by default.
                Generated ones always count.

        Raises:
            HookNameError, InputError: as `check`, or no such feature.
        """
        self.check(model)
        ablated = list(ablate)
        if bad := [i for i in ablated if not 0 <= i < len(self)]:
            raise InputError(f"there is no feature {bad[0]}, expected 0 to {len(self) - 1}")
        own, seen = self.to(model.device), dict[str, Tensor]()

        def read(x: Tensor, hook: Hook) -> None:
            seen["x"] = x.flatten(2)

        def write(y: Tensor, hook: Hook) -> Tensor:
            was = y.flatten(2)
            x = seen.pop("x") if own.is_transcoder else was
            if x.shape[:2] != was.shape[:2]:
                raise HookError(
                    f"{hook.name} holds {was.shape[1]} rows, {own.hook_in} held {x.shape[1]}: "
                    "read= took some away in between"
                )
            features = own.encode(x)
            changed = features.clone()
            changed[..., ablated] = 0
            if edit is not None and (returned := edit(changed, hook)) is not None:
                changed = returned
            if error:
                new = was + ((changed - features) @ own.W_dec).to(was.dtype)
            else:
                new = own._from(changed, x).to(was.dtype)
            if positions is not None and not hook.step:
                new = torch.where(is_at(hook, positions).to(was.device)[..., None], new, was)
            return new.view_as(y)

        return [*([(self.hook_in, read)] if self.is_transcoder else []), (self.hook_out, write)]
