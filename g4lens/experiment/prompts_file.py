"""Prompts from a file, with their pictures and sounds beside it.

JSON lines, a prompt a line:

    {"text": "The capital of France is"}
    {"image": "pictures/street.png", "text": "What is on the left?"}
    {"parts": ["Compare ", {"image": "a.png"}, " with ", {"image": "b.png"}]}
    {"messages": [{"role": "user", "content": [{"image": "a.png"}, "What is this?"]}]}

CSV with the columns text, image, audio and messages (as JSON), of which it has at least one. Or a
folder as Hugging Face's `save_to_disk` writes it, with those columns among others.

Nothing is unpickled or run, and no path leaves the folder.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from g4lens.errors import InputError, did_you_mean, listed
from g4lens.experiment.media import KINDS
from g4lens.inputs.image import Image, local_path
from g4lens.inputs.sound import Audio

FIELDS = ("text", "image", "audio", "parts", "messages")
COLUMNS = ("text", "image", "audio", "messages")


def read_prompts(path: str | Path, root: str | Path | None = None) -> list[Any]:
    """The prompts of a file.

    Pictures and sounds are found now and read when they are used, but for sounds that a dataset
    holds itself, which are decoded now. In a line with `text` they stand before it.

    Args:
        path: a `.jsonl` or `.csv` file in UTF-8, or a folder that `datasets` saved.
        root: the folder that no picture or sound may be outside of; by default the file's own.

    Returns:
        A prompt each: a text, a tuple of parts for `model.prompt(*parts)`, or a list of messages
        for `model.chat(messages)`.

    Raises:
        InputError: no such file, another kind of file, no prompts in it; the line and what is wrong
            there: unknown or missing fields, a picture or sound that is missing or outside.
    """
    path = Path(path)
    home = path if path.is_dir() else path.parent
    root = Path(root) if root is not None else home
    if path.is_dir():
        rows = _saved(path)
    elif not path.is_file():
        raise InputError(f"no file {path}")
    elif path.suffix in (".jsonl", ".csv"):
        rows = (_lines if path.suffix == ".jsonl" else _records)(_text(path), path)
    else:
        raise InputError(f"{path}: expected a .jsonl or .csv file, or a folder of `datasets`")
    prompts = []
    for where, row in rows:
        try:
            prompts.append(_prompt(row, home, root))
        except InputError as error:
            raise InputError(f"{path}, {where}: {error}") from None
    if not prompts:
        raise InputError(f"{path} holds no prompts, expected at least one")
    return prompts


# ---- rows of each kind of file


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # ends of lines in a cell stay what they are
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no text in UTF-8: {error}") from None


def _lines(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # texts may hold other ends of lines
        if not line.strip():
            continue
        row = _json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}: found {row!r:.40}, expected an object")
        _check_names(row, FIELDS, f"{path}, line {number}")
        yield f"line {number}", row


def _records(text: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(max(len(text), 1))  # a long prompt is no mistake
    try:
        columns = next(reader, [])
        _check_names(columns, COLUMNS, f"{path}, line 1")
        if not columns or len(set(columns)) < len(columns):
            raise InputError(
                f"{path}, line 1: the columns are {listed(columns) or 'none'}, expected each once "
                f"and at least one of {listed(COLUMNS)}"
            )
        for cells in filter(None, reader):  # as in JSON lines, an empty one is passed over
            where = f"line {reader.line_num}"
            if len(cells) != len(columns):
                raise InputError(
                    f"{path}, {where}: {len(cells)} cells, but there are {len(columns)} columns "
                    f"({listed(columns)})"
                )
            row: dict[str, Any] = {k: v for k, v in zip(columns, cells, strict=True) if v}
            if "messages" in row:
                row["messages"] = _json(row["messages"], f"{path}, {where}, messages")
            yield where, row
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: no CSV: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _saved(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a dataset of Hugging Face's, read through Arrow."""
    import pyarrow as pa

    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise InputError(f"{folder} holds the splits {listed(splits)}: name the folder of one")
    if not (folder / "state.json").is_file():
        raise InputError(f"{folder} is no dataset that `save_to_disk` wrote: it has no state.json")
    state = _json(_text(folder / "state.json"), str(folder / "state.json"))
    number = 0
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise InputError(f"{folder} has an index beside its rows: save it again, flattened")
        for name in names:
            file = _inside(folder / name, folder, "the data file", name)
            with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
                columns = [name for name in reader.schema.names if name in FIELDS]
                if not columns:
                    near = "".join(did_you_mean(name, FIELDS) for name in reader.schema.names)
                    raise InputError(
                        f"{folder} has the columns {listed(reader.schema.names)}, expected one of "
                        f"{listed(FIELDS)}: rename the one that is meant.{near}"
                    )
                for batch in reader:
                    for row in batch.select(columns).to_pylist():
                        yield f"row {number}", row
                        number += 1
    except (KeyError, TypeError, AttributeError, OSError, pa.ArrowException) as error:
        raise InputError(f"{folder} is not readable as a dataset ({error})") from None


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no JSON: {error}") from None


def _check_names(names: Iterable[str], known: Sequence[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(
                f"{where}: {name!r} is none of {listed(known)}.{did_you_mean(name, known)}"
            )


# ---- one prompt


def _prompt(row: Mapping[str, Any], home: Path, root: Path) -> Any:
    """What the fields of a row make together."""
    row = {k: v for k, v in row.items() if v is not None}
    for alone in ("parts", "messages"):
        if alone in row and len(row) > 1:
            raise InputError(f"{alone} stands beside {listed(k for k in row if k != alone)}")
    if "messages" in row:
        if not isinstance(row["messages"], list) or not row["messages"]:
            raise InputError("messages are no list, or empty")
        return [_message(message, home, root) for message in row["messages"]]
    if "parts" in row:
        if not isinstance(row["parts"], list) or not row["parts"]:
            raise InputError("parts are no list, or empty")
        return tuple(_part(part, home, root) for part in row["parts"])
    text = row.get("text", "")
    if not isinstance(text, str):
        raise InputError(f"text is {text!r:.40}, expected text")
    media = []
    for kind in KINDS:
        given = row.get(kind, [])
        for one in given if isinstance(given, list) else [given]:
            media.append(_media(kind, one, home, root))
    if not text and not media:
        raise InputError("the prompt is empty")
    return (*media, *([text] if text else [])) if media else text


def _message(message: Any, home: Path, root: Path) -> Any:
    """A message for `model.chat`, its media found."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError(f"a message is {message!r:.60}, expected an object with role and content")
    message = {k: v for k, v in message.items() if v is not None}
    if isinstance(message.get("content"), list):  # a tool may give back any other value
        message["content"] = [_part(part, home, root) for part in message["content"]]
    return message


def _part(part: Any, home: Path, root: Path) -> Any:
    """Text, or `{"image": path}`; `{"type": "image", "image": path}` is the same."""
    if isinstance(part, str):
        return part
    said = {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else {}
    kind = said.pop("type", next(iter(said), None))
    if set(said) != {kind} or kind not in ("text", *KINDS):
        raise InputError(
            f'a part is {part!r:.60}, expected text, {{"image": path}} or {{"audio": path}}'
        )
    value = said[kind]
    if kind != "text":
        return _media(kind, value, home, root)
    if not isinstance(value, str):
        raise InputError(f"text is {value!r:.40}, expected text")
    return value


def _media(kind: str, given: Any, home: Path, root: Path) -> Image | Audio:
    """A picture or sound: a path, or the bytes that `datasets` keeps beside one."""
    if isinstance(given, dict) and set(given) <= {"bytes", "path"}:
        if isinstance(given.get("bytes"), bytes):  # a text there would be taken for a path
            return Image(given["bytes"]) if kind == "image" else _decoded(given["bytes"])
        given = given.get("path") if given.get("bytes") is None else given
    if not isinstance(given, str):
        raise InputError(f"{kind} is {given!r:.40}, expected a path")
    file = _inside(home / local_path(given, KINDS[kind].__name__), root, kind, given)
    if not file.is_file():
        raise InputError(f"no {kind} {file}")
    return KINDS[kind](file)


def _inside(file: Path, root: Path, what: str, given: str) -> Path:
    """The file that a path leads to, links followed. Raises: InputError: outside of `root`."""
    try:
        file = file.resolve()
        is_inside = file.is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError) as error:  # no path, too long, or links in a circle
        raise InputError(f"{what} {given!r} is no path: {error}") from None
    if not is_inside:
        raise InputError(f"{what} {given!r} lies outside the folder {root}")
    return file


def _decoded(content: bytes) -> Audio:
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(content), dtype="float32")
    except (soundfile.SoundFileError, RuntimeError, TypeError) as error:
        raise InputError(f"audio of {len(content)} bytes is not readable ({error})") from None
    return Audio(samples, rate)
