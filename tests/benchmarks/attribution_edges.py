"""What EAP and EAP-IG cost beside one plain forward pass over the same prompts."""

import torch

import g4lens
from g4lens.analysis.circuits.edge_attribution import edge_attribution
from g4lens.analysis.pairs import Pair, Pairs
from tests.benchmarks.measure import extra_peak, ratio

VOCABULARY = 988
MIB = 2**20


def random_pairs(n_pairs: int, n: int) -> Pairs:
    """Prompts of random tokens that share only the first."""
    ids = torch.randint(10, VOCABULARY, (n_pairs, 2, n), generator=torch.Generator().manual_seed(n))
    ids[:, 1, 0] = ids[:, 0, 0]
    return Pairs([Pair(clean, corrupted, 5, 6) for clean, corrupted in ids])


def edges(model, hf, rounds: int) -> None:
    """All edges at once, by EAP and by EAP-IG with 5 steps; a plain pass gives all logits."""
    for n_pairs, n in ((4, 32), (1, 96), (2, 192)):
        _edges(f"{n_pairs} x {n} tokens", model, random_pairs(n_pairs, n), rounds)
    tiny = g4lens.load("tiny")
    _edges("the bundled model", tiny, g4lens.tasks.pairs("ioi", 16), rounds)
    pairs = random_pairs(4, 192)
    for budget in (256, 1024):
        peak = extra_peak(lambda budget=budget: edge_attribution(model, pairs, budget=budget * MIB))
        print(f"memory of EAP over 4 x 192 tokens, budget {budget} MiB: {peak / MIB:.0f} MiB")


def _edges(what: str, model, pairs: Pairs, rounds: int) -> None:
    """One line for each method: its time as a multiple of a plain pass over the clean prompts."""
    (group,) = pairs.on(model, g4lens.metrics.logit_diff)
    ids = group.clean.tokens

    def plain():
        with torch.no_grad():
            return model(ids)

    for name, steps, target in (("EAP", None, ""), ("EAP-IG, 5 steps", 5, "<= 30")):
        ours, theirs, times = ratio(
            lambda steps=steps: edge_attribution(model, pairs, steps=steps), plain, rounds
        )
        print(
            f"{f'{name} / {what}':<44} {ours:>7.3g} s {theirs:>8.3g} s {times:>6.1f}x  {target}",
            flush=True,
        )
