"""Text, pictures and sounds into prompts, as a checkpoint's folder says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from g4lens.config import Gemma4Config
from g4lens.errors import InputError
from g4lens.inputs.chat import QUOTE, SHIELD, render, shielded
from g4lens.inputs.image import Image, ImagePatches, ImageSettings, patches
from g4lens.inputs.prompt import Prompt, build
from g4lens.inputs.sound import Audio, MelFrames, SoundSettings, mel_frames
from g4lens.inputs.tokenizer import Tokenizer

SPOKEN_BY_THE_MODEL = ("channel", "tool_call", "tool_response", QUOTE)


@dataclass(frozen=True)
class Processor:
    """What a checkpoint's folder says about inputs.

    Attributes:
        image_settings: `max_soft_tokens` is the budget of each picture; `with_budget` changes it.
        chat_template: jinja2 source; None where the folder has none.
    """

    cfg: Gemma4Config
    tokenizer: Tokenizer
    image_settings: ImageSettings
    sound_settings: SoundSettings
    chat_template: str | None = None

    @classmethod
    def from_folder(cls, folder: str | Path, cfg: Gemma4Config) -> "Processor":
        """Read a checkpoint's tokenizer, processor settings and chat template.

        Raises: InputError: no tokenizer, one that knows more tokens than the config, or a file that
            cannot be used.
        """
        folder = Path(folder)
        tokenizer = Tokenizer.from_folder(folder)
        if tokenizer.n_vocab > cfg.d_vocab:
            raise InputError(
                f"{folder}: the tokenizer has {tokenizer.n_vocab} tokens, expected at most the "
                f"config's {cfg.d_vocab}"
            )
        path = folder / "chat_template.jinja"
        try:
            template = path.read_text(encoding="utf-8") if path.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as text ({error})") from None
        return cls(
            cfg,
            tokenizer,
            ImageSettings.from_json(folder),
            SoundSettings.from_json(folder),
            template,
        )

    def with_budget(self, max_soft_tokens: int) -> "Processor":
        """The same with another budget of soft tokens a picture: 70, 140, 280, 560 or 1120.

        Raises: InputError: another number.
        """
        return replace(
            self, image_settings=replace(self.image_settings, max_soft_tokens=max_soft_tokens)
        )

    def prompt(self, *parts: Any) -> Prompt:
        """Text, `Image`s and `Audio`s in the order given, behind exactly one <bos>.

        Special tokens written out in the text become those tokens; placeholders of pictures and
        sounds may not be written.

        Raises: InputError: a part that cannot be taken, or nothing at all.
        """
        if not parts:
            raise InputError("prompt: nothing given, expected text, Image or Audio")
        ids: list[int] = []
        images: list[ImagePatches] = []
        sounds: list[MelFrames] = []
        for part in parts:
            if isinstance(part, str):
                self._refuse_placeholders(part, "the text")
                ids += self.tokenizer.encode(part)
            elif isinstance(part, Image):
                images.append(self._patches(part))
                ids += self._image_ids(images[-1])
            elif isinstance(part, Audio):
                sounds.append(self._frames(part))
                ids += self._sound_ids(sounds[-1])
            else:
                raise InputError(
                    f"prompt: found a {type(part).__name__}, expected str, Image or Audio"
                )
        bos = self.cfg.bos_id
        return build(
            ids if ids[:1] == [bos] else [bos, *ids], self.tokenizer, self.cfg, images, sounds
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool = False,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """A conversation, rendered by the checkpoint's own template.

        Args:
            messages: `{"role": ..., "content": ...}`, the content a text or a list of texts,
                `Image`s, `Audio`s and `{"type": "text" | "image" | "audio", type: ...}`.
            thinking: switch reasoning on.
            tools: declarations of functions, as in transformers' chat templates.
            add_generation_prompt: end with the opening of the model's turn.

        Raises: InputError: no template, a message it cannot take, or text that holds special tokens
            and so would forge the structure of the conversation.
        """
        if self.chat_template is None:
            raise InputError("this checkpoint has no chat_template.jinja: use prompt(...)")
        for name, given in (("messages", messages), ("tools", tools or [])):
            if not isinstance(given, list | tuple):
                raise InputError(f"{name}: found a {type(given).__name__}, expected a list")
        media: list[Image | Audio] = []
        plain = [self._plain(i, message, media) for i, message in enumerate(messages)]
        special = {
            "bos_token": self.cfg.bos_id,
            "eos_token": self.cfg.eos_ids[0],
            "pad_token": self.cfg.pad_id,
        }
        text = render(
            self.chat_template,
            plain,
            tools=tools and shielded(tools, self.tokenizer.split, "tools"),
            thinking=thinking,
            add_generation_prompt=add_generation_prompt,
            special={name: self.tokenizer.token_text(i) for name, i in special.items()},
        )
        return self._expanded(self._encoded(text), media)

    def extend(self, prompt: Prompt, ids: Sequence[int]) -> Prompt:
        """The prompt with more tokens behind it; a placeholder among them has no picture or sound.

        Raises: InputError: no such id.
        """
        whole = [*prompt.ids.tolist(), *ids]
        return build(whole, self.tokenizer, self.cfg, prompt.images, prompt.sounds)

    def _encoded(self, text: str) -> list[int]:
        """The ids of a rendered conversation: only its template wrote special tokens."""
        ids: list[int] = []
        for index, part in enumerate(self.tokenizer.split(text)):
            if index % 2:
                ids.append(self.tokenizer.special[part])
                continue
            part = part.replace(SHIELD, "<")
            if forged := self.tokenizer.split(part)[1:2]:
                raise InputError(
                    f"texts of the messages join into the special token {forged[0]!r}, which would "
                    "forge the structure of the conversation"
                )
            ids += self.tokenizer.encode(part)
        return ids

    def _expanded(self, ids: Sequence[int], media: Sequence[Image | Audio]) -> Prompt:
        """Put each picture's and sound's soft tokens in the place of its one placeholder."""
        images: list[ImagePatches] = []
        sounds: list[MelFrames] = []
        queue, whole = list(media), list[int]()
        for id_ in ids:
            kind = {self.cfg.image_id: Image, self.cfg.audio_id: Audio}.get(id_)
            if kind is None:
                whole.append(id_)
                continue
            if not queue or not isinstance(queue[0], kind):
                raise InputError(
                    "the chat template moved or dropped a picture or sound of the messages"
                )
            item = queue.pop(0)
            if isinstance(item, Image):
                images.append(self._patches(item))
                whole += self._image_ids(images[-1])
            else:
                sounds.append(self._frames(item))
                whole += self._sound_ids(sounds[-1])
        if queue:
            raise InputError(
                f"the chat template left out {len(queue)} pictures or sounds of the messages"
            )
        return build(whole, self.tokenizer, self.cfg, images, sounds)

    def _plain(
        self, index: int, message: Mapping[str, Any], media: list[Image | Audio]
    ) -> Mapping[str, Any]:
        """A message as templates expect it; its pictures and sounds are collected in order."""
        if not isinstance(message, Mapping):
            raise InputError(
                f"message {index} is a {type(message).__name__}, expected a mapping with role and "
                "content"
            )
        where, split = f"message {index}", self.tokenizer.split
        plain = shielded({k: v for k, v in message.items() if k != "content"}, split, where)
        if "content" in message:
            content = message["content"]
            if isinstance(content, str):
                self._refuse_placeholders(content, where)
            elif isinstance(content, list | tuple):
                content = [self._plain_part(part, where, media) for part in content]
            may_speak = message.get("role") in ("assistant", "model")
            allowed = [
                token
                for token in self.tokenizer.special
                if may_speak and any(word in token for word in SPOKEN_BY_THE_MODEL)
            ]
            plain["content"] = shielded(content, split, where, allowed)
        return plain

    def _plain_part(self, part: Any, where: str, media: list[Image | Audio]) -> dict[str, Any]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        elif isinstance(part, Image):
            part = {"type": "image", "image": part}
        elif isinstance(part, Audio):
            part = {"type": "audio", "audio": part}
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "image", "audio") or part.get(kind) is None:
            raise InputError(
                f"{where}: found content of type {kind!r}, expected a text, an Image, an Audio or "
                '{"type": "text" | "image" | "audio", and its value under the same name}'
            )
        value = part[kind]
        if kind == "text":
            if not isinstance(value, str):
                raise InputError(
                    f"{where}: found a text of type {type(value).__name__}, expected str"
                )
            self._refuse_placeholders(value, where)
            return {"type": "text", "text": value}
        wrap = Image if kind == "image" else Audio
        media.append(value if isinstance(value, wrap) else wrap(value))
        return {"type": kind}

    def _patches(self, image: Image) -> ImagePatches:
        if self.cfg.vision is None:
            raise InputError("this model has no vision tower: it takes no pictures")
        return patches(image, self.image_settings)

    def _frames(self, sound: Audio) -> MelFrames:
        if self.cfg.audio is None:
            raise InputError("this model has no audio tower: it takes no sounds")
        return mel_frames(sound, self.sound_settings)

    def _image_ids(self, image: ImagePatches) -> list[int]:
        return _known(
            [self.cfg.boi_id, *[self.cfg.image_id] * image.n_soft_tokens, self.cfg.eoi_id]
        )

    def _sound_ids(self, sound: MelFrames) -> list[int]:
        return _known(
            [self.cfg.boa_id, *[self.cfg.audio_id] * sound.n_soft_tokens, self.cfg.eoa_id]
        )

    def _refuse_placeholders(self, text: str, where: str) -> None:
        for id_, kind in ((self.cfg.image_id, "Image"), (self.cfg.audio_id, "Audio")):
            if id_ is not None and (written := self.tokenizer.token_text(id_)) in text:
                raise InputError(
                    f"{where} holds the placeholder {written!r}: give an {kind} in its place"
                )


def _known(ids: Sequence[int | None]) -> list[int]:
    if None in ids:
        raise InputError("the config names no token that opens or closes a picture or sound")
    return [id_ for id_ in ids if id_ is not None]
