"""Distributed alignment search: which directions of an activation carry a variable?

A variable need not lie along channels. DAS (Geiger et al. 2023, arXiv 2303.02536) learns an
orthonormal basis Q so that exchanging the part of an activation along it, and nothing else, between
two runs gives each the other's answer:

    Q  =  argmin  mean of  -log p(other side's answer | x + (other - x) Q^T Q)

The fewer directions suffice, the more is said. What a search finds on some pairs has to hold on
others, and it may still use a pathway that no run ever uses: see `dormant_check`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from g4lens.analysis.pairs import Pair, Pairs, as_pairs
from g4lens.analysis.sites import Unit
from g4lens.analysis.subspaces.exchange import NO_FOIL, Exchange, exchanges
from g4lens.errors import InputError
from g4lens.model.gemma4 import Gemma4

DRAWS = 8  # random subspaces to compare with


@dataclass(frozen=True, eq=False, repr=False)
class Subspace:
    """What `das` found.

    Attributes:
        basis: orthonormal rows, in float32 (float64 of a float64 model) on the CPU; goes into
            `activation_patching(subspace=...)`.
        unit: where.
        accuracy: share of held-out exchanges, both ways, after which the other side's answer has
            the largest logit.
        train_accuracy: the same of the pairs that it was learnt on.
        random_accuracy: held out, mean over random subspaces of the same rank.
        whole_accuracy: held out, with the whole activation exchanged: what a subspace can reach.
        losses: the mean loss of each epoch, in nats.
        train, held_out: the pairs.
    """

    basis: Float[Tensor, "k d"]
    unit: Unit
    accuracy: float
    train_accuracy: float
    random_accuracy: float
    whole_accuracy: float
    losses: tuple[float, ...]
    train: Pairs
    held_out: Pairs

    def __repr__(self) -> str:
        k, d = self.basis.shape
        return (
            f"Subspace({k} of {d} directions of {self.unit}: {self.accuracy:.2f} of exchanges on "
            f"{len(self.held_out)} held-out pairs give the other answer, {self.train_accuracy:.2f} "
            f"on {len(self.train)} learnt ones; random {self.random_accuracy:.2f}, whole "
            f"{self.whole_accuracy:.2f})"
        )


def das(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    unit: Unit,
    k: int = 1,
    discovery: float = 0.5,
    by: Literal["template", "pair"] = "template",
    epochs: int = 60,
    lr: float = 0.05,
    batch: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> Subspace:
    """Learn the k directions of an activation that carry what distinguishes two sides.

    Clean runs receive corrupted values and must give the foil, corrupted runs clean ones and must
    give the answer. Q stays orthonormal by torch's parametrisation; Adam minimises the cross
    entropy over the whole vocabulary.

    Costs a run of all pairs up to the block, then `epochs` forward and backward passes through the
    blocks above it; the state that enters the block is kept for every pair.

    It misleads where there is much to choose from: with k large against the number of pairs any
    activation can be made to say anything, so compare accuracy with `random_accuracy` and with
    `das` in a place that cannot know the variable; and exchanging an inactive direction that the
    outputs read along with one that varies may move answers which the model itself moves otherwise.

    Args:
        model: the model.
        pairs: each with a foil; the sides differ in the variable.
        unit: site, block, head and position: of a stream, of a head's or owner's vectors, of
            neurons.
        k: how many directions.
        discovery: the share of pairs to learn on; the others are held out.
        by: what is held out together, as for `Pairs.split`.
        epochs: how often each pair is seen.
        lr: Adam's step, falling to none.
        batch: pairs in a step.
        seed: of split, start, order and random subspaces.
        progress: show a bar.

    Raises: InputError: no such unit, or one that nothing reads; k out of range; pairs without foil,
        that cannot be compared or split.
    """
    pairs = as_pairs(pairs)
    if any(pair.foil is None for pair in pairs):
        raise InputError(NO_FOIL)
    learnt, held = pairs.split(discovery, by, seed)
    for name, value in (("k", k), ("epochs", epochs), ("batch", batch)):
        if value < 1:
            raise InputError(f"{name} is {value}, expected at least 1")
    train, test = (exchanges(model, some, unit, batch) for some in (learnt, held))
    d = train[0].own.shape[-1]
    if k > d:
        raise InputError(f"k is {k}, but {unit} has {d} channels")
    basis, losses = _learnt(train, k, epochs, lr, seed, progress)
    random = torch.Generator().manual_seed(seed)
    drawn = [random_basis(k, d, random).to(basis) for _ in range(DRAWS)]
    return Subspace(
        basis=basis.cpu(),
        unit=unit,
        accuracy=_accuracy(test, basis),
        train_accuracy=_accuracy(train, basis),
        random_accuracy=sum(_accuracy(test, one) for one in drawn) / DRAWS,
        whole_accuracy=_accuracy(test, None),
        losses=losses,
        train=learnt,
        held_out=held,
    )


def interchange_accuracy(
    model: Gemma4,
    pairs: Pairs | Pair | Sequence[Pair],
    unit: Unit,
    basis: Float[Tensor, "k d"] | None = None,
) -> float:
    """The share of exchanges along a basis after which the other side's answer is the likeliest.

    Both ways of every pair. Costs a run of either side, and one more from the unit's block on.

    Args:
        model: the model.
        pairs: each with a foil.
        unit: where.
        basis: orthonormal rows; None: exchange the whole activation.

    Raises: InputError: as `das`; a basis of another width, or one that is not orthonormal.
    """
    ready = exchanges(model, as_pairs(pairs), unit)
    if basis is not None:
        basis = checked_basis(basis, ready[0].own)
    return _accuracy(ready, basis)


def overlap(one: Float[Tensor, "k d"], other: Float[Tensor, "l d"]) -> float:
    """How much of the smaller of two subspaces lies in the larger: 1 all of it, 0 none.

    `||A B^T||^2 / min(k, l)`, the mean squared cosine of their principal angles; random subspaces
    have max(k, l) / d.

    Args:
        one: orthonormal rows.
        other: the same.

    Raises: InputError: other widths, or rows that are not orthonormal.
    """
    one = checked_basis(one, one)
    other = checked_basis(other, one)
    return float((one @ other.T).square().sum() / min(len(one), len(other)))


def checked_basis(basis: Tensor, like: Tensor) -> Float[Tensor, "k d"]:
    """A basis in the dtype and place of an activation.

    Raises: InputError: another width, or rows that are not orthonormal.
    """
    d = like.shape[-1]
    if not isinstance(basis, Tensor) or basis.ndim != 2 or basis.shape[1] != d:
        found = tuple(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
        raise InputError(f"basis is {found}, expected a tensor [k, {d}]")
    basis = basis.detach().to(like)
    off = float((basis @ basis.T - torch.eye(len(basis)).to(basis)).abs().max())
    if not off < 1e-3:
        raise InputError(f"the rows of basis are not orthonormal: off by {off:.2g}")
    return basis


def random_basis(k: int, d: int, random: torch.Generator) -> Float[Tensor, "k d"]:
    """Orthonormal rows whose span is uniformly distributed."""
    return torch.linalg.qr(torch.randn(d, k, generator=random))[0].T


def _learnt(
    train: list[Exchange], k: int, epochs: int, lr: float, seed: int, progress: bool
) -> tuple[Float[Tensor, "k d"], tuple[float, ...]]:
    """The basis after so many epochs, and the loss of each."""
    from tqdm.auto import tqdm

    random, like = torch.Generator().manual_seed(seed), train[0].own
    turn = nn.Linear(like.shape[-1], k, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        turn.weight.copy_(random_basis(k, like.shape[-1], random))
    # with a trivialisation the start would be completed by numbers of the global generator
    nn.utils.parametrizations.orthogonal(turn, "weight", "householder", use_trivialization=False)
    weights, losses = list(turn.parameters()), list[float]()
    adam = torch.optim.Adam(weights, lr)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, epochs * len(train))
    for _ in tqdm(range(epochs), unit="epoch", leave=False, delay=1.0, disable=not progress):
        total = 0.0
        for i in torch.randperm(len(train), generator=random).tolist():
            with torch.enable_grad():
                logits = train[i].logits(train[i].along(turn.weight))[:, 0]
                loss = F.cross_entropy(logits.float(), train[i].wanted)
            # by these weights alone: a model's own gradients stay as they are
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = slope
            adam.step()
            falling.step()
            total += float(loss.detach()) * len(train[i].group)
        losses.append(total / sum(len(one.group) for one in train))
    return turn.weight.detach(), tuple(losses)


@torch.no_grad()
def _accuracy(ready: list[Exchange], basis: Float[Tensor, "k d"] | None) -> float:
    right = [one.logits(one.along(basis))[:, 0].argmax(-1) == one.wanted for one in ready]
    return float(torch.cat(right).float().mean())
