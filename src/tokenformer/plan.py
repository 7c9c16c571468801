"""What growing step by step will cost, beside training from scratch: from sizes, text tokens and hardware alone.

A YAML file is a `Plan`, field for field; recipes/plan/paper.yaml is one.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator
from transformers import AutoConfig

from . import cost
from .growth.architectures import row_of
from .sections import Section, read_sections
from .training.log import read_log
from .training.model import ModelSection
from .units import looped, scientific, short


class Device(NamedTuple):
    """Peak of dense bfloat16 matrix products, accumulated in float32, in TFLOP/s; memory in GB of 1e9 bytes."""

    peak_tflops: float
    memory_gb: float


# As the makers' data sheets say. NVIDIA's print twice the TFLOP/s "with sparsity" from Hopper and Ada on.
DEVICES = {
    "a100-40": Device(312, 40),  # NVIDIA A100 data sheet
    "a100-80": Device(312, 80),
    "h100": Device(989, 80),  # NVIDIA H100 data sheet, SXM
    "h200": Device(989, 141),  # NVIDIA H200 data sheet, SXM
    "l40s": Device(362, 48),  # NVIDIA L40S data sheet
    "rtx-4090": Device(165, 24),  # NVIDIA Ada GPU architecture white paper, appendix A
    "mi300x": Device(1307, 192),  # AMD Instinct MI300X data sheet
    "tpu-v4": Device(275, 34.4),  # a chip, 32 GiB; docs.cloud.google.com/tpu/docs/v4
    "tpu-v5e": Device(197, 16),  # docs.cloud.google.com/tpu/docs/v5e
    "tpu-v5p": Device(459, 95),  # docs.cloud.google.com/tpu/docs/v5p
}


class HardwareSection(Section):
    """What it runs on."""

    device: str | None = None
    """Kind of device: a100-40, a100-80, h100, h200, l40s, rtx-4090, mi300x, tpu-v4, tpu-v5e or tpu-v5p."""
    peak_tflops: float | None = Field(None, gt=0)
    """Of another device: its peak in dense matrix products of the type computed in, in 1e12 FLOP/s."""
    memory_gb: float | None = Field(None, gt=0)
    """Of another device: its memory in 1e9 bytes."""
    count: int = Field(1, gt=0)
    """Devices."""
    utilisation: float = Field(gt=0, le=1)
    """Share of the peak that the model's FLOPs make (MFU). 0.4 is good: PaLM reports 0.46 (arXiv 2204.02311)."""
    price_per_hour: float | None = Field(None, ge=0)
    """Of one device, in any currency."""
    sharded: bool = False
    """Whether weights, gradients and moments are spread over the devices (FSDP, ZeRO-3); else each holds a copy."""

    @model_validator(mode="after")
    def _known(self) -> HardwareSection:
        if self.device is not None and self.device not in DEVICES:
            raise ValueError(
                f"there is no device {self.device!r}; there are {', '.join(DEVICES)}. Give peak_tflops and memory_gb "
                "of another one instead"
            )
        if (self.device is None) == (self.peak_tflops is None):
            raise ValueError("give either device or peak_tflops")
        if self.device is not None and self.memory_gb is not None:
            raise ValueError(f"{self.device!r} brings its own memory; take out memory_gb")
        return self

    @property
    def memory_bytes(self) -> float | None:
        """Memory of one device."""
        gigabytes = DEVICES[self.device].memory_gb if self.device else self.memory_gb
        return gigabytes * 1e9 if gigabytes else None

    def device_hours(self, training_flops: float) -> float:
        """Hours that one device would take; n devices take the n-th part."""
        return training_flops / (self._peak_flops * self.utilisation * 3600)

    def implied_utilisation(self, training_flops: float, device_hours: float) -> float:
        """Return the share of the peak that makes `device_hours` of these FLOPs."""
        return training_flops / (self._peak_flops * device_hours * 3600)

    @property
    def _peak_flops(self) -> float:
        return 1e12 * (DEVICES[self.device].peak_tflops if self.device else self.peak_tflops or 0)


class PlannedModel(Section):
    """A model, and the text that it is trained on."""

    model: ModelSection | None = None
    """A preset, such as 354m; or `architecture` (default: tokenformer) and fields of its configuration in transformers'
    names, which may change a `preset`."""
    text_tokens: float = Field(0, ge=0)
    """Text tokens of this run alone."""
    run: Path | None = None
    """Instead of both, for the first of `grown`: the folder of a training run, its last model and all the text it read.
    Its log then says whether to grow now."""
    published_hours: float | None = Field(None, gt=0)
    """Device hours that someone reports for it, all stages before it included: shown beside the computed ones."""

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, model: Any) -> Any:
        return {"preset": model} if isinstance(model, str) else model

    @model_validator(mode="after")
    def _makes_a_model(self) -> PlannedModel:
        given = self.model is not None, bool(self.text_tokens)
        if given != ((True, True) if self.run is None else (False, False)):
            raise ValueError("give model and text_tokens, or run: the folder of a training run")
        row = row_of(self.config)
        if row is None:
            raise ValueError(
                f"{self.label} is a {self.config.model_type!r} model, of which FLOPs can be counted and not computed: "
                "plans are of architectures in the table, with linear maps"
            )
        if row.auto != "AutoModelForCausalLM":
            raise ValueError(f"{self.label} reads images; plans count text tokens, and are of models that read text")
        return self

    @cached_property
    def config(self) -> Any:
        """The configuration.

        Raises:
            ValueError: sizes that make no model, or `run` holds no finished stage.
        """
        if self.run is None:
            assert self.model is not None
            return self.model.config()
        if not self.events:
            raise ValueError(
                f"{self.run} is no folder of a training run: there is no finished stage in it, or no log; "
                "tokenformer train makes one"
            )
        return AutoConfig.from_pretrained(self.run / f"stage{self._finished}", trust_remote_code=False)

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What the log of `run` says of its finished stages."""
        if self.run is None or not (self.run / "log.jsonl").exists():
            return []
        return [event for event in read_log(self.run) if 0 < event.get("stage", 0) <= self._finished]

    @property
    def _finished(self) -> int:
        """How many stages of `run` have ended."""
        return next(i for i in count() if self.run is None or not (self.run / f"stage{i + 1}" / "config.json").exists())

    @property
    def text(self) -> float:
        """Text tokens of this run alone, given or read off its log."""
        return self.text_tokens if self.run is None else self.events[-1]["text_tokens_seen"]

    @property
    def label(self) -> str:
        """Name for a table."""
        if self.run is not None:
            return str(self.run)
        if self.model is not None and self.model.preset:
            return ("changed " if len(self.model.model_fields_set) > 1 else "") + self.model.preset
        size = f"{self.config.num_hidden_layers} × {self.config.hidden_size}"
        return f"{self.config.model_type} {size}{looped(getattr(self.config, 'num_loops', 1))}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a run takes.

    Attributes:
        label: of the model.
        parameters: of the model, a tied embedding counted once.
        memory_bytes: on each device, of weights, gradients and AdamW's moments; activations come on top.
        text_tokens, training_flops: of this run.
        total_text_tokens, total_flops: with all stages before it; of a run from scratch the same.
        published_hours: device hours reported for this run alone; total_published_hours with the stages before.
        implied_utilisation: share of the peak at which training_flops take published_hours.
    """

    label: str
    parameters: int
    memory_bytes: float
    text_tokens: float
    training_flops: float
    total_text_tokens: float
    total_flops: float
    published_hours: float | None
    total_published_hours: float | None
    implied_utilisation: float | None


class Plan(Section):
    """A whole plan."""

    context: int = Field(gt=0)
    """Text tokens in a sequence: what token-token attention costs depends on it."""
    hardware: HardwareSection
    """What it runs on."""
    grown: list[PlannedModel] = Field(min_length=1)
    """Growth stages in order, the first model's training included."""
    scratch: list[PlannedModel] = Field([])
    """Models trained from scratch instead, each on its own; the last one is compared with the last stage."""

    @cached_property
    def grown_costs(self) -> list[Cost]:
        """What each stage of growth takes."""
        costs: list[Cost] = []
        for run in self.grown:
            costs.append(_cost(self, run, costs[-1] if costs else None))
        return costs

    @cached_property
    def scratch_costs(self) -> list[Cost]:
        """What each model takes from scratch."""
        return [_cost(self, run, None) for run in self.scratch]

    @model_validator(mode="after")
    def _stages_grow(self) -> Plan:
        sizes = [cost.parameters(run.config) for run in self.grown]
        for i in range(1, len(sizes)):
            if sizes[i] < sizes[i - 1]:
                raise ValueError(
                    f"grown.{i} has {sizes[i]:,} parameters, fewer than the {sizes[i - 1]:,} of the stage before; "
                    "put the stages in order"
                )
        hours = [run.published_hours for run in self.grown if run.published_hours is not None]
        if sorted(set(hours)) != hours:
            raise ValueError(
                f"published_hours of grown are {hours}; each includes the stages before, so they must rise"
            )
        if any(run.run for run in (*self.grown[1:], *self.scratch)):
            raise ValueError("only the first of grown can be a run: that which the others grow from")
        if self.grown[0].run and len(self.grown) > 1:
            old, new = (run.config for run in self.grown[:2])
            if old.vocab_size != new.vocab_size:
                raise ValueError(
                    f"grown.1 has a vocabulary of {new.vocab_size:,}, {self.grown[0].run} one of {old.vocab_size:,}; "
                    "growing keeps it: set vocab_size"
                )
            if not 0 < cost.block_parameters(old) < cost.block_parameters(new):
                raise ValueError(f"grown.1 has no more parameters in its blocks than {self.grown[0].run}")
        return self


def read_plan(path: str | Path) -> Plan:
    """Read a YAML plan; errors as in `recipe.read_sections`."""
    return read_sections(Plan, path)


def conclusions(plan: Plan) -> list[str]:
    """Say what does not fit, what growing costs beside scratch, what is equal, and whether published hours agree."""
    said = []
    costs, memory = [*plan.grown_costs, *plan.scratch_costs], plan.hardware.memory_bytes
    large = dict.fromkeys(c.label for c in costs if memory is not None and c.memory_bytes > memory)
    if large:
        spreads = plan.hardware.sharded or plan.hardware.count == 1
        remedy = "take more or larger ones" if spreads else "set hardware.sharded to spread it over all"
        said.append(f"Too large for one device, even without activations: {', '.join(large)}; {remedy}.")
    if plan.scratch:
        grown, scratch = plan.grown_costs[-1], plan.scratch_costs[-1]
        affordable = scratch.total_text_tokens * grown.total_flops / scratch.total_flops
        owned = grown.total_flops - plan.grown_costs[0].total_flops
        said += [
            f"Growing to {grown.label} takes {scientific(grown.total_flops)} FLOPs, all stages included; "
            f"{scratch.label} from scratch {scientific(scratch.total_flops)}, "
            f"{scratch.total_flops / grown.total_flops:.3g} times as many.",
            f"{_compared('Text tokens', grown.total_text_tokens, scratch.total_text_tokens)}; "
            f"{_compared('parameters', grown.parameters, scratch.parameters)}.",
            f"For the FLOPs of growing, {scratch.label} could read {short(affordable)} text tokens.",
            *(
                [
                    f"With {plan.grown[0].label} there already, growing takes {scientific(owned)} FLOPs, "
                    f"{owned / scratch.total_flops:.3g} times those of {scratch.label} from scratch."
                ]
                if owned
                else []
            ),
            "A plan cannot say which of them is better then; `tokenformer compare` measures it.",
        ]
    if plan.grown[0].run and len(plan.grown) > 1:
        budget = scientific(plan.grown_costs[1].training_flops)
        said.append(
            f"Whether to grow {plan.grown[0].run} now, later or not at all for as many FLOPs, "
            f"`tokenformer plan --run {plan.grown[0].run} --budget {budget}` weighs."
        )
    implied = [c.implied_utilisation for c in costs if c.implied_utilisation is not None]
    if implied:
        said.append(
            f"The published hours imply a utilisation of {min(implied):.3f} to {max(implied):.3f}; it would be one "
            "number if they were proportional to these FLOPs."
        )
    return said


def _cost(plan: Plan, run: PlannedModel, before: Cost | None) -> Cost:
    hardware = plan.hardware
    flops = cost.training_flops(run.config, plan.context) * run.text
    if run.run:
        flops = run.events[-1]["training_flops"]
    earlier = before.total_published_hours if before else 0.0
    published = None if run.published_hours is None or earlier is None else run.published_hours - earlier
    return Cost(
        label=run.label,
        parameters=cost.parameters(run.config),
        memory_bytes=cost.training_bytes(run.config) / (hardware.count if hardware.sharded else 1),
        text_tokens=run.text,
        training_flops=flops,
        total_text_tokens=run.text + (before.total_text_tokens if before else 0),
        total_flops=flops + (before.total_flops if before else 0),
        published_hours=published,
        total_published_hours=run.published_hours,
        implied_utilisation=None if published is None else hardware.implied_utilisation(flops, published),
    )


def _compared(what: str, grown: float, scratch: float) -> str:
    verdict = "equal within 1%" if abs(grown / scratch - 1) < 0.01 else "not equal"
    return f"{what}: {short(grown)} against {short(scratch)} ({verdict})"
