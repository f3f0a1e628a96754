"""Train a small TopK sparse autoencoder from rows of activations.

    f    = TopK((x - b_dec) W_enc + b_enc)
    loss = |x - x'|^2 / |x - mean|^2  +  1/32 |e - e'|^2 / |x - mean|^2

e = x - x' is what the reconstruction misses, e' what the features that have long been silent make
of it: so dead features are pulled towards what is still unexplained (Gao et al. 2024, arXiv
2406.04093, whose recipe this is).
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g4lens.analysis.readouts.dictionaries import Dictionary
from g4lens.errors import InputError

AUX_WEIGHT = 1 / 32
POOL = 32  # batches that are shuffled together: rows of one prompt are much alike
DECAY = 0.2  # share of the steps over which the learning rate falls to nothing


def train_dictionary(
    activations: Iterable[Float[Tensor, "_ d"]],
    width: int,
    k: int,
    hook_point: str,
    steps: int,
    batch: int = 512,
    learning_rate: float = 2e-3,
    dead_after: int = 20_000,
    seed: int = 0,
    progress: bool = True,
) -> Dictionary:
    """A TopK sparse autoencoder of what an iterator gives.

        rows = (part.values for _ in range(20) for part in g4lens.activations(model, texts, point))
        dictionary = g4lens.train_dictionary(rows, width=512, k=8, hook_point=point, steps=2000)

    Rows are shuffled among some tens of thousands and scaled by one number, so that the variance of
    a channel is one on the mean; the number is folded into the result, whose features are in units
    of the activations. The rows of `W_dec` keep length one. A step costs about as much as `6 *
    batch * d * width` products for the encoder alone.

    It misleads where the rows are few or alike: features then name single prompts. A dictionary of
    `g4lens.untrained(model)` shows what the method finds in any stream.

    Args:
        activations: rows of one width, of any number at a time.
        width: how many features.
        k: how many of them are active at most.
        hook_point: where the rows are from.
        steps: batches to learn from.
        batch: rows of one.
        learning_rate: Adam's, which falls to zero over the last fifth of the steps.
        dead_after: a feature that was silent over so many rows counts as dead.
        seed: of the start and the order.
        progress: show a bar.

    Raises: InputError: no such width or k, rows of another shape, or an iterator that ends early.
    """
    from tqdm import trange

    if not 1 <= k <= width or steps < 1 or batch < 2:
        raise InputError(
            f"k is {k}, width {width}, steps {steps}, batch {batch}: expected 1 <= k <= width, at "
            "least one step, and two rows at a time"
        )
    random = torch.Generator().manual_seed(seed)
    batches = shuffled(activations, batch, random)
    first = next(batches, None)
    if first is None:
        raise InputError(f"the activations ended before there was a batch of {batch} rows")
    learner = Learner(first, width, k, learning_rate, random)
    bar = trange(steps, disable=not progress, desc="dictionary", leave=False)
    for step in bar:
        x = first if step == 0 else next(batches, None)
        if x is None:
            raise InputError(
                f"the activations ended after {step} of {steps} batches of {batch} rows: give an "
                "iterator that goes over them again"
            )
        rate = min(1.0, (steps - step) / max(1.0, DECAY * steps))
        loss = learner.learn(x, rate * learning_rate, dead_after)
        if step % 50 == 0:
            bar.set_postfix(unexplained=f"{loss:.3f}")
    return learner.dictionary(hook_point)


def shuffled(
    activations: Iterable[Float[Tensor, "_ d"]], batch: int, random: torch.Generator
) -> Iterator[Float[Tensor, "batch d"]]:
    """Batches of rows drawn from a pool that is filled up again when it is half empty."""
    pool = torch.empty(0, 0)
    for rows in activations:
        if rows.ndim != 2 or (len(pool) and rows.shape[1] != pool.shape[1]):
            width = pool.shape[1] if len(pool) else "d"
            raise InputError(f"activations of shape {tuple(rows.shape)}, expected [rows, {width}]")
        rows = rows.detach().float().cpu()
        pool = torch.cat([pool, rows]) if len(pool) else rows
        if len(pool) >= POOL * batch:
            pool = pool[torch.randperm(len(pool), generator=random)]
            while len(pool) >= POOL * batch // 2:
                yield pool[:batch]
                pool = pool[batch:]
    pool = pool[torch.randperm(len(pool), generator=random)]
    yield from (rows for rows in pool.split(batch) if len(rows) == batch)


class Learner:
    """Weights in the making, in units in which a channel's variance is one on the mean."""

    def __init__(
        self,
        rows: Float[Tensor, "rows d"],
        width: int,
        k: int,
        learning_rate: float,
        random: torch.Generator,
    ):
        d = rows.shape[1]
        self.k, self.scale = k, float((rows - rows.mean(0)).square().mean().sqrt()) or 1.0
        W_dec = torch.randn(width, d, generator=random)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.W_dec = nn.Parameter(W_dec)
        self.W_enc = nn.Parameter(W_dec.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(width))
        self.b_dec = nn.Parameter(rows.mean(0) / self.scale)
        weights = [self.W_dec, self.W_enc, self.b_enc, self.b_dec]
        self.optimizer = torch.optim.Adam(weights, lr=learning_rate, eps=1e-7)
        self.silent = torch.zeros(width, dtype=torch.int64)  # rows since each was last active

    def learn(self, rows: Float[Tensor, "rows d"], rate: float, dead_after: int) -> float:
        """One step. Returns the share of the variance that was left unexplained."""
        with torch.enable_grad():
            x = rows / self.scale
            pre = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
            features = _top(pre, self.k)
            error = x - (features @ self.W_dec + self.b_dec)
            variance = (x - x.mean(0)).square().sum()
            unexplained = error.square().sum() / variance
            loss = unexplained
            dead = self.silent >= dead_after
            if n_dead := int(dead.sum()):
                most = min(n_dead, x.shape[1] // 2)
                revived = _top(torch.where(dead, pre, 0.0), most) @ self.W_dec
                missed = (error.detach() - revived).square().sum() / variance
                loss = loss + AUX_WEIGHT * missed
            self.optimizer.zero_grad()
            loss.backward()
        self.silent = torch.where((features > 0).any(0), 0, self.silent + len(rows))
        self._step(rate)
        return float(unexplained.detach())

    @torch.no_grad()
    def _step(self, rate: float) -> None:
        """Move, and keep the features' vectors at length one: no gradient along them."""
        gradient = self.W_dec.grad
        if gradient is not None:
            gradient -= (gradient * self.W_dec).sum(1, keepdim=True) * self.W_dec
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    def dictionary(self, hook_point: str) -> Dictionary:
        """What was learned, in the units of the activations."""
        return Dictionary(
            W_enc=self.W_enc.detach().clone(),
            b_enc=self.b_enc.detach() * self.scale,
            W_dec=self.W_dec.detach().clone(),
            b_dec=self.b_dec.detach() * self.scale,
            hook_in=hook_point,
            hook_out=hook_point,
            k=self.k,
        )


def _top(pre: Float[Tensor, "rows feature"], k: int) -> Float[Tensor, "rows feature"]:
    """The k largest of each row, the rest zero."""
    top = pre.topk(k, sorted=False)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)
