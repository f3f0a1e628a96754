"""The bundled model's own files: tokenizers that agree, a template that writes what was trained."""

import json
import random
import runpy
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from g4lens.analysis import tasks
from g4lens.config import Gemma4Config

TINY = Path(__file__).parents[1] / "data/tiny"


@pytest.fixture(scope="module")
def fast() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))


@pytest.fixture(scope="module")
def piece() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))


def ids(fast: tokenizers.Tokenizer, text: str) -> list[int]:
    return fast.encode(text, add_special_tokens=False).ids


def test_the_tokenizer_files_are_what_the_script_makes():
    build = runpy.run_path(str(TINY / "build_tokenizer.py"))
    found = build["pieces"]()
    assert build["as_tokenizers"](found) == (TINY / "tokenizer.json").read_text(encoding="utf-8")
    assert build["as_sentencepiece"](found) == (TINY / "tokenizer.model").read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "The capital of France is",
        "  two  spaces\n\nand\ttabs",
        "Ünïcode ☃ 漢字 <0x41> parks",
        '<|turn>model\n<|tool_call>call:f{a:<|"|>b c<|"|>}<tool_call|><turn|>\n',
    ],
)
def test_both_tokenizers_give_the_same_ids_and_the_text_back(fast, piece, text):
    assert ids(fast, text) == piece.encode(text)
    assert fast.decode(ids(fast, text), skip_special_tokens=False) == text
    assert piece.decode(piece.encode(text)) == text


def test_both_tokenizers_agree_on_random_texts(fast, piece):
    rng = random.Random(0)
    known = [piece.id_to_piece(i).replace("▁", " ") for i in range(4, piece.vocab_size())]
    known = [text for text in known if not text.startswith("<0x")]
    for _ in range(1000):
        parts = [rng.choice(known)[: rng.choice((2, 4, 20))] for _ in range(rng.randint(1, 12))]
        text = "".join(parts) + rng.choice(["", "é", "漢"])
        assert ids(fast, text) == piece.encode(text), text


def test_an_answer_is_one_token(fast):
    for task, generate in tasks.TASKS.items():
        for seed in range(20):
            answer = generate(random.Random(seed), "test").answer
            assert len(ids(fast, answer)) == 1, (task, answer)
            if "induction" not in task and task != "names":
                assert len(ids(fast, answer.strip())) == 1, (task, answer)


def test_special_ids_agree_with_the_config(fast):
    cfg = Gemma4Config.from_json(TINY)
    named = {
        "<pad>": cfg.pad_id, "<bos>": cfg.bos_id, "<|image>": cfg.boi_id, "<|image|>": cfg.image_id,
        "<image|>": cfg.eoi_id, "<|audio>": cfg.boa_id, "<|audio|>": cfg.audio_id,
        "<audio|>": cfg.eoa_id, "<|video|>": cfg.video_id,
    }  # fmt: skip
    assert {text: fast.token_to_id(text) for text in named} == named
    assert cfg.eos_ids == (fast.token_to_id("<eos>"), fast.token_to_id("<turn|>"))
    assert cfg.d_vocab == fast.get_vocab_size()
    generation = json.loads((TINY / "generation_config.json").read_text())
    assert tuple(generation["eos_token_id"]) == cfg.eos_ids


USER = {"role": "user", "content": "What is the capital of France?"}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "tool_calls": [
        {"function": {"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}}
    ],
}
ASKED = "<|turn>user\nWhat is the capital of France?<turn|>\n"
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Weather of a city<|"|>,parameters:{properties:'
    '{city:{type:<|"|>STRING<|"|>},days:{items:{type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>}},'
    'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
CALLED = '<|tool_call>call:weather{city:<|"|>Oslo<|"|>,days:[1,2]}<tool_call|>'


@pytest.mark.parametrize(
    ("messages", "options", "expected"),
    [
        ([USER], {}, ASKED + "<|turn>model\n"),
        ([USER], {"add_generation_prompt": False}, ASKED),
        (
            [USER],
            {"enable_thinking": True},
            "<|turn>system\n<|think|><turn|>\n" + ASKED + "<|turn>model\n",
        ),
        (
            [{"role": "system", "content": "Be brief."}, USER],
            {"enable_thinking": True, "tools": [TOOL]},
            f"<|turn>system\n<|think|>Be brief.{DECLARED}<turn|>\n{ASKED}<|turn>model\n",
        ),
        (
            [USER, {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Paris"}, USER],
            {},
            f"{ASKED}<|turn>model\nParis<turn|>\n{ASKED}<|turn>model\n",
        ),
        (
            [USER, CALL, {"role": "tool", "name": "weather", "content": {"t": 3, "sky": "grey"}}],
            {},
            ASKED
            + f"<|turn>model\n{CALLED}<|tool_response>response:weather"
            + '{sky:<|"|>grey<|"|>,t:3}<tool_response|>',
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "image"},
                        {"type": "audio"},
                        {"type": "text", "text": "Hm?"},
                    ],
                }
            ],
            {},
            "<|turn>user\n<|image|><|audio|>Hm?<turn|>\n<|turn>model\n",
        ),
    ],
)
def test_the_template_writes_gemmas_chat_format(messages, options, expected):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((TINY / "chat_template.jinja").read_text(encoding="utf-8"))
    options = {"add_generation_prompt": True, **options}
    assert template.render(messages=messages, bos_token="<bos>", **options) == "<bos>" + expected
