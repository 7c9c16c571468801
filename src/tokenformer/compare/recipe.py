"""Comparison recipes: which models, grown how, at which equal cost, and by which rules it is decided.

Everything is stated before the first run; `tokenformer compare` refuses to go on with other rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..data.section import DataSection, TextSection, texts_in
from ..errors import RecipeError
from ..growth.grow import Amount
from ..sections import Section, parse_sections, read_yaml
from ..training.model import ModelSection, SitesSection
from ..training.recipe import TrainingSection, check_length
from .methods import METHODS

Unit = Literal["training_flops", "text_tokens", "seconds"]


# Fields of a stage that say what it reads, and those that say what becomes of the learning rate as it grows.
_READS = ("data", "sequence_length", "batch_size")
_RATES = ("after_decay", "rewarm", "rewarm_new")


class ArmStage(Section):
    """One growth of an arm, or another change in how it trains."""

    at: float = Field(gt=0)
    """What has been spent by then, all earlier stages included, in the unit of `equal`. A run whose learning rate
    begins to decay here or earlier ends without this growth."""
    method: str = "exact"
    """How it grows: exact, random_keys, recomputed_tau, published, shrink_pad_perturb, hyperclone, stack or
    random_blocks."""
    qkv_param_tokens: Amount | None = None
    """Parameter tokens to reach in each of query, key and value: a total, or what to add as "+256" or "+50%"."""
    output_param_tokens: Amount | None = None
    """Likewise in the attention's output."""
    ffn_param_tokens: Amount | None = None
    """Likewise in the feed-forward; an ordinary transformer's MLP neurons."""
    num_hidden_layers: Amount | None = None
    """Blocks to reach."""
    num_loops: Amount | None = None
    """Times to reach that the blocks run; what grows with it takes part in the new loops alone."""
    grow: SitesSection | None = None
    """Parameter tokens to add beside linear maps of any model, or to those that were tokenised."""
    factor: int | None = Field(None, gt=1)
    """What hyperclone multiplies the width by."""
    shrink: float | None = Field(None, ge=0, le=1)
    """What shrink_pad_perturb multiplies the old weights by. Default: 0.4."""
    frozen: list[str] = Field([])
    """What does not train from then on, as in `stages[].frozen` of a training recipe: "base" freezes the old tokens."""
    after_decay: bool = False
    """Grow what has decayed, as a released checkpoint: the learning rate falls over the share `training.decay` before
    `at`, as if that were a budget, and warms up again once the model has grown."""
    rewarm: float | None = Field(None, gt=0, le=1)
    """Share of the smallest budget over which the learning rate rises from zero again after growing. Default: it stays
    where it is, or after a decay rises over `training.warmup`."""
    rewarm_new: float | None = Field(None, gt=0, le=1)
    """Likewise over which the learning rate of the new parameters alone rises, whose optimizer state is new (SPARKLING,
    arXiv 2602.02472)."""
    data: TextSection | None = None
    """What it reads until the next stage, a source or a mixture. Default: what the arm reads."""
    sequence_length: int | None = Field(None, gt=1)
    """Text tokens per sequence until the next stage; a divisor of `training.sequence_length`. Default: the arm's."""
    batch_size: int | None = Field(None, gt=0)
    """Sequences per optimizer step until the next stage. Default: the arm's."""

    @property
    def reads(self) -> dict[str, Any]:
        """What it reads otherwise than the arm does, and in which batches."""
        return self.model_dump(include={*_READS}, exclude_defaults=True)

    @property
    def rates(self) -> dict[str, Any]:
        """What becomes of the learning rate as it grows."""
        return self.model_dump(include={*_RATES}, exclude_defaults=True)

    @property
    def amounts(self) -> dict[str, Any]:
        """What the method is asked for."""
        asked = self.model_dump(exclude={"at", "method", "frozen", "grow", *_READS, *_RATES}, exclude_none=True)
        return asked | (self.grow.model_dump() if self.grow else {})

    @property
    def grows(self) -> bool:
        """Whether the model grows here."""
        return bool(self.amounts) or not self.model_fields_set & {"frozen", *_READS}

    @model_validator(mode="after")
    def _known_method(self) -> ArmStage:
        if self.method not in METHODS:
            raise ValueError(f"there is no way to grow called {self.method!r}; there are {', '.join(METHODS)}")
        return self


class Arm(Section):
    """One contestant: a model, and how it grows."""

    model: ModelSection
    """`architecture` (tokenformer, gpt_neox, …) and fields of its configuration in transformers' names; the vocabulary
    comes from the tokenizer, the context from `training.sequence_length`, and embeddings are tied unless it says so."""
    stages: list[ArmStage] = Field([])
    """How it grows, or what else changes, in order; none: nothing does."""
    training: dict[str, Any] = Field({})
    """Fields of `training` that differ for this arm."""
    data: TextSection | None = None
    """What it reads instead of `data`, a source or a mixture; what is held out to tune and to report is the same for
    all arms."""

    @property
    def growths(self) -> list[ArmStage]:
        """Those of its stages at which the model grows."""
        return [stage for stage in self.stages if stage.grows]


class Rules(Section):
    """How it is decided, stated before any run. The metric is bits per byte on held-out documents."""

    reference: str
    """Arm that all others are compared with."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Of every interval; comparisons with the reference are corrected by Holm's method."""
    threshold: float = Field(0.01, ge=0)
    """Smallest difference in bits per byte that matters."""
    parameters_within: float | None = Field(None, gt=0)
    """Refuse to run unless the final models' parameters are equal to the reference's up to this share."""


class CompareRecipe(Section):
    """A whole comparison."""

    question: str
    """What it shall answer, in a sentence."""
    data: DataSection
    """The text, the same for all. Half of the held-out documents tune learning rates, the others are reported on."""
    training: TrainingSection = TrainingSection()
    """How to train. `warmup` is a share of the smallest budget, `decay` a share of each, `threads` those of one run."""
    equal: Unit = "training_flops"
    """What all arms spend alike, base and every stage included: FLOPs counted by torch's flop counter, text tokens, or
    seconds of training (measured step times of this machine)."""
    budgets: list[float] = Field(min_length=1)
    """What a whole run may spend, in that unit. Each is a run with its own decay; what runs share is trained once."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """One run each: initial weights and order of the text."""
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Peak learning rates to try; each arm takes its best. A best one at an end of this grid extends the grid by the
    factor between its last two, up to four times at each end, until the best lies inside. One alone: none is tuned."""
    tuning_budget: float
    """Which of the budgets learning rates are tried with, on the first seed; on the second, too, where the best two
    differ by less than `rules.threshold`."""
    rules: Rules
    """How it is decided."""
    arms: dict[str, Arm] = Field(min_length=1)
    """The contestants by name."""

    @model_validator(mode="after")
    def _makes_sense(self) -> CompareRecipe:
        if sorted(self.budgets) != self.budgets:
            raise ValueError(f"budgets are {self.budgets}; write the smallest first")
        for field in ("budgets", "seeds", "learning_rates"):
            given = getattr(self, field)
            if len(set(given)) < len(given):
                raise ValueError(f"{field} are {given}; write each of them once")
        if self.tuning_budget not in self.budgets:
            raise ValueError(f"tuning_budget is {self.tuning_budget:g}; it must be one of the budgets {self.budgets}")
        if self.rules.reference not in self.arms:
            raise ValueError(f"rules.reference is {self.rules.reference!r}; the arms are {', '.join(self.arms)}")
        if self.data.streaming:
            raise ValueError("data.streaming does not go with a comparison, whose arms start anywhere in the text")
        for name, arm in self.arms.items():
            points, end = [stage.at for stage in arm.stages], self.trunk_end(name, self.budgets[-1])
            if sorted(set(points)) != points or (points and points[-1] >= end):
                raise ValueError(
                    f"arms.{name}.stages grow at {points}; the points must rise and lie below {end:g}, "
                    "where the learning rate begins to decay in the largest budget"
                )
            for i, stage in enumerate(arm.stages):
                self._check_rates(name, stage, where=f"arms.{name}.stages.{i}")
            training = self.training_of(name)
            if training.parallel is not None:
                raise ValueError(
                    f"arms.{name}: training.parallel spreads one model over processes, and a comparison deals out its "
                    "arms among them; leave it out"
                )
            own = training.sequence_length
            check_length(own, self.training, self.data, where=f"arms.{name}.training")
            for i, stage in enumerate(arm.stages):
                check_length(stage.sequence_length, self.training, self.data, where=f"arms.{name}.stages.{i}")
        texts_in(self.data, self.other_texts)
        return self

    def _check_rates(self, arm: str, stage: ArmStage, *, where: str) -> None:
        training, asked = self.training_of(arm), ", ".join(stage.rates)
        if not asked:
            return
        if not stage.grows or training.schedule != "wsd":
            raise ValueError(f"{where} has {asked}, which goes with growing and with schedule wsd")
        others = [other.at for other in self.arms[arm].stages if other is not stage]
        if stage.after_decay and any(self.trunk_end(arm, stage.at) <= at < stage.at for at in others):
            raise ValueError(
                f"{where}.after_decay: the decay begins at {self.trunk_end(arm, stage.at):g}, but a stage begins later "
                "than that; move it before the decay, or after the growth"
            )
        if stage.rewarm_new is None:
            return
        if not training.keep_optimizer_state:
            raise ValueError(
                f"{where}.rewarm_new: without keep_optimizer_state, all parameters are new to the optimizer"
            )
        end = stage.at + stage.rewarm_new * self.budgets[0]
        later = others + [self.trunk_end(arm, budget) for budget in self.budgets]
        if any(stage.at < cut < end for cut in later):
            raise ValueError(
                f"{where}.rewarm_new ends at {end:g}, but the next stage or the first decay begins at "
                f"{min(cut for cut in later if cut > stage.at):g}; make it end before that"
            )

    @property
    def other_texts(self) -> list[TextSection]:
        """What arms and their stages read in place of `data`."""
        found = [data for arm in self.arms.values() for data in (arm.data, *(stage.data for stage in arm.stages))]
        return [data for data in found if data is not None]

    def training_of(self, arm: str) -> TrainingSection:
        """Return how an arm trains.

        Raises:
            RecipeError: its changes make no sense.
        """
        fields = {**self.training.model_dump(exclude_unset=True), **self.arms[arm].training}
        return parse_sections(TrainingSection, fields, where=f"arms.{arm}.training")

    def trunk_end(self, arm: str, budget: float) -> float:
        """Return where an arm's learning rate begins to decay in a run of a budget: at its end where it never does."""
        training = self.training_of(arm)
        end = budget * (1 - training.decay) if training.schedule == "wsd" else budget
        return float(f"{end:.12g}")  # without rounding errors, so that it can be told whether growth lies before it


def load_compare_recipe(path: str | Path) -> CompareRecipe:
    """Read a YAML comparison recipe, which may be `based_on` another and then only says what it changes.

    Raises:
        RecipeError: as `recipe.read_sections`.
    """
    content, read = read_yaml(CompareRecipe, path), [Path(path).resolve()]
    while "based_on" in content:
        read.append((read[-1].parent / str(content.pop("based_on"))).resolve())
        if read[-1] in read[:-1]:
            raise RecipeError(f"{path} is based_on itself, by way of {', '.join(p.name for p in read[1:])}")
        content = {**read_yaml(CompareRecipe, read[-1]), **content}
    return parse_sections(CompareRecipe, content, where=str(path))
