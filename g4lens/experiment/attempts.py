"""How often, how long and with what code each unit was worked on: beside the results.

    attempts/PROCESS.jsonl    {"unit": ..., "worker": ..., "at": ...}       begun
                              {..., "seconds": ..., "code": {...}}          computed

A process appends to a file of its own; a line that a kill cut short is passed over. What a unit
holds does not follow from these files, and no two runs have the same.
"""

import json
import os
import socket
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from g4lens.experiment import version
from g4lens.experiment.files import failed
from g4lens.experiment.store import SPEC

LOG = "attempts"
TOLD = ("seconds", "worker", "at", "code")  # of what was computed


class Log:
    """What one process does for a folder of results. Lines wait until the folder has its spec."""

    def __init__(self, folder: Path):
        self._folder, self._path = folder, folder / LOG / f"{uuid.uuid4().hex}.jsonl"
        self._waiting: list[str] = []
        self._worker = f"{socket.gethostname()}:{os.getpid()}"

    def begun(self, unit: str) -> None:
        """A unit is being worked on. Raises: StoreError: no space, no permission."""
        self._note({"unit": unit})

    def computed(self, unit: str, seconds: float) -> None:
        """A unit's result is there, to be kept. Raises: StoreError: no space, no permission."""
        self._note({"unit": unit, "seconds": round(seconds, 3), "code": self._code})

    @cached_property
    def _code(self) -> dict[str, Any]:
        return version.code()

    def _note(self, what: dict[str, Any]) -> None:
        at = datetime.now(UTC).isoformat(timespec="microseconds")
        self._waiting.append(json.dumps({**what, "worker": self._worker, "at": at}))
        if not (self._folder / SPEC).exists():
            return
        try:
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in self._waiting))
        except OSError as error:
            raise failed(self._path.parent, error) from None
        self._waiting.clear()


def attempts(folder: Path) -> dict[str, dict[str, Any]]:
    """What the logs of a folder say of each unit.

    Returns: by unit `attempts`, how often it was begun, and of the last one that was computed
        `seconds`, `worker` (host and process), `at` (UTC) and `code` (as `version.code` gives it);
        None where none was.
    """
    told: dict[str, dict[str, Any]] = {}
    for line in sorted(_lines(folder), key=lambda line: line["at"]):
        unit = told.setdefault(line["unit"], {"attempts": 0, **dict.fromkeys(TOLD)})
        if "seconds" in line:
            unit |= {key: line.get(key) for key in TOLD}
        else:
            unit["attempts"] += 1
    return told


def _lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in (folder / LOG).glob("*.jsonl"):
        for text in path.read_text("utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and {"unit", "worker", "at"} <= line.keys():
                yield line
