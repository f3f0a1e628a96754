"""What attribution costs, in plain forward passes of the same batch.

    python -m tests.benchmarks.attribution [nodes] [star] [memory] [edges] [--rounds N]

The model of `tests.benchmarks.sweep`: random weights, float32, two threads, 15 blocks of width 384.
Eight pairs of prompts of 96 and of 256 tokens. A plain pass is one call of the model on the
corrupted prompts: with all logits, and with those of the last position alone, which is the cheapest
there is and the whole of what a metric needs. Asserts nothing.
"""

from collections.abc import Callable
from functools import partial

import torch

from g4lens.analysis.gradients.attribution_patching import attribution_patching
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.sites import SITES
from tests.benchmarks.forward import transformer_lens
from tests.benchmarks.measure import extra_peak, ratio, run
from tests.benchmarks.sweep import VOCABULARY, difference, theirs

N_PAIRS = 8


def pairs(n: int, count: int = N_PAIRS) -> Pairs:
    """Prompts of random tokens that share only their first."""
    random = torch.Generator().manual_seed(n)
    clean, corrupted = torch.randint(10, VOCABULARY, (2, count, n), generator=random)
    corrupted[:, 0] = clean[:, 0] = 2
    return Pairs([Pair(a, b, 5, 6) for a, b in zip(clean, corrupted, strict=True)])


def corrupted(some: Pairs) -> torch.Tensor:
    """One side as a batch."""
    return torch.stack([pair.corrupted for pair in some])


def beside_a_pass(model, what: str, fn: Callable[[Pairs], object], rounds: int, aim: str) -> None:
    """Two lines for each length: beside a pass with all logits, and with the last alone."""
    for n in (96, 256):
        some = pairs(n)
        batch = corrupted(some)
        for kind, read in (("all logits", None), ("last logit", -1)):
            mine, plain, relative = ratio(
                partial(fn, some), partial(model, batch, read=read), rounds
            )
            print(
                f"{what}, {N_PAIRS} x {n} / plain pass, {kind:<10} {mine:>7.3f} s {plain:>7.3f} s "
                f"{relative:>6.2f}x  {aim if read is None else ''}",
                flush=True,
            )


def nodes(model, hf, rounds: int) -> None:
    """Attribution patching over all sites at once, and TransformerLens's over streams and heads."""

    def all_sites(some: Pairs) -> object:
        return attribution_patching(model, some, site=list(SITES), progress=False)

    beside_a_pass(model, f"all {len(SITES)} sites", all_sites, rounds, "<= 5")
    few = ["resid_pre", "z", "mlp_out"]

    def three(some: Pairs) -> dict:
        return attribution_patching(model, some, site=few, progress=False)

    beside_a_pass(model, "resid_pre, z, mlp_out", three, rounds, "")
    bridge = transformer_lens(theirs())
    if bridge is None:
        return
    for n in (96, 256):
        some = pairs(n)
        mine, other, relative = ratio(
            partial(three, some), partial(bridge_loop, bridge, some), rounds
        )
        ours, them = three(some), bridge_loop(bridge, some)
        apart = max(
            float((ours[site].per_pair - them[site]).abs().max() / them[site].std())
            for site in ("resid_pre", "mlp_out")
        )
        print(
            f"resid_pre, z, mlp_out, {N_PAIRS} x {n} / TransformerLens       {mine:>7.3f} s "
            f"{other:>7.3f} s {relative:>6.2f}x  apart {apart:.0e}",
            flush=True,
        )


def bridge_loop(bridge, some: Pairs) -> dict[str, torch.Tensor]:
    """Node attribution patching with TransformerLens's hooks: two passes and one backward."""
    names = {
        "resid_pre": [f"blocks.{i}.hook_resid_pre" for i in range(15)],
        "z": [f"blocks.{i}.attn.hook_z" for i in range(15)],
        "mlp_out": [f"blocks.{i}.ln2_post.hook_out" for i in range(15)],
    }
    wanted = [name for group in names.values() for name in group]
    source, values, slopes = {}, {}, {}

    def keep(into, name, x, hook):
        into[name] = (x[0] if isinstance(x, tuple) else x).detach()

    def keep_and_ask(name, x, hook):
        keep(values, name, x, hook)
        return x if x.requires_grad else x.detach().requires_grad_()

    with bridge.hooks([(n, partial(keep, source, n)) for n in wanted]):
        bridge(torch.stack([pair.clean for pair in some]))
    asked = [(n, partial(keep_and_ask, n)) for n in wanted]
    with (
        torch.enable_grad(),
        bridge.hooks(asked, [(n, partial(keep, slopes, n)) for n in wanted]),
    ):
        logits = bridge(corrupted(some))[:, -1]
        capless = 30 * torch.atanh((logits / 30).clamp(-1 + 1e-7, 1 - 1e-7))
        difference(capless).sum().backward()
    bridge.zero_grad()
    found = {}
    for site, group in names.items():
        shares = [((source[n] - values[n]) * slopes[n]).sum(-1) for n in group]
        found[site] = torch.stack(shares, 1)
    return found


def star(model, hf, rounds: int) -> None:
    """The same with the QK fix, and AtP* whole: a backward pass for each of 15 blocks."""

    def fixed(some: Pairs) -> object:
        return attribution_patching(model, some, site=list(SITES), qk_fix=True, progress=False)

    def whole(some: Pairs) -> object:
        return attribution_patching(
            model, some, site=list(SITES), qk_fix=True, grad_drop=True, progress=False
        )

    beside_a_pass(model, "QK fix, all sites", fixed, rounds, "")
    beside_a_pass(model, "AtP*, all sites", whole, max(1, rounds // 3), "")


def memory(model, hf, rounds: int) -> None:
    """How far memory grows, beside the budget."""
    mib = 2**20
    for n, budget in ((96, 128), (96, 256), (512, 768), (512, 1536)):
        some = pairs(n, 32 if n == 96 else 8)

        def call(some=some, budget=budget):
            attribution_patching(model, some, site=list(SITES), budget=budget * mib, progress=False)

        call()
        peak = extra_peak(call) / mib
        print(f"{len(some)} x {n} tokens, budget {budget} MiB: {peak:.0f} MiB", flush=True)


def edges(model, hf, rounds: int) -> None:
    """Edge attribution patching, plain and with integrated gradients."""
    try:
        from tests.benchmarks import attribution_edges
    except ImportError:
        print("tests/benchmarks/attribution_edges.py is not there: its rows are left out")
        return
    attribution_edges.edges(model, hf, rounds)


PARTS = {"nodes": nodes, "star": star, "memory": memory, "edges": edges}


if __name__ == "__main__":
    run(PARTS, theirs, __doc__, rounds=5)
