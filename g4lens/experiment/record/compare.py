"""Runs side by side, if they are of one model and one set of pairs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from g4lens.errors import InputError
from g4lens.experiment.files import put
from g4lens.experiment.record import page, provenance
from g4lens.experiment.record.folder import Run
from g4lens.experiment.record.summary import STATED, Key
from g4lens.experiment.store import differences

if TYPE_CHECKING:
    import pandas as pd

# of the model, what runs must agree in to be merged (hashes, not settings), and its name
HASHES = {
    "weights": "weights",
    "config": "config",
    "inputs": "inputs (tokenizer, chat template, processor)",
    "edited": "edited",
}
MOST = 5  # cells of each variant in words, where it has many
SHOWN = ("mean", "recovered", "recovered_low", "recovered_high", "effect", "p_adj")


@dataclass(frozen=True)
class Comparison:
    """Several runs.

    Attributes:
        runs: by the names that tell them apart.
        summaries: of each run.
        table: a row for each variant, baseline, metric and cell; columns (run, statistic).
        differences: a line for each setting, version or machine in which a run differs from the
            first one.
    """

    runs: dict[str, Run]
    summaries: dict[str, Any]
    table: Any
    differences: tuple[str, ...]

    def rows(self, most: int) -> Iterator[dict[str, Any]]:
        """The strongest cells of each variant and metric in any run, in words.

        Args:
            most: how many of each variant's cells, where it has many.
        """
        own: Any = self.long.query("baseline == 'none'")
        names = _cells(self.summaries)
        for (variant, metric), rows in own.groupby(["variant", "metric"], sort=False):
            cells = rows.assign(cell=[page.cell_of(row, names) for row in rows.to_dict("records")])
            largest = cells.assign(size=cells["effect"].abs()).groupby("cell", sort=False)["size"]
            order = largest.max().rename("effect").reset_index()
            chosen = page.strongest(order, most)["cell"]
            for i, cell in enumerate(chosen):
                by_run = {
                    row["run"]: row for row in cells[cells["cell"] == cell].to_dict("records")
                }
                yield {
                    "span": len(chosen) * (i == 0),
                    "of": f"{variant}, {metric}",
                    "conditions": _conditions(rows) if i == 0 else [],
                    "cell": cell,
                    "runs": [_told(by_run.get(name)) for name in self.runs],
                }

    @property
    def long(self) -> "pd.DataFrame":
        """The summaries of all runs below each other, the run before them."""
        import pandas as pd

        frames: Any = self.summaries
        return pd.concat(frames, names=["run", None]).reset_index("run").reset_index(drop=True)

    def __repr__(self) -> str:
        lines: list[str] = []
        for row in self.rows(MOST):
            if row["span"]:
                lines += [
                    "",
                    f"{row['of']:<40} {'  '.join(f'{n:<34}' for n in self.runs)}".rstrip(),
                ]
                lines += [f"  ({line})" for line in row["conditions"]]
            told = (
                f"{one['share']:<9} {one['interval']:<18} {one['p_adj']:<5}" for one in row["runs"]
            )
            lines.append(f"  {row['cell']:<38} {'  '.join(told)}".rstrip())
        lines += ["", *(f"differs: {line}" for line in self.differences)]
        return "\n".join(lines[1:])

    def write(self, path: str | Path) -> None:
        """Write a page that needs nothing else. Raises: StoreError: no space, no permission."""
        path = Path(path)
        content = page.compared(self).encode()
        put(path.parent, [content], lambda _: path.name)


def compare(folders: Sequence[str | Path]) -> Comparison:
    """Put runs side by side.

    Args:
        folders: of complete runs.

    Raises:
        InputError: a run that is not complete, or runs of other weights, inputs or pairs: what
            differs is named. StoreError: a record that is not what was written.
    """
    import pandas as pd

    if not folders:
        raise InputError("no runs, expected at least one")
    runs = dict(zip(_names(folders), map(Run, folders), strict=True))
    first = next(iter(runs))
    changed: list[str] = []
    for name, run in runs.items():
        _refuse_others(first, runs[first], name, run)
        changed += _settings(first, runs[first].manifest, name, run.manifest)
    tables = {name: run.summary for name, run in runs.items()}
    cells = _cells(tables)
    wide = pd.concat(
        {name: _indexed(table, cells) for name, table in tables.items()}, axis=1, sort=False
    )
    return Comparison(runs, tables, wide, tuple(changed))


def _cells(tables: Mapping[str, Any]) -> list[str]:
    """The columns that name a cell in any of several summaries."""
    return list(dict.fromkeys(name for table in tables.values() for name in page.cell_names(table)))


def _names(folders: Sequence[str | Path]) -> list[str]:
    """The last part of each path, or the whole where two share it."""
    short = [Path(folder).resolve().name for folder in folders]
    whole = [str(folder) for folder in folders]
    if len(set(whole)) < len(whole):
        raise InputError(f"{', '.join(whole)}: a run is there twice, expected each once")
    return [a if short.count(a) == 1 else b for a, b in zip(short, whole, strict=True)]


def _refuse_others(first: str, one: Run, name: str, other: Run) -> None:
    """Raises: InputError: the runs do not follow from the same model and pairs."""
    a, b = one.manifest, other.manifest
    found: list[str] = []
    for key, called in HASHES.items():
        found += _said(first, a["model"], name, b["model"], key, called)
    if found and all(a["model"][key] == b["model"][key] for key in ("name", "revision")):
        found.append(f"though both name the model {a['model']['name']!r}")
    found += _said(first, a, name, b, "media")
    found += _said(first, a["pairs"], name, b["pairs"], "sha256", "pairs.sha256")
    if found:
        raise InputError(f"{first} and {name} cannot be merged: {'; '.join(found)}")


def _settings(first: str, a: dict[str, Any], name: str, b: dict[str, Any]) -> list[str]:
    """What else is different."""
    lines = [x for part in ("spec", "code", "machine") for x in _said(first, a, name, b, part)]
    return lines + provenance.few(_said(first, a, name, b, "packages"))


def _said(
    first: str, a: dict[str, Any], name: str, b: dict[str, Any], key: str, called: str = ""
) -> list[str]:
    return [
        line.replace(" there and ", f" in {first} and ").removesuffix(" here") + f" in {name}"
        for line in differences(a[key], b[key], called or key)
    ]


def _conditions(rows: Any) -> list[str]:
    """What the shown numbers of a variant are, a line for all runs or one for each kind of run."""
    told: dict[str, list[str]] = {}
    for name, mine in rows.groupby("run", sort=False):
        row = mine.iloc[0]
        is_lost = row["direction"] == "noise"
        of = "mean" if mine["recovered"].isna().all() else "lost" if is_lost else "recovered"
        stated = ", ".join(f"{key.replace('_', ' ')} {row[key]}" for key in STATED[:-1])
        told.setdefault(f"{of if of == 'mean' else f'share {of}'}: {stated}", []).append(str(name))
    return [line if len(told) == 1 else f"{', '.join(of)}: {line}" for line, of in told.items()]


def _told(row: Mapping[str, Any] | None) -> dict[str, str]:
    """A cell of one run: the share if there is one, else the mean."""
    if row is None:
        return dict.fromkeys(("share", "interval", "p_adj"), page.DASH)
    of = "mean" if math.isnan(row["recovered"]) else "recovered"
    return {
        "share": page.number(row[of]),
        "interval": page.interval(row, of),
        "p_adj": page.probability(row["p_adj"]),
    }


def _indexed(table: Any, cells: list[str]) -> Any:
    import pandas as pd

    names = [*Key._fields, *cells]
    labels = table.reindex(columns=names).map(lambda x: "" if pd.isna(x) else str(x))
    return table[list(SHOWN)].set_index([labels[name] for name in names])
