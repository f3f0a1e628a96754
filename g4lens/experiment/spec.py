"""Specs: what to run, in a YAML file, checked before anything is run.

    model: tiny                                  # or {name: ..., revision: ..., dtype: bfloat16}
    prompts: prompts.jsonl                       # .jsonl, .csv, or a folder that `datasets` saved
    names: ["blocks.*.hook_resid_post"]
    positions: last                              # all, last, "4:-1", [0, 5], image, user, ...
    dtype: bfloat16

A spec names things and never code: it is read by `yaml.safe_load`.
"""

import re
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from g4lens.config import Gemma4Config
from g4lens.errors import HookNameError, InputError, did_you_mean, listed
from g4lens.experiment.selection import parsed
from g4lens.load import load, resolve
from g4lens.model.gemma4 import Gemma4

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
S = TypeVar("S", bound=BaseModel)


class Part(BaseModel):
    """A part of a spec: nothing but its own keys, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ModelSpec(Part):
    """A model, as `g4lens.load` takes it. A folder is meant from the spec's folder on.

    Attributes:
        name: "tiny", a folder, or a name on the hub.
        revision: of a model on the hub.
        dtype: to compute in; by default as stored.
        device: "auto", "cpu", "cuda", ...
        max_soft_tokens: of each picture; by default as the checkpoint says.
    """

    name: str
    revision: str | None = None
    dtype: Dtype | None = None
    device: str = "auto"
    max_soft_tokens: int | None = None

    def folder_or_name(self, home: Path) -> str:
        """What to give to `load`, for a spec in the folder `home`."""
        beside = home / self.name
        return str(beside) if beside.is_dir() else self.name

    def skeleton(self, home: Path) -> Gemma4:
        """The model without weights, to check names against. Raises: as `g4lens.load`."""
        folder, _, _ = resolve(self.folder_or_name(home), self.revision, ["config.json"])
        with torch.device("meta"):
            return Gemma4(Gemma4Config.from_json(folder))

    def load(self, home: Path) -> Gemma4:
        """The model. Raises: as `g4lens.load`."""
        model = load(
            self.folder_or_name(home),
            dtype=self.dtype,
            device=self.device,
            revision=self.revision,
        )
        if self.max_soft_tokens is not None and model.processor is not None:
            model.processor = model.processor.with_budget(self.max_soft_tokens)
        return model


class CacheSpec(Part):
    """What `g4lens cache` is to do; see `cache_activations`.

    Attributes:
        model: the model, or its name alone.
        prompts: a file or folder, from the spec's folder on. Pictures and sounds that it names must
            be inside the spec's folder.
        names: of hook points, with globs.
        positions: of each prompt.
        dtype: to store in; by default as computed.
        prompts_per_unit: of each work unit.
    """

    model: ModelSpec
    prompts: str
    names: list[str] = Field(min_length=1)
    positions: str | list[int] = "all"
    dtype: Dtype | None = None
    prompts_per_unit: int = Field(32, ge=1)

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("names", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("positions", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        parsed(value)
        return value


def read_spec(path: str | Path, kind: type[S]) -> S:
    """A spec file, checked.

    Args:
        path: a YAML file.
        kind: what it should be: `CacheSpec`.

    Raises:
        InputError: no such file, no YAML, a key twice, unknown or missing keys, wrong values: the
            path inside the file, what was found and expected, near names.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
        raw, twice = yaml.safe_load(text), _twice(yaml.compose(text, yaml.SafeLoader))
    except FileNotFoundError:
        raise InputError(f"no file {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} is not readable as YAML ({error})") from None
    if twice:
        raise InputError(f"{path}: {twice[0]} is there twice, expected each key once")
    if not isinstance(raw, dict):
        raise InputError(f"{path}: found a {type(raw).__name__}, expected keys and values")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        # An unknown key first: it is often the one that is missing, misspelt
        found = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        raise InputError(f"{path}: {'; '.join(_told(one, kind) for one in found[:4])}") from None


def _twice(root: yaml.Node | None) -> list[str]:
    """The keys that a mapping of a file has more than once: YAML takes the last one."""
    found: list[str] = []
    nodes, seen = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))  # an alias leads to the same one again
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            found += dict.fromkeys(key for key in keys if keys.count(key) > 1)
            nodes += [value for _, value in node.value]
        else:
            nodes += node.value
    return found


def check_names(names: list[str], model: Gemma4, where: str) -> None:
    """Raises: HookNameError: one of a spec's names is of no hook point, with near names."""
    for i, name in enumerate(names):
        try:
            model.matching(name)
        except HookNameError as error:
            raise HookNameError(f"{where}: names[{i}]: {error}") from None


def _told(error: Any, kind: type[BaseModel]) -> str:
    """One thing that is wrong, in words."""
    at, parts = _place(error, kind)
    loc, found = error["loc"] or ("",), error["input"]
    if error["type"] == "extra_forbidden":
        known = list(dict.fromkeys(name for part in parts for name in part.model_fields))
        return f"{at} is unknown, expected {listed(known)}.{did_you_mean(str(loc[-1]), known)}"
    if error["type"] == "union_tag_invalid":
        tag, known = error["ctx"]["tag"], [_tag(part) for part in parts]
        near = did_you_mean(tag, known)
        return f"{at}.kind is {tag!r}, expected one of {listed(known)}.{near}"
    if error["type"] == "union_tag_not_found":
        return f"{at}.kind is missing"
    if error["type"] == "missing":
        return f"{at} is missing"
    if error["type"] == "literal_error":
        known = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        near = did_you_mean(str(found), known)
        return f"{at} is {found!r:.60}, expected one of {listed(known)}.{near}"
    if error["type"] == "value_error":  # one of ours
        said = str(error["ctx"]["error"])
        return said if said.startswith(at) else f"{at}: {said}"
    return f"{at} is {found!r:.60}: {error['msg']}"


def _place(error: Any, kind: type[BaseModel]) -> tuple[str, list[type[BaseModel]]]:
    """Where in the file an error is, and the part of the spec, or the parts it may be, there."""
    at, parts = "", [kind]
    for i, x in enumerate(error["loc"]):
        fields = [part.model_fields[x] for part in parts if x in part.model_fields]
        is_last = i == len(error["loc"]) - 1
        if isinstance(x, int):
            at += f"[{x}]"
        elif fields or (is_last and error["type"] == "extra_forbidden"):
            at += f".{x}"
            parts = [p for field in fields for p in _parts(field.annotation)] or parts
        else:  # which member of a union was meant
            parts = [part for part in parts if _tag(part) == x] or parts
    return at.lstrip("."), parts


def _parts(annotation: Any) -> list[type[BaseModel]]:
    """The parts of a spec that may stand at a key."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for inner in get_args(annotation) for part in _parts(inner)]


def _tag(part: type[BaseModel]) -> str:
    """The `kind` of a part; nothing if it has none."""
    field = part.model_fields.get("kind")
    return "" if field is None else str(get_args(field.annotation)[0])
