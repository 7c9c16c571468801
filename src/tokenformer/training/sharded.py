"""How a stage begins, is kept and is written where one model is spread over several processes.

Each process holds a part of every tensor, of its gradient and of its moments: transformers' own loading puts them there
(`DistributedConfig`: FSDP2, tensor parallelism, or both), and torch.distributed.checkpoint keeps them between steps.
Growth happens in files, block by block, before they are read. A whole model is in files alone, but for the first of a
run, which the main process draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

from ..checkpoints.checkpoint import read_config, save_checkpoint, shards_of
from ..checkpoints.lineage import Lineage
from ..checkpoints.optimizer import OPTIMIZER_FILE, load_states
from ..checkpoints.rewrite import open_checkpoint, rewrite, without_weights
from ..checkpoints.verify import carry_files, read_lineage, verify_checkpoint
from ..growth.architectures import frozen_names
from ..growth.freeze import freeze
from ..growth.grow import grow_operation
from ..growth.tokenise import build
from ..models.modeling_tokenformer import TokenformerForCausalLM
from .material import Material
from .placement import whole
from .processes import processes
from .recipe import ParallelSection, Recipe
from .settings import StageSettings
from .stream import StreamTrainer
from .whole import Begun, grown, outcome, told

_MOMENTS, _SCHEDULE = "optimizer", "scheduler.pt"


class ShardedTrainer(StreamTrainer):
    """Keeps a stage's state in parts, each process its own, which any number of processes can read.

    Processes that split parameter tokens are given the same text.
    """

    def get_train_dataloader(self) -> DataLoader:
        """Return what gives the batches of this process."""
        loader = super().get_train_dataloader()
        if isinstance(batches := loader.batch_sampler, BatchSamplerShard):
            batches.process_index //= self.get_tp_size()
            batches.num_processes //= self.get_tp_size()
        return loader

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Keep from accelerate that tokens are split: it would deal out text by that, and refuses to on CPUs."""
        arguments = super()._build_accelerator_args(**kwargs)
        arguments.pop("parallelism_config", None)
        return arguments

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the weights."""
        assert output_dir is not None
        split = self.model.is_distributed_loading_by_transformers
        self.model.save_pretrained(output_dir, distributed_checkpoint=split)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_optimizer_distributed(self.model, self.optimizer, str(Path(output_dir) / _MOMENTS))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: the model was made of the state's weights."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.optimizer.state.clear()  # torch leaves out what has no state where anything has
            load_optimizer_distributed(self.model, self.optimizer, str(Path(checkpoint) / _MOMENTS))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True))


class BegunInParts(Begun):
    """What a stage trains where each process holds a part of it."""

    trainer = ShardedTrainer

    def write(
        self,
        target: Path,
        optimizer: torch.optim.Optimizer,
        processor: Any,
        lineage: Lineage,
        *,
        parent: str | Path | None,
    ) -> None:
        """Let the main process write what was trained, a tensor after the other; all others hand it theirs.

        The optimizer's states are gathered in files, and are in no process's memory together.
        """
        state, empty = self.model.state_dict(), without_weights(self.model.config, torch.float32)

        def weights(names: Sequence[str]) -> dict[str, Tensor]:
            return {name: whole(state[name]).cpu() for name in names}

        if not processes().is_main_process:
            for names in shards_of(empty):
                weights(names)
            for _ in _moments(self.model, optimizer):
                pass
            return

        def add_files(folder: Path) -> None:
            with TemporaryDirectory(dir=folder) as kept:
                states = {**self.states}
                for i, (name, key, moment) in enumerate(_moments(self.model, optimizer)):
                    file = torch.from_file(f"{kept}/{i}", shared=True, size=moment.numel(), dtype=moment.dtype)
                    states[name] = {**states.get(name, {}), key: file.view(moment.shape).copy_(moment)}
                torch.save(states, folder / OPTIMIZER_FILE)
            if parent is not None:
                carry_files(parent, folder)

        save_checkpoint(target, empty, processor, lineage, weights=weights, extra=add_files)


def begin(
    recipe: Recipe,
    previous: str | Path | None,
    settings: StageSettings,
    data: Material,
    *,
    place: Path,
    state: Path | None,
) -> BegunInParts:
    """Read a stage's model into the processes, once the main process has drawn it or has grown its files.

    Args:
        recipe: that is trained.
        previous: checkpoint that the stage starts from; None: a new model.
        settings: of the stage.
        data: to measure a model on that grows.
        place: where the stage keeps what it has.
        state: of the stage, to go on from.
    """
    parallel = settings.training.parallel
    assert parallel is not None
    source = Path(previous) if previous and not settings.growth else place / "begun"
    if processes().is_main_process:
        if source.exists():
            verify_checkpoint(source)
        elif previous is None:
            torch.manual_seed(settings.weights_seed)
            save_checkpoint(source, build(data.config(recipe), dtype=torch.float32))
        else:
            _grow(previous, settings, source)
    processes().wait_for_everyone()
    lineage = read_lineage(previous) if previous else Lineage()
    config = read_config(source)
    data.adapt(config, recipe)
    before = None
    if previous and settings.growth and state is None:
        before = outcome(load_parts(previous, read_config(previous), parallel), data, settings, measured=True)
    model = load_parts(state or source, config, parallel)
    begun = BegunInParts(model, load_states(source), lineage)
    if settings.growth:
        begun.lineage = grown(lineage, settings, model)
        if before is not None:
            begun.growth = told(settings, model, before, outcome(model, data, settings, measured=True))
    return begun


class _InParts(TokenformerForCausalLM):
    """Is spread by FSDP with its embedding and its head in one part, as one tensor, while there are no weights yet.

    transformers' own plan leaves a tied head to a part of its own, where it is not updated if the rows of the embedding
    do not divide evenly among the processes (5.23).
    """

    _auto_class: Any = None  # so that no code is put beside the weights of a state

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Spread a model, which is on the meta device, as transformers asks before it reads the weights."""
        split = replace(distributed_config, fsdp_size=1, dp_replicate_size=1)
        model = super().maybe_distribute_model(model, split, mesh_manager)
        model.config.distributed_config, model._fsdp_size = distributed_config, distributed_config.fsdp_size
        if distributed_config.dp_size > 1:
            model.tie_weights()
            copies = distributed_config.dp_replicate_size > 1
            mesh = mesh_manager.get_mesh(("dp_replicate", "fsdp") if copies else "fsdp")
            for part in (*model.model.layers, model):
                # Given back after every forward pass: until then the parameters are whole ones, of which the optimizer
                # knows nothing, and a validation has no backward pass.
                spread = fully_shard(part, mesh=mesh, reshard_after_forward=True)
                # gloo's reduce-scatter adds up where it is asked for the mean (pytorch issue 162338).
                spread.set_force_sum_reduction_for_comms(processes().device.type == "cpu")
            model._is_fsdp_managed_module = True
        return model


_InParts.__name__ = TokenformerForCausalLM.__name__


def load_parts(path: str | Path, config: PreTrainedConfig, parallel: ParallelSection) -> PreTrainedModel:
    """Read of the checkpoint or state at `path` what this process holds, in float32."""
    count = processes().num_processes
    spread = DistributedConfig(
        fsdp_size=parallel.fsdp, tp_size=parallel.tensor, dp_replicate_size=count // (parallel.fsdp * parallel.tensor)
    )
    model = _InParts.from_pretrained(
        path, config=config, dtype=torch.float32, distributed_config=spread if count > 1 else None
    )
    model.register_state_dict_post_hook(_untie)
    freeze(model, frozen_names(config))
    return model


def _untie(model: PreTrainedModel, state: dict[str, Any], *_: Any) -> None:
    """Copy tied tensors in a state dict, as safetensors wants them."""
    state |= {name: state[name].clone() for name in model.all_tied_weights_keys if name in state}


def _grow(previous: str | Path, settings: StageSettings, target: Path) -> None:
    """Write what growing makes of a checkpoint; the new values are those that `grow` draws in memory."""
    torch.manual_seed(settings.weights_seed)
    seed, stored = int(torch.randint(2**62, ())), open_checkpoint(previous)
    rewrite(stored, target, grow_operation(stored.config, **settings.growth, seed=seed, dtype=torch.float32))


def _moments(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, Tensor]]:
    """Yield an optimizer's moments as whole tensors, with the parameter's name; all processes must do so together."""
    for name, p in model.named_parameters():
        for key, moment in sorted(optimizer.state.get(p, {}).items()):
            yield name, key, whole(moment).cpu()
