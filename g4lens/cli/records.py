"""`g4lens verify` and `g4lens report`: what was run, looked at again and side by side."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from g4lens.cli import arguments

if TYPE_CHECKING:
    from g4lens.experiment.record import Verdict
    from g4lens.experiment.store import UnitStore


def add(commands: arguments.Commands) -> None:
    """The commands of this file."""
    verify_parser = commands.add_parser(
        "verify", help="compare a run with its hashes, and run some units again"
    )
    arguments.folder(
        verify_parser, "run", type=Path, help="the folder of a run, or of cached activations"
    )
    verify_parser.add_argument(
        "--units", type=int, default=3, metavar="K", help="of a run, to run again; 3 by default"
    )
    verify_parser.set_defaults(do=verify)

    report_parser = commands.add_parser("report", help="runs of one model and pairs side by side")
    arguments.folder(report_parser, "runs", nargs="+", type=Path, help="folders of runs")
    report_parser.add_argument("--out", type=Path, metavar="HTML", help="write a page as well")
    report_parser.set_defaults(do=report)
    for parser in (verify_parser, report_parser):
        arguments.printing(parser)


def verify(args: argparse.Namespace) -> int:
    """Tell whether a run, or cached activations, are what they say: 1 if not."""
    from g4lens.experiment.store import UnitStore

    store = UnitStore.open(args.run)
    is_cache = store.spec.get("kind") == "activations"
    verdict = _of_cache(store) if is_cache else _of_run(args)
    arguments.tell(args, {"passed": verdict.passed, **vars(verdict)}, lambda: str(verdict))
    return 0 if verdict.passed else 1


def _of_run(args: argparse.Namespace) -> "Verdict":
    """A run beside its hashes, and some of its units run again."""
    from g4lens.experiment.record import Run  # pyarrow, pydantic

    return Run(args.run).verify(args.units, progress=not args.quiet)


def _of_cache(store: "UnitStore") -> "Verdict":
    """Every file of cached activations beside its hash; nothing is computed again."""
    from g4lens.experiment.record import Verdict

    n = len(store.files())
    return Verdict(
        tuple(store.verify()), (f"the hashes of {n} units, none of which was run again",)
    )


def report(args: argparse.Namespace) -> None:
    """Put runs side by side, or refuse to."""
    from g4lens.experiment.record import compare

    several = compare(args.runs)
    if args.out is not None:
        several.write(args.out)
    rows = json.loads(str(several.long.to_json(orient="records", double_precision=15)))
    told = {"runs": list(several.runs), "differences": several.differences, "cells": rows}
    arguments.tell(args, told, lambda: str(several))
