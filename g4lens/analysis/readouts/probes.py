"""Linear probes: can a class be read off a stream, and is that the stream's doing?

    accuracy     of a linear classifier on prompts whose clusters it has not seen
    control      the same with labels that say nothing: one drawn for each item, whatever its prompt
    selectivity  accuracy - control               (Hewitt and Liang 2019, arXiv 1909.03368)
    untrained    the same on the model with weights drawn anew

A probe that is as good on the control has learned by heart, and one that is as good on the
untrained model reads what any network keeps of its input.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from g4lens.analysis.readouts.activations import prompt_groups, taken
from g4lens.analysis.readouts.untrained import untrained
from g4lens.analysis.sites import checked_layers, site_named
from g4lens.config import Gemma4Config
from g4lens.errors import G4LensError, InputError
from g4lens.model.gemma4 import Gemma4

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

MOST_STEPS = 5000  # of the solver


@dataclass(frozen=True, eq=False, repr=False)
class Probes:
    """A linear probe for each of some blocks. Shares of prompts that were held out.

    Attributes:
        layers, site: what was read.
        classes: the labels, in order.
        accuracy, control, untrained: as at the top of this module.
        chance: the share of the commonest class.
        weights, biases: of a probe that has learned from all prompts: the class with the largest
            `x @ weight + bias`.
        cfg: the model's numbers.
    """

    layers: tuple[int, ...]
    site: str
    classes: tuple[Any, ...]
    accuracy: Float[Tensor, "layer"]
    control: Float[Tensor, "layer"]
    untrained: Float[Tensor, "layer"]
    chance: float
    weights: Float[Tensor, "layer class d"]
    biases: Float[Tensor, "layer class"]
    cfg: Gemma4Config

    @property
    def selectivity(self) -> Float[Tensor, "layer"]:
        """Accuracy beyond what the probe can learn by heart."""
        return self.accuracy - self.control

    def __repr__(self) -> str:
        best = int(self.accuracy.argmax())
        return (
            f"Probes({len(self.classes)} classes from {self.site} of {len(self.layers)} blocks; "
            f"best in block {self.layers[best]}: accuracy {self.accuracy[best]:.2f}, control "
            f"{self.control[best]:.2f}, untrained {self.untrained[best]:.2f}, chance "
            f"{self.chance:.2f})"
        )

    def to_frame(self) -> "DataFrame":
        """A row for each block."""
        import pandas as pd

        columns = ("accuracy", "control", "selectivity", "untrained")
        return pd.DataFrame(
            {"layer": self.layers, **{name: getattr(self, name).tolist() for name in columns}}
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Accuracy, control and untrained weights by block, and chance as a line."""
        from g4lens import plots

        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots(figsize=(7, 2.8), layout="constrained")[1]
        for name, style in (("accuracy", "o-"), ("control", "s:"), ("untrained", "^--")):
            ax.plot(range(len(self.layers)), getattr(self, name).numpy(), style, label=name)
        ax.axhline(self.chance, color="grey", linewidth=1, label="chance")
        ax.set(ylim=(0, 1.05), ylabel=f"share right, {self.site}")
        ax.legend(frameon=False)
        plots.block_axis(ax, self.cfg, self.layers)
        return ax


def probe(
    model: Gemma4,
    prompts: Sequence[Any],
    labels: Sequence[Any],
    layers: int | Sequence[int] | None = None,
    site: str = "resid_post",
    positions: Any = -1,
    clusters: Sequence[Hashable] | None = None,
    items: Sequence[Hashable] | None = None,
    folds: int = 4,
    penalty: float = 1.0,
    seed: int = 0,
) -> Probes:
    """Logistic regressions from activations to labels, block by block, with their controls.

    Each prompt is held out once, with its whole cluster. Channels are scaled to unit variance
    first. Costs a run of each prompt in the model and in an untrained copy of it, and `3 * folds +
    1` fits for each block.

    It misleads in both directions. What is readable need not be used: ablate or patch to know. What
    is not linearly readable may be there. And where prompts of one cluster are spread over the
    folds, accuracy is memory: give templates, names or pictures as clusters.

    Args:
        model: the model.
        prompts: a list of prompts of any kind.
        labels: the class of each.
        layers: a block or several; all by default.
        site: a site of one vector for each position, or of several heads, which lie side by side.
        positions: where in each prompt, as `Pairs` name places; several are rows of one label.
        clusters: what prompts have in common that a probe could recognise; by default nothing.
        items: what the control's labels are drawn for; by default the token that is read.
        folds: parts that are held out in turn.
        penalty: of the squared weights, times one half, beside the summed loss.
        seed: of folds, control and untrained weights.

    Raises:
        InputError: one class only, a class in fewer clusters than folds, items that are all the
            same, lists of unequal lengths, no penalty, or no such site, block or position.
        G4LensError: scikit-learn is not installed.
    """
    place = site_named(site)
    wanted = [layers] if isinstance(layers, int) else None if layers is None else list(layers)
    chosen = checked_layers(model.cfg, place, wanted)
    names = [place.full_name(layer) for layer in chosen]
    groups_of = list(range(len(prompts))) if clusters is None else list(clusters)
    _check(prompts, labels, groups_of, items, folds)
    if not penalty > 0:
        raise InputError(f"penalty is {penalty}, expected more than 0")
    classes = sorted(set(labels), key=lambda label: (str(type(label)), label))
    fit = _Fit(folds, penalty, seed)
    states, rows, tokens = _states(model, prompts, names, positions)
    fresh, _, _ = _states(untrained(model, seed), prompts, names, positions)
    y = np.array([classes.index(labels[row]) for row in rows])
    numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(groups_of))}
    cluster = np.array([numbers[groups_of[row]] for row in rows])
    item = tokens if items is None else [items[row] for row in rows]
    by_item = _control(y, item, seed)
    whole = [fit.directions(x, y, len(classes)) for x in states]
    return Probes(
        layers=tuple(chosen),
        site=site,
        classes=tuple(classes),
        accuracy=torch.tensor([fit.held_out(x, y, y, cluster) for x in states]),
        control=torch.tensor([fit.held_out(x, by_item, y, cluster) for x in states]),
        untrained=torch.tensor([fit.held_out(x, y, y, cluster) for x in fresh]),
        chance=float(np.bincount(y).max() / len(y)),
        weights=torch.stack([weights for weights, _ in whole]),
        biases=torch.stack([biases for _, biases in whole]),
        cfg=model.cfg,
    )


def _check(
    prompts: Sequence[Any],
    labels: Sequence[Any],
    clusters: Sequence[Hashable],
    items: Sequence[Hashable] | None,
    folds: int,
) -> None:
    """Refuse what no probe can learn from. Raises: InputError."""
    if not len(prompts):
        raise InputError("no prompts, expected a list of some")
    for name, given in (("labels", labels), ("clusters", clusters), ("items", items)):
        if given is not None and len(given) != len(prompts):
            raise InputError(f"{len(given)} {name} for {len(prompts)} prompts, expected as many")
    if len(classes := set(labels)) < 2:
        raise InputError(
            f"all labels are {next(iter(classes), None)!r}: a probe needs two classes at least"
        )
    if folds < 2:
        raise InputError(f"folds is {folds}, expected at least 2")
    of_class = [
        (len({c for c, other in zip(clusters, labels, strict=True) if other == label}), label)
        for label in dict.fromkeys(labels)
    ]
    fewest, label = min(of_class, key=lambda pair: pair[0])
    if fewest < folds:
        raise InputError(
            f"class {label!r} stands in {fewest} clusters, expected one for each of {folds} folds"
        )


def _states(
    model: Gemma4, prompts: Sequence[Any], names: list[str], positions: Any
) -> tuple[list[np.ndarray], list[int], list[int]]:
    """Rows of each hook point, and of each row the prompt and the token."""
    found = [taken(model, group, names, positions) for group in prompt_groups(model, prompts)]
    states = [
        torch.cat([parts[i].values for parts in found]).double().numpy() for i in range(len(names))
    ]
    rows = torch.cat([parts[0].prompts for parts in found]).tolist()
    return states, rows, torch.cat([parts[0].tokens for parts in found]).tolist()


def _control(y: np.ndarray, items: Sequence[Hashable], seed: int) -> np.ndarray:
    """A class for each item, in the proportions of the labels.

    Raises: InputError: there is one item only.
    """
    different = list(dict.fromkeys(items))
    if len(different) < 2:
        raise InputError(
            f"all rows are of one item ({different[0]!r}), so a control has one class: name what "
            "tells them apart in items="
        )
    order = np.random.default_rng(seed).permutation(len(different))
    ranks = ((order + 0.5) / len(different) * len(y)).astype(int)
    drawn = dict(zip(different, np.sort(y)[ranks], strict=True))
    return np.array([drawn[item] for item in items])


class _Fit:
    """Logistic regression on scaled channels."""

    def __init__(self, folds: int, penalty: float, seed: int):
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import StratifiedGroupKFold
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise G4LensError(
                f"probes need scikit-learn, which is not installed ({error}): "
                "pip install scikit-learn"
            ) from None
        self.folds = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        self.new = lambda: make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=MOST_STEPS)
        )

    def held_out(
        self, x: np.ndarray, y: np.ndarray, strata: np.ndarray, clusters: np.ndarray
    ) -> float:
        """The share of rows that are right when their cluster is held out."""
        right = 0
        for learned, held in self.folds.split(x, strata, clusters):
            if len(set(y[learned])) < 2:  # a control of few items: nothing to tell apart
                right += int((y[held] == y[learned][0]).sum())
            else:
                right += int(
                    (self.new().fit(x[learned], y[learned]).predict(x[held]) == y[held]).sum()
                )
        return right / len(y)

    def directions(
        self, x: np.ndarray, y: np.ndarray, n_classes: int
    ) -> tuple[Float[Tensor, "class d"], Float[Tensor, "class"]]:
        """The probe of all rows, in the units of the activations."""
        scaler, regression = (step for _, step in self.new().fit(x, y).steps)
        weights = torch.tensor(regression.coef_ / scaler.scale_)
        biases = torch.tensor(regression.intercept_) - weights @ torch.tensor(scaler.mean_)
        if n_classes == 2:  # scikit-learn keeps the second class's only
            weights, biases = torch.cat([-weights, weights]) / 2, torch.cat([-biases, biases]) / 2
        return weights.float(), biases.float()
