"""Units done by Ray's workers, each an actor that loads the model by its source.

this process ─ what is to be computed, pickled; the model as its source ─> worker: load
             ─ one unit at a time ─>                                        compute, commit
             <─ done, or dead: another worker, and the unit again ─
"""

import io
import os
import pickle
import socket
import sys
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from g4lens.errors import G4LensError, InputError, StoreError, WeightsError, listed
from g4lens.experiment.attempts import Log
from g4lens.experiment.store import UnitStore
from g4lens.hooks import edited_points
from g4lens.load import load
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    from g4lens.experiment.engine import Compute

ATTEMPTS = 4  # of a unit whose workers die
# Read by Ray when it is imported or started: addresses of this machine alone, nothing sent home
QUIET = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def spread(
    store: UnitStore,
    units: Sequence[str],
    compute: "Compute",
    model: Gemma4,
    address: str | None,
    workers: int | None,
) -> Generator[str]:
    """Have units done by workers; yields each when it is. See `engine.fill`."""
    job = Job.of(store, compute, model)
    with connected(address) as ray:
        options, slots = _slots(ray, job)
        n = min(workers or slots, len(units))
        if n > slots or not slots:
            raise InputError(
                f"{n or 1} workers, each with {_told(options)}, and room for {slots}: take fewer, "
                "or fewer threads in each (OMP_NUM_THREADS=1)"
            )
        yield from _dealt(ray, units, store, job, options, n)
    there = store.files()
    if unseen := [unit for unit in units if unit not in there]:
        raise StoreError(
            f"{len(unseen)} units are done and not in {store.folder}: {listed(unseen, 4)}; give a "
            "folder that all machines share, or run again if files take a while to be seen"
        )


def _dealt(
    ray: Any, units: Sequence[str], store: UnitStore, job: "Job", options: dict[str, Any], n: int
) -> Iterator[str]:
    """One unit at a time to each of n workers; a dead worker is replaced, its unit tried again."""
    held = ray.put(job)

    def hired() -> Any:
        return ray.remote(Worker).options(**options).remote(held)

    waiting, lost = deque(units), Counter[str]()
    idle, busy = [hired() for _ in range(n)], {}
    try:
        while waiting or busy:
            while waiting and idle:
                worker, unit = idle.pop(), waiting.popleft()
                busy[worker.do.remote(unit)] = worker, unit
            (ready, *_), _ = ray.wait(list(busy))
            worker, unit = busy.pop(ready)
            try:
                ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, G4LensError) else error from None
            except ray.exceptions.RayError as error:
                ray.kill(worker)  # it may only be out of reach
                idle.append(hired())
                lost[unit] += 1
                if lost[unit] == ATTEMPTS:
                    told = f"unit {unit}: {ATTEMPTS} workers died of it, the last one so: {error}"
                    raise StoreError(told) from None
                waiting.appendleft(unit)
            else:
                idle.append(worker)
                yield unit
    finally:
        for worker in idle + [worker for worker, _ in busy.values()]:
            ray.kill(worker)


@dataclass(frozen=True)
class Job:
    """What a worker needs to know.

    Attributes:
        source: of the model.
        device: that the model is on here, as "cuda"; which one, Ray says.
        threads: of torch here: another number could give other last bits.
        folder: this process's, from which relative paths are meant.
        pickled: what computes a unit, the store and the model's processor, with nothing in the
            place of the model.
    """

    source: Any
    device: str
    threads: int
    folder: str
    pickled: bytes

    @classmethod
    def of(cls, store: UnitStore, compute: "Compute", model: Gemma4) -> "Job":
        """Raises: InputError, WeightsError: workers could not load this very model."""
        if hung := edited_points():
            raise InputError(
                f"hooks hang at {listed((point.name for point in hung), 4)}, and workers would not "
                "have them: use engine 'local'"
            )
        source = model.source
        _ = source.hashes  # kept in the source, to be compared
        file = io.BytesIO()
        try:
            _Pickler(file, model).dump((compute, store, model.processor))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise InputError(f"what is to be computed cannot go to workers: {error}") from None
        threads = torch.get_num_threads()
        return cls(source, model.device.type, threads, str(Path.cwd()), file.getvalue())

    def opened(self) -> tuple["Compute", UnitStore]:
        """What computes a unit, with a model of this process's, and the store.

        Raises: InputError: a folder that is not there. WeightsError: other weights.
        """
        try:
            os.chdir(self.folder)
        except OSError as error:
            raise InputError(f"{socket.gethostname()}: {self.folder}: {error.strerror}") from None
        torch.set_num_threads(self.threads)
        source = self.source
        model = load(source.name, **{**source.options, "device": self.device})
        if model.origin.hashes != source.hashes:
            raise WeightsError(
                f"{socket.gethostname()}: the weights in {model.origin.path} are not those of "
                f"{source.path} where this was started"
            )
        compute, store, model.processor = _Unpickler(io.BytesIO(self.pickled), model).load()
        return compute, store


class Worker:
    """A Ray actor. Loads at its first unit, so that what is wrong comes back as that error."""

    def __init__(self, job: Job):
        self._job, self._opened = job, None

    def do(self, unit: str) -> None:
        """Compute a unit and keep it."""
        from g4lens.experiment.engine import do

        if self._opened is None:
            compute, store = self._job.opened()
            self._opened = compute, store, Log(store.folder)
        do(unit, *self._opened)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, model: Gemma4):
        super().__init__(file)
        self._model = model

    def persistent_id(self, obj: Any) -> str | None:
        return "model" if obj is self._model else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, model: Gemma4):
        super().__init__(file)
        self._model = model

    def persistent_load(self, pid: str) -> Gemma4:
        return self._model


# ---- the cluster


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """Ray, connected: to what this process is connected to, to an address, or to one started here.

    Raises: InputError: Ray is not installed, nothing answers, or it would not stay on loopback.
    """
    if "ray" not in sys.modules:
        os.environ.update(QUIET)
    try:
        import ray
    except ImportError:
        raise InputError("Ray is not installed: pip install 'g4lens[ray]'") from None
    if ray.is_initialized():
        if address is not None:
            raise InputError(f"address {address!r}: this process is connected to Ray already")
        yield ray
        return
    options: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
    else:
        _knock(address)
        options |= {"address": address}
    try:
        about: Any = ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"no Ray cluster at {address or 'this machine'}: {error}") from None
    try:
        if address is None and about.address_info["node_ip_address"] not in ("127.0.0.1", "::1"):
            settings = " ".join(f"{k}={v}" for k, v in QUIET.items())
            raise InputError(
                "Ray was imported before it could be told to stay on this machine: set "
                f"{settings} first, or give an address"
            )
        yield ray
    finally:
        with suppress(KeyboardInterrupt):  # a second Ctrl-C must not leave it half shut
            ray.shutdown()


def _knock(address: str) -> None:
    """Try whether somebody is there: Ray tries for minutes. Raises: InputError: nobody is."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"no Ray cluster at {address}: {error}") from None


def _slots(ray: Any, job: Job) -> tuple[dict[str, Any], int]:
    """What a worker takes of a machine, and how many there is room for."""
    on_gpu = job.device == "cuda"
    options = {"num_gpus": 1, "num_cpus": 0} if on_gpu else {"num_cpus": job.threads}
    what, size = ("GPU", 1) if on_gpu else ("CPU", job.threads)
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return options, sum(int(machine.get(what, 0)) // size for machine in machines)


def _told(options: dict[str, Any]) -> str:
    return "a GPU" if options.get("num_gpus") else f"{options['num_cpus']} CPUs"
