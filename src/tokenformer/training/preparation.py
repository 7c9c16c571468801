"""What happens before the first step: the run folder, the data, and a rehearsal of every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from ..checkpoints.checkpoint import read_config
from ..checkpoints.files import check_target, replacing_folder
from ..checkpoints.verify import is_addon_folder
from ..errors import CheckpointError, GrowthError, RecipeError
from ..growth.architectures import frozen_names, row_of
from ..growth.beside import grow_beside, names_beside
from ..growth.freeze import freeze_only, trainable_parts
from ..growth.grow import grow
from ..growth.tokenise import build
from .captions import prepare_captions
from .images import prepare_pictures
from .material import Material
from .precision import use_bfloat16
from .processes import processes, reader
from .recipe import ParallelSection, Recipe, TrainingSection, load_recipe
from .text import prepare_text

# Fields of TrainingArguments that do nothing beside our optimizer, schedule and validation; those that break resuming.
_DECIDED = ("learning_rate", "lr_", "optim", "weight_decay", "adam_", "warmup_", "num_train_epochs", "eval_", "save_")
_BREAKING = ("ignore_data_skip", "per_device_", "fp16", "auto_find_batch_size")


def begin_run(recipe: Recipe, run: Path, *, force: bool) -> Material:
    """Make the run folder and prepare the run in it; if that fails, what was there before still is.

    Raises:
        CheckpointError: the folder exists and not `force`, or is not ours to replace, or cannot be written. Others as
            `prepare_run`.
    """
    check_target(run, force=True)
    if run.exists() and not force:
        hint = "--resume to continue it, " if (run / "recipe.yaml").exists() else ""
        raise CheckpointError(f"{run} exists already; {hint}--force to replace it, or --output for another place")
    with replacing_folder(run, force=force) as folder:
        content = yaml.safe_dump(recipe.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
        (folder / "recipe.yaml").write_text(content, encoding="utf-8")
        return prepare_run(recipe, folder)


def check_resumable(recipe: Recipe, run: Path) -> None:
    """Raise CheckpointError where there is no run, RecipeError where it began with another recipe."""
    file = run / "recipe.yaml"
    check_target(run, force=True)
    if not file.exists():
        raise CheckpointError(f"nothing to resume: {run} holds no run; start it without --resume")
    began = load_recipe(file)
    if _kept_on_resuming(began) != _kept_on_resuming(recipe):
        changed = [k for k in Recipe.model_fields if getattr(began, k) != getattr(recipe, k)]
        raise RecipeError(
            f"the recipe differs from the one this run began with ({file}) in: {', '.join(changed)}; resume with "
            "that one, or start another run with --output"
        )


def prepare_run(recipe: Recipe, run: Path) -> Material:
    """Read the data, and rehearse every stage without weights: no mistake should wait behind hours of training."""
    initial = recipe.model.checkpoint
    if initial is not None and is_addon_folder(initial):
        raise RecipeError(f"model.checkpoint {initial} is an add-on; name its parent, and learn it in a stage before")
    config = read_config(initial) if initial is not None else None
    if recipe.images is None:
        prepare: Any = prepare_text
    else:
        prepare = prepare_captions if recipe.images.captions else prepare_pictures
    data = prepare(recipe, run, config)
    if config is None:
        config = data.config(recipe)
    data.check(config, recipe)
    _check_parallel(recipe, config)
    training_arguments(recipe.training, run, steps=1, seed=recipe.seed)
    with torch.device("meta"):
        model = build(config)
        addons = not names_beside(model)
        for i, stage in enumerate(recipe.stages):
            if stage.batch_size is not None:
                try:
                    training_arguments(stage.training(recipe.training), run, steps=1, seed=recipe.seed)
                except RecipeError as error:
                    raise RecipeError(f"stages.{i}: {error}") from error
            try:
                _rehearse_growth(model, stage.growth, addons=addons)
            except GrowthError as error:
                raise GrowthError(f"stages.{i}: {error}") from error
            try:
                freeze_only(model, frozen_parts(stage.frozen, model, addon=addons and bool(names_beside(model))))
            except GrowthError as error:
                raise RecipeError(f"stages.{i}: {error}") from error
            row = row_of(model.config)
            if stage.nested_dropout is not None and (row is None or not row.has_pattention):
                raise RecipeError(f"stages.{i}: nested_dropout takes prefixes of a TokenFormer's token groups only")
    return data


def _check_parallel(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise RecipeError where a model cannot be spread as the recipe says, or not over as many processes."""
    parallel, count = recipe.training.parallel, processes().num_processes
    if parallel is None:
        return
    size = parallel.fsdp * parallel.tensor
    if count % size:
        raise RecipeError(
            f"training.parallel spreads the model over {parallel.fsdp} × {parallel.tensor} processes, and the run has "
            f"{count}: torchrun --nproc-per-node {size} -m tokenformer train …"
        )
    kind, beside = config.model_type, [i for i, stage in enumerate(recipe.stages) if stage.at is not None]
    if kind != "tokenformer" or recipe.images is not None:
        raise RecipeError(f"training.parallel spreads TokenFormers that read text, and the model is a {kind!r}")
    if beside:
        raise RecipeError(f"stages.{beside[0]}.at puts tokens beside linear maps, and training.parallel spreads none")
    dropped = [i for i, stage in enumerate(recipe.stages) if stage.nested_dropout is not None]
    if dropped:
        raise RecipeError(f"stages.{dropped[0]}.nested_dropout cuts maps, of which training.parallel leaves only parts")
    if parallel.tensor > 1 and not config.base_model_tp_plan:
        raise RecipeError(
            "training.parallel.tensor splits parameter tokens, which needs a norm that is a sum of squares, float "
            "weights and no gates, and this model has others; give its processes to training.parallel.fsdp"
        )


def _rehearse_growth(model: PreTrainedModel, growth: dict[str, Any], *, addons: bool) -> None:
    """Grow a model on the meta device; `addons`: tokens beside its linear maps are kept without it."""
    if growth.get("at") is not None:
        sizes = ", ".join(growth.keys() - {"at", "tokens", "name"})
        if sizes:
            raise GrowthError(f"at puts tokens beside linear maps; grow {sizes} in a stage of its own")
        grow_beside(model, growth["at"], growth.get("tokens"), name=growth["name"], seed=0)
    elif growth and addons and names_beside(model):
        raise GrowthError(
            "a stage before has put tokens beside linear maps and is kept as an add-on, whose parent must not change: "
            "put more tokens beside the maps, or grow the model before that"
        )
    elif growth:
        grow(model, **growth)


def _kept_on_resuming(recipe: Recipe) -> Recipe:
    """Leave out what --resume may find changed: what to do about the step that stopped it, and how many processes."""
    parallel = recipe.training.parallel and ParallelSection()
    training = recipe.training.model_copy(update={"on_bad_step": "stop", "bad_grad_norm": None, "parallel": parallel})
    return recipe.model_copy(update={"training": training})


def frozen_parts(frozen: list[str] | None, model: PreTrainedModel, *, addon: bool) -> list[str]:
    """Return what a stage freezes: what it says, or else what the checkpoint has frozen.

    Of an `addon`, all but the newest group of tokens beside linear maps, which is kept alone.

    Raises:
        GrowthError: the stage says something there.
    """
    beside = names_beside(model)
    if addon and frozen is not None:
        raise GrowthError(
            f"frozen is {', '.join(frozen) or 'nothing'}, but the stage is kept as an add-on, which holds token group "
            f"{beside[-1]!r} alone: all else is frozen; leave frozen out"
        )
    if addon:
        return [part for part in trainable_parts(model) if part != beside[-1]]
    return frozen if frozen is not None else frozen_names(model.config)


def training_arguments(t: TrainingSection, output: Path, *, steps: int, seed: int) -> TrainingArguments:
    """Return a `training` section in the Trainer's words.

    Raises:
        RecipeError: batches that do not divide, or `training_arguments` that are unknown or decided elsewhere.
    """
    _, count = reader(t)
    micro = t.micro_batch_size or max(1, t.batch_size // count)
    if t.batch_size % (micro * count):
        raise RecipeError(
            f"batch_size {t.batch_size} is not a multiple of micro_batch_size {micro} × {count} "
            "processes; change one of them"
        )
    ours: dict[str, Any] = {
        "output_dir": str(output),
        "max_steps": steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": t.batch_size // (micro * count),
        "max_grad_norm": t.max_grad_norm,
        "bf16": use_bfloat16(t.precision),
        "use_cpu": not torch.accelerator.is_available(),
        "save_strategy": "no",  # but where the watcher says so
        "save_total_limit": 2,
        "logging_steps": t.log_every,
        "logging_nan_inf_filter": False,  # it would log a loss that diverged as 0
        "report_to": t.report_to,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": seed,
    }
    taken = sorted(name for name in t.training_arguments if name in ours or name.startswith(_DECIDED + _BREAKING))
    if taken:
        raise RecipeError(f"training.training_arguments sets {', '.join(taken)}, which other recipe fields decide")
    try:
        arguments = TrainingArguments(**ours, **t.training_arguments)
    except (TypeError, ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"training.training_arguments: {error}") from error
    try:
        for reporter in get_reporting_integration_callbacks(t.report_to):
            reporter()
    except (ValueError, RuntimeError, ImportError) as error:
        raise RecipeError(f"training.report_to: {error}") from error
    if arguments.n_gpu > 1:
        raise RecipeError(
            f"this process sees {arguments.n_gpu} GPUs and would use them with other batches than the recipe's; start "
            f"one process each: torchrun --nproc-per-node {arguments.n_gpu} -m tokenformer train …"
        )
    return arguments
