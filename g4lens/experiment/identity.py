"""What results follow from, as hashes: a model, and prompts with their pictures and sounds."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g4lens.errors import G4LensError, InputError, WeightsError
from g4lens.experiment.files import sha256
from g4lens.experiment.media import named_by
from g4lens.hooks import edited_points
from g4lens.inputs.image import Image
from g4lens.inputs.processor import Processor
from g4lens.inputs.prompt import Prompt
from g4lens.model.gemma4 import Gemma4
from g4lens.quantize import quantized


def model_identity(model: Gemma4) -> dict[str, Any]:
    """The hashes of a model's weights and of what turns text into its inputs.

    A loaded model is compared with its files and known by theirs; any other, by its tensors. Of
    hooks that hang now only the names of their points are told: a function has no hash.

    Costs a read of all weights.
    """
    try:
        weights = model.source.hashes
    except (InputError, WeightsError):  # made or edited in memory
        weights = {"in memory": _tensors(model.state_dict())}
    kind = quantized(model)
    return {
        "weights": weights,
        "config": hashlib.sha256(repr(model.cfg).encode()).hexdigest(),
        "inputs": None if model.processor is None else _processor(model.processor),
        "dtype": ", ".join(filter(None, (str(model.dtype).removeprefix("torch."), kind))),
        "device": model.device.type,
        "edited": sorted(point.name for point in edited_points()),
    }


def prompts_identity(prompts: Sequence[Any]) -> dict[str, Any]:
    """The number of prompts and the hash of all that is in them, files of media included.

    Raises: InputError: a prompt of a kind that no model takes.
    """
    digest = hashlib.sha256()
    for i, prompt in enumerate(prompts):
        try:
            digest.update(json.dumps(_plain(prompt), sort_keys=True).encode() + b"\n")
        except (G4LensError, TypeError, ValueError) as error:
            raise InputError(f"prompt {i} cannot be taken: {error}") from None
    return {"n": len(prompts), "sha256": digest.hexdigest()}


def _tensors(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _processor(processor: Processor) -> str:
    tokenizer = processor.tokenizer
    told = {
        "vocabulary": [tokenizer.token_text(i) for i in range(tokenizer.n_vocab)],
        "special": tokenizer.special,
        "template": processor.chat_template,
        "images": dataclasses.asdict(processor.image_settings),
        "sounds": dataclasses.asdict(processor.sound_settings),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=repr).encode()).hexdigest()


def _plain(x: Any) -> Any:
    """What JSON can hold, with a hash in the place of a picture or sound."""
    if isinstance(x, Prompt):
        made = [image.pixels for image in x.images] + [sound.mel for sound in x.sounds]
        return {"ids": x.ids.tolist(), "media": [_array(one.numpy()) for one in made]}
    x = named_by(x) or x
    if hasattr(x, "source"):  # an Image or Audio
        return [type(x).__name__, _media(x), getattr(x, "rate", None)]
    if isinstance(x, Tensor | np.ndarray):
        return x.tolist()
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_plain(one) for one in x]
    return x


def _media(x: Any) -> str:
    if isinstance(x.source, Path):
        return sha256(x.source)
    if isinstance(x.source, bytes):
        return hashlib.sha256(x.source).hexdigest()
    return hashlib.sha256(x.encoded()).hexdigest() if isinstance(x, Image) else _array(x.source)


def _array(x: Any) -> str:
    x = np.ascontiguousarray(x)
    return hashlib.sha256(f"{x.dtype} {x.shape} ".encode() + x.tobytes()).hexdigest()
