"""`g4lens tutorial`: the notebooks, to work in."""

import argparse
import filecmp
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from g4lens.cli import arguments
from g4lens.errors import InputError, listed
from g4lens.resources import bundled


def add(commands: arguments.Commands) -> None:
    """The command of this file."""
    parser = commands.add_parser("tutorial", help="copy the notebooks and open them")
    arguments.folder(parser, "folder", nargs="?", default="g4lens_tutorial", type=Path)
    parser.add_argument("--no-open", action="store_true", help="copy them only")
    arguments.printing(parser)
    parser.set_defaults(do=tutorial)


def tutorial(args: argparse.Namespace) -> None:
    """Copy the notebooks to a folder and open them in JupyterLab, on this machine only.

    Errors: those of `copied`.
    """
    copies = copied(args.folder, not args.no_open)
    told = {
        "folder": str(args.folder.resolve()),
        "notebooks": [path.name for path in copies],
        "opened": None if args.no_open else str(copies[0]),
    }
    arguments.tell(args, told, lambda: f"{len(copies)} notebooks in {told['folder']}")
    if not args.no_open:
        options = ["--ip=127.0.0.1", "--KernelManager.transport_encryption=auto"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.append("--allow-root")  # JupyterLab does not start for root without it
        # In place of this process, so that Ctrl-C is JupyterLab's own.
        os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options, str(copies[0])])


def copied(folder: Path, open_it: bool = True) -> list[Path]:
    """Copy the notebooks, if they can be opened, should they be.

    Returns: the copies, the first one first.

    Raises:
        InputError: a notebook there was changed, the folder cannot be written to, JupyterLab is not
            installed, or there is nothing to copy.
    """
    sources = sorted(bundled("notebooks").glob("*.ipynb"))
    if not sources:
        raise InputError(f"no notebooks in {bundled('notebooks')}")
    changed = [
        source.name
        for source in sources
        if (folder / source.name).exists()
        and not filecmp.cmp(source, folder / source.name, shallow=False)
    ]
    if changed:
        raise InputError(
            f"{folder} holds {listed(changed)} with changes, which would be lost: name another "
            f"folder, or go on in this one with `jupyter lab {folder}`"
        )
    if open_it and find_spec("jupyterlab") is None:
        raise InputError("JupyterLab is not installed: pip install 'g4lens[lab]', or use --no-open")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sources:
            shutil.copyfile(source, folder / source.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be written to ({error}): name another folder") from None
    return [folder / source.name for source in sources]
