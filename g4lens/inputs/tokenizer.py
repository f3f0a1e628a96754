"""Text into token ids and back, by a checkpoint's own tokenizer file.

A checkpoint ships `tokenizer.json`, read by the library tokenizers, or a SentencePiece `*.model`,
read by sentencepiece. This class makes the two alike: the same ids for the same text.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

from g4lens.errors import InputError, did_you_mean

# A mark, also where the file does not call it special: <|turn> and <turn|>, but not <table>
MARK = re.compile(r"<\|.+\|?>|<.+\|>")


@runtime_checkable
class _Backend(Protocol):
    """What the two libraries have in common."""

    special: dict[str, int]
    n_vocab: int

    def encode(self, text: str) -> list[int]:
        """Ids of a text that holds no special token."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids of which none is special."""
        ...

    def piece(self, id_: int) -> str:
        """An id's entry in the vocabulary, spaces written as ▁."""
        ...

    def find(self, piece: str) -> int | None:
        """An entry's id."""
        ...

    def pieces(self) -> list[str]:
        """All entries."""
        ...


class Tokenizer:
    """A checkpoint's tokenizer.

    Special tokens written out in a text become those tokens. No <bos> is added.

    Attributes:
        special: the special tokens' ids by text.
        n_vocab: the number of ids.
    """

    def __init__(self, backend: _Backend):
        self._backend = backend
        self.special = backend.special
        self.n_vocab = backend.n_vocab
        self._special_ids = {id_: text for text, id_ in self.special.items()}
        longest_first = sorted(map(re.escape, self.special), key=len, reverse=True)
        self._marks = re.compile(f"({'|'.join(longest_first)})" if longest_first else "(?!)")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read the folder's `tokenizer.json`, or else its SentencePiece model.

        Raises: InputError: neither is there, or it cannot be read.
        """
        folder = Path(folder)
        if (path := folder / "tokenizer.json").is_file():
            return cls(_Json(path))
        models = sorted(folder.glob("*.model"), key=lambda path: path.name != "tokenizer.model")
        if models:
            return cls(_SentencePiece(models[0]))
        raise InputError(f"{folder}: found neither tokenizer.json nor a SentencePiece *.model")

    def split(self, text: str) -> list[str]:
        """The text cut at its special tokens, which are the parts of odd index."""
        return self._marks.split(text)

    def encode(self, text: str) -> list[int]:
        """The text's ids, without <bos>. Raises: InputError: it holds half of a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start]
            raise InputError(
                f"the text holds {found!r} at character {error.start}, half of a surrogate pair"
            ) from None
        ids: list[int] = []
        for index, part in enumerate(self.split(text)):
            if index % 2:
                ids.append(self.special[part])
            elif part:
                ids += self._backend.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """The ids' text; special tokens are written out, or left out.

        Raises: InputError: no such id.
        """
        for id_ in ids:
            self._check(id_)
        return "".join(self._decoded(ids, skip_special))

    def _decoded(self, ids: Sequence[int], skip_special: bool) -> Iterator[str]:
        for is_special, run in groupby(ids, key=lambda i: i in self._special_ids):
            if not is_special:
                yield self._backend.decode(list(run))
            elif not skip_special:
                yield "".join(self._special_ids[i] for i in run)

    def token_text(self, id_: int) -> str:
        """What one token reads as, leading space included. Raises: InputError: no such id."""
        self._check(id_)
        return self._special_ids.get(id_) or self._backend.piece(id_).replace("▁", " ")

    def id_of(self, token: str) -> int:
        """The id of the token with this very text. Raises: InputError: there is none."""
        if token in self.special:
            return self.special[token]
        if (found := self._backend.find(token.replace(" ", "▁"))) is not None:
            return found
        texts = [piece.replace("▁", " ") for piece in self._backend.pieces()]
        raise InputError(f"no token reads {token!r}.{did_you_mean(token, texts)}")

    def _check(self, id_: int) -> None:
        if not 0 <= id_ < self.n_vocab:
            raise InputError(f"token id {id_} is outside the vocabulary: 0 to {self.n_vocab - 1}")


class _Json:
    def __init__(self, path: Path):
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(f"{path}: not readable as a tokenizer ({error})") from None
        self._model.no_truncation()
        self._model.no_padding()
        added = self._model.get_added_tokens_decoder()
        self.special = {
            token.content: id_
            for id_, token in added.items()
            if token.special or MARK.fullmatch(token.content)
        }
        self.n_vocab = self._model.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def piece(self, id_: int) -> str:
        return self._model.id_to_token(id_) or ""

    def find(self, piece: str) -> int | None:
        return self._model.token_to_id(piece)

    def pieces(self) -> list[str]:
        return list(self._model.get_vocab())


class _SentencePiece:
    def __init__(self, path: Path):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{path}: not readable as a SentencePiece model ({error})") from None
        self.n_vocab = self._model.get_piece_size()
        control = (self._model.is_control, self._model.is_unknown)
        self.special = {
            piece: id_
            for id_, piece in enumerate(self.pieces())
            if any(is_kind(id_) for is_kind in control) or MARK.fullmatch(piece)
        }

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, out_type=int)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def piece(self, id_: int) -> str:
        return self._model.id_to_piece(id_)

    def find(self, piece: str) -> int | None:
        found = self._model.piece_to_id(piece)
        return found if self._model.id_to_piece(found) == piece else None

    def pieces(self) -> list[str]:
        return [self._model.id_to_piece(i) for i in range(self.n_vocab)]
