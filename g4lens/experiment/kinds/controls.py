"""Controls: labels exchanged at random, and other heads and positions of the same layers."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from g4lens.analysis.groups import SIDES, Group
from g4lens.analysis.pairs import Pair, Pairs
from g4lens.analysis.scope import label
from g4lens.errors import InputError
from g4lens.experiment.kinds.base import Baseline, Chunk, Drawn
from g4lens.model.gemma4 import Gemma4


def permuted(pairs: Pairs, baseline: Baseline) -> Pairs:
    """The same prompts with answer and foil exchanged in half of each template's pairs at random.

    Of an odd number the odd one is exchanged or not by a throw. Pairs without a foil get each
    other's answers within the template.
    """
    drawn = list(pairs)
    for i, name in _halves(pairs, baseline):
        pair = drawn[i]
        drawn[i] = replace(pair, answer=name, foil=pair.answer if pair.foil is not None else None)
    return Pairs(drawn)


def turned(pairs: Pairs, baseline: Baseline) -> Pairs:
    """The same pairs with clean and corrupted side exchanged in half of each template's."""
    drawn = list(pairs)
    for i, _ in _halves(pairs, baseline):
        drawn[i] = _other_way_round(drawn[i])
    return Pairs(drawn)


def _halves(pairs: Pairs, baseline: Baseline) -> list[tuple[int, Any]]:
    """The pairs to exchange, each with its new answer."""
    order = sorted(range(len(pairs)), key=lambda i: (pairs.clusters[i], i))
    found: list[tuple[int, Any]] = []
    for template, group in groupby(order, key=lambda i: pairs.clusters[i]):
        mine, draws = list(group), random.Random(baseline.seeded(template))
        foiled = [i for i in mine if pairs[i].foil is not None]
        half = (len(foiled) + draws.randint(0, len(foiled) % 2)) // 2
        found += [(i, pairs[i].foil) for i in draws.sample(foiled, half)]
        single = [i for i in mine if pairs[i].foil is None]
        answers = draws.sample([pairs[i].answer for i in single], len(single))
        found += list(zip(single, answers, strict=True))
    return found


def _other_way_round(pair: Pair) -> Pair:
    places = {
        name: {"clean": place["corrupted"], "corrupted": place["clean"]}
        if isinstance(place, dict)
        else place
        for name, place in pair.positions.items()
    }
    answer, foil = (pair.answer, None) if pair.foil is None else (pair.foil, pair.answer)
    return Pair(pair.corrupted, pair.clean, answer, foil, pair.template, places)


def other_heads(
    heads: Sequence[int], n: int, baseline: Baseline, layer: int | None = None
) -> dict[int, int]:
    """For each head another one that is not among them, as far as there are any."""
    others = [head for head in range(n) if head not in heads]
    draws = random.Random(baseline.seeded("heads", layer))
    drawn = draws.sample(others, min(len(heads), len(others)))
    return dict(zip(heads, drawn, strict=False))


def other_places(
    model: Gemma4,
    chunk: Chunk,
    places: Sequence[Any],
    baseline: Baseline,
    seen_by: Mapping[int | str, Sequence[Any]] | None = None,
) -> Drawn:
    """The pairs with a place of random positions beside each of theirs.

    As many positions, as far as there are, none of which belongs to any of the places on either
    side, nor is the first one, where <bos> stands.

    Args:
        model: knows what stands where.
        chunk: the pairs.
        places: as `positions=` takes them.
        baseline: what is drawn.
        seen_by: by the label of a place those that look at it: positions that stand behind them on
            both sides are not drawn.

    Raises: InputError: the places are all there is in a prompt.
    """
    names = {f"random, for {label(place)}": place for place in places}
    drawn, fewest = list(chunk.pairs), (1, 1)
    for group in chunk.pairs.on(model, "logit"):
        found = {name: _both_sides(group, [place]) for name, place in names.items()}
        n = min(group.length("clean"), group.length("corrupted"))
        lasts = {
            name: [n - 1] * len(group)
            if seen_by is None
            else list(map(max, _both_sides(group, seen_by[label(place)])))
            for name, place in names.items()
        }
        for row, i in enumerate(group.index):
            taken = {p for rows in found.values() for p in rows[row]}
            draws = random.Random(baseline.seeded("places", chunk.numbers[i]))
            new = {}
            for name, place in names.items():
                free = [p for p in range(1, n) if p not in taken and p <= lasts[name][row]]
                if not free:
                    raise InputError(f"pair {chunk.numbers[i]} has no other positions to draw from")
                wanted = max(int((group.places(place, side)[row] >= 0).sum()) for side in SIDES)
                new[name] = sorted(draws.sample(free, min(wanted, len(free))))
                fewest = min(fewest, (len(new[name]), wanted), key=lambda x: x[0] / x[1])
            pair = drawn[i]
            drawn[i] = replace(pair, positions={**pair.positions, **new})
    fewer = "" if fewest == (1, 1) else f", in places but {fewest[0]} for {fewest[1]}"
    called = {name: label(place) for name, place in names.items()}
    return Drawn(Chunk(Pairs(drawn), chunk.numbers), called, fewer)


def _both_sides(group: Group, places: Sequence[Any]) -> list[set[int]]:
    """Of each pair of a group the positions of places, whichever side they are on."""
    each = [group.places(place, side).tolist() for place in places for side in SIDES]
    return [{p for found in each for p in found[row] if p >= 0} for row in range(len(group))]
