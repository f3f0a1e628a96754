"""Tuned lens: the logit lens, with a translator for each block.

    logits  =  softcap(W_U norm(A h + b))         min over A, b of  KL(model's own || these)

A block's stream need not be written in the basis that the unembedding reads. So each block gets one
affine map, learned on prompts so that the lens comes as near to the model's final distribution as
such a map can (Belrose et al. 2023, arXiv 2303.08112).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from g4lens.analysis.logit_lens import Lens, logit_lens, unembedded
from g4lens.analysis.readouts.activations import prompt_groups, taken
from g4lens.config import TextConfig
from g4lens.errors import InputError, WeightsError, listed
from g4lens.model.gemma4 import Gemma4, Inputs
from g4lens.watch import STREAMS
from g4lens.weights import readable

FORMAT = "g4lens tuned lens 1"


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """An affine translator for each of some blocks.

    Attributes:
        weights, biases: A and b, in float32.
        layers: the blocks.
        site: the stream that they read.
        kl: how far the lens is from the model's own distribution where it was trained, in nats, the
            mean over the last tenth of the steps.
        untuned_kl: the same of the logit lens.
        geometry: the numbers of the model that it belongs to.
        origin: what that model is called.
    """

    weights: Float[Tensor, "layer d_model d_model"]
    biases: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    site: str
    kl: Float[Tensor, "layer"]
    untuned_kl: Float[Tensor, "layer"]
    geometry: dict[str, Any]
    origin: str

    def __repr__(self) -> str:
        rows = zip(self.layers, self.untuned_kl.tolist(), self.kl.tolist(), strict=True)
        gains = ", ".join(f"{layer}: {before:.2g} to {after:.2g}" for layer, before, after in rows)
        return f"TunedLens({self.site} of {self.origin}; KL in nats by block {gains})"

    def read(self, model: Gemma4, inputs: Inputs | None = None, **options: Any) -> Lens:
        """What the lens shows of a prompt: as `logit_lens` gives it, through the translators.

        Args:
            model: the model.
            inputs: one prompt.
            **options: `positions`, `tokens`, `top`, `cache`, as for `logit_lens`; `layers`
                likewise, by default those of the lens.

        Raises: InputError: another model's lens, a block it has not, or as `logit_lens`.
        """
        self.check(model)
        layers = options.pop("layers", None)
        layers = self.layers if layers is None else layers
        if lost := sorted(set(layers) - set(self.layers)):
            raise InputError(
                f"the lens has no block {lost[0]}, it has {listed(map(str, self.layers))}"
            )
        lens = logit_lens(model, inputs, self.site, layers, translate=self._translate, **options)
        return replace(lens, site=f"{self.site}, tuned")

    def _translate(self, layer: int, states: Float[Tensor, "state d_model"]) -> Tensor:
        i = self.layers.index(layer)
        A, b = self.weights[i].to(states.device), self.biases[i].to(states.device)
        return (states.float() @ A.T + b).to(states.dtype)

    def check(self, model: Gemma4) -> None:
        """Does it belong to a model of these numbers? Raises: InputError: names what differs."""
        found = geometry(model)
        if different := [
            f"{name} {self.geometry.get(name)!r}, not {value!r}"
            for name, value in found.items()
            if self.geometry.get(name) != value
        ]:
            raise InputError(
                f"this tuned lens belongs to another model ({self.origin}), with "
                f"{listed(different, 4)}"
            )

    def save(self, path: str | Path) -> None:
        """Write it to a safetensors file, which appears whole or not at all; folders are made."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "layers": list(self.layers),
            "site": self.site,
            "geometry": self.geometry,
            "origin": self.origin,
        }
        tensors = {name: getattr(self, name).cpu().clone() for name in TENSORS}
        partial = path.with_name(path.name + ".partial")
        save_file(tensors, partial, metadata={"g4lens": json.dumps(about)})
        partial.replace(path)


TENSORS = ("weights", "biases", "kl", "untuned_kl")


def load_tuned_lens(path: str | Path, model: Gemma4) -> TunedLens:
    """A lens that `TunedLens.save` wrote.

    Args:
        path: the file.
        model: the model it is for: one of the same numbers, whatever its weights.

    Raises:
        WeightsError: no such file, or no tuned lens in it.
        InputError: it belongs to a model of other numbers, which are named.
    """
    path = Path(path)
    with readable(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    try:
        about = json.loads(metadata.get("g4lens", "{}"))
        if about.pop("format") != FORMAT:
            raise ValueError("another format")
        lens = TunedLens(**tensors, **{**about, "layers": tuple(about["layers"])})
        n, d = len(lens.layers), int(lens.geometry["d_model"])
        shapes = {"weights": (n, d, d), "biases": (n, d), "kl": (n,), "untuned_kl": (n,)}
        if {name: tuple(x.shape) for name, x in tensors.items()} != shapes:
            raise ValueError("tensors of other shapes")
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path}: holds no tuned lens, expected what TunedLens.save writes ({error!r})"
        ) from None
    lens.check(model)
    return lens


def geometry(model: Gemma4) -> dict[str, Any]:
    """The numbers that define a decoder, as JSON has them."""
    numbers = {field.name: getattr(model.cfg, field.name) for field in fields(TextConfig)}
    return json.loads(json.dumps(numbers))


def train_tuned_lens(
    model: Gemma4,
    prompts: Sequence[Any],
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    positions: Any = None,
    steps: int = 250,
    rows: int = 256,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = True,
) -> TunedLens:
    """Learn a translator for each block on some prompts.

    They start as the identity, so step 0 is the logit lens. A step costs a run of a batch and, for
    each block and row, three unembeddings and four products with A.

    It misleads where the translator is clever itself: on narrow prompts an affine map can learn the
    answers, so read prompts it was not trained on, and compare a lens of `g4lens.untrained(model)`.
    Behind the horizon a state that only its own position reads (`Lens.own_only`) is translated like
    any other, and still tells no one.

    Args:
        model: the model; its weights stay.
        prompts: a list of prompts of any kind.
        layers: the blocks; all by default.
        site: "resid_pre", "resid_mid", "resid_pre_ple" or "resid_post".
        positions: where in each prompt, as `Pairs` name places; everywhere by default.
        steps: batches to learn from.
        rows: positions of a batch, drawn from prompts of one length.
        learning_rate: Adam's, which falls to zero.
        seed: of the order.
        progress: show a bar.

    Raises: InputError: no prompts, no such block, site or position, or no step.
    """
    from tqdm import trange

    chosen = _checked(model, layers, site)
    if steps < 1 or rows < 1:
        raise InputError(f"steps is {steps} and rows {rows}, expected at least 1")
    random = torch.Generator().manual_seed(seed)
    groups = list(prompt_groups(model, prompts, rows))
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    names = [f"blocks.{layer}.hook_{site}" for layer in chosen]
    translators = [Translator(model) for _ in chosen]
    weights = [p for translator in translators for p in translator.parameters()]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    history = []
    rounds = range(-(-steps // len(groups)))
    order = [i for _ in rounds for i in torch.randperm(len(groups), generator=random).tolist()]
    bar = trange(steps, disable=not progress, desc="tuned lens", leave=False)
    for step in bar:
        found = taken(model, groups[order[step]], [*names, last], positions)
        some = torch.randperm(len(found[0].values), generator=random)[:rows]
        *states, final = (part.values[some].to(model.device) for part in found)
        own = unembedded(model, final).log_softmax(-1)
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        optimizer.zero_grad()
        history.append([t.learn(model, h, own) for t, h in zip(translators, states, strict=True)])
        optimizer.step()
        bar.set_postfix(KL=f"{sum(kl for _, kl in history[-1]) / len(chosen):.3f}")
    untuned, kl = torch.tensor(history[-max(1, steps // 10) :]).mean(0).T.contiguous().unbind()
    origin = "a model made in memory" if model.origin is None else str(model.origin.name)
    return TunedLens(
        weights=torch.stack([t.weight() for t in translators]),
        biases=torch.stack([t.bias() for t in translators]),
        layers=tuple(chosen),
        site=site,
        kl=kl,
        untuned_kl=untuned,
        geometry=geometry(model),
        origin=origin,
    )


def _checked(model: Gemma4, layers: Sequence[int] | None, site: str) -> list[int]:
    """Those blocks. Raises: InputError: no such block or stream."""
    chosen = list(range(model.cfg.n_layers)) if layers is None else list(layers)
    if site not in STREAMS or not chosen or not set(chosen) <= set(range(model.cfg.n_layers)):
        raise InputError(
            f"site is {site!r} and layers {chosen}: expected one of {', '.join(STREAMS)}, and "
            f"blocks of 0 to {model.cfg.n_layers - 1}"
        )
    return chosen


class Translator(nn.Module):
    """h + W h + size c, with `size` the stream's own: then one learning rate suits every block."""

    def __init__(self, model: Gemma4):
        super().__init__()
        d = model.cfg.d_model
        self.W = nn.Parameter(torch.zeros(d, d, device=model.device))
        self.c = nn.Parameter(torch.zeros(d, device=model.device))
        self.size = 0.0

    def learn(
        self, model: Gemma4, states: Float[Tensor, "row d_model"], own: Float[Tensor, "row d_vocab"]
    ) -> tuple[float, float]:
        """Add this batch's gradient. Returns the divergence without and with the translator."""
        h = states.float()
        self.size = self.size or float(h.square().mean().sqrt())
        with torch.enable_grad():
            kl = _divergence(model, own, h + h @ self.W.T + self.size * self.c)
            kl.backward()
        with torch.no_grad():
            return float(_divergence(model, own, h)), float(kl)

    def weight(self) -> Float[Tensor, "d_model d_model"]:
        """A, on the CPU."""
        return (self.W.detach() + torch.eye(len(self.W), device=self.W.device)).cpu()

    def bias(self) -> Float[Tensor, "d_model"]:
        """b, on the CPU."""
        return (self.size * self.c.detach()).cpu()


def _divergence(
    model: Gemma4, own: Float[Tensor, "row d_vocab"], states: Float[Tensor, "row d_model"]
) -> Float[Tensor, ""]:
    """KL(own || lens), summed over the vocabulary, mean over rows."""
    lens = unembedded(model, states).log_softmax(-1)
    return (own.exp() * (own - lens)).sum(-1).mean()
