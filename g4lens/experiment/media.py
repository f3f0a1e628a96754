"""A first look at the pictures and sounds of a prompt, before anything is computed."""

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from g4lens.config import Gemma4Config
from g4lens.errors import InputError
from g4lens.inputs.image import FORMATS, Image
from g4lens.inputs.sound import Audio

KINDS: dict[str, type[Image] | type[Audio]] = {"image": Image, "audio": Audio}


def check_media(prompt: Any, cfg: Gemma4Config, what: str) -> bool:
    """Read the header of each picture and sound of a prompt.

    Args:
        prompt: text, a tuple of parts or a list of messages.
        cfg: of the model that is to read them.
        what: the prompt's name, for errors.

    Returns:
        Whether there are any.

    Raises: InputError: one is missing or no such file, or the model has no tower for it.
    """
    found = list(media(prompt))
    for one in found:
        tower, kind = (cfg.vision, "image") if isinstance(one, Image) else (cfg.audio, "audio")
        if tower is None:
            raise InputError(f"{what}: {one}, but this model has no tower for {kind} inputs")
        try:
            _open(one)
        except Exception as error:  # the decoders raise all kinds on a corrupt file
            raise InputError(f"{what}: {one} is not readable ({error})") from None
    return bool(found)


def media(x: Any) -> Iterator[Image | Audio]:
    """The pictures and sounds in text, parts or messages, in order."""
    if isinstance(x, Image | Audio):
        yield x
    elif (named := named_by(x)) is not None:
        yield named
    elif isinstance(x, dict | list | tuple):
        for one in x.values() if isinstance(x, dict) else x:
            yield from media(one)


def named_by(x: Any) -> Image | Audio | None:
    """What `{"type": "image", "image": path}` in a message stands for, or the same with audio.

    None for anything else. Raises: InputError: it can be no picture or sound.
    """
    kind = KINDS.get(str(x.get("type"))) if isinstance(x, dict) else None
    value = None if kind is None else x.get(x["type"])
    return None if kind is None or value is None or isinstance(value, kind) else kind(value)


def _open(one: Image | Audio) -> None:
    import PIL.Image
    import soundfile

    if isinstance(one, Audio) and isinstance(one.source, Path):
        soundfile.info(one.source)
    elif isinstance(one, Image) and isinstance(one.source, Path | bytes):
        source = io.BytesIO(one.source) if isinstance(one.source, bytes) else one.source
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            PIL.Image.open(source, formats=FORMATS).close()
