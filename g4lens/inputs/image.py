"""Pictures: decoded, resized to a budget of soft tokens, and cut into patches.

Equal to `Gemma4ImageProcessorPil` of transformers'
`models/gemma4/image_processing_pil_gemma4.py`, but for the padding to the budget, which changes no
result.
"""

import io
import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from g4lens.errors import InputError

BUDGETS = (70, 140, 280, 560, 1120)
MAX_PIXELS = 178_956_970  # 512 MiB of RGB: where PIL too takes a picture for a decompression bomb


class Image:
    """A picture for a prompt.

    Args:
        source: a path, the bytes of an image file, a PIL image, or an array `[height, width, 3]`
            (or `[height, width]`, grey) of uint8, or of floats from 0 to 1.
    """

    def __init__(self, source: Any):
        if isinstance(source, str) and "://" in source:
            raise InputError(
                f"Image({source!r}): found a URL, expected a path (g4lens fetches no media)"
            )
        self.source = Path(source) if isinstance(source, str) else source

    def __repr__(self) -> str:
        return f"Image({_named(self.source)})"


@dataclass(frozen=True)
class ImageSettings:
    """How pictures are cut up. Raises: InputError: a budget that Gemma 4 was not trained with.

    Attributes:
        max_soft_tokens: at most so many for one picture.
        patch_size: side of a patch in pixels.
        pooling: a soft token is a square of so many patches a side.
    """

    max_soft_tokens: int = 280
    patch_size: int = 16
    pooling: int = 3

    def __post_init__(self) -> None:
        if self.max_soft_tokens not in BUDGETS:
            raise InputError(
                f"max_soft_tokens is {self.max_soft_tokens!r}, expected one of {BUDGETS}"
            )

    @property
    def tile(self) -> int:
        """Side of one soft token's square in pixels of the resized picture."""
        return self.patch_size * self.pooling

    @classmethod
    def from_json(cls, folder: str | Path) -> "ImageSettings":
        """Read `processor_config.json` or `preprocessor_config.json`, or else take the defaults.

        Raises: InputError: settings that ask for something else than Gemma 4's preprocessing.
        """
        raw, path = settings_of(folder, "image_processor")
        expected = {"do_resize": True, "do_rescale": True, "do_normalize": False, "resample": 3}
        refuse_others(raw, expected, path)
        return cls(
            raw.get("max_soft_tokens", 280),
            raw.get("patch_size", 16),
            raw.get("pooling_kernel_size", 3),
        )


@dataclass(frozen=True, eq=False)
class ImagePatches:
    """A picture as the vision tower reads it.

    Attributes:
        pixels: flattened patches (row, column, channel), 0 to 1.
        positions: column and row of each patch.
        grid: rows and columns of soft tokens.
        size: width and height of the original, in pixels.
    """

    pixels: Float[Tensor, "patch d_patch"]
    positions: Int[Tensor, "patch 2"]
    grid: tuple[int, int]
    size: tuple[int, int]

    @property
    def n_soft_tokens(self) -> int:
        """How many soft tokens it becomes."""
        return self.grid[0] * self.grid[1]

    def box(self, k: int) -> tuple[float, float, float, float]:
        """Left, top, right, bottom of the k-th soft token, in pixels of the original."""
        (rows, columns), (width, height) = self.grid, self.size
        row, column = divmod(k, columns)
        x, y = width / columns, height / rows
        return column * x, row * y, (column + 1) * x, (row + 1) * y


def patches(image: Image, settings: ImageSettings) -> ImagePatches:
    """Decode, resize and cut up a picture.

    Raises: InputError: a picture that cannot be decoded, is empty, too large, or too narrow.
    """
    import PIL.Image

    picture = _decoded(image)
    width, height = target_size(picture.size, settings)
    if (width, height) != picture.size:
        resized = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    else:
        resized = picture
    pixels = (np.asarray(resized) * (1 / 255)).astype(np.float32)
    side = settings.patch_size
    cut = rearrange(pixels, "(row y) (column x) c -> (row column) (y x c)", y=side, x=side)
    rows, columns = height // side, width // side
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    grid = rows // settings.pooling, columns // settings.pooling
    positions = torch.stack([x, y], dim=-1).reshape(-1, 2)
    return ImagePatches(torch.from_numpy(cut.copy()), positions, grid, picture.size)


def target_size(size: tuple[int, int], settings: ImageSettings) -> tuple[int, int]:
    """Width and height to resize to: the largest whole tiles that keep aspect and budget.

    Raises: InputError: a picture so narrow that no tile fits.
    """
    (width, height), tile = size, settings.tile
    budget = settings.max_soft_tokens * tile**2
    scale = math.sqrt(budget / (width * height))
    columns, rows = (math.floor(scale * side / tile) for side in (width, height))
    if rows == 0:
        rows, columns = 1, min(width // height, settings.max_soft_tokens)
    elif columns == 0:
        rows, columns = min(height // width, settings.max_soft_tokens), 1
    return columns * tile, rows * tile


def settings_of(folder: str | Path, section: str) -> tuple[dict[str, Any], Path]:
    """A section of a checkpoint's processor settings, and the file it is from.

    Raises: InputError: the file is no JSON object.
    """
    paths = [Path(folder) / name for name in ("processor_config.json", "preprocessor_config.json")]
    path = next((path for path in paths if path.is_file()), paths[0])
    if not path.is_file():
        return {}, path
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = raw.get(section, raw if path == paths[1] else {})
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: not readable as a JSON object ({error})") from None
    return found, path


def refuse_others(raw: dict[str, Any], expected: dict[str, Any], path: Path) -> None:
    """Refuse settings with another value than the one that g4lens computes. Raises: InputError."""
    for name, value in expected.items():
        if raw.get(name, value) != value:
            raise InputError(f"{path}: {name} is {raw[name]!r}, g4lens computes {value!r} only")


def _decoded(image: Image) -> Any:
    """The picture as RGB, upright."""
    import PIL.Image
    import PIL.ImageOps

    source, name = image.source, repr(image)
    if isinstance(source, Path) and not source.is_file():
        raise InputError(f"{name}: no such file")
    if hasattr(source, "__array__") and not isinstance(source, PIL.Image.Image):
        return PIL.Image.fromarray(_as_bytes(np.asarray(source), name)).convert("RGB")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our limit is next
        try:
            if isinstance(source, bytes):
                source = io.BytesIO(source)
            opened = source if isinstance(source, PIL.Image.Image) else PIL.Image.open(source)
            if 0 in opened.size:
                raise InputError(
                    f"{name}: the picture is empty, {opened.size[0]} x {opened.size[1]}"
                )
            if (found := opened.size[0] * opened.size[1]) > MAX_PIXELS:
                raise InputError(f"{name}: {found:,} pixels, expected at most {MAX_PIXELS:,}")
            return PIL.ImageOps.exif_transpose(opened).convert("RGB")
        except PIL.Image.DecompressionBombError as error:
            raise InputError(f"{name}: {error}, expected at most {MAX_PIXELS:,} pixels") from None
        except (OSError, ValueError, TypeError, AttributeError, SyntaxError) as error:
            raise InputError(f"{name}: not readable as a picture ({error})") from None


def _as_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """An array of pixels as uint8."""
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[2] != 3):
        raise InputError(
            f"{name}: expected [height, width, 3] or [height, width], at least one pixel"
        )
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"{name}: expected at most {MAX_PIXELS:,} pixels")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(f"{name}: pixels are {array.dtype}, expected uint8, or floats from 0 to 1")
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
        raise InputError(f"{name}: pixels reach beyond 0 to 1 or are NaN")
    return (array * 255).round().astype(np.uint8)


def _named(source: Any) -> str:
    """A picture's or sound's source, briefly."""
    if isinstance(source, Path):
        return repr(str(source))
    if isinstance(source, bytes):
        return f"{len(source)} bytes"
    shape = getattr(source, "shape", None) or getattr(source, "size", None)
    return f"{type(source).__name__} {shape}"
