"""Both kinds of tokenizer files give the same ids."""

import json
import random
import shutil

import pytest

from g4lens.errors import InputError
from g4lens.inputs.tokenizer import Tokenizer
from g4lens.resources import bundled

TINY = bundled("data", "tiny")
TEXTS = [
    "The capital of France is",
    " Paris",
    "<bos>Hello <|turn>user\nhi<turn|> <eos><pad>",
    "two  spaces\n\nand lines",
    "1234 + é ñ 漢字 😀",
    'call:f{a:<|"|>x<|"|>}<tool_call|>',
    "<table> <|not a token|> <turn|",
    "",
    "The<unk>x",
    "Zxqv\t\r\n\0\u00a0e\u0301 \ufb01 \u200d",
    "<|image|><|audio|> <0x0A> <|<|turn>|>",
]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    shutil.copy(TINY / "tokenizer.model", folder)
    return Tokenizer.from_folder(TINY), Tokenizer.from_folder(folder)


@pytest.mark.parametrize("text", TEXTS)
def test_same_ids_and_back(both, text):
    ids, same = (tokenizer.encode(text) for tokenizer in both)
    assert ids == same
    for tokenizer in both:
        assert tokenizer.decode(ids) == text
    assert both[0].decode(ids, skip_special=True) == both[1].decode(ids, skip_special=True)
    assert [both[0].token_text(i) for i in ids] == [both[1].token_text(i) for i in ids]


def test_same_ids_for_random_texts(both):
    draw = random.Random(0)
    pieces = [both[0].token_text(i) for i in range(both[0].n_vocab)]
    for _ in range(300):
        text = "".join(draw.choice(pieces) for _ in range(12))
        assert both[0].encode(text) == both[1].encode(text), text


def test_special_tokens(both):
    for tokenizer in both:
        assert tokenizer.special == both[0].special
        assert {"<bos>", "<eos>", "<|image|>", "<|channel>", "<tool_call|>"} <= set(
            tokenizer.special
        )
        assert tokenizer.decode(tokenizer.encode("<bos>a<eos>"), skip_special=True) == "a"
        assert tokenizer.n_vocab == both[0].n_vocab


def test_marks_that_the_file_does_not_call_special(tmp_path):
    described = json.loads((TINY / "tokenizer.json").read_text())
    for token in described["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert {"<|turn>", "<turn|>", '<|"|>'} <= set(tokenizer.special)
    assert tokenizer.split("a<turn|>b") == ["a", "<turn|>", "b"]


def test_tokens_by_text(both):
    for tokenizer in both:
        assert tokenizer.token_text(tokenizer.id_of(" Paris")) == " Paris"
        assert tokenizer.id_of("<|turn>") == tokenizer.special["<|turn>"]
        with pytest.raises(InputError, match=r"no token reads ' Pariss'.* Did you mean ' Paris'"):
            tokenizer.id_of(" Pariss")
        with pytest.raises(InputError, match="token id 99999 is outside the vocabulary"):
            tokenizer.decode([99999])
        with pytest.raises(InputError, match="token id -1 is outside the vocabulary"):
            tokenizer.token_text(-1)


def test_unusable_files(tmp_path):
    with pytest.raises(InputError, match=r"found neither tokenizer\.json nor a SentencePiece"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(
        InputError, match=r"tokenizer\.model: not readable as a SentencePiece model"
    ):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json: not readable as a tokenizer"):
        Tokenizer.from_folder(tmp_path)
