"""From a row for each prompt to the statistics of each cell.

A control is measured on the scale of the thing itself: its `recovered` is its own mean effect over
the way from base to target that the thing itself has to go. With permuted labels there is no such
way of its own.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis import stats
from g4lens.analysis.metrics import as_metric
from g4lens.analysis.result import CONDITIONS, Axis, Result
from g4lens.config import TextConfig
from g4lens.errors import InputError
from g4lens.experiment.run_spec import Spec

ENOUGH_DRAWS = 2000
SHORT = 0.1  # of the mean way from base to target
FLOORED, FLOOR = ("kl", "rank"), 1e-3  # metrics that are never negative, and what is zero of them
CORRECTIONS: dict[str, Any] = {"max-T": "max_t", "BH": "bh"}
STATED = [name for name in CONDITIONS if name != "metric"] + ["details"]
Cells = Float[Tensor, "*axes"]


class Key(NamedTuple):
    """What a result is of."""

    variant: str
    baseline: str
    metric: str

    @property
    def itself(self) -> "Key":
        """The thing that a control stands beside."""
        return self._replace(baseline="none")


def cell_columns(frame: Any) -> list[str]:
    """The columns that name a cell."""
    columns = list(frame.columns)
    return columns[columns.index("baseline") + 1 : columns.index("prompt")]


def results(frame: Any, cfg: TextConfig, spec: Spec) -> dict[Key, Result]:
    """A result for each variant, baseline and metric of the rows of all units."""
    is_normalised = {as_metric(name).name: as_metric(name).is_normalised for name in spec.metrics}
    names = cell_columns(frame)
    found: dict[Key, Result] = {}
    for key, rows in frame.groupby(list(Key._fields), sort=False):
        key = Key(*key)
        result = _result(rows, [name for name in names if rows[name].notna().any()], cfg)
        result = replace(result, is_normalised=is_normalised[key.metric])
        own = found.get(key.itself)
        if own is not None:
            result = replace(result, target=result.base + own.target - own.base)
        found[key] = result
    return found


def _result(rows: Any, names: list[str], cfg: TextConfig) -> Result:
    import pandas as pd

    axes, places = [], []
    for name in names:
        is_word = rows[name].dtype.kind not in "iuf"
        place, labels = pd.factorize(rows[name], sort=not is_word)
        axes.append(Axis("pos" if name == "position" else name, tuple(labels.tolist())))
        places.append(torch.from_numpy(place))
    pair, prompts = pd.factorize(rows["prompt"], sort=True)
    per_pair = torch.full((len(prompts), *map(len, axes)), torch.nan, dtype=torch.float64)
    each = {name: torch.tensor(rows[name].to_numpy("float64")) for name in ("value", "base")}
    each["target"] = torch.tensor(rows["target"].to_numpy("float64"))
    per_pair[(torch.from_numpy(pair), *places)] = each["value"]
    first = rows.drop_duplicates("prompt").sort_values("prompt")
    about = {name: " | ".join(dict.fromkeys(rows[name])) for name in STATED}
    return Result(
        per_pair=per_pair,
        axes=tuple(axes),
        base=torch.tensor(first["base"].to_numpy("float64")),
        target=torch.tensor(first["target"].to_numpy("float64")),
        clusters=tuple(first["cluster"]),
        about={**about, "metric": rows["metric"].iloc[0]},
        cfg=cfg,
    )


def summary(found: dict[Key, Result], spec: Spec, cells: list[str]) -> tuple[Any, list[str]]:
    """A row for each cell of each result, and what is to be said of them all.

    Columns: variant, baseline, metric, the cell's labels; mean of the metric and its interval, base
    and target; the share recovered (or lost) and its interval; the mean effect, Cohen's d_z and the
    smallest effect that would be seen four times in five; the p-value of the effect by itself and
    corrected for all cells of the variant and metric; the number of prompts and of clusters; the
    conditions. NaN where something is undefined, for a reason that is among the notes.

    Args:
        found: the results.
        spec: says how they are judged.
        cells: the columns that name a cell, in order.
    """
    import pandas as pd

    said: dict[str, list[Key]] = {}
    frames = [_frame(key, result, spec, said) for key, result in found.items()]
    whole = pd.concat(frames, ignore_index=True)
    names = [name for name in cells if name in whole]
    whole = with_plain_cells(whole, names)
    rest = [name for name in whole.columns if name not in (*Key._fields, *names)]
    return whole[[*Key._fields, *names, *rest]], _notes(said, found, spec)


def _notes(said: Mapping[str, list[Key]], found: Mapping[Key, Result], spec: Spec) -> list[str]:
    """What was said of results, once each, and of which if not of all; controls are passed over."""
    own = [key for key in found if key.baseline == "none"]
    notes = []
    if spec.statistics.draws < ENOUGH_DRAWS:
        notes.append(
            f"{spec.statistics.draws} draws leave intervals and p-values coarse, {ENOUGH_DRAWS:,} "
            "are enough"
        )
    for text, keys in said.items():
        some = [f"{key.variant}, {key.metric}" for key in own if key in keys]
        if some:
            notes.append(text if len(some) == len(own) else f"{'; '.join(some)}: {text}")
    return notes


def with_plain_cells(frame: Any, names: list[str]) -> Any:
    """Columns that Parquet can hold where some rows have no such label.

    Whole numbers stay whole, and what is half words becomes words.
    """
    import pandas as pd

    def plain(labels: Any) -> Any:
        if labels.dtype == object:
            return labels.map(lambda x: None if pd.isna(x) else str(x))
        if labels.dtype.kind == "f" and labels.isna().any() and (labels.dropna() % 1 == 0).all():
            return labels.astype("Int64")
        return labels

    return frame.assign(**{name: plain(frame[name]) for name in names})


def has_sign(result: Result) -> bool:
    """Can an effect be of either sign? None can where a metric stands at its floor already."""
    name = result.about["metric"].partition(".")[0]
    return name not in FLOORED or float(result.base.mean()) > FLOOR


def column(axis: Axis) -> str:
    """What an axis of a result is called in tables."""
    return "position" if axis.name == "pos" else axis.name


def _frame(key: Key, result: Result, spec: Spec, said: dict[str, list[Key]]) -> Any:
    import pandas as pd

    labels = product(*(axis.labels for axis in result.axes))
    frame = pd.DataFrame(list(labels), columns=[column(axis) for axis in result.axes])
    notes: list[str] = []
    for name, cells in _statistics(result, spec, notes).items():
        frame[name] = cells.reshape(-1).numpy()
    for text in dict.fromkeys(notes):
        said.setdefault(text, []).append(key)
    return frame.assign(
        **key._asdict(),
        correction=spec.statistics.correction,
        confidence=1 - spec.statistics.alpha,
        n=len(result.per_pair),
        n_clusters=len(set(result.clusters)),
        **{name: result.about[name] for name in STATED},
    )


def _statistics(result: Result, spec: Spec, notes: list[str]) -> dict[str, Cells]:
    alpha, draws = spec.statistics.alpha, spec.statistics.draws
    settings = {"confidence": 1 - alpha, "n_resamples": draws, "seed": spec.seed}
    tests = {"n_permutations": draws, "seed": spec.seed, "alpha": alpha}
    effects = result.effect.numpy()
    unknown = torch.full_like(result.values, torch.nan)

    def known(make: Callable[[], Any], default: Any = unknown) -> Any:
        """What is asked for, if there is such a thing."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                made = make()
            except InputError as error:
                notes.append(str(error))
                made = default
        notes.extend(str(one.message) for one in caught)
        return made

    mean = known(lambda: result.bootstrap_ci(**settings), (unknown, unknown))
    share, ends = unknown, (unknown, unknown)
    if result.is_normalised:
        share = known(lambda: result.recovered)
    if not share.isnan().all():
        ends = known(lambda: result.bootstrap_ci("recovered", **settings), ends)
        notes.extend(_short_ways(result))
    smallest, p, p_adj = (unknown,) * 3
    if has_sign(result):
        correction = CORRECTIONS[spec.statistics.correction]
        smallest = known(lambda: _smallest(effects, result, alpha))
        p = known(lambda: result.permutation_pvalue(None, **tests))
        p_adj = known(lambda: result.permutation_pvalue(correction, **tests))
    else:
        notes.append(
            f"{result.about['metric']} stands at 0 without intervention and cannot fall: a test of "
            "signs would find any change at all, and there is none"
        )
    return {
        "mean": result.values,
        "mean_low": mean[0],
        "mean_high": mean[1],
        "base": result.base.mean().expand_as(unknown),
        "target": result.target.mean().expand_as(unknown),
        "recovered": share,
        "recovered_low": ends[0],
        "recovered_high": ends[1],
        "effect": result.effect.mean(0),
        "effect_size": known(lambda: result.effect_sizes),
        "smallest_effect": smallest,
        "p": p,
        "p_adj": p_adj,
    }


def _smallest(effects: Any, result: Result, alpha: float) -> Cells:
    return torch.from_numpy(stats.smallest_effects(effects, result.clusters, alpha))


def _short_ways(result: Result) -> Iterator[str]:
    """A word on pairs with hardly any way from base to target, or one in the other direction."""
    span = result.target - result.base
    short = int((span / span.mean() < SHORT).sum())
    if short:
        yield (
            f"in {short} of {len(span)} pairs target - base is below a tenth of its mean, or of "
            "the other sign: see the prompts one by one"
        )
