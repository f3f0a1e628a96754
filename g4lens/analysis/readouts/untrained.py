"""The same model, never trained: what a readout finds there it brought along itself."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from g4lens.model.gemma4 import Gemma4
from g4lens.quantize import Packed
from g4lens.tables import HostTable

APART = 0x9E3779B9  # from the small seeds that models are initialised with: not their draw again


@torch.no_grad()
def untrained(model: Gemma4, seed: int = 0) -> Gemma4:
    """A copy whose weights are drawn anew: the control of every learned readout.

    Matrices and tables are drawn from a normal distribution with their own mean and standard
    deviation, those in 8 or 4 bits are held so again; gains are shuffled, layer scalars and bounds
    stay. A table that is read from its file keeps its rows, but each now belongs to another token,
    drawn at random. Sizes are those of the trained model, and nothing it knows is left. Costs a
    second model's memory.

    It misleads as a floor of zero. Tokens still have vectors of their own, which attention mixes:
    probes and dictionaries find words and positions there too (Heap et al. 2025, arXiv 2501.17727,
    on dictionaries). What they find in the trained model beyond that is the model's.

    Args:
        model: the model; it stays as it is.
        seed: of the draw.
    """
    other = copy.deepcopy(model)
    other.origin = None
    random = torch.Generator(device=model.device).manual_seed(APART + seed)
    for name, module in list(other.named_modules()):
        if isinstance(module, HostTable):
            other.set_submodule(name, Reassigned(module, seed))
        elif isinstance(module, Packed):
            module.hold(_drawn(module.weight.detach(), random))
        for part, weight in module.named_parameters(recurse=False):
            if part != "codes":  # a packed weight, held anew above
                _drawn(weight, random)
    return other


def _drawn(weight: Float[Tensor, "*axes"], random: torch.Generator) -> Float[Tensor, "*axes"]:
    """Draw a matrix anew, or put gains in another order; in place."""
    if weight.ndim > 1:
        mean, std = float(weight.float().mean()), float(weight.float().std())
        return weight.normal_(mean, std, generator=random)
    return weight.copy_(weight[torch.randperm(len(weight), generator=random, device=weight.device)])


class Reassigned(nn.Module):
    """A table on the host whose rows belong to other tokens."""

    def __init__(self, table: HostTable, seed: int):
        super().__init__()
        self.table = table
        self.order = torch.randperm(
            table.n_rows, generator=torch.Generator().manual_seed(APART + seed)
        )

    def forward(self, ids: Int[Tensor, "*ids"]) -> Float[Tensor, "*ids width"]:
        """The rows that these ids have now."""
        return self.table(self.order[ids.cpu()])

    def products(self, x: Float[Tensor, "*axes width"]) -> Float[Tensor, "*axes d_vocab"]:
        """The product of `x` with each row, in the order of the ids."""
        return self.table.products(x)[..., self.order.to(x.device)]
