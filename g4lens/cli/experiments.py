"""`g4lens cache` and `g4lens run`: specs into folders of results."""

import argparse
from pathlib import Path
from typing import Any

from g4lens.cli import arguments
from g4lens.errors import InputError


def add(commands: arguments.Commands) -> None:
    """The commands of this file."""
    cache_parser = commands.add_parser("cache", help="keep activations of many prompts on disk")
    arguments.file(cache_parser, "spec", "a YAML file: what to keep")
    arguments.folder(cache_parser, "--out", type=Path, required=True, metavar="DIR")
    cache_parser.set_defaults(do=cache)

    run_parser = commands.add_parser("run", help="run an experiment and write its record")
    arguments.file(run_parser, "spec", "a YAML file: what to run")
    arguments.folder(run_parser, "--out", type=Path, metavar="DIR")
    run_parser.add_argument("--dry", action="store_true", help="only tell what it would cost")
    run_parser.set_defaults(do=run)
    for parser in (cache_parser, run_parser):
        arguments.working(parser)
        arguments.printing(parser)


def cache(args: argparse.Namespace) -> None:
    """Do what a spec of cached activations says, and tell what is in the folder now."""
    from g4lens.experiment.caching import cache_spec  # pyarrow, pydantic

    store = cache_spec(args.spec, args.out, **arguments.how(args))
    told = {
        "folder": str(args.out),
        "units": len(store.store.units),
        "done": len(store.store.files()),
        "prompts": len(store),
        "names": len(store.names),
        "rows": store.n_rows,
        "bytes": sum(path.stat().st_size for path in store.store.files().values()),
    }
    arguments.tell(args, told, lambda: _lines(told))


def run(args: argparse.Namespace) -> None:
    """Do what a spec of an experiment says, or with `--dry` tell what it would cost."""
    from g4lens.experiment.run import prepare
    from g4lens.experiment.run import run as run_spec

    if args.dry:
        _plan(prepare(args.spec).experiment, args)
        return
    if args.out is None:
        raise InputError("--out is missing: the folder to write to")
    found = run_spec(args.spec, args.out, **arguments.how(args))
    units, left = found.store.units, len(found.store.missing())
    checks = found.manifest["checks"] if found.is_recorded else []
    told = {
        "folder": str(args.out),
        "units": len(units),
        "done": len(units) - left,
        "report": None if left else str(args.out / "report.html"),
        "failed": [check["name"] for check in checks if not check["passed"]] or None,
    }
    arguments.tell(args, told, lambda: _lines(told))


def _plan(experiment: Any, args: argparse.Namespace) -> None:
    """What a run would cost."""
    plan = experiment.plan()
    total = {name: plan[name].sum().item() for name in ("units", "cells", "passes", "seconds")}

    def text() -> str:
        absent = (f"no {name} control: {why}" for name, why in experiment.absent.items())
        counted = ", ".join(f"{value:,.4g} {name}" for name, value in total.items())
        return "\n".join([plan.to_string(index=False), *absent, f"in all {counted}"])

    told = {"plan": plan.to_dict("records"), "total": total, "absent": experiment.absent}
    arguments.tell(args, told, text)


def _lines(told: dict[str, Any]) -> str:
    """A few facts, one a line."""
    return "\n".join(f"{key:<8} {value}" for key, value in told.items() if value is not None)
