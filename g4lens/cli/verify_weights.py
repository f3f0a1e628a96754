"""`g4lens verify-weights`: does a checkpoint compute here what transformers computes with it?

Both run the same fixed prompt of text, a picture and a sound. Then every block of transformers is
given what ours was given, all of them in one pass, so that each is told apart from those before it;
and the whole pass is compared by its logits. Both read the same files: this compares what they
compute, and the sha256 of each file tells whether it is the released one.

transformers is no dependency of g4lens: this command looks it up when it is called, and no other
part of the package does.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from g4lens import config_json
from g4lens.cli import arguments
from g4lens.errors import InputError
from g4lens.inputs.batch import Batch, prepare
from g4lens.inputs.image import Image
from g4lens.inputs.sound import Audio
from g4lens.load import load, resolve
from g4lens.model.gemma4 import Gemma4
from g4lens.resources import free_memory, sample
from g4lens.weights import Checkpoint

# Root mean square of the difference, in that of transformers: of one block, of all logits
LIMITS = {
    "float64": (1e-4, 1e-3),  # transformers narrows norms to float32
    "float32": (1e-4, 1e-3),
    "bfloat16": (3e-2, 1e-1),
    "float16": (5e-3, 2e-2),
}
KINDS = {"gemma4": "Gemma4ForConditionalGeneration", "gemma4_text": "Gemma4ForCausalLM"}
# What transformers' modules put out, by our names: of a tower, of a block
TOWERS = {"vision.hook_image_tokens": "embed_vision", "audio.hook_audio_tokens": "embed_audio"}
BLOCK = {
    "attn_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
    "ple_out": "post_per_layer_input_norm",
}
MEDIA = ("text", "picture", "sound")


class Row(NamedTuple):
    """How far an activation is from transformers', and how far it may be."""

    what: str
    distance: float
    limit: float

    @property
    def passed(self) -> bool:
        """Is it near enough? NaN is not."""
        return self.distance <= self.limit


def add(commands: arguments.Commands) -> None:
    """The command of this file."""
    parser = commands.add_parser(
        "verify-weights", help="compare a checkpoint, block by block, with transformers"
    )
    arguments.folder(parser, "name", help='"tiny", a folder, or a name on the hub')
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    parser.add_argument("--dtype", help=f"{', '.join(LIMITS)}; by default as stored")
    arguments.printing(parser)
    parser.set_defaults(do=_do)


def _do(args: argparse.Namespace) -> int:
    told = verify_weights(args.name, args.revision, args.dtype)
    arguments.tell(args, told, lambda: _text(told))
    return 0 if told["passed"] else 1


def verify_weights(
    name: str, revision: str | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """Compare a checkpoint here with the same one in transformers, on the CPU.

    Costs a pass here and two there, over a prompt of some hundred tokens, and the memory of one
    model after the other.

    Args:
        name: as `g4lens.load` takes it.
        revision: as `g4lens.load` takes it.
        dtype: as `g4lens.load` takes it.

    Returns: `passed`; `compared`, of text, picture and sound those that the prompt holds; the
        files' sha256; versions; the prompt's ids; for each row its distance from transformers
        (root mean square, in that of transformers' value; NaN where one of both is no number) and
        its limit; the share of positions with the same likeliest token.

    Raises:
        InputError: transformers is not installed, is too old, fails at the checkpoint, or would
            need more memory than there is. And what `load` raises.
    """
    library = _transformers()
    folder, _, commit = resolve(name, revision)
    _check_memory(folder, dtype)
    model = load(folder, dtype=dtype, device="cpu", ple="disk")
    batch, held, hashes = fixed_prompt(model), model.dtype, model.origin.hashes
    with torch.no_grad():
        logits, cache = model.run_with_cache(batch, _points(model, batch))
    ours = {**cache, "logits": logits}
    del model, cache  # their memory is for transformers now
    theirs = _their_run(library, folder, batch, held, ours)
    block, whole = LIMITS[str(held).removeprefix("torch.")]
    rows = [
        Row(what, _distance(ours[what], x), whole if what == "logits" else block)
        for what, x in theirs.items()
    ]
    same = (logits.argmax(-1) == theirs["logits"].argmax(-1)).float().mean().item()
    return {
        "name": name,
        "revision": commit,
        "passed": all(row.passed for row in rows),
        "dtype": str(held).removeprefix("torch."),
        "compared": [
            kind
            for kind, x in zip(MEDIA, (batch.tokens, batch.pixels, batch.mel), strict=True)
            if x is not None
        ],
        "same_likeliest_token": same,
        "rows": [{**row._asdict(), "passed": row.passed} for row in rows],
        "tokens": batch.tokens[0].tolist(),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "sha256": hashes,
    }


def fixed_prompt(model: Gemma4) -> Batch:
    """The words, the picture and the sound that are compared; as far as a model takes them."""
    cfg = model.cfg
    if model.processor is None:  # no tokenizer beside the weights: any ids will do
        others = (cfg.image_id, cfg.audio_id, cfg.video_id)
        ids = [i for i in range(3, min(64, cfg.d_vocab)) if i not in others]
        return prepare(torch.tensor([ids[: min(32, cfg.n_ctx)]]), None, cfg)
    parts: list[Any] = ["The picture shows a red square"]
    if model.vision is not None:
        parts += [Image(sample("images/corners.png"))]
    if model.audio is not None and model.dtype != torch.float64:  # transformers' tower cannot
        parts += [" and one hears", Audio(sample("sounds/beeps.wav"))]
    return prepare(model.prompt(*parts, " in the capital of France."), model.processor, cfg)


def _points(model: Gemma4, batch: Batch) -> list[str]:
    """The activations of ours that are compared, or given to transformers."""
    parts = ("resid_pre", *BLOCK, "resid_post")
    points = [f"blocks.{i}.hook_{part}" for i in range(model.cfg.n_layers) for part in parts]
    given = zip(TOWERS, (batch.pixels, batch.mel), strict=True)
    return ["hook_embed", *(point for point, x in given if x is not None), *points]


# ---- transformers


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ImportError as error:
        raise InputError(
            f"verify-weights compares with transformers, which is not installed ({error}): "
            "pip install 'transformers>=5.23'"
        ) from None


def _check_memory(folder: Path, dtype: str | None) -> None:
    """Refuse weights that transformers has no room to convert; those as stored it maps.

    Raises: InputError, and what is wrong with the files. An unknown dtype is for `load` to refuse.
    """
    if dtype not in LIMITS:
        return
    files, wanted = Checkpoint(folder), getattr(torch, dtype)
    changed = [x for name, x in files.shapes.items() if files.dtype(name) != wanted]
    need, free = sum(map(math.prod, changed)) * wanted.itemsize, free_memory(torch.device("cpu"))
    if need > free:
        raise InputError(
            f"transformers needs {need / 1e9:.1f} GB for the weights in {dtype}, but "
            f"{free / 1e9:.1f} GB of memory are free: without --dtype they are mapped as stored"
        )


def _their_run(
    library: Any, folder: Path, batch: Batch, dtype: torch.dtype, ours: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What transformers' modules put out by our names, each block given our input; its logits."""
    kind = KINDS[config_json.parsed(folder / "config.json")["model_type"]]
    theirs = _loaded(library, kind, folder, dtype)
    inputs: dict[str, Tensor] = {"input_ids": batch.tokens}
    if batch.pixels is not None and batch.patch_positions is not None:
        inputs["pixel_values"] = batch.pixels.to(dtype)
        inputs["image_position_ids"] = batch.patch_positions
    if batch.mel is not None and batch.mel_mask is not None:
        inputs["input_features"] = batch.mel.to(dtype)
        inputs["input_features_mask"] = batch.mel_mask
    if kind == KINDS["gemma4"]:
        ids = theirs.config.image_token_id, theirs.config.audio_token_id
        kinds = (batch.tokens == ids[0]) + 3 * (batch.tokens == ids[1])
        inputs["mm_token_type_ids"] = kinds.long()
    with torch.no_grad(), _trying(library, f"run {folder} in {str(dtype).removeprefix('torch.')}"):
        logits = theirs(**inputs, use_cache=False).logits
        with _kept(theirs.model, ours) as kept:
            theirs(**inputs, use_cache=False)
    point = "audio.hook_audio_tokens"
    if point in kept and batch.mel_mask is not None:  # padded there, one behind the other here
        kept[point] = kept[point][batch.mel_mask[:, ::2][:, ::2]]
    return kept | {"logits": logits}


def _loaded(library: Any, kind: str, folder: Path, dtype: torch.dtype) -> Any:
    """Transformers' model, loaded without a word. Raises: InputError."""
    try:
        model = getattr(library, kind)
    except (AttributeError, ImportError):
        raise InputError(
            f"transformers {library.__version__} has no {kind}: pip install 'transformers>=5.23'"
        ) from None
    log = library.utils.logging
    had_bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        with _trying(library, f"load {folder}"):
            return model.from_pretrained(folder, dtype=dtype).eval()
    finally:
        log.set_verbosity(level)
        if had_bars:
            log.enable_progress_bar()


@contextmanager
def _trying(library: Any, what: str) -> Iterator[None]:
    """Turn what transformers raises, of any kind, into our own error."""
    try:
        yield
    except Exception as error:
        why = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"transformers {library.__version__} cannot {what} ({type(error).__name__}: {why})"
        ) from error


@contextmanager
def _kept(theirs: Any, ours: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """What transformers' modules put out in a run in this block, each layer given our input."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            kept[name] = x.detach().clone()  # layers scale their output in place

        return hook

    def give(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any) -> Any:
            if layer == 0:
                kept["hook_embed"] = args[0].detach().clone()
            return ours[f"blocks.{layer}.hook_resid_pre"].clone(), *args[1:]

        return hook

    hung = [
        getattr(theirs, module).register_forward_hook(keep(point))
        for point, module in TOWERS.items()
        if point in ours
    ]
    for i, layer in enumerate(getattr(theirs, "language_model", theirs).layers):
        hung.append(layer.register_forward_pre_hook(give(i)))
        for part, module in BLOCK.items():
            out = getattr(layer, module)
            hung.append(out.register_forward_hook(keep(f"blocks.{i}.hook_{part}")))
        hung.append(layer.register_forward_hook(keep(f"blocks.{i}.hook_resid_post")))
    try:
        yield kept
    finally:
        for handle in hung:
            handle.remove()


# ---- the report


def _distance(ours: Tensor, theirs: Tensor) -> float:
    """Root mean square of the difference, in that of transformers' value."""
    a, b = ours.double(), theirs.double().reshape(ours.shape)
    return 0.0 if torch.equal(a, b) else ((a - b).norm() / b.norm()).item()


def _text(told: Mapping[str, Any]) -> str:
    """The report, the blocks by their farthest activation."""
    failed = [row["what"] for row in told["rows"] if not row["passed"]]
    lines = [
        f"{told['name']} in {told['dtype']}, {len(told['tokens'])} tokens of "
        f"{', '.join(told['compared'])}, beside transformers {told['versions']['transformers']}: "
        + (f"FAILED, first at {failed[0]}" if failed else "passed")
    ]
    blocks: dict[str, list[dict[str, Any]]] = {}
    for row in told["rows"]:
        place = ".".join(row["what"].split(".")[:2]) if "blocks." in row["what"] else row["what"]
        blocks.setdefault(place, []).append(row)
    for place, rows in blocks.items():
        far = max(rows, key=lambda row: (math.isnan(row["distance"]), row["distance"]))
        verdict = "ok" if all(row["passed"] for row in rows) else "DIFFERS"
        point = far["what"].removeprefix(place).lstrip(".")
        lines.append(
            f"  {place:<26} {far['distance']:>7.1e} <= {far['limit']:.0e}  {verdict:<7} {point}"
        )
    lines.append(f"  same likeliest token at {told['same_likeliest_token']:.0%} of the positions")
    lines += [f"  sha256 {digest}  {file}" for file, digest in told["sha256"].items()]
    return "\n".join(line.rstrip() for line in lines)
