"""Training recipes: what to train, on which text, in which stages. A YAML file is a `Recipe`, field for field.

`tokenformer recipe --explain` prints the docstring under every field.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ..data.image_section import ImageSection
from ..data.section import DataSection, TextSection, texts_in
from ..growth.grow import Amount
from ..sections import Section, parse_sections, read_sections
from .model import ModelSection

EXAMPLE = """\
# tokenformer train THIS_FILE
model:
  preset: 1m-modern
  ffn_tau: 39.2              # √1536, the parameter tokens that it will grow to
data:
  source: shakespeare        # or your files: [notes/, "books/*.txt", corpus.jsonl]
  tokenizer: bpe:4096
training:
  batch_size: 16
  sequence_length: 128
  optimizer: muon            # learning rates and weight decay are then those that suit it
stages:
  - text_tokens: 1_000_000
  - ffn_param_tokens: +100%  # grow, losing nothing, and train on
    text_tokens: 1_000_000
"""


# Found by the trials of docs/lab-notebook.md, and nanochat's by and large.
_WITH_MUON = {"learning_rate": 0.02, "embedding_rate": 5.0, "head_rate": 0.1, "weight_decay": 0.0}


class StartSection(ModelSection):
    """The model of the first stage."""

    checkpoint: str | None = None
    """Folder of a checkpoint to start from instead: its weights, its tokenizer. No field above goes with it."""

    @model_validator(mode="after")
    def _nothing_beside_a_checkpoint(self) -> StartSection:
        if self.checkpoint is not None and self.model_fields_set != {"checkpoint"}:
            others = ", ".join(sorted(self.model_fields_set - {"checkpoint"}))
            raise ValueError(f"checkpoint brings its own sizes; take out {others}, or grow in a stage")
        return self


class ParallelSection(Section):
    """How one model is spread over the processes that torchrun starts: `fsdp` × `tensor`, or whole copies of those."""

    fsdp: int = Field(1, gt=0)
    """Processes of which each keeps a part of all weights, gradients and moments, and reads text of its own (FSDP2)."""
    tensor: int = Field(1, gt=0)
    """Processes of which each computes a part of the parameter tokens, of the same text (tensor parallelism)."""


class TrainingSection(Section):
    """How to train; the same for all stages, but for what a stage says itself."""

    batch_size: int = Field(16, gt=0)
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Sequences per forward pass and process, where fewer fit in memory. Default: batch_size / processes."""
    sequence_length: int = Field(256, gt=1)
    """Text tokens per sequence; what validation reads, and the longest that a stage may."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate; a stage may set its own. Default: 0.001; with muon 0.02."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """"wsd": warm up, hold, decay once over all stages. "cosine": warm up and decay to a tenth in each (paper).
    "constant": warm up once and hold."""
    warmup: float = Field(0.02, ge=0, le=1)
    """Share of the text tokens the learning rate rises over: of all stages (wsd, constant) or of the stage (cosine)."""
    decay: float = Field(0.2, ge=0, le=1)
    """Share of all text tokens at the end over which wsd falls linearly to 0."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"adamw". "muon": Muon (momentum 0.95) on the blocks' matrices, AdamW on all else."""
    embedding_rate: float = Field(1.0, gt=0)
    """Learning rate of an embedding, as a multiple of the blocks'. Default: 1; with muon 5."""
    head_rate: float = Field(1.0, gt=0)
    """Likewise of the head, and of an embedding tied to it. Default: 1; with muon 0.1."""
    rate_width: int | None = Field(None, gt=0)
    """hidden_size at which `learning_rate` was found: where a model is wider, AdamW's rate for the blocks' matrices and
    for a head of its own falls in proportion, so that the same number stays right (muP). Muon's needs no such help."""
    keep_optimizer_state: bool = True
    """Whether what trained before a stage goes on with its optimizer state; if not, every stage starts it afresh."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """AdamW's decay of the gradient's mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """AdamW's decay of the gradient's square."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay on every matrix; never on the final norm. Default: 0.1; with muon 0."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest gradient norm; larger ones are scaled down."""
    on_bad_step: Literal["stop", "skip", "go_on"] = "stop"
    """What happens before a step whose gradients are not finite, or larger than `bad_grad_norm`: the run stops, its
    newest saved state kept; the step is left out; or it is taken all the same, which spoils the weights. Comparisons go
    on, for a run that diverges is a result. --resume may find this and the next field changed."""
    bad_grad_norm: float | None = Field(None, gt=0)
    """Gradient norm, before it is scaled down, above which a step counts as bad. Default: none does."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute type; "auto" takes bfloat16 where the GPU or CPU has units for it. Weights stay float32."""
    evaluations_per_stage: int = Field(4, ge=1)
    """Validations in each stage, evenly spread, the last at its end."""
    save_every: int = Field(500, gt=0)
    """Optimizer steps between the checkpoints that --resume continues from."""
    log_every: int = Field(10, gt=0)
    """Optimizer steps between lines in log.jsonl."""
    threads: int | None = Field(None, gt=0)
    """CPU threads. Default: torch's choice. Tiny models are faster on 1; equal bits need an equal number."""
    parallel: ParallelSection | None = None
    """Spread the model over several processes, where it would not fit in one. Default: each has all of it.
    --resume may find other numbers here, and as many processes; {fsdp: 1} is one that has all."""
    report_to: list[str] = Field([])
    """Where else to log, in transformers' names: "tensorboard", "wandb", …."""
    training_arguments: dict[str, Any] = Field({})
    """Further fields of transformers.TrainingArguments, for example {gradient_checkpointing: true}."""

    @model_validator(mode="after")
    def _defaults_that_suit_the_optimizer(self) -> TrainingSection:
        suited = _WITH_MUON if self.optimizer == "muon" else {}
        # Not set as by a caller, so that they follow where another optimizer is asked for.
        self.__dict__.update({field: value for field, value in suited.items() if field not in self.model_fields_set})
        return self

    @property
    def tokens_per_step(self) -> int:
        """Text tokens in an optimizer step."""
        return self.batch_size * self.sequence_length


class Stage(Section):
    """One growth stage: grow (all but the first may), then train."""

    renamed: ClassVar[dict[str, str]] = {"group": "name", "token_group_norm": "norm"}
    text_tokens: int | None = Field(None, gt=0)
    """Text tokens to train on in this stage, rounded up to whole optimizer steps."""
    images: int | None = Field(None, gt=0)
    """Instead, where the recipe has images: how many of them."""
    data: TextSection | None = None
    """What it reads instead of `data`: a source, or a mixture with weights. It is held out and tokenised alike."""
    sequence_length: int | None = Field(None, gt=1)
    """Text tokens per sequence in this stage, a divisor of training.sequence_length, which is the default."""
    batch_size: int | None = Field(None, gt=0)
    """Sequences per optimizer step in this stage. Default: training.batch_size."""
    preset: str | None = None
    """Grow to the parameter tokens and depth of this preset before training."""
    qkv_param_tokens: Amount | None = None
    """Grow each of query, key and value to this total, or by "+256" or "+50%"."""
    output_param_tokens: Amount | None = None
    """Grow the attention's output likewise."""
    ffn_param_tokens: Amount | None = None
    """Grow the feed-forward likewise."""
    num_hidden_layers: Amount | None = None
    """Insert blocks up to this depth, likewise."""
    num_loops: Amount | None = None
    """Let the blocks run so many times, likewise; what grows with it takes part in the new loops alone."""
    at: str | dict[str, int] | None = None
    """Put parameter tokens beside linear maps instead, those that this regular expression names, such as
    "q_proj|v_proj", or several with the tokens that each gets. Only they train, and the stage writes an add-on."""
    tokens: int | None = Field(None, gt=0)
    """Parameter tokens beside each of these maps."""
    name: str | None = None
    """Of the token group that growing adds. Default: grown1, grown2, …."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of this stage. Default: training.learning_rate."""
    norm: Literal["joint", "per_group"] | None = None
    """What the scores of a token group are normalised with, chosen while there is one: those of all, or its own."""
    weights: Literal["float", "ternary"] | None = None
    """How the keys and values that growing adds are kept. Default: as the model's maps are."""
    frozen: list[str] | None = None
    """What does not train in this stage: names of token groups, "embedding" (with the output head), "final_norm",
    "linear_maps" (all else in the blocks). Default: what `tokenformer freeze` froze in the checkpoint."""
    nested_dropout: float | None = Field(None, gt=0, le=1)
    """Train prefixes as well, so that slices of the model are good: in every step only a random share of each group's
    first parameter tokens takes part, between this and 1."""

    @property
    def amount(self) -> int:
        """Text tokens, or images, to train on."""
        return self.text_tokens or self.images or 0

    def training(self, all_stages: TrainingSection) -> TrainingSection:
        """Return how this stage trains."""
        own = self.model_dump(include={"sequence_length", "batch_size"}, exclude_none=True)
        return all_stages.model_copy(update=own)

    @property
    def growth(self) -> dict[str, Any]:
        """Keyword arguments for `grow`; empty where this stage does not grow."""
        sizes = {"qkv_param_tokens", "output_param_tokens", "ffn_param_tokens", "num_hidden_layers", "num_loops"}
        fields = {"preset", *sizes, "at", "tokens"}
        asked = self.model_dump(include=fields, exclude_none=True)
        how = self.model_dump(include={"norm", "weights"}, exclude_none=True)
        return {**asked, "name": self.name, **how} if asked else {}


class Recipe(Section):
    """A whole run."""

    model: StartSection
    """The first stage's model."""
    data: DataSection | None = None
    """The text."""
    images: ImageSection | None = None
    """The images, in place of text."""
    training: TrainingSection = TrainingSection()
    """How to train."""
    stages: list[Stage] = Field(min_length=1)
    """Growth stages in order."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides initial weights, hold-out order of the text and everything else random."""

    @model_validator(mode="after")
    def _stages_say_how_much_they_read_of_what_there_is(self) -> Recipe:
        if self.data is not None and self.images is not None:
            raise ValueError("data is text to train on, and images is instead of it: take one of them out")
        if self.data is None and self.images is None:
            raise ValueError("'data' is missing: the text to train on, or images in its place")
        kind, other = ("text_tokens", "images") if self.images is None else ("images", "text_tokens")
        for i, stage in enumerate(self.stages):
            if getattr(stage, kind) is None:
                raise ValueError(f"'stages.{i}.{kind}' is missing")
            of_text = [name for name in ("data", "sequence_length") if getattr(stage, name) is not None]
            foreign = [other, *(of_text if kind == "images" else [])]
            given = [name for name in foreign if getattr(stage, name) is not None]
            if given:
                raise ValueError(f"stages.{i}.{given[0]} does not go with {'data' if kind != 'images' else 'images'}")
        return self

    @model_validator(mode="after")
    def _first_stage_does_not_grow(self) -> Recipe:
        if self.stages[0].growth and self.model.checkpoint is None:
            raise ValueError("stages.0 grows, but the first stage trains `model`: put its sizes there")
        for i, stage in enumerate(self.stages):
            if stage.name is not None and not stage.growth:
                raise ValueError(f"stages.{i} names a token group {stage.name!r} but adds no parameter tokens")
            if stage.weights is not None and not stage.growth:
                raise ValueError(
                    f"stages.{i}.weights is {stage.weights}, but the stage adds no parameter tokens; those of the "
                    "first model go into model.weights"
                )
        return self

    @model_validator(mode="after")
    def _stages_read_one_set_of_texts(self) -> Recipe:
        if self.data is None:
            return self
        for i, stage in enumerate(self.stages):
            check_length(stage.sequence_length, self.training, self.data, where=f"stages.{i}")
        texts_in(self.data, self.other_texts)
        return self

    def per_step(self, stage: Stage) -> int:
        """Text tokens, or images, in an optimizer step of a stage."""
        training = stage.training(self.training)
        return training.batch_size if self.images is not None else training.tokens_per_step

    @property
    def other_texts(self) -> list[TextSection]:
        """What stages read in place of `data`."""
        return [stage.data for stage in self.stages if stage.data is not None]


def check_length(length: int | None, training: TrainingSection, data: DataSection, *, where: str) -> None:
    """Raise ValueError where a stage's sequences are no pieces of a text block; None is a whole one."""
    if length is None or length == training.sequence_length:
        return
    if training.sequence_length % length:
        raise ValueError(
            f"{where}.sequence_length is {length}, which does not divide training.sequence_length, "
            f"{training.sequence_length}: text blocks have that length and are cut into pieces; take a divisor"
        )
    if data.streaming:
        raise ValueError(f"{where}.sequence_length is {length}; data.streaming goes with one sequence_length")


def load_recipe(path: str | Path) -> Recipe:
    """Read a YAML recipe; errors as in `read_sections`."""
    return read_sections(Recipe, path)


def parse_recipe(content: dict[str, Any], *, where: str = "recipe") -> Recipe:
    """Check a recipe given as nested dictionaries; errors as in `read_sections`."""
    return parse_sections(Recipe, content, where=where)
