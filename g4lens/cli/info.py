"""`g4lens info`: geometry, blocks, parameters and hooks of a model."""

import argparse
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch

from g4lens.cli import arguments
from g4lens.config import Gemma4Config
from g4lens.load import resolve
from g4lens.model.gemma4 import Gemma4


def add(commands: arguments.Commands) -> None:
    """The command of this file."""
    parser = commands.add_parser("info", help="geometry, blocks, parameters and hooks of a model")
    arguments.folder(parser, "name", help='"tiny", a folder, or a name on the hub')
    parser.add_argument("--revision", help="branch, tag or commit of a model on the hub")
    arguments.printing(parser)
    parser.set_defaults(do=info)


def info(args: argparse.Namespace) -> None:
    """Tell what a model is, from its `config.json` alone. Errors: those of `g4lens.load`."""
    cfg = Gemma4Config.from_json(resolve(args.name, args.revision, ["config.json"])[0])
    with torch.device("meta"):
        model = Gemma4(cfg)
    arguments.tell(args, _facts(args.name, model), lambda: _text(args.name, model))


def _text(name: str, model: Gemma4) -> str:
    cfg = model.cfg
    parts = [_geometry(name, cfg), _blocks(cfg), _parameters(model), _hooks(model)]
    return "\n\n".join(parts)


def _facts(name: str, model: Gemma4) -> dict[str, Any]:
    cfg = model.cfg
    return {
        "name": name,
        "config": asdict(cfg),
        "horizon": cfg.horizon,
        "kv_source": [cfg.kv_source(i) for i in range(cfg.n_layers)],
        "parameters": _counts(model),
        "hook_points": {point.name: point.axes for point in model.hook_points.values()},
    }


def _geometry(name: str, cfg: Gemma4Config) -> str:
    lines = [
        f"{name}: {cfg.n_layers} blocks, d_model {cfg.d_model}, vocabulary {cfg.d_vocab:,}, "
        f"context {cfg.n_ctx:,}",
        f"  attention  {cfg.n_heads} query heads, {cfg.n_kv_heads} key heads; d_head "
        f"{cfg.d_head_local} local, {cfg.d_head_global} global; window {cfg.sliding_window}",
        f"  MLP        {cfg.d_mlp_at(0)} wide in owners of keys and values, "
        f"{cfg.d_mlp_at(cfg.n_layers - 1)} in the last block",
        f"  PLE        {cfg.d_ple} wide in each block",
        f"  horizon    block {cfg.horizon}: after it positions exchange nothing new",
    ]
    for kind, tower in (("vision", cfg.vision), ("audio", cfg.audio)):
        what = f"{tower.n_layers} blocks, d_model {tower.d_model}" if tower else "none"
        lines.append(f"  {kind:<10} {what}")
    return "\n".join(lines)


def _blocks(cfg: Gemma4Config) -> str:
    """A letter for each block, and whose keys and values it reads."""
    letters = "".join("G" if cfg.is_global(i) else "L" for i in range(cfg.n_layers))
    lines = [f"blocks (L local, G global): {' '.join(re.findall('L*G', letters))}"]
    lines.append(f"  0 to {cfg.horizon} own keys and values")
    for owner in range(cfg.horizon + 1):
        if readers := cfg.readers(owner)[1:]:
            kind = "global" if cfg.is_global(owner) else "local"
            verb = "reads" if len(readers) == 1 else "read"
            numbers = ", ".join(map(str, readers))
            lines.append(f"  {numbers} {verb} those of block {owner} ({kind})")
    return "\n".join(lines)


def _counts(model: Gemma4) -> dict[str, int]:
    """Parameters by part; PLE is the table of per-layer embeddings."""
    sizes: dict[str, int] = dict.fromkeys(("embedding", "PLE", "decoder", "vision", "audio"), 0)
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        if name.startswith("embed.tokens"):
            part = "embedding"
        elif name.startswith("embed.ple_tokens"):
            part = "PLE"
        sizes[part if part in sizes else "decoder"] += parameter.numel()
    return {**sizes, "total": sum(sizes.values())}


def _parameters(model: Gemma4) -> str:
    rows = [f"  {part:<10} {n:>15,}" for part, n in _counts(model).items()]
    return "\n".join(["parameters (PLE: the table of per-layer embeddings)", *rows])


def _hooks(model: Gemma4) -> str:
    """The hook points, those of all blocks in one line."""
    blocks: dict[tuple[str, str], list[str]] = {}
    for name, point in model.hook_points.items():
        sizes = _sizes(model.cfg, name)
        if name.endswith("hook_scale"):
            sizes |= {point.axes[-1]: "1"}
        axes = " ".join(f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in point.axes)
        block = re.search(r"blocks\.(\d+)\.", name)
        general = re.sub(r"blocks\.\d+\.", "blocks.i.", name)
        blocks.setdefault((general, axes), []).append(block[1] if block else "")
    rows = [(name, " to ".join(dict.fromkeys((i[0], i[-1]))), x) for (name, x), i in blocks.items()]
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(
        [
            f"{len(model.hook_points)} hook points: name, blocks i, axes",
            *(f"  {name:<{width}}  {i:<8}  {axes}" for name, i, axes in rows),
        ]
    )


def _sizes(cfg: Gemma4Config, name: str) -> dict[str, str]:
    """The axes of a hook point whose sizes the inputs do not change.

    `|` stands between local and global blocks, and between owners and readers of keys and values.
    """
    vision, audio = cfg.vision, cfg.audio
    sizes: dict[str, int | str]
    if vision is not None and name.startswith("vision."):
        d_model = cfg.d_model if name.endswith("hook_image_tokens") else vision.d_model
        sizes = {"d_model": d_model, "d_mlp": vision.d_mlp}
        sizes |= {"head": vision.n_heads, "d_head": vision.d_head}
    elif audio is not None and name.startswith("audio."):
        behind = name.startswith(("audio.hook_out", "audio.ln_final"))
        d_model = audio.d_out if behind else audio.d_model
        d_model = cfg.d_model if name.endswith("hook_audio_tokens") else d_model
        sizes = {"d_model": d_model, "d_mlp": 4 * audio.d_model}
        sizes |= {"head": audio.n_heads, "d_head": audio.d_head}
        sizes |= {"query_pos": audio.chunk, "key_pos": audio.n_keys}
    else:
        sizes = {"d_model": cfg.d_model, "d_vocab": cfg.d_vocab}
        sizes |= {"layer": cfg.n_layers, "d_ple": cfg.d_ple}
        sizes |= {"head": cfg.n_heads, "kv_head": cfg.n_kv_heads}
        sizes["d_head"] = _either(cfg.d_head(i) for i in range(cfg.n_layers))
        sizes["d_mlp"] = _either(cfg.d_mlp_at(i) for i in range(cfg.n_layers))
    return {axis: str(size) for axis, size in sizes.items()}


def _either(sizes: Iterable[int]) -> str:
    return "|".join(map(str, sorted(set(sizes))))
