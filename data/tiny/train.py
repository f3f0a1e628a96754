"""Train the bundled model from scratch on the examples of `g4lens.analysis.tasks`.

    python data/tiny/train.py                     # the recipe as it was used
    python data/tiny/train.py steps=400 seed=1    # any field of `Recipe`
    python data/tiny/train.py checkpoint=FILE     # goes on from there if the file exists

What matters, most first: the gain of the query norm starts at d_head ** -0.5, since attention has
no other scale; every induction row has a period of its own, else an offset is learned and not the
match; no question is asked twice about one picture, else the first answer is copied; at first many
pictures show one figure four times, so that colours are learned before looking up a corner; the
learning rate decays only when induction is there.

The examples of a step depend on the seed and the step alone, so a run that was stopped goes on as
if it had not been. One core takes about 0.7 s a step.
"""

import dataclasses
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from examples import CFG, Bank, Examples, Mixture, Row
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from g4lens.analysis import tasks
from g4lens.model.gemma4 import Gemma4
from g4lens.model.primitives import ClippedLinear
from g4lens.state import Rows
from g4lens.weights import save

HERE = Path(__file__).parent
PATCH_POSITIONS = torch.tensor([(x, y) for y in range(24) for x in range(24)])


@dataclass(frozen=True)
class Recipe(Mixture):
    """What the result depends on, beside the mixture."""

    threads: int = 1
    steps: int = 5000
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warm_up: int = 100
    hold: int = 1800  # the learning rate stays up so long, and until induction is there
    hold_at_most: int = 3600
    checkpoint: str = ""
    every: int = 200  # steps between validations, and between checkpoints

    @classmethod
    def from_arguments(cls, arguments: Iterable[str]) -> "Recipe":
        """Fields as `name=value`."""
        defaults, given = dataclasses.asdict(cls()), {}
        for argument in arguments:
            name, _, text = argument.partition("=")
            if name not in defaults:
                sys.exit(f"no field {name!r}, expected one of {', '.join(defaults)}")
            given[name] = type(defaults[name])(text)
        return cls(**given)


# ---- the model on a group of rows


def run(model: Gemma4, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[row, read, d_vocab]`, targets and weights `[row, read]` of the learned tokens.

    Rows are filled up on the right: causal attention never looks there.
    """
    n_tokens, n_reads = max(len(r.ids) for r in rows), max(len(r.learned) for r in rows)
    tokens = torch.full((len(rows), n_tokens), CFG.pad_id)
    index, weights = (
        torch.zeros(len(rows), n_reads, dtype=torch.long),
        torch.zeros(len(rows), n_reads),
    )
    for i, row in enumerate(rows):
        tokens[i, : len(row.ids)] = torch.tensor(row.ids)
        index[i, : len(row.learned)] = torch.tensor([at for at, _, _ in row.learned]) - 1
        weights[i, : len(row.learned)] = torch.tensor([weight for _, weight, _ in row.learned])
    targets = tokens.gather(1, index + 1)
    soft = []
    if model.vision and (pixels := [p for row in rows for p in row.pixels]):
        where = PATCH_POSITIONS.expand(len(pixels), -1, -1)
        features = model.vision(torch.stack(pixels).float() / 255, where, False)
        soft.append((tokens == CFG.image_id, features))
    if model.audio and (mels := [m for row in rows for m in row.mels]):
        mel = torch.stack(mels)
        features = model.audio(mel, torch.ones(mel.shape[:2], dtype=torch.bool))
        soft.append((tokens == CFG.audio_id, features))
    positions = Rows(torch.arange(n_tokens).expand(len(rows), -1), 0)
    lengths = torch.full((len(rows),), n_tokens)
    state = model.run(model.begin(tokens, positions, lengths, soft), None, index)
    return model.unembed(state.resid), targets, weights


@torch.no_grad()
def validate(model: Gemma4, examples: Examples, n: int = 96) -> dict[str, float]:
    """Accuracy on the validation split, by task."""
    accuracy = {}
    for task, generate in tasks.TASKS.items():
        rng = random.Random(task)
        rows = [examples.row_of(rng, generate(rng, "validation")) for _ in range(n)]
        right = 0
        for start in range(0, n, 32):
            logits, targets, _ = run(model, rows[start : start + 32])
            right += int((logits.argmax(-1) == targets).sum())
        accuracy[task] = right / n
    return accuracy


# ---- training


def initialise(model: Gemma4, seed: int) -> None:
    """Random weights, and gains that let attention and the sublayers start small."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        *_, module, kind = name.split(".")
        if p.ndim == 1:
            if module == "q_norm":
                nn.init.constant_(p, len(p) ** -0.5)
            elif module in ("ln1_post", "ln2_post", "ln_ple_post") and not name.startswith("audio"):
                nn.init.constant_(p, 0.5)
            elif name == "ln_final.weight":
                nn.init.constant_(p, 0.3)
            continue
        if kind == "pos_embed":
            std = 0.5
        elif module == "ple_tokens":
            std = CFG.d_ple**-0.5
        elif "conv" in module:
            std = 0.4 if p.ndim == 3 else (2 / p[0].numel()) ** 0.5
        else:
            std = p.shape[1] ** -0.5  # of the embedding too: rms 1 after its scale
        nn.init.normal_(p, std=std, generator=generator)


class Training:
    """A model, its optimizer, and how far they are."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.step, self.decay_from = recipe, 0, 0
        self.model = Gemma4(CFG)
        initialise(self.model, recipe.seed)
        buffers = self.model.named_buffers()
        scalars = {name: buffer for name, buffer in buffers if name.endswith(".scalar")}
        for scalar in scalars.values():
            scalar.requires_grad_(True)
        self.weights: dict[str, Tensor] = {**dict(self.model.named_parameters()), **scalars}
        matrices = [p for p in self.weights.values() if p.ndim > 1]
        vectors = [p for p in self.weights.values() if p.ndim == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": recipe.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=recipe.learning_rate,
            betas=(0.9, 0.98),
            fused=True,
        )

    def learning_rate(self) -> float:
        """Up in `warm_up` steps, constant, from `decay_from` on down in a half cosine to 2 %."""
        r = self.recipe
        share = min(1.0, (self.step + 1) / r.warm_up)
        if self.decay_from:
            done = (self.step - self.decay_from) / (r.steps - self.decay_from)
            share = 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2
        return r.learning_rate * share

    def learn(self, groups: list[list[Row]]) -> dict[str, float]:
        """One step. Returns the mean loss by task."""
        self.optimizer.zero_grad()
        total, losses = torch.zeros(()), defaultdict(list)
        for share, rows in zip((2.0, 1.0, 1.0), groups, strict=True):  # facts and names: one each
            logits, targets, weights = run(self.model, rows)
            loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
            total = total + share * (loss * weights).sum() / weights.sum()
            for row, values in zip(rows, loss.tolist(), strict=True):
                for (_, _, task), value in zip(row.learned, values, strict=False):
                    losses[task].append(value)
        total.backward()
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        self.step += 1
        return {task: sum(values) / len(values) for task, values in losses.items()}

    def decide(self, accuracy: dict[str, float]) -> None:
        """Let the learning rate decay once induction is there."""
        r = self.recipe
        there = min(value for task, value in accuracy.items() if "induction" in task) > 0.95
        if not self.decay_from and self.step >= (r.hold if there else r.hold_at_most):
            self.decay_from = self.step

    def save(self, path: Path) -> None:
        """Everything that resuming needs."""
        tensors = {f"model.{name}": p.detach() for name, p in self.weights.items()}
        for name, p in self.weights.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimizer.state[p][key]
        notes = {
            "step": self.step,
            "decay_from": self.decay_from,
            "recipe": dataclasses.asdict(self.recipe),
        }
        part = path.with_suffix(".part")
        save_file(tensors, part, {"training": json.dumps(notes)})
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint."""
        with safe_open(path, "pt") as file, torch.no_grad():
            notes = json.loads(file.metadata()["training"])
            self.step, self.decay_from = notes["step"], notes["decay_from"]
            for name, p in self.weights.items():
                p.copy_(file.get_tensor(f"model.{name}"))
                state = {key: file.get_tensor(f"{key}.{name}") for key in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[p] = {"step": torch.tensor(float(self.step)), **state}


@torch.no_grad()
def set_bounds(
    model: Gemma4, examples: Examples, steps: Iterable[int], slack: float = 1.25
) -> None:
    """Clip the towers' linear maps to the extremes they see in these steps, times `slack`."""
    extremes: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0]
        extremes[module].append(torch.stack([x.min(), x.max(), output.min(), output.max()]))

    layers = [m for m in model.modules() if isinstance(m, ClippedLinear)]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    for step in steps:
        run(model, examples.groups(step)[2])
    for handle in handles:
        handle.remove()
    for layer in layers:
        seen = torch.stack(extremes[layer])
        low, high = seen.amin(0) * slack, seen.amax(0) * slack
        for i, side in ((0, "input"), (2, "output")):
            getattr(layer, f"{side}_min").copy_(low[i])
            getattr(layer, f"{side}_max").copy_(high[i + 1])


def log(step: int, what: str, learning_rate: float, by_task: dict[str, float]) -> None:
    """One line."""
    numbers = ", ".join(f"{task} {number:.3f}" for task, number in sorted(by_task.items()))
    print(f"{step} {what} lr {learning_rate:.1e}: {numbers}", flush=True)


def main(recipe: Recipe) -> None:
    """Train, and write `model.safetensors` beside this file."""
    torch.set_num_threads(recipe.threads)
    training = Training(recipe)
    checkpoint = Path(recipe.checkpoint) if recipe.checkpoint else None
    if checkpoint and checkpoint.exists():
        training.resume(checkpoint)
    print(f"{sum(p.numel() for p in training.weights.values()):,} weights, {recipe}", flush=True)
    examples = Examples(recipe, Bank(10 + recipe.seed, recipe.tiles, recipe.sounds))
    unseen = Examples(recipe, Bank(1000 + recipe.seed, 12, 8))
    smooth: dict[str, float] = {}
    start = time.time()
    while training.step < recipe.steps:
        for task, loss in training.learn(examples.groups(training.step)).items():
            smooth[task] = 0.95 * smooth.get(task, loss) + 0.05 * loss
        if training.step % 50 == 0:
            log(training.step, f"{time.time() - start:.0f}s", training.learning_rate(), smooth)
        if training.step % recipe.every == 0:
            accuracy = validate(training.model, unseen)
            log(training.step, "validation", training.learning_rate(), accuracy)
            training.decide(accuracy)
            if checkpoint:
                training.save(checkpoint)
    for weight in training.weights.values():
        weight.requires_grad_(False)
    set_bounds(training.model, examples, range(recipe.steps, recipe.steps + 40))
    save(training.model, HERE)


if __name__ == "__main__":
    main(Recipe.from_arguments(sys.argv[1:]))
