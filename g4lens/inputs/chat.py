"""Conversations: rendered by the checkpoint's template, parsed back out of what the model wrote.

Gemma 4 writes `<|turn>ROLE`, a newline, the content and `<turn|>`; a thought stands between
`<|channel>thought` and `<channel|>`, a call of a tool between `<|tool_call>call:` and
`<tool_call|>`. Nothing that a model wrote is ever evaluated.
"""

import json
import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from g4lens.errors import InputError

QUOTE = '<|"|>'
MAX_DEPTH = 32
MESSAGE_DEPTH = 64  # the deepest call, and the message around it
OPENING = re.compile(r"<\|channel>|<\|tool_call>")
ENDINGS = ("<turn|>", "<eos>", "<|tool_response>")
# What each pair of marks makes of the tokens between them
SPANS = {
    "<|channel>": ("<channel|>", "thought"),
    "<|tool>": ("<tool|>", "tool"),
    "<|tool_call>": ("<tool_call|>", "tool"),
    "<|tool_response>": ("<tool_response|>", "tool"),
}
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "model": "model",
    "assistant": "model",
}
# A noncharacter of Unicode: stands for "<" in all that a caller wrote while the template renders,
# so that no text, and no joint of two, reads as a special token. Only the template writes those.
SHIELD = "\ufdd0"


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called, with its arguments by name."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What a model wrote, taken apart: its answer, its thoughts, its calls of tools."""

    text: str
    thoughts: tuple[str, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    thinking: bool = False,
    add_generation_prompt: bool = True,
    special: Mapping[str, str],
) -> str:
    """Render messages by a chat template, in jinja2's sandbox.

    Args:
        template: jinja2 source, with the variables that transformers passes.
        messages: `{"role": ..., "content": ...}`.
        tools: declarations of functions.
        thinking: passed as `enable_thinking`.
        add_generation_prompt: open the model's turn at the end.
        special: texts of special tokens by the names that templates use, as `bos_token`.

    Raises: InputError: a message without role or of an unknown one, a message that says nothing,
        or whatever the template objects to.
    """
    import jinja2

    if not messages:
        raise InputError("chat: no messages, expected at least one")
    for index, message in enumerate(messages):
        _check(index, message)
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=messages,
                tools=tools,
                enable_thinking=thinking,
                add_generation_prompt=add_generation_prompt,
                **special,
            )
        )
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template's line {error.lineno} is wrong: {error}") from None
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refused the messages: {error}") from None
    except Exception as error:  # a template can fail in as many ways as a program
        raise InputError(
            f"the chat template failed on the messages: {type(error).__name__}: {error}"
        ) from None


def _check(index: int, message: Any) -> None:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in (*ROLES, "tool"):
        raise InputError(
            f"message {index} has role {role!r}, expected system, user, assistant, model or tool"
        )
    content = message.get("content")
    if content is None and not (message.get("tool_calls") or message.get("tool_responses")):
        raise InputError(f"message {index} of role {role!r} has no content")
    # What a tool gave back may be any value
    if role != "tool" and not isinstance(content, str | list | tuple | None):
        raise InputError(
            f"message {index} has content of type {type(content).__name__}, expected a text or a "
            "list of parts"
        )


def _environment() -> Any:
    """The sandbox, with what transformers' `utils/chat_template_utils.py` promises to templates."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(text: str) -> None:
        raise jinja2.TemplateError(text)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def shielded(
    value: Any, split: Callable[[str], Sequence[str]], where: str, allowed: Container[str] = ()
) -> Any:
    """What a caller wrote, rebuilt of JSON's types for a template, with no special token in it.

    Args:
        value: a message, a declaration of a tool, or a part of one.
        split: cuts a text at its special tokens, which are the parts of odd index.
        where: names the value in errors.
        allowed: special tokens that may stand in it.

    Raises: InputError: a special token, which would forge the structure of the conversation; a
        value that JSON cannot write; more than 64 levels of nesting.
    """

    def rebuilt(value: Any, depth: int) -> Any:
        if depth > MESSAGE_DEPTH:
            raise InputError(f"{where} nests deeper than {MESSAGE_DEPTH} levels")
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return text(value)
        if isinstance(value, Mapping):
            return {rebuilt(k, depth): rebuilt(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [rebuilt(item, depth + 1) for item in value]
        raise InputError(
            f"{where} holds a {type(value).__name__}, expected what JSON can write: mappings, "
            "lists, texts, numbers, true, false and null"
        )

    def text(value: str) -> str:
        if SHIELD in value:
            raise InputError(f"{where} holds U+FDD0, which is no character")
        parts = list(split(value))
        if forged := [token for token in parts[1::2] if token not in allowed]:
            raise InputError(
                f"{where} holds the special token {forged[0]!r}, which would forge the structure "
                "of the conversation: leave it out, or write the whole prompt by hand with "
                "prompt(...)"
            )
        parts[::2] = [part.replace("<", SHIELD) for part in parts[::2]]
        return "".join(parts)

    return rebuilt(value, 0)


def roles(texts: Sequence[str]) -> list[str | None]:
    """Who speaks each token: "system", "user", "model", "thought", "tool", or None outside turns.

    Marks belong to the span that they open or close.

    Args:
        texts: each token's text, in order; special tokens by themselves.
    """
    found: list[str | None] = []
    speaker: str | None = None
    closing: str | None = None
    inside: str | None = None
    for index, text in enumerate(texts):
        if text == "<|turn>":
            name = re.match(r"\w+", "".join(texts[index + 1 : index + 12]).lstrip())
            speaker = ROLES.get(name[0]) if name else None
            closing = inside = None
        elif text in SPANS and closing is None:
            closing, inside = SPANS[text]
        found.append(inside or speaker)
        if text == closing:
            closing = inside = None
        elif text == "<turn|>":
            speaker = closing = inside = None
    return found


def parse(text: str) -> Reply:
    """Take apart what a model wrote.

    A thought that was begun and not ended goes to the end of the text; empty ones are left out.

    Args:
        text: the generated text with its special tokens written out.

    Raises: InputError: a call that is not written as Gemma 4 writes calls, or one with a value that
        nests deeper than 32 levels.
    """
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    said: list[str] = []
    at = 0
    while opening := OPENING.search(text, at):
        said.append(text[at : opening.start()])
        if opening[0] == "<|tool_call>":
            reader = _Reader(text, opening.end())
            calls.append(reader.call())
            at = reader.at
        else:
            end = text.find("<channel|>", opening.end())
            end = len(text) if end < 0 else end
            thoughts.append(text[opening.end() : end].removeprefix("thought").strip())
            at = end + len("<channel|>")
    answer = "".join([*said, text[at:]]).strip()
    while ending := next((mark for mark in ENDINGS if answer.endswith(mark)), None):
        answer = answer.removesuffix(ending).rstrip()
    return Reply(answer, tuple(filter(None, thoughts)), tuple(calls))


class _Reader:
    """Reads one call, from left to right."""

    NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
    NAME = re.compile(r"[\w.\-]+")
    WORDS = (("true", True), ("false", False), ("null", None))

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def call(self) -> ToolCall:
        self.expect("call:")
        name = self.match(self.NAME, "the name of a function")
        arguments = self.mapping(0)
        self.expect("<tool_call|>")
        return ToolCall(name, arguments)

    def mapping(self, depth: int) -> dict[str, Any]:
        self.expect("{")
        values: dict[str, Any] = {}
        while not self.take("}"):
            if values:
                self.expect(",")
            quoted = self.text.startswith(QUOTE, self.at)
            key = self.string() if quoted else self.match(self.NAME, "a key")
            if key in values:
                raise self.error(f"no second {key!r}")
            self.expect(":")
            values[key] = self.value(depth)
        return values

    def sequence(self, depth: int) -> list[Any]:
        self.expect("[")
        values: list[Any] = []
        while not self.take("]"):
            if values:
                self.expect(",")
            values.append(self.value(depth))
        return values

    def value(self, depth: int) -> Any:
        if self.text.startswith(("{", "["), self.at):
            if depth == MAX_DEPTH:
                raise self.error(f"at most {MAX_DEPTH} levels of nesting")
            is_mapping = self.text[self.at] == "{"
            return self.mapping(depth + 1) if is_mapping else self.sequence(depth + 1)
        if self.text.startswith(QUOTE, self.at):
            return self.string()
        for word, meaning in self.WORDS:
            if self.take(word):
                return meaning
        start, number = self.at, self.match(self.NUMBER, "a value")
        value = float(number) if re.search(r"[.eE]", number) else int(number)
        if value in (math.inf, -math.inf):
            self.at = start
            raise self.error("a number that fits in 64 bits")
        return value

    def string(self) -> str:
        self.expect(QUOTE)
        end = self.text.find(QUOTE, self.at)
        if end < 0:
            raise self.error(f"a closing {QUOTE}")
        found, self.at = self.text[self.at : end], end + len(QUOTE)
        return found

    def take(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self.at += len(mark)
        return True

    def expect(self, mark: str) -> None:
        if not self.take(mark):
            raise self.error(repr(mark))

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if found is None or len(found[0]) > 1000:
            raise self.error(what)
        self.at = found.end()
        return found[0]

    def error(self, expected: str) -> InputError:
        found = self.text[self.at : self.at + 30]
        return InputError(f"tool call: expected {expected} at character {self.at}, found {found!r}")
