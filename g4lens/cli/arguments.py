"""Arguments that several commands take."""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shtab

from g4lens.experiment.engine import ENGINES

Commands = Any  # argparse has no public name for what `add_subparsers` returns


def folder(parser: argparse.ArgumentParser, *name: str, **options: Any) -> None:
    """A folder, which the shell completes."""
    argument = parser.add_argument(*name, **options)
    argument.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]


def file(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """A file, which the shell completes."""
    argument = parser.add_argument(name, type=Path, help=what)
    argument.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]


def printing(parser: argparse.ArgumentParser) -> None:
    """How a command tells what it has to tell: see `tell`."""
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument(
        "--quiet", action="store_true", help="print nothing but errors, and JSON if it is asked for"
    )


def tell(args: argparse.Namespace, told: Any, text: Callable[[], str]) -> None:
    """Print what a command found out, in the way that `printing` was asked for.

    Args:
        args: of the command.
        told: what JSON can hold; infinities and NaN, which it has no words for, become null.
        text: the same to read.
    """
    if args.json:
        plain = json.loads(json.dumps(told), parse_constant=lambda _: None)
        print(json.dumps(plain, allow_nan=False), flush=True)
    elif not args.quiet:
        print(text(), flush=True)


def working(parser: argparse.ArgumentParser) -> None:
    """Who does the units of a store."""
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="k/n",
        help="do every n-th unit from the k-th on: one of n jobs, as of a SLURM array",
    )
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="local: this process")
    parser.add_argument("--address", help="of a Ray cluster; by default one is started here")
    parser.add_argument("--workers", type=int, help="of Ray; by default as many as there is room")


def how(args: argparse.Namespace) -> dict[str, Any]:
    """What `working` and `printing` asked for, as `run` and `cache_spec` take it."""
    asked = {name: getattr(args, name) for name in ("shard", "engine", "address", "workers")}
    return {**asked, "progress": not args.quiet}


def _shard(text: str) -> tuple[int, int]:
    """`3/8` as numbers; argparse tells of the error."""
    if not (found := re.fullmatch(r"(\d+)/(\d+)", text)) or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected k/n with k from 1 to n, as 3/8")
    return int(found[1]), int(found[2])
