"""Conversations: rendered in the sandbox, roles marked, calls parsed and never evaluated."""

import json

import pytest

from g4lens.errors import InputError
from g4lens.inputs.chat import Reply, ToolCall, parse, render, roles
from g4lens.resources import bundled

TEMPLATE = (bundled("data", "tiny") / "chat_template.jinja").read_text()
SPECIAL = {"bos_token": "<bos>"}
WEATHER = {
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HI = {"role": "user", "content": "Hi"}


def rendered(messages, **options):
    return render(TEMPLATE, messages, special=SPECIAL, **options)


def test_a_turn():
    text = rendered([{"role": "user", "content": "Hi"}])
    assert text == "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
    closed = rendered([{"role": "user", "content": "Hi"}], add_generation_prompt=False)
    assert closed == "<bos><|turn>user\nHi<turn|>\n"


def test_thinking_and_tools_stand_in_the_system_turn():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = rendered(messages, thinking=True, tools=[WEATHER])
    system = text[: text.index("<turn|>")]
    assert system.startswith("<bos><|turn>system\n<|think|>Be brief.<|tool>declaration:weather{")
    assert '<|"|>Tells the weather.<|"|>' in system


def test_calls_and_responses():
    call = {"name": "weather", "arguments": {"city": "Paris", "days": 2, "now": True}}
    text = rendered(
        [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "tool_calls": [{"function": call}]},
            {"role": "tool", "name": "weather", "content": {"sky": "blue"}},
        ]
    )
    written = '<|tool_call>call:weather{city:<|"|>Paris<|"|>,days:2,now:true}<tool_call|>'
    assert written in text
    assert '<|tool_response>response:weather{sky:<|"|>blue<|"|>}<tool_response|>' in text
    assert parse(written).tool_calls == (ToolCall("weather", call["arguments"]),)


def test_text_beside_a_call_leaves_the_turn_open_for_the_response():
    said = {"role": "assistant", "content": "I look.", "tool_calls": [{"name": "f"}]}
    result = {"role": "tool", "name": "f", "content": "r"}
    answer = {"role": "assistant", "content": "Done."}
    written = '<|tool_response>response:f{value:<|"|>r<|"|>}<tool_response|>'
    called = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n<|tool_call>call:f{}<tool_call|>"
    text = rendered([HI, said, result, answer], add_generation_prompt=False)
    assert text == f"{called}I look.{written}Done.<turn|>\n"
    text = rendered([HI, result, HI])
    assert f"<|turn>model\n{written}<turn|>\n<|turn>user" in text


def test_responses_within_the_message_of_the_call():
    responses = [{"name": "f", "response": {"x": [1, None]}}, {"name": "g", "response": 2}]
    message = {"role": "model", "tool_calls": [{"name": "f"}], "tool_responses": responses}
    written = (
        "<|tool_call>call:f{}<tool_call|><|tool_response>response:f{x:[1,null]}<tool_response|>"
        "<|tool_response>response:g{value:2}<tool_response|>"
    )
    assert rendered([HI, message]).endswith(f"<|turn>model\n{written}")
    assert rendered([HI, {**message, "content": "So."}, HI]).count(f"{written}So.<turn|>") == 1


def test_results_of_any_type():
    for value, written in ((3, "3"), ([{"type": "text", "text": "a"}], '<|"|>a<|"|>')):
        text = rendered([HI, {"role": "tool", "name": "f", "content": value}])
        assert f"response:f{{value:{written}}}" in text


def test_parts_of_a_message():
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "audio"}]
    assert "<|image|>What is it?<|audio|><turn|>" in rendered(
        [{"role": "user", "content": content}]
    )


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no messages"),
        (["Hi"], "message 0 has role None"),
        ([{"role": "robot", "content": "Hi"}], "message 0 has role 'robot', expected system, user"),
        ([{"role": "user", "content": [{"type": "smell"}]}], "content of type smell"),
        ([{"role": "user"}], "message 0 of role 'user' has no content"),
        ([HI, {"role": "assistant", "content": None}], "message 1 of role 'assistant' has no"),
        ([{"role": "user", "content": 3}], "content of type int, expected a text or a list"),
        ([{"role": "user", "content": {"text": "Hi"}}], "content of type dict, expected a text"),
        ([HI, {"role": "assistant", "tool_calls": [{}]}], "a tool call has no name"),
    ],
)
def test_messages_that_cannot_be_rendered(messages, says):
    with pytest.raises(InputError, match=says):
        rendered(messages)


def test_a_tool_without_name():
    for tool in ({"description": "d"}, {"function": {}}, 3):
        with pytest.raises(InputError, match="a declared tool has no name"):
            rendered([HI], tools=[tool])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% include 'x' %}",
        "{{ nonsense( }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_the_sandbox_holds(template):
    with pytest.raises(InputError, match="the chat template"):
        render(template, [{"role": "user", "content": "Hi"}], special=SPECIAL)


def test_roles():
    texts = ["<bos>", "<|turn>", "user", "\n", "Hi", "<turn|>", "\n", "<|turn>", "model", "\n"]
    texts += [
        "<|channel>",
        "thought",
        "\n",
        "hm",
        "<channel|>",
        "So",
        "<|tool_call>",
        "call",
        "<tool_call|>",
    ]
    texts += ["<turn|>", "x"]
    assert roles(texts) == [
        *[None, *["user"] * 5, None, *["model"] * 3],
        *[*["thought"] * 5, "model", *["tool"] * 3],
        *["model", None],
    ]


def test_roles_of_a_system_turn_and_of_tools():
    system = ["<|turn>", "sys", "tem", "\n", "<|think|>", "<|tool>", "f", "<tool|>", "<turn|>"]
    model = ["<|turn>", "assistant", "\n", "<|tool_response>", "r", "<tool_response|>", "A"]
    assert roles(system) == [*["system"] * 5, *["tool"] * 3, "system"]
    assert roles(model) == [*["model"] * 3, *["tool"] * 3, "model"]
    assert roles(["<|turn>", "robot", "\n", "x"]) == [None] * 4


def test_a_reply_is_taken_apart():
    text = (
        "<|channel>thought\nLet me see.<channel|>Here: "
        '<|tool_call>call:f.g-1{a:<|"|>x, {y}<|"|>,n:-3,x:1.5e3,l:[true,{q:null},[]],o:{},'
        '<|"|>k k<|"|>:0}<tool_call|>'
        "<|tool_call>call:h{}<tool_call|> Done.<turn|>\n"
    )
    first = {"a": "x, {y}", "n": -3, "x": 1500.0, "l": [True, {"q": None}, []], "o": {}, "k k": 0}
    assert parse(text) == Reply(
        "Here:  Done.", ("Let me see.",), (ToolCall("f.g-1", first), ToolCall("h", {}))
    )
    assert parse("Paris<turn|>") == Reply("Paris")
    assert parse("<|channel>thought\ncut off").thoughts == ("cut off",)


def nested(depth):
    return f"<|tool_call>call:f{{a:{'[' * depth}{']' * depth}}}<tool_call|>"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("<|tool_call>f{}<tool_call|>", r"expected 'call:' at character 12, found 'f\{\}"),
        ("<|tool_call>call:f{a:x}<tool_call|>", "expected a value at character 21"),
        ("<|tool_call>call:f{a:1", "expected ','"),
        ('<|tool_call>call:f{a:<|"|>x', "expected a closing"),
        ("<|tool_call>call:f{a:__import__('os')}<tool_call|>", "expected a value"),
        ("<|tool_call>call:{}<tool_call|>", "the name of a function"),
        ("<|tool_call>call:f{}", "expected '<tool_call|>'".replace("|", r"\|")),
        ("<|tool_call>call:f{a:1,a:2}<tool_call|>", "expected no second 'a' at character 24"),
        ("<|tool_call>call:f{a:1,}<tool_call|>", "expected a key"),
        (
            "<|tool_call>call:f{a:1e999}<tool_call|>",
            "a number that fits in 64 bits at character 21",
        ),
        ("<|tool_call>call:f{a:\u0663}<tool_call|>", "expected a value"),
        (
            "<|channel>thought\nhm<channel|><|tool_call>call:f{a:?}",
            "expected a value at character 51",
        ),
        (nested(33), "at most 32 levels"),
        (nested(100_000), "at most 32 levels"),
    ],
)
def test_malformed_calls(text, says):
    with pytest.raises(InputError, match=says):
        parse(text)


def test_the_deepest_call():
    value = parse(nested(32)).tool_calls[0].arguments["a"]
    for _ in range(31):
        (value,) = value
    assert value == []


def test_thoughts_and_calls_do_not_reach_into_each_other():
    call = '<|tool_call>call:f{a:<|"|><|channel>thought\nno<channel|><|"|>}<tool_call|>'
    assert parse(call) == Reply("", (), (ToolCall("f", {"a": "<|channel>thought\nno<channel|>"}),))
    planned = "<|channel>thought\nfirst <|tool_call>call:?<channel|>Now."
    assert parse(planned) == Reply("Now.", ("first <|tool_call>call:?",))
    assert parse("<|channel>thought\n<channel|>Yes") == Reply("Yes")
    assert parse("Two.<turn|>\n<eos>") == Reply("Two.")


def test_what_templates_are_promised():
    messages = [{"role": "user", "content": "é<b>"}]
    written = render("{{ messages | tojson(indent=1) }}", messages, special=SPECIAL)
    assert json.loads(written) == messages and "é<b>" in written
    assert render("{{ strftime_now('%Y') }}", messages, special=SPECIAL).isdigit()
    breaking = "{% for m in messages %}{% break %}{% endfor %}{{ bos_token }}"
    assert render(breaking, messages, special=SPECIAL) == "<bos>"
