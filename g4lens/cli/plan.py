"""`g4lens plan`: what memory a run will need, before anything is fetched or loaded."""

import argparse
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from g4lens.cli import arguments
from g4lens.config import Gemma4Config
from g4lens.cost import block_flop
from g4lens.errors import InputError
from g4lens.load import resolve
from g4lens.plan import BITS, RELEASED, Options, Plan, fitting, plan
from g4lens.resources import free_memory

DEFAULT = "google/gemma-4-E2B-it"


def add(commands: arguments.Commands) -> None:
    """The command of this file."""
    parser = commands.add_parser("plan", help="memory that a run will need, by part")
    arguments.folder(
        parser,
        "name",
        nargs="?",
        default=DEFAULT,
        help=f'"tiny", a folder, or a name on the hub; by default {DEFAULT}',
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--context", type=int, required=True, help="tokens of each prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts")
    parser.add_argument("--chunk", type=int, help="tokens at a time; by default all")
    parser.add_argument("--dtype", default="bfloat16", help="of weights and activations")
    parser.add_argument("--cache", action="append", metavar="PATTERN", help="activations to keep")
    parser.add_argument("--read", default="last", help="logits wanted: last or all")
    for table in ("ple", "embed"):
        parser.add_argument(f"--{table}", default="device", help="device, ram or disk")
    for tower in ("vision", "audio"):
        parser.add_argument(f"--no-{tower}", dest=tower, action="store_false")
    parser.add_argument("--memory", type=_bytes, metavar="GB", help="of the machine; else this one")
    parser.add_argument("--out", type=Path, help="draw the parts: plan.svg, plan.png or plan.pdf")
    arguments.printing(parser)
    parser.set_defaults(do=tell_plan)


def tell_plan(args: argparse.Namespace) -> None:
    """Tell the plan that the arguments ask for; draw it as well if they name a file."""
    names = ("context", "batch", "chunk", "dtype", "cache", "read", "ple", "embed")
    asked = {name: getattr(args, name) for name in (*names, "vision", "audio")}
    options = Options(**asked)
    cfg = geometry(args.name, args.revision)
    free = _free() if args.memory is None else args.memory
    plans = {bits: plan(cfg, replace(options, quantize=q)) for q, bits in BITS.items()}
    best = fitting(cfg, options, free)
    flop = args.batch * _flop(cfg, args.context)
    if args.out is not None:
        _draw({f"{bits} bit": p.parts for bits, p in plans.items()}, free, args.out)
    fits = None if best is None else best.to_dict()
    told = {"name": args.name, "free": free, "flop": flop, "fits": fits}
    told["plans"] = {bits: p.to_dict() for bits, p in plans.items()}
    lines = [
        f"{args.name}: {args.batch} x {args.context:,} tokens, {args.dtype}, logits: {args.read}",
        *_table(plans, free),
        f"{free / 1e9:.2f} GB are free: {_advice(plans[16], best)}",
        f"about {flop / 1e12:,.3g} TFLOP with read=-1",
    ]
    arguments.tell(args, told, lambda: "\n".join(lines))


def _bytes(text: str) -> int:
    """A number of GB as bytes; argparse tells of the error."""
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 < gigabytes < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of GB above 0")
    return int(gigabytes * 1e9)


def geometry(name: str, revision: str | None = None) -> Gemma4Config:
    """The numbers of a model; those of a released one are known without a network.

    Errors: those of `g4lens.load`.
    """
    known = re.fullmatch(r"google/gemma-4-(\w+?)(-it)?", name)
    if known and known[1] in RELEASED and revision is None:
        return RELEASED[known[1]]
    return Gemma4Config.from_json(resolve(name, revision, ["config.json"])[0])


def _flop(cfg: Gemma4Config, n: int) -> float:
    """FLOP of one prompt read at its end; on average a query of a global block sees half of it."""
    blocks = (
        block_flop(cfg, layer, *((n, max(1, n // 2)) if layer <= cfg.horizon else (1, n)))
        for layer in range(cfg.n_layers)
    )
    return sum(blocks) + 2.0 * cfg.d_model * (n * cfg.n_layers * cfg.d_ple + cfg.d_vocab)


def _table(plans: Mapping[int, Plan], free: int) -> list[str]:
    """A line for each part, a column for each number of bits."""
    parts = [part for part in plans[16].parts if any(p.parts[part] for p in plans.values())]
    unit, name = (1e9, "GB") if plans[16].total >= 1e9 else (1e6, "MB")
    rows = [
        [name, *(f"{bits} bit" for bits in plans)],
        *([part, *(f"{p.parts[part] / unit:.3f}" for p in plans.values())] for part in parts),
        ["total", *(f"{p.total / unit:.3f}" for p in plans.values())],
        ["fits here", *("yes" if p.total <= free else "no" for p in plans.values())],
    ]
    return [f"  {row[0]:<16}" + "".join(f"{x:>10}" for x in row[1:]) for row in rows]


def _advice(asked: Plan, best: Plan | None) -> str:
    """Whether it fits, and with what."""
    if best is None:
        return "nothing that could be given up makes it fit"
    before, now = vars(asked.options), vars(best.options)
    changes = [f"{name}={x!r}" for name, x in now.items() if x != before[name]]
    if not changes:
        return "it fits"
    return f"it fits with {', '.join(changes)}: {best.total / 1e9:.2f} GB"


def _free() -> int:
    """Bytes of the device that `load` would take."""
    return free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _draw(plans: Mapping[str, Mapping[str, int]], free: int, out: Path) -> None:
    """Save the picture. Raises: InputError: a kind of file that is none, or no permission."""
    from matplotlib.figure import Figure  # on first use, and no window whatever the backend

    from g4lens.plots.memory import memory

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    memory(plans, free, figure.subplots())
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:
        raise InputError(f"{out} cannot be drawn: {error}") from None
