"""What does the activation store cost: writing, reading at random, caching a set of prompts.

    python -m tests.benchmarks.store [write] [read] [overhead] [--rounds N]

Beside plain safetensors, zarr 3 with sharding, and the bare forward passes, in interleaved runs of
one process, one thread. Asserts nothing.
"""

import argparse
import dataclasses
import itertools
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from g4lens.experiment.activation_store import ActivationStore
from g4lens.experiment.caching import cache_activations
from g4lens.experiment.store import UnitStore
from g4lens.experiment.work import Work
from g4lens.model.gemma4 import Gemma4
from tests.benchmarks.forward import row
from tests.benchmarks.measure import ratio
from tests.conftest import randomised, small_config

NAME = "blocks.0.hook_resid_post"


def write(folder: Path, rounds: int) -> None:
    """Shards of 64 MiB: hash, rename and all, beside `safetensors.torch.save_file`.

    Into the page cache, where it is the hash that is timed, and until the disk has them.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"blocks.{i}.hook_resid_post": torch.randn(1024, 1024, generator=generator)
        for i in range(16)
    }
    for what, settle in (("page cache", lambda path: None), ("disk", _on_disk)):
        place = folder / what
        units = [f"{i}" for i in range(rounds + 1)]
        store, numbers = UnitStore(place / "ours", {}, units), itertools.count()
        (place / "theirs").mkdir(parents=True)

        def ours(store=store, units=units, settle=settle):
            unit = units[len(store.files())]
            store.commit(unit, tensors)
            settle(store.files()[unit])

        def theirs(place=place, numbers=numbers, settle=settle):
            path = place / "theirs" / f"{next(numbers)}.safetensors"
            save_file(tensors, path)
            settle(path)

        a, b, relative = ratio(ours, theirs, rounds)
        row(f"bytes a second, {what} / safetensors", 64 / a, 64 / b, 1 / relative, "MiB", ">= 0.8")


def _on_disk(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read(folder: Path, rounds: int) -> None:
    """1,000 random vectors of 1,536 numbers among 32 units of 2,048, beside zarr 3 sharded."""
    import zarr

    store, whole = _filled(folder, n_units=32, per_unit=8, n=256, d=1536)
    array = zarr.create_array(
        store=folder / "zarr", shape=whole.shape, chunks=(64, 1536), shards=(2048, 1536),
        dtype="float32",
    )  # fmt: skip
    array[:] = whole.numpy()
    pick = random.Random(0)
    places = [(pick.randrange(256), pick.randrange(256)) for _ in range(1000)]
    flat = np.array([prompt * 256 + position for prompt, position in places])
    expected = whole[flat]

    def all_at_once() -> torch.Tensor:
        return store.take(NAME, *zip(*places, strict=True))

    def one_by_one() -> torch.Tensor:
        return torch.stack([store[prompt, NAME, position] for prompt, position in places])

    def theirs_at_once() -> np.ndarray:
        return array.oindex[flat]

    def theirs_one_by_one() -> np.ndarray:
        return np.stack([array[i] for i in flat])

    for ours, theirs in ((all_at_once, theirs_at_once), (one_by_one, theirs_one_by_one)):
        assert torch.equal(ours(), expected) and np.array_equal(theirs(), expected.numpy())
        a, b, relative = ratio(ours, theirs, max(3, rounds // 3))
        what = ours.__name__.replace("_", " ")
        row(
            f"1,000 random vectors, {what} / zarr {zarr.__version__}",
            a,
            b,
            1 / relative,
            "s",
            ">= 20",
        )


def overhead(folder: Path, rounds: int) -> None:
    """All residual streams of 64 prompts of 24 to 64 tokens, beside the bare passes."""
    cfg = dataclasses.replace(
        small_config(), d_model=512, d_mlp=2048, n_heads=8, d_head_local=64, d_head_global=128,
        vision=None, audio=None, image_id=None, audio_id=None, video_id=None,
    )  # fmt: skip
    model = randomised(Gemma4(cfg))
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 90, (24 + i * 7 % 41,), generator=generator) for i in range(64)]
    names = [name for name in model.hook_points if name.endswith("hook_resid_post")]
    work = Work(model, prompts, names, "all", None, 32)
    index = [list(work._prompts_of(unit)) for unit in work.units]
    groups = [
        [unit[i] for i in group]
        for unit in index
        for group in work._batches([len(prompts[k]) for k in unit])
    ]
    numbers = itertools.count()

    def bare() -> None:
        with torch.no_grad():
            for group in groups:
                model([prompts[i] for i in group], stop=work.stop)

    def ours() -> ActivationStore:
        out = folder / f"cached{next(numbers)}"
        return cache_activations(model, prompts, out, names, progress=False)

    a, b, relative = ratio(ours, bare, max(3, rounds // 2))
    row(f"{len(groups)} batches cached / bare forward passes", a, b, relative, "s", "<= 1.15")


def _filled(
    folder: Path, n_units: int, per_unit: int, n: int, d: int
) -> tuple[ActivationStore, torch.Tensor]:
    """A store of random vectors, and all of them in one tensor."""
    whole = torch.randn(n_units * per_unit * n, d, generator=torch.Generator().manual_seed(0))
    spec = {
        "kind": "activations",
        "names": [NAME],
        "prompts": {"n": n_units * per_unit, "sha256": ""},
        "prompts_per_unit": per_unit,
    }
    units = [f"{i:06}" for i in range(n_units)]
    store, rows = UnitStore(folder / "store", spec, units), per_unit * n
    for i, unit in enumerate(units):
        tensors = {
            NAME: whole[i * rows : (i + 1) * rows],
            "prompts": torch.arange(i * per_unit, (i + 1) * per_unit),
            "lengths": torch.full((per_unit,), n),
            "offsets": torch.arange(0, rows + 1, n),
            "positions": torch.arange(n).repeat(per_unit),
            "tokens": torch.zeros(rows, dtype=torch.int64),
        }
        store.commit(unit, tensors)
    store.write_index()
    return ActivationStore(folder / "store"), whole


PARTS = {"write": write, "read": read, "overhead": overhead}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        print(f"\n{part}: {PARTS[part].__doc__}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            PARTS[part](Path(folder), args.rounds)


if __name__ == "__main__":
    main()
