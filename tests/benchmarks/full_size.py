"""E2B's full shape on this machine, beside transformers: loading, memory, agreement, prefill.

    python -m tests.benchmarks.full_size                    # load, memory, logits, prefill
    python -m tests.benchmarks.full_size load --folder DIR  # the checkpoint is there, or made there

Needs 25 GB of disk (10.2 GB of it for the checkpoint, in DIR or in a temporary folder), 12 GB of
memory, and Linux. Whatever is measured is measured in a fresh process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from tests.benchmarks import measure

Told = dict[str, Any]
SIDE = 6  # soft tokens of the picture, across and down
N = 64  # tokens of the prompt, picture included
NEW = 16  # tokens generated

# ---- probes: what one process does and tells


def prompt(folder: Path, with_picture: bool = True) -> dict[str, Tensor]:
    """Words of the bundled vocabulary, and a picture between them."""
    from tests.conftest import pictures  # with pytest, whose memory is not to be counted elsewhere

    raw = json.loads((folder / "config.json").read_text())
    ids = torch.randint(20, 900, (1, N), generator=torch.Generator().manual_seed(1))
    ids[0, 0] = 2
    if not with_picture:
        return {"input_ids": ids}
    soft = [raw["image_token_id"]] * SIDE**2
    ids[0, 4 : 6 + len(soft)] = torch.tensor([raw["boi_token_id"], *soft, raw["eoi_token_id"]])
    return {"input_ids": ids, **pictures((SIDE, SIDE), patch=16)}


def ours(folder: Path, out: Path | None, **options: Any) -> Told:
    """Load with these options, run the prompt if its logits are to go somewhere."""
    import g4lens

    start = time.perf_counter()
    model = g4lens.load(folder, device="cpu", **options)
    inputs = prompt(folder, with_picture=model.vision is not None)
    return _told(start, lambda: model(inputs), out)


def theirs(folder: Path, out: Path | None) -> Told:
    """The same with transformers, in the dtype stored."""
    from transformers import Gemma4ForConditionalGeneration as Theirs

    start = time.perf_counter()
    model = Theirs.from_pretrained(folder, dtype="auto")
    inputs = prompt(folder)
    soft = inputs["input_ids"] == model.config.image_token_id
    return _told(start, lambda: model(**inputs, mm_token_type_ids=soft.long()).logits, out)


def prefill(folder: Path, out: Path | None, n: int, rounds: int) -> Told:
    """The last logit of `n` tokens beside all of them, in turn."""
    import g4lens

    model = g4lens.load(folder, device="cpu", ple="disk", vision=False, audio=False)
    ids = torch.randint(20, 900, (1, n), generator=torch.Generator().manual_seed(2))
    last, whole, ratio = measure.ratio(lambda: model(ids, read=-1), lambda: model(ids), rounds)
    return {"last": last, "whole": whole, "ratio": ratio}


def quantised(folder: Path, out: Path | None, kind: Any, embed: Any, n: int) -> Told:
    """Load in fewer bits, without towers; then, if `n`, a pass and generation after `n` tokens."""
    import g4lens

    start = time.perf_counter()
    with peak() as most:
        model = g4lens.load(folder, device="cpu", embed=embed, quantize=kind, **TEXT)
    model.processor = None  # random weights choose tokens that the bundled vocabulary has not
    told: Told = {"seconds": time.perf_counter() - start, "peak": most, "loaded": held()}
    if not n:
        return told
    ids = torch.randint(20, 900, (1, n), generator=torch.Generator().manual_seed(2))
    model(ids, read=-1)
    told["pass"] = min(measure.seconds(lambda: model(ids, read=-1)) for _ in range(3))
    one, many = (
        min(measure.seconds(lambda k=k: model.generate(ids, k, stop_tokens=[])) for _ in range(3))
        for k in (1, 1 + NEW)
    )
    return told | {"rate": NEW / (many - one)}


def _told(start: float, run: Callable[[], Tensor], out: Path | None) -> Told:
    seconds = time.perf_counter() - start
    loaded, anonymous = held()
    told = {"seconds": seconds, "loaded": loaded}
    if out is None:
        return told
    with peak() as most:
        logits = run()
    torch.save(logits, out)
    return told | {"used": held()[0], "peak": most[0], "grown": most[1] - anonymous}


def held() -> tuple[int, int]:
    """Bytes of memory that this process holds: in all, and those that no file backs."""
    resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
    return resident * 4096, (resident - shared) * 4096


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most that is held in the block, in all and without files, seen every millisecond."""
    most, done = list(held()), threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            most[:] = map(max, most, held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield most
    done.set()
    watcher.join()


# ---- rows: what is asked of the probes

PROBES = {probe.__name__: probe for probe in (ours, theirs, prefill, quantised)}
TEXT = {"ple": "disk", "vision": False, "audio": False}


class Machine:
    """Runs probes in processes of their own, on one checkpoint."""

    def __init__(self, folder: Path, scratch: Path):
        self.folder, self.scratch = folder, scratch

    def run(self, probe: str, name: str | None = None, **options: Any) -> Told:
        """What a probe tells; with a name it runs the prompt and keeps the logits under it."""
        out = None if name is None else str(self.scratch / name)
        asked = json.dumps([probe, str(self.folder), out, options])
        command = [sys.executable, "-m", __spec__.name, "--probe", asked]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])

    def logits(self, name: str) -> Tensor:
        """What a probe computed."""
        return torch.load(self.scratch / name).float()


def row(what: str, a: str, b: str, ratio: float | None, aim: str) -> None:
    """Print a row of the table."""
    print(f"| {what} | {a} | {b} | {'' if ratio is None else f'{ratio:.2f}'} | {aim} |", flush=True)


def load(machine: Machine, rounds: int) -> None:
    """Time to ready, the checkpoint in the page cache for both."""
    machine.run("ours", ple="disk"), machine.run("theirs")
    times = []
    for i in range(3 * rounds):  # who goes first changes
        runs = [lambda: machine.run("ours", ple="disk"), lambda: machine.run("theirs")]
        told = [run()["seconds"] for run in (runs if i % 2 == 0 else runs[::-1])]
        times.append(told if i % 2 == 0 else told[::-1])
    a, b = (median(x) for x in zip(*times, strict=True))
    ratio = median(x / y for x, y in times)
    row("time to ready, `ple='disk'`", f"{a:.2f} s", f"{b:.2f} s", ratio, "<= 0.6")


def memory(machine: Machine, rounds: int) -> None:
    """Resident memory after loading, and once a pass has used all that it needs."""
    there = machine.run("theirs", "logits")
    for what, options, aim in (
        ("`ple='disk'`, both towers", {"ple": "disk"}, "<= 5.9 GB"),
        ("the same, `embed='disk'`", {"ple": "disk", "embed": "disk"}, ""),
        ("`ple='disk'`, no tower", TEXT, "<= 4.9 GB"),
        ("the same, `embed='disk'`", {**TEXT, "embed": "disk"}, ""),
    ):
        here = machine.run("ours", "logits", **options)
        for when, key, bound in (("loaded", "loaded", aim), ("after a pass", "used", "")):
            beside = "" if "vision" in options else _gb(there[key])
            row(f"resident, {when}: {what}", _gb(here[key]), beside, None, bound)
        if options == {"ple": "disk"}:
            for name, key, bound in (
                ("peak of the pass, resident", "peak", "<= 0.65"),
                ("peak of the pass beside the weights", "grown", ""),
            ):
                row(name, _gb(here[key]), _gb(there[key]), here[key] / there[key], bound)


def logits(machine: Machine, rounds: int) -> None:
    """Both in bfloat16, beside each other and beside our own float32."""
    machine.run("ours", "ours", ple="disk"), machine.run("theirs", "theirs")
    machine.run("ours", "exact", ple="disk", audio=False, dtype="float32")
    here, there, exact = (machine.logits(name) for name in ("ours", "theirs", "exact"))
    a, b = _distance(here, exact), _distance(there, exact)
    row("logits in bfloat16, distance from float32", f"{a:.4f}", f"{b:.4f}", a / b, "<= 1.1")
    between, same = _distance(here, there), (here.argmax(-1) == there.argmax(-1)).float().mean()
    row("ours from theirs", f"{between:.4f}", "", None, "<= 0.06")
    row("positions with the same likeliest token", f"{same:.2f}", "", None, "")


def prefill_row(machine: Machine, rounds: int) -> None:
    """`read=-1` beside all logits."""
    told = machine.run("prefill", n=1024, rounds=rounds)
    a, b = f"{told['last']:.1f} s", f"{told['whole']:.1f} s"
    row("1,024 tokens, `read=-1` beside our full read", a, b, told["ratio"], "<= 0.6")


def fewer_bits(machine: Machine, rounds: int) -> None:
    """Memory of a quantised decoder with both tables on disk, and its speed with one there."""
    for kind, aims in (("int4", ("<= 1.5 GB", "<= 3 GB")), ("int8", ("", ""))):
        told = machine.run("quantised", kind=kind, embed="disk", n=0)
        for what, n, aim in (
            ("anonymous memory after loading", told["loaded"][1], aims[0]),
            ("most on the way, with mapped pages", told["peak"][0], aims[1]),
        ):
            row(f"{what}: `quantize='{kind}'`, tables on disk, no tower", _gb(n), "", None, aim)
        row(f"time to ready, `quantize='{kind}'`", f"{told['seconds']:.0f} s", "", None, "")
    kinds = (None, "int8", "int4")
    for n in (64, 512):
        plain, *others = (machine.run("quantised", kind=x, embed="device", n=n) for x in kinds)
        for kind, told in zip(kinds[1:], others, strict=True):
            for what, key, unit in (
                ("last logit of", "pass", "s"),
                ("generated after", "rate", "/s"),
            ):
                a, b = told[key], plain[key]
                row(f"{what} {n} tokens, {kind}", f"{a:.2f} {unit}", f"{b:.2f} {unit}", a / b, "")


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


def _distance(x: Tensor, y: Tensor) -> float:
    """Root mean square of the difference, in that of `y`."""
    return ((x - y).norm() / y.norm()).item()


ROWS = {
    "load": load,
    "memory": memory,
    "logits": logits,
    "prefill": prefill_row,
    "quantised": fewer_bits,
}


def main() -> None:
    """Run the rows named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], default=[])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    if args.probe:
        probe, folder, out, options = json.loads(args.probe)
        print(json.dumps(PROBES[probe](Path(folder), out and Path(out), **options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "e2b"
        if not (folder / "model.safetensors.index.json").is_file():
            from tests.benchmarks import make_e2b  # with transformers

            make_e2b.make(folder)
        print("| what | ours | other | ratio | aim |\n|---|---|---|---|---|")
        for name in args.rows or ROWS:
            ROWS[name](Machine(folder, Path(scratch)), args.rounds)


if __name__ == "__main__":
    main()
