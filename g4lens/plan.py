"""What memory a run will need, told from a model's numbers alone.

Weights are counted. The pass itself is run, by the model's own code, on a device that has shapes
and no numbers, behind the keys and values of all positions before the last chunk; a ledger keeps
what is alive at each moment. So the plan follows the code, whatever becomes of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from g4lens.config import AudioConfig, Gemma4Config, VisionConfig
from g4lens.errors import InputError, did_you_mean
from g4lens.hooks import Hung, NamesFilter, hang, running
from g4lens.ledger import Fused, Ledger, Saved, size, tensors
from g4lens.model.gemma4 import Gemma4
from g4lens.quantize import Kind, packed_bytes
from g4lens.state import KeyValues, Rows

PARTS = (
    "embedding",
    "PLE table",
    "decoder",
    "vision",
    "audio",
    "keys and values",
    "activations",
    "cached",
)
TOWERS = ("vision", "audio")
DTYPES = ("float64", "float32", "bfloat16", "float16")
BITS = {None: 16, "int8": 8, "int4": 4}
CHUNKS = (8192, 4096, 2048, 1024, 512)
# What may be given up for room, the cheapest first.
SAVINGS: tuple[dict[str, Any], ...] = (
    {"ple": "disk"},
    *({"chunk": chunk} for chunk in CHUNKS),
    {"vision": False, "audio": False},
    {"embed": "disk"},
    {"quantize": "int8"},
    {"quantize": "int4"},
    {"batch": 1},
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is loaded and run: the arguments of `load`, and those of a call.

    Attributes:
        context: tokens of each prompt.
        batch: prompts.
        chunk: tokens that go through the blocks at a time; None for all.
        dtype: of weights that are not quantised, and of activations.
        quantize: None, "int8" or "int4": the linear maps of the decoder and the towers.
        ple, embed: "device", "ram" or "disk".
        vision, audio: with this tower?
        cache: the activations that are kept, as `run_with_cache` names them; None for none.
        read: "last" or "all": the positions whose logits are wanted.

    Raises: InputError: a number below one, a chunk of zero, an unknown word.
    """

    context: int
    batch: int = 1
    chunk: int | None = None
    dtype: str = "bfloat16"
    quantize: Kind | None = None
    ple: str = "device"
    embed: str = "device"
    vision: bool = True
    audio: bool = True
    cache: NamesFilter | None = None
    read: str = "last"

    def __post_init__(self) -> None:
        for name in ("context", "batch", "chunk"):
            number = getattr(self, name)
            if number is not None and (type(number) is not int or number < 1):
                raise InputError(f"{name} is {number!r}, expected at least 1")
        places = ("device", "ram", "disk")
        for name, known in (
            ("dtype", DTYPES),
            ("quantize", tuple(BITS)),
            ("ple", places),
            ("embed", places),
            ("read", ("last", "all")),
        ):
            if (found := getattr(self, name)) not in known:
                words = [str(word) for word in known]
                raise InputError(
                    f"{name} is {found!r}, expected one of {', '.join(words)}."
                    f"{did_you_mean(str(found), words)}"
                )


@dataclass(frozen=True)
class Plan:
    """The memory of a run, in bytes.

    Attributes:
        options: how the model is loaded and run.
        parts: what each part takes at the run's peak. "activations" is all that the pass holds
            beside the other parts, among it the old keys and values while new ones are joined to
            them; "PLE table" and "embedding" are zero where they stay on disk.
    """

    options: Options
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def weights(self) -> int:
        """What the model takes before anything is run."""
        return sum(self.parts[part] for part in PARTS[:5])

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"options": asdict(self.options), "parts": self.parts, "total": self.total}


_E2B = Gemma4Config(vision=VisionConfig(), audio=AudioConfig(), image_id=258_880, audio_id=258_881)
# The released geometries, for a plan without a network.
RELEASED = {
    "E2B": _E2B,
    "E4B": replace(
        _E2B,
        n_layers=42,
        layer_types=(*("local",) * 5, "global") * 7,
        n_kv_shared_layers=18,
        d_model=2560,
        d_mlp=10_240,
        n_kv_heads=2,
        double_wide_mlp=False,
    ),
}


def plan(cfg: Gemma4Config, options: Options) -> Plan:
    """What a pass over prompts of so many tokens needs, beside the Python process itself.

    Exact for the tensors that the code makes, and within a tenth of measured peaks. What glibc
    keeps of freed pieces below 32 MB comes on top: up to half of what the pass of a small model
    needs, unless the environment says MALLOC_MMAP_THRESHOLD_=65536. Weights that are mapped from
    their file count in full, though a pass reads few rows of the table of per-layer embeddings, and
    the system may take pages back. Pictures and sounds are not part of the pass: their towers run
    before it. Costs a pass of one chunk without arithmetic, a second or two.

    Args:
        cfg: the model's numbers.
        options: how it is loaded and run.

    Raises:
        InputError: a context that the model does not have. HookNameError: no such activations.
    """
    if options.context > cfg.n_ctx:
        raise InputError(
            f"a prompt of {options.context:,} tokens is longer than the context of {cfg.n_ctx:,}"
        )
    kept = {tower: getattr(cfg, tower) if getattr(options, tower) else None for tower in TOWERS}
    with torch.device("meta"):
        model = Gemma4(replace(cfg, **kept)).to(getattr(torch, options.dtype))
    model.requires_grad_(False)
    parts = dict.fromkeys(PARTS, 0) | _weights(model, options)
    return Plan(options, parts | _pass(model, options))


def fitting(cfg: Gemma4Config, options: Options, free: int) -> Plan | None:
    """The plan of the first savings, the cheapest first, with which a run fits; None if none does.

    Savings add up: the table of per-layer embeddings on disk, a smaller chunk, no towers, the
    embedding on disk, 8 bit, 4 bit, one prompt at a time.

    Args:
        cfg: the model's numbers.
        options: how it is to be loaded and run.
        free: bytes.

    Raises: as `plan`.
    """
    best = plan(cfg, options)
    for saving in SAVINGS:
        if best.total <= free:
            return best
        if not _is_less(best.options, saving):
            continue
        smaller = plan(cfg, replace(best.options, **saving))
        best = smaller if smaller.total < best.total else best
    return best if best.total <= free else None


def _is_less(options: Options, saving: Mapping[str, Any]) -> bool:
    """Does this saving change the options, and not to something dearer?"""
    changed = any(getattr(options, name) != x for name, x in saving.items())
    if "chunk" in saving:
        return saving["chunk"] < (options.chunk or options.context)
    return changed and (saving.get("quantize") != "int8" or options.quantize is None)


# ---- weights


def _weights(model: Gemma4, options: Options) -> dict[str, int]:
    """Bytes of the weights, by part."""
    itemsize, sizes = getattr(torch, options.dtype).itemsize, dict.fromkeys(PARTS[:5], 0)
    maps = {f"{n}.weight" for n, part in model.named_modules() if isinstance(part, nn.Linear)}
    kind = options.quantize
    for name, x in model.state_dict().items():
        part = name.split(".")[0]
        if name == "embed.tokens.weight":
            part = "embedding"
        elif name == "embed.ple_tokens.weight":
            part = "PLE table"
        part = part if part in sizes else "decoder"
        if kind is not None and name in maps:
            sizes[part] += packed_bytes(kind, x.shape, itemsize)
        else:
            sizes[part] += x.numel() * itemsize
    elsewhere = {"PLE table": options.ple, "embedding": options.embed}
    return {p: 0 if elsewhere.get(p, "device") != "device" else n for p, n in sizes.items()}


# ---- the pass


def _pass(model: Gemma4, options: Options) -> dict[str, int]:
    """Bytes of the dearest chunk: the last one, or a longer one before it."""
    n = options.context
    chunk = min(options.chunk or n, n)
    last = n - chunk * ((n - 1) // chunk)
    runs = [_chunk(model, options, n - last, last)]
    if last < chunk:
        runs.append(_chunk(model, options, n - last - chunk, chunk))
    return max(runs, key=lambda parts: sum(parts.values()))


@torch.no_grad()
def _chunk(model: Gemma4, options: Options, before: int, n: int) -> dict[str, int]:
    """Bytes of a chunk of `n` tokens behind `before` others."""
    ledger, saved, batch = Ledger(model), Saved(), options.batch
    points = [] if options.cache is None else model.matching(options.cache)
    with ledger, Fused(), running(), hang([(point, Hung(savers=[saved])) for point in points]):
        tokens = torch.zeros(batch, n, dtype=torch.int64, device="meta")
        rows = Rows(torch.arange(n, device="meta").expand(batch, -1), before)
        read = None if options.read == "all" else tokens[:, :1]
        past = _past(model, before, batch, options.chunk or n)
        # what a call returns and what enters it are unnamed there too
        state = model.run(model.begin(tokens, rows, tokens[:, 0], past=past), read=read)
        del past
        model.unembed(state.resid)
    held, new = sum(map(size, tensors(state.kv))), saved.new(state.kv)
    return {
        "keys and values": held,
        "activations": ledger.most - held - new,
        "cached": new + saved.earlier(model.cfg, before, n),
    }


def _past(model: Gemma4, before: int, batch: int, chunk: int) -> KeyValues:
    """The keys and values of so many positions, as chunks before leave them.

    Those of a local block are its window's and the chunk's: what leaves the window goes when the
    next chunk is written.
    """
    cfg, kv, dtype = model.cfg, KeyValues(), model.embed.ple_context.weight.dtype
    for layer in range(cfg.horizon + 1) if before else ():
        kept = before if cfg.is_global(layer) else min(before, cfg.sliding_window - 1 + chunk)
        shape = (batch, kept, cfg.n_kv_heads, cfg.d_head(layer))
        kv.keys[layer], kv.values[layer] = (
            torch.empty(shape, dtype=dtype, device="meta") for _ in range(2)
        )
        positions = torch.arange(kept, device="meta").expand(batch, -1)
        kv.rows[layer] = Rows(positions, before - kept)
    return kv
