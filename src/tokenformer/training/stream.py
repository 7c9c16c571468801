"""How a stage reads a stream: each process its own share of it, and on resuming from where the state says."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.utils.data import DataLoader

from ..data.stream import BlockStream
from .gradients import GuardedTrainer


class StreamTrainer(GuardedTrainer):
    """Gives each process batches of its own stream; how other data is read is for transformers to say."""

    def get_train_dataloader(self) -> DataLoader:
        """Return what gives the batches of this process, one after the other."""
        if not isinstance(self.train_dataset, BlockStream):
            return super().get_train_dataloader()
        self.args.ignore_data_skip = True  # a stream begins where the state left it
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # else it would draw from the one that a saved state has restored
        )


def save_place(stream: BlockStream, state: Path) -> None:
    """Write into a state how far this process has read."""
    torch.save(stream.state_dict(), _file(state, stream))


def go_on(stream: BlockStream, state: Path, *, read: int) -> None:
    """Begin where the run was when `state` was written.

    Args:
        stream: of this process.
        state: of the run; it says where only to as many processes as wrote it.
        read: sequences that had been read of all shares by then.
    """
    file = _file(state, stream)
    if file.exists():
        stream.load_state_dict(torch.load(file, weights_only=True))
    else:
        stream.begin_after(read // stream.shares)


def _file(state: Path, stream: BlockStream) -> Path:
    return state / f"text-{stream.number}-of-{stream.shares}.pt"
