"""What `g4lens run` is to do, in a YAML file.

    name: which blocks' per-layer input matters
    model: tiny
    pairs: {task: colour by beeps, n: 80}       # or {file: pairs.jsonl}
    metrics: [logit_diff]
    experiment:
      kind: ablation                            # and what that method takes, under its own names
      site: ple_out
      value: [zero, mean, resample]

Arguments that take one word in Python take a list here, and each word is a variant.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from g4lens.analysis import tasks
from g4lens.analysis.ablation import POST_NORMS
from g4lens.analysis.metrics import METRICS, as_metric
from g4lens.analysis.pairs import Pairs
from g4lens.analysis.sites import site_named
from g4lens.errors import InputError, did_you_mean, listed
from g4lens.experiment.files import sha256
from g4lens.experiment.spec import ModelSpec, Part
from g4lens.model.gemma4 import Gemma4


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _different(values: list[Any]) -> list[Any]:
    if len(set(map(str, values))) < len(values):
        raise InputError(f"{values} holds something twice, expected different ones")
    return values


def _metric(name: str) -> str:
    try:
        as_metric(name)
    except InputError as error:
        raise InputError(f"{error} Metrics: {', '.join(METRICS)}") from None
    return name


def _site(name: str) -> str:
    site_named(name)
    return name


FROZEN = " and ".join(POST_NORMS)
Several = [Field(min_length=1), BeforeValidator(_as_list), AfterValidator(_different)]
Metrics = Annotated[list[Annotated[str, AfterValidator(_metric)]], *Several]
Site = Annotated[str, AfterValidator(_site)]
Sites = Annotated[list[Site], *Several]
Directions = Annotated[list[Literal["denoise", "noise"]], *Several]
Values = Annotated[list[Literal["zero", "mean", "pos_mean", "token_mean", "resample"]], *Several]
Place = int | str | list[int | str]
Different = [Field(min_length=1), AfterValidator(_different)]
Places = Literal["all"] | Annotated[list[Place], *Different] | None
Blocks = Annotated[list[int], *Different] | None


class PairsSpec(Part):
    """The pairs: of a task of `g4lens.tasks`, or of a file.

    Attributes:
        task, n, seed, split: as `tasks.pairs` takes them.
        file: as `Pairs.from_jsonl` reads it, in the spec's folder.
        sha256: of the file; another one is refused.
        filter: leave out those of which the model gets a side wrong; each needs a foil.
    """

    task: str | None = None
    n: int | None = Field(None, ge=1)
    seed: int = 0
    split: tasks.Split = "test"
    file: str | None = None
    sha256: str | None = None
    filter: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.task is None) == (self.file is None):
            found = "neither" if self.task is None else "both"
            raise InputError(f"{found} of task and file, expected one of them")
        if self.task is None:
            self._refuse("file", n=self.n, seed=self.seed, split=self.split)
            return self
        self._refuse("task", sha256=self.sha256)
        if self.task not in tasks.PAIRS:
            near = did_you_mean(self.task, tasks.PAIRS)
            raise InputError(
                f"task is {self.task!r}, expected one of {listed(tasks.PAIRS, 12)}.{near}"
            )
        if self.n is None:
            raise InputError("n is missing: how many pairs of the task")
        return self

    def _refuse(self, source: str, **others: Any) -> None:
        """Raises: InputError: something that goes with the other source is given."""
        for name, value in others.items():
            if value != type(self).model_fields[name].default:
                raise InputError(f"{name} does not go with {source}")

    def load(self, home: Path, model: Gemma4) -> Pairs:
        """The pairs, for a spec in the folder `home`.

        Raises: InputError: no such file, one outside the folder or of another hash, a line that is
            no pair, fewer pairs than asked for; with `filter` a pair without foil, or none that the
            model gets right.
        """
        if self.task is not None:
            pairs = tasks.pairs(self.task, self.n or 0, self.seed, self.split)
        else:
            pairs = self._read(home)
        lonely = [i for i, pair in enumerate(pairs) if pair.foil is None]
        if self.filter and lonely:
            raise InputError(f"pairs.filter: pair {lonely[0]} has no foil, its corrupted answer")
        return pairs.filter(model) if self.filter else pairs

    def _read(self, home: Path) -> Pairs:
        path = (home / str(self.file)).resolve()
        if not path.is_relative_to(home.resolve()):
            raise InputError(f"pairs.file {self.file!r} lies outside the spec's folder")
        pairs = Pairs.from_jsonl(path)
        if self.sha256 is not None and (found := sha256(path)) != self.sha256:
            raise InputError(f"{path} has the sha256 {found}, expected {self.sha256}")
        return pairs


class Statistics(Part):
    """How the numbers are judged.

    Attributes:
        alpha: the level; intervals are of 1 - alpha.
        draws: of the bootstrap and of the sign flips.
        correction: for all cells of a variant and metric: "max-T" bounds the probability of any
            false find, "BH" the share of false finds.
    """

    alpha: float = Field(default=0.05, gt=0, lt=0.5)
    draws: int = Field(default=2000, ge=200)
    correction: Literal["max-T", "BH"] = "max-T"


class Baselines(Part):
    """How often each control is drawn; 0 leaves it out.

    Attributes:
        random: as many other units of the same layers and type.
        direction: a random direction of the same length.
        permuted: answer and foil exchanged at random within templates.
    """

    random: int = Field(default=1, ge=0)
    direction: int = Field(default=1, ge=0)
    permuted: int = Field(default=1, ge=0)


# ---- kinds of experiments


class Patching(Part):
    """See `g4lens.activation_patching`. Variants: site and direction."""

    kind: Literal["patching"]
    site: Sites = Field(["resid_pre"])
    direction: Directions = Field(["denoise"])
    carry: Annotated[list[Literal["ple", "kv"]], AfterValidator(_different)] = Field([])
    layers: Blocks = None
    positions: Places = None
    heads: Blocks = None


class Ablation(Part):
    """See `g4lens.ablation`. Variants: site and value."""

    kind: Literal["ablation"]
    site: Sites = Field(["z"])
    value: Values = Field(["mean"])
    post_norm: Literal["live", "frozen"] = "live"
    layers: Blocks = None
    positions: Places = "all"
    heads: Blocks = None
    bos: bool = False

    @model_validator(mode="after")
    def _can_be_done(self) -> Self:
        for site in self.site:
            if site_named(site).kind == "pattern":
                raise InputError(f"site {site!r} cannot be ablated: ablate 'z', what comes of it")
            if self.post_norm == "frozen" and site not in POST_NORMS:
                raise InputError(f"post_norm 'frozen' goes with {FROZEN}, not with {site!r}")
        return self


class Knockout(Part):
    """See `g4lens.knockout`. `layers: [window, 3]` slides over the blocks. Variants: layer_type."""

    kind: Literal["knockout"]
    edges: Annotated[list[Annotated[list[Place], Field(min_length=2, max_length=2)]], *Different]
    layers: list[int | Literal["window"]] | None = None
    layer_type: Annotated[list[Literal["local", "global"] | None], *Several] = Field([None])
    side: Literal["clean", "corrupted"] = "clean"


class PathPatching(Part):
    """See `path_patching`. Nodes are named as in "head 3.1", ports as in "head 5.0 q".

    Variants: direction.
    """

    kind: Literal["path_patching"]
    senders: Annotated[list[str], *Different] | None = None
    receivers: Annotated[list[str | list[str]], *Different] | None = None
    direction: Directions = Field(["noise"])
    readers: Literal["one", "all"] = "one"


class Attribution(Part):
    """See `attribution_patching`. Variants: site and direction."""

    kind: Literal["attribution"]
    site: Sites = Field(["resid_pre"])
    direction: Directions = Field(["denoise"])
    layers: Blocks = None
    positions: Places = None
    heads: Blocks = None
    qk_fix: bool = False
    grad_drop: bool = False


class Circuits(Part):
    """Circuits of growing size, chosen on the discovery pairs and measured on the others.

    See `edge_attribution`, `extract_circuit` and `faithfulness`. Variants: direction.

    Attributes:
        steps: of EAP-IG; None is EAP.
        ranking, search: as `extract_circuit` takes them.
        shares: of all edges.
        direction: of the scores and of the measurement.
    """

    kind: Literal["circuits"]
    steps: int | None = Field(None, ge=1)
    ranking: Literal["signed", "absolute"] = "absolute"
    search: Literal["threshold", "greedy"] = "threshold"
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], *Different] = Field(
        [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    )
    direction: Directions = Field(["noise"])


class Steering(Part):
    """A direction made on the discovery pairs, its dose and response measured on the others.

    See `steering`, `difference_of_means` and `function_vector`. Variants: vector.

    Attributes:
        vector: how it is made.
        layers: the blocks, each by itself.
        site: of a difference of means.
        positions: where its means are taken.
        n_heads: of a function vector.
        strengths, side: as `steering` takes them.
        steered: where the vector is added; everywhere by default.
    """

    kind: Literal["steering"]
    vector: Annotated[list[Literal["difference_of_means", "function_vector"]], *Several] = Field(
        ["difference_of_means"]
    )
    layers: Annotated[list[int], *Different]
    site: Site = "resid_post"
    positions: Place = "end"
    n_heads: int = Field(10, ge=1)
    strengths: Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], *Several] = Field(
        [0.5, 1.0, 2.0]
    )
    side: Literal["clean", "corrupted"] = "corrupted"
    steered: Place | None = None


class LogitLens(Part):
    """The metric of every block's stream read as logits: see `g4lens.logit_lens`. Variants: site.

    Attributes:
        site: streams.
        layers: the blocks; all by default.
        side: whose prompts are read, at their ends.
    """

    kind: Literal["logit_lens"]
    site: Annotated[
        list[Literal["resid_pre", "resid_mid", "resid_pre_ple", "resid_post"]], *Several
    ] = Field(["resid_post"])
    layers: Blocks = None
    side: Literal["clean", "corrupted"] = "clean"


Kind = Patching | Ablation | Knockout | PathPatching | Attribution | Circuits | Steering | LogitLens
CHOOSING = ("circuits", "steering")


class Spec(Part):
    """What `g4lens run` is to do.

    Attributes:
        name: what it is called in the report.
        model: the model, or its name alone.
        pairs: what to run.
        metrics: of `g4lens.metrics`, by name.
        experiment: the kind of experiment, and what it takes.
        seed: of every draw.
        split: the share of the templates that is set apart, for what the experiment chooses to be
            chosen on; the others are measured. Circuits and steering set half apart by default,
            the rest nothing.
        statistics: how the numbers are judged.
        baselines: what they are compared with.
        pairs_per_unit: of each work unit.
    """

    name: str
    model: ModelSpec
    pairs: PairsSpec
    metrics: Annotated[list[Annotated[str, AfterValidator(_metric)]], *Several] = Field(
        ["logit_diff"]
    )
    experiment: Annotated[Kind, Field(discriminator="kind")]
    seed: int = 0
    split: float | None = Field(None, gt=0, lt=1)
    statistics: Statistics = Statistics()
    baselines: Baselines = Baselines()
    pairs_per_unit: int = Field(16, ge=1)

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def discovery(self) -> float | None:
        """The share of the templates that is set apart."""
        chooses = self.experiment.kind in CHOOSING
        return 0.5 if self.split is None and chooses else self.split
