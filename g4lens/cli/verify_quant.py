"""`g4lens verify-quant`: what 8 or 4 bits make of a model's predictions."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from g4lens.cli import arguments


def add(commands: arguments.Commands) -> None:
    """The command of this file."""
    parser = commands.add_parser(
        "verify-quant", help="a quantised model's predictions beside those in bfloat16"
    )
    arguments.folder(parser, "name", help='"tiny", a folder, or a name on the hub')
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="a prompt a line: .jsonl or .csv",
    )
    parser.add_argument("--quantize", choices=["int8", "int4"], default="int4")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    arguments.printing(parser)
    parser.set_defaults(do=verify_quant)


def verify_quant(args: argparse.Namespace) -> None:
    """Tell divergence and agreement, prompt by prompt and in all."""
    from g4lens.analysis.quantisation import quantisation_error
    from g4lens.experiment.prompts_file import read_prompts

    options: dict[str, Any] = {"revision": args.revision, "device": args.device, "ple": "disk"}
    prompts = read_prompts(args.prompts)
    found = quantisation_error(
        args.name, prompts, args.quantize, progress=not args.quiet, **options
    )
    rows = list(zip(found.kl, found.agreement, found.n_positions, strict=True))
    total = found.total_kl, found.total_agreement, sum(found.n_positions)
    keys = ("kl", "agreement", "positions")
    told = {
        "prompts": [dict(zip(keys, row, strict=True)) for row in rows],
        "all": dict(zip(keys, total, strict=True)),
    }
    heading = f"{args.name} in {args.quantize} beside bfloat16"
    arguments.tell(args, told, lambda: "\n".join([heading, *_table([*rows, total])]))


def _table(rows: Sequence[tuple[float, float, int]]) -> list[str]:
    """A line for each prompt, and the last one for all."""
    names = [*range(len(rows) - 1), "all"]
    return [
        "  prompt  positions  KL (nats)  same likeliest token",
        *(
            f"  {name:>6}  {n:>9,}  {kl:>9.4f}  {agreement:>20.1%}"
            for name, (kl, agreement, n) in zip(names, rows, strict=True)
        ),
    ]
