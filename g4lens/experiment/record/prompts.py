"""Prompts as the page of a run shows them: text, small pictures, the names of sounds."""

import base64
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from g4lens.analysis.pairs import Pair
from g4lens.errors import G4LensError
from g4lens.inputs.image import Image
from g4lens.inputs.sound import Audio

N_CHARACTERS = 600
THUMBNAIL = 96  # pixels


def cells_of(pair: Pair) -> Iterator[list[dict[str, str]]]:
    """The cells of a pair's row, each in parts."""
    yield list(_parts(pair.clean))
    yield list(_parts(pair.corrupted))
    for one in (pair.answer, pair.foil, pair.template):
        yield [{"text": "" if one is None else str(one)[:N_CHARACTERS]}]


def _parts(x: Any) -> Iterator[dict[str, str]]:
    """Text, and small pictures."""
    if isinstance(x, Image):
        yield {"text": _called("picture", x.source), "jpeg": _thumbnail(x)}
    elif isinstance(x, Audio):
        yield {"text": f"({_called('sound', x.source)})"}
    elif isinstance(x, Mapping):  # a message
        yield {"text": f"{x.get('role', '')}:"}
        yield from _parts(x.get("content", ""))
    elif isinstance(x, list | tuple) and not all(isinstance(one, int) for one in x):
        for one in x:
            yield from _parts(one)
    else:
        yield {"text": str(x)[:N_CHARACTERS]}


def _called(kind: str, source: Any) -> str:
    return f"{kind} {source.name}" if isinstance(source, Path) else kind


def _thumbnail(image: Image) -> str:
    import PIL.Image

    try:
        picture = PIL.Image.open(io.BytesIO(image.encoded()))
    except G4LensError:
        return ""
    picture = picture.convert("RGB")
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    picture.save(target := io.BytesIO(), "JPEG", quality=80)
    return base64_of(target.getvalue())


def base64_of(content: bytes) -> str:
    """Bytes as a page holds them."""
    return base64.b64encode(content).decode()
