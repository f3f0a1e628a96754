"""Conversations: rendered by the checkpoint's template, parsed back out of what the model wrote.

Gemma 4 writes `<|turn>ROLE`, a newline, the content and `<turn|>`; a thought stands between `<|channel>thought`
and `<channel|>`, a call of a tool between `<|tool_call>call:` and `<tool_call|>`. Nothing that a model wrote
is ever evaluated.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from g4lens.errors import InputError

QUOTE = '<|"|>'
MAX_DEPTH = 32
# What each pair of marks makes of the tokens between them
SPANS = {
    "<|channel>": ("<channel|>", "thought"),
    "<|tool>": ("<tool|>", "tool"),
    "<|tool_call>": ("<tool_call|>", "tool"),
    "<|tool_response>": ("<tool_response|>", "tool"),
}
ROLES = {"system": "system", "developer": "system", "user": "user", "model": "model", "assistant": "model"}


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

    Raises: InputError: a message without role or of an unknown one, or whatever the template objects to.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if not messages:
        raise InputError("chat: no messages, expected at least one")
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in (*ROLES, "tool"):
            raise InputError(
                f"message {index} has role {role!r}, expected system, user, assistant, model or tool"
            )

    def raise_exception(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda x, **options: json.dumps(x, ensure_ascii=False, **options)
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=tools,
            enable_thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            **special,
        )
    except jinja2.TemplateError as error:
        raise InputError(f"the chat template refused the messages: {error}") from None
    except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
        raise InputError(f"the chat template failed on the messages: {error}") from None


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

    Args:
        text: the generated text with its special tokens written out.

    Raises: InputError: a call that is not written as Gemma 4 writes calls, or nests deeper than 32.
    """
    thoughts: list[str] = []

    def keep(found: re.Match[str]) -> str:
        thoughts.append(found[1].strip())
        return ""

    rest = re.sub(r"<\|channel>thought\n(.*?)(?:<channel\|>|$)", keep, text, flags=re.DOTALL)
    calls: list[ToolCall] = []
    said: list[str] = []
    while (start := rest.find("<|tool_call>")) >= 0:
        said.append(rest[:start])
        reader = _Reader(rest, start + len("<|tool_call>"))
        calls.append(reader.call())
        rest = rest[reader.at :]
    answer = re.sub(r"(?:<turn\|>|<eos>|<\|tool_response>)+\s*$", "", "".join([*said, rest]))
    return Reply(answer.strip(), tuple(thoughts), tuple(calls))


class _Reader:
    """Reads one call, from left to right."""

    NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")
    NAME = re.compile(r"[\w.\-]+")
    WORDS = (("true", True), ("false", False), ("null", None))

    def __init__(self, text: str, at: int):
        self.text, self.at = text, at

    def call(self) -> ToolCall:
        self.expect("call:")
        name = self.match(self.NAME, "the name of a function")
        arguments = self.mapping(1)
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
        if depth > MAX_DEPTH:
            raise self.error(f"at most {MAX_DEPTH} levels of nesting")
        if self.text.startswith("{", self.at):
            return self.mapping(depth + 1)
        if self.text.startswith("[", self.at):
            return self.sequence(depth + 1)
        if self.text.startswith(QUOTE, self.at):
            return self.string()
        for word, meaning in self.WORDS:
            if self.take(word):
                return meaning
        number = self.match(self.NUMBER, "a value")
        return float(number) if re.search(r"[.eE]", number) else int(number)

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
        return InputError(
            f"tool call: expected {expected} at character {self.at}, found {found!r}"
        )
