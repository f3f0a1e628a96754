"""A run on one page, and several side by side: HTML that loads nothing and runs no script.

Every text that goes into it, tokens and file names among them, is escaped by the templates beside
this file; pictures stand in it as data.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from g4lens.analysis.result import Result
from g4lens.experiment.record.figures import Drawn, value_of
from g4lens.experiment.record.prompts import base64_of, cells_of
from g4lens.experiment.record.summary import STATED, Key

if TYPE_CHECKING:
    from g4lens.experiment.record.compare import Comparison
    from g4lens.experiment.run import Job

FEW, MOST = 8, 5  # a variant with no more cells is shown whole; of others the strongest
EVERY = 600  # rows of the table of all cells
N_PROMPTS = 3
WIDE = 7  # inches of a figure that gets a row for itself
# by kind of control, then by variant, metric and cell, what it has
Beside = dict[str, dict[tuple[str, ...], dict[str, float]]]
DASH = "\u2013"
CONTROLS = {
    "random": "as many other units of the same kind, in the same blocks",
    "direction": "as long a vector in a direction drawn at random",
    "permuted": "answer and foil exchanged in half of each template's pairs, so that nothing is "
    "left to be found",
}


def rendered(
    manifest: dict[str, Any],
    found: dict[Key, Result],
    table: Any,
    drawn: Sequence[Drawn],
    job: "Job",
) -> str:
    """The page of a run.

    Args:
        manifest: of the run, as far as it is known before its files are.
        found: the results.
        table: their summary.
        drawn: the figures.
        job: what the run is.
    """
    alpha = job.spec.statistics.alpha
    own = table[table["baseline"] == "none"]
    beside = _controls(table)
    every = [row for key in _keys(own) for row in _rows(own, key, found, beside, alpha, None)]
    headline = [row for key in _keys(own) for row in _rows(own, key, found, beside, alpha, MOST)]
    is_cut = len(headline) < len(every)
    pictures = [_picture(one) for one in drawn]
    seconds = [unit["seconds"] for unit in manifest["units"].values()]
    name = job.path.name
    return _template("run.html.jinja").render(
        m=manifest,
        question=_question(manifest),
        metrics=list(dict.fromkeys(own["metric"])),
        failed=sum(not check["passed"] for check in manifest["checks"]),
        seconds=f"{sum(filter(None, seconds)):,.0f} s" if any(seconds) else "time not kept",
        headline=headline,
        headline_caption=f"The {MOST} strongest cells of each variant" if is_cut else "All cells",
        every=every if is_cut and len(every) <= EVERY else [],
        controls={name: _control(name, job, table) for name in beside},
        percent=f"{100 * (1 - alpha):g} %",
        small=[one for one in pictures if not one["is_wide"]],
        large=[one for one in pictures if one["is_wide"]],
        conditions=_conditions(own),
        prompts=[list(cells_of(pair)) for pair in job.pairs[:N_PROMPTS]],
        checks=[_check(check) for check in manifest["checks"]],
        model=_flat(manifest["model"]),
        sources=_flat({**manifest["pairs"], "media": manifest["media"]}),
        made_by=_flat(
            {
                **manifest["code"],
                "units": _computed_with(manifest),
                **manifest["machine"],
                "seeds": manifest["seeds"],
            }
        ),
        commands=f"g4lens run {name} --out DIR\ng4lens verify DIR",
        spec=yaml.safe_dump(manifest["spec"], sort_keys=False, allow_unicode=True),
    )


def compared(several: "Comparison") -> str:
    """The page of runs side by side."""
    manifests = {name: run.manifest for name, run in several.runs.items()}
    rows = list(several.rows(MOST))
    return _template("runs.html.jinja").render(
        names=list(several.runs),
        runs=[
            {
                "folder": name,
                "name": manifest["name"],
                "run": manifest["run"],
                "kind": manifest["spec"]["experiment"]["kind"],
                "pairs": f"{manifest['pairs']['measured']} in {manifest['pairs']['clusters']}",
                "passed": all(check["passed"] for check in manifest["checks"]),
            }
            for name, manifest in manifests.items()
        ],
        rows=rows,
        conditions=[
            {"run": name, **row}
            for name, table in several.summaries.items()
            for row in _conditions(table[table["baseline"] == "none"])
        ],
        caption="Share recovered or lost, or the mean where there is no share; strongest cells",
        pictures=[
            {"run": name, "name": path.stem, "data": base64_of(path.read_bytes())}
            for name, run in several.runs.items()
            for path in sorted((run.folder / "figures").glob("*.svg"))
            if not path.name.startswith("prompts.")
        ],
        differences=several.differences,
    )


@cache
def _template(name: str) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    options = {"autoescape": True, "undefined": StrictUndefined}
    return Environment(loader=loader, trim_blocks=True, **options).get_template(name)


# ---- results


def number(x: float | None) -> str:
    """Three digits, or a dash where there is no number."""
    return DASH if x is None or math.isnan(x) else f"{x:.3g}".replace("-", "\u2212")


def probability(p: float) -> str:
    """A p-value: no smaller than one in a thousand."""
    return "<0.001" if p < 0.001 else DASH if math.isnan(p) else f"{p:.3f}"


def interval(row: Mapping[str, Any], of: str) -> str:
    """The ends of the interval of the share or the mean."""
    low, high = row[f"{of}_low"], row[f"{of}_high"]
    return DASH if math.isnan(low) else f"[{number(low)}, {number(high)}]"


def strongest(rows: Any, most: int | None) -> Any:
    """The rows with the largest effects, or all where there are few."""
    if most is None or len(rows) <= FEW:
        return rows
    order = rows["effect"].abs().sort_values(ascending=False, kind="stable").index
    return rows.loc[order[:most]]


def cell_names(table: Any) -> list[str]:
    """The columns of a summary that name a cell."""
    columns = list(table)
    return columns[len(Key._fields) : columns.index("mean")]


def cell_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """What a cell is called."""
    import pandas as pd

    return ", ".join(f"{name} {_label(row[name])}" for name in names if not pd.isna(row[name]))


def _label(x: Any) -> str:
    return f"{x:g}" if isinstance(x, float) else str(x)


def _keys(table: Any) -> list[Key]:
    return [Key(*key) for key in table[list(Key._fields)].drop_duplicates().to_numpy().tolist()]


def _rows(
    own: Any,
    key: Key,
    found: dict[Key, Result],
    beside: Beside,
    alpha: float,
    most: int | None,
) -> Iterator[dict[str, Any]]:
    """The cells of a variant as the page shows them."""
    rows = own[(own["variant"] == key.variant) & (own["metric"] == key.metric)]
    names, of = cell_names(own), value_of(found[key])
    chosen = strongest(rows, most).to_dict("records")
    for i, row in enumerate(chosen):
        cell = cell_of(row, names)
        shown = "recovered" if of == "recovered" else "mean"
        others = {
            control: by_cell.get((key.variant, key.metric, cell), {}).get(shown)
            for control, by_cell in beside.items()
        }
        yield {
            "span": len(chosen) * (i == 0),
            "is_found": row["p_adj"] < alpha,
            "of": f"{key.variant}, {key.metric}",
            "ends": f"base {number(row['base'])}, target {number(row['target'])}",
            "cell": cell,
            "mean": number(row["mean"]),
            "share": number(row["recovered"]),
            "interval": interval(row, shown),
            "effect": number(row["effect"]),
            "size": number(row["effect_size"]),
            "p_adj": probability(row["p_adj"]),
            "controls": {control: number(other) for control, other in others.items()},
        }


def _conditions(own: Any) -> list[dict[str, str]]:
    """What the numbers of each variant depend on, a row for all metrics that have it in common."""
    metrics = own.groupby(["variant", *STATED], sort=False)["metric"].unique().map(", ".join)
    return metrics.reset_index()[["variant", "metric", *STATED]].to_dict("records")


def _controls(table: Any) -> Beside:
    """The mean over draws of each kind of control."""
    names, rows = cell_names(table), table[table["baseline"] != "none"]
    if rows.empty:
        return {}
    kinds = rows["baseline"].str.partition(".")[0]
    cells = [cell_of(row, names) for row in rows.to_dict("records")]
    by = [kinds, rows["variant"], rows["metric"], cells]
    beside: Beside = {}
    for (kind, *key), mean in rows[["mean", "recovered"]].groupby(by, sort=False).mean().iterrows():
        beside.setdefault(kind, {})[tuple(key)] = mean.to_dict()
    return beside


# ---- words


def _question(manifest: dict[str, Any]) -> str:
    """What was done, in a sentence."""
    spec = manifest["spec"]
    pairs = spec["pairs"]["task"] or Path(spec["pairs"]["file"]).name
    kind = spec["experiment"]["kind"].replace("_", " ")
    kind = kind[0].upper() + kind[1:]
    return f"{kind} in {manifest['model']['name']}, on {manifest['pairs']['n']} pairs of {pairs}."


def _control(name: str, job: "Job", table: Any) -> str:
    """What a control is, how often it was drawn, and what was drawn."""
    if name == "permuted" and job.experiment.kind.permutes:
        said = "what is chosen when labels are exchanged in half of each discovery template's pairs"
    else:
        said = CONTROLS[name]
    n, of_it = getattr(job.spec.baselines, name), table["baseline"].str.startswith(f"{name}.")
    told = dict.fromkeys(x.partition("drawn ")[2] for x in table[of_it]["details"])
    drawn = "; ".join(x for x in told if x)
    return f"{said} ({n} draw{'s' if n > 1 else ''}{f': {drawn}' if drawn else ''})"


def _computed_with(manifest: Mapping[str, Any]) -> str:
    """Which code the units were computed with."""
    own = manifest["code"]["source"]
    told = []
    for code in manifest["computed_with"]:
        other = f"source {code['source']}, commit {code['commit']}"
        which = (
            "this code" if code["source"] == own else other if code["source"] else "unknown code"
        )
        told.append(f"{code['units']} computed with {which}")
    return "; ".join(told)


def _check(check: dict[str, Any]) -> dict[str, Any]:
    is_told_only = check["tolerance"] is None
    result = "told only" if is_told_only else "passed" if check["passed"] else "failed"
    allowed = DASH if is_told_only else f"{check['tolerance']:.1e}"
    return {**check, "value": f"{check['value']:.1e}", "tolerance": allowed, "result": result}


def _flat(x: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Names with dots, and what there is; without what there is not."""
    found: dict[str, str] = {}
    for key, value in x.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{key}: ")
        elif value not in (None, []):
            found[f"{before}{key}"] = str(value)
    return found


def _picture(one: Drawn) -> dict[str, Any]:
    return {
        "name": one.name,
        "caption": one.caption,
        "data": base64_of(one.files["svg"]),
        "is_wide": one.width > WIDE or one.is_of_prompts,
    }
