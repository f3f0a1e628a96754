"""Take a direction out of the stream, while the model runs or in its weights.

    activations    w  <-  w - R^T R w            every write w: embedding, attention, MLP, per-layer
    weights        W  <-  W - U U^T W            every matrix W that writes; U spans the rows of
                                                 g * R, with g the gain of the norm behind W

(Arditi et al. 2024, arXiv 2406.11717.) Behind each matrix stands a norm, so taking R itself out of
W would leave some of it in the write `g * (W x) / rms(W x)`. And the two are not the same run: in
the weights the norm sees a shorter vector and makes what is left of it longer. `direction_effect`
shows how far they part.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from g4lens.analysis.groups import Group, Side
from g4lens.analysis.metrics import logit_diff
from g4lens.analysis.plain import Loop
from g4lens.analysis.result import Axis, Result
from g4lens.analysis.subspaces.das import random_basis
from g4lens.analysis.vectors import Direction
from g4lens.errors import InputError
from g4lens.hooks import Hook, HookFn
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import widened
from g4lens.model.text import Block

EMBEDDING = "blocks.0.hook_resid_pre"  # behind the per-layer embeddings, which stay as they are
CONTRIBUTIONS = ("attn_out", "mlp_out", "ple_out")
EDITS = ("activations", "weights", "random")
Directions = Direction | Float[Tensor, "*directions d_model"]


@contextmanager
def directional_ablation(model: Gemma4, direction: Directions) -> Iterator[None]:
    """No run inside the `with` block writes anything along a direction.

        with directional_ablation(model, difference_of_means(model, polite, rude, 14)):
            model.generate(prompt)

    Every write loses its part along it, at all positions, generated ones too: the embedding as it
    enters block 0, and what attention, MLP and per-layer embedding add in each block. The stream
    then holds none of it anywhere. Per-layer embeddings are made before that, and stay.

    It misleads as any ablation to zero does: if the direction's mean is not zero, the stream is
    moved to where it has never been. A random direction is the control (`direction_effect`).

    Args:
        model: the model.
        direction: a `Direction` of one block, a vector, or several: then their span.

    Raises: InputError: another width than the stream's, or vectors that are zero or dependent.
    """
    ablate = _ablating(_basis(model, direction))
    writes = [
        f"blocks.{i}.hook_{name}" for i in range(model.cfg.n_layers) for name in CONTRIBUTIONS
    ]
    with model.hooks([([EMBEDDING, *writes], ablate)]):
        yield


@contextmanager
def orthogonalised(model: Gemma4, direction: Directions) -> Iterator[None]:
    """The same in the weights: inside the `with` block no matrix can write along a direction.

    Replaces the output matrices of attention, MLP and per-layer embedding of every block, each
    made orthogonal to `g * R` in at least float32 and rounded to its own dtype. The embedding is
    tied to the unembedding, so that its part is taken out by a hook. When the block ends, by an
    error too, the matrices are the very tensors they were.

    Costs the memory of those matrices once more, and no pass. Weights belong to all threads: runs
    in another one see the edit.

    Args:
        model: the model.
        direction: as for `directional_ablation`.

    Raises: InputError: as `directional_ablation`; weights in 8 or 4 bits.
    """
    basis = _basis(model, direction)
    kept: list[tuple[nn.Linear, Tensor]] = []
    try:
        for block in cast("list[Block]", list(model.blocks)):
            for linear, norm in (
                (block.attn.o_proj, block.ln1_post),
                (block.mlp.down_proj, block.ln2_post),
                (block.ple.project, block.ln_ple_post),
            ):
                weight, gain = linear.weight, cast(Tensor, norm.weight)
                edited = _orthogonal(weight, gain, basis)
                linear.weight = nn.Parameter(edited, weight.requires_grad)
                kept.append((linear, weight))
        with model.hooks([(EMBEDDING, _ablating(basis))]):
            yield
    finally:
        for linear, weight in reversed(kept):
            linear.weight = weight


def direction_effect(
    model: Gemma4,
    pairs: Any,
    direction: Directions,
    metric: Any = logit_diff,
    side: Side = "clean",
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """The metric without a direction: taken out of activations, of weights, and a random one.

    `values` along the axis "edit": "activations" (`directional_ablation`), "weights"
    (`orthogonalised`), and "random", as many random directions ablated in activations. The gap
    between the first two, `per_pair[:, 1] - per_pair[:, 0]`, is what norms make of the edit.
    `recovered` is the share of the way to the other side's metric. Costs three passes a pair, and
    two without edits.

    Args:
        model: the model.
        pairs: what to measure on; not what the direction was made from (`Pairs.split`).
        metric: as `activation_patching` takes it.
        direction: as for `directional_ablation`.
        side: whose runs are edited.
        seed: of the random directions.
        progress: show a bar.

    Raises: InputError: no such side; as `directional_ablation` and `activation_patching`.
    """
    if side not in ("clean", "corrupted"):
        raise InputError(f"side is {side!r}, expected 'clean' or 'corrupted'")
    basis = _basis(model, direction)
    random = random_basis(len(basis), basis.shape[1], torch.Generator().manual_seed(seed))
    loop = Loop(model, pairs, metric, "noise" if side == "clean" else "denoise")

    def cells(group: Group) -> Float[Tensor, "pairs edit"]:
        values: list[Tensor] = []
        for edit, along in zip(
            (directional_ablation, orthogonalised, directional_ablation),
            (basis, basis, random),
            strict=True,
        ):
            with edit(model, along):
                values.append(loop.run(group))
        return torch.stack(values, -1)

    about = {
        "method": "directional ablation",
        "direction": f"in {side} runs",
        "site": f"every write, {len(basis)} of {basis.shape[1]} directions",
        "ablation_value": "zero",
        "positions": "all",
    }
    return loop.result(cells, [Axis("edit", EDITS)], len(EDITS), about, progress)


def _basis(model: Gemma4, direction: Directions) -> Float[Tensor, "k d_model"]:
    """Orthonormal rows that span the directions, at least in float32."""
    vectors = direction.vectors if isinstance(direction, Direction) else direction
    if isinstance(direction, Direction) and len(direction.layers) > 1:
        raise InputError(
            f"the direction has a vector for each of blocks {direction.layers}, expected one block"
        )
    if not isinstance(vectors, Tensor) or vectors.ndim not in (1, 2):
        raise InputError("direction: expected a Direction or a tensor [d_model] or [k, d_model]")
    vectors = widened(vectors.detach().reshape(-1, vectors.shape[-1]))
    if vectors.shape[1] != model.cfg.d_model:
        raise InputError(
            f"the direction is {vectors.shape[1]} wide, this model's stream {model.cfg.d_model}"
        )
    if not vectors.isfinite().all() or int(torch.linalg.matrix_rank(vectors)) < len(vectors):
        raise InputError(f"the {len(vectors)} directions are zero, not finite or not independent")
    return torch.linalg.qr(vectors.double().T)[0].T.to(vectors)


def _ablating(basis: Float[Tensor, "k d_model"]) -> HookFn:
    def ablate(x: Tensor, hook: Hook) -> Tensor:
        wide = widened(x)
        along = basis.to(wide)
        return (wide - wide @ along.T @ along).to(x.dtype)

    return ablate


@torch.no_grad()
def _orthogonal(
    weight: Float[Tensor, "d_model d_in"],
    gain: Float[Tensor, "d_model"],
    basis: Float[Tensor, "k d_model"],
) -> Float[Tensor, "d_model d_in"]:
    """A matrix of which, behind a norm with this gain, nothing lies along the basis."""
    seen = (widened(gain) * basis.to(gain.device)).T
    directions, size, _ = torch.linalg.svd(seen, full_matrices=False)
    directions = directions[:, size > 1e-6 * size.max()]  # where all gains are zero, none
    wide = widened(weight)
    directions = directions.to(wide)
    return (wide - directions @ (directions.T @ wide)).to(weight.dtype)
