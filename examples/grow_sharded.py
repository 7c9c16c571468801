"""Grow a TokenFormer in place, while FSDP2 holds it in parts, in a training loop of one's own.

    torchrun --nproc-per-node 2 examples/grow_sharded.py

A token group is made of parameters of its own, so nothing moves that is there: every process draws the new group alike
and keeps its part of it, and the optimizer gets it as one more group of parameters. `tokenformer train` does it in
files, between stages (docs/many-devices.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tokenformer import Pattention, TokenformerConfig, TokenformerForCausalLM


def shard(module: torch.nn.Module) -> None:
    """Let every process keep a part of a module's parameters."""
    # Given back even if no backward pass follows; and gloo, on CPUs, cannot take means (pytorch issue 162338).
    fully_shard(module, reshard_after_forward=True).set_force_sum_reduction_for_comms(
        not torch.accelerator.is_available()
    )


def grow(model: TokenformerForCausalLM, optimizer: torch.optim.Optimizer, name: str, tokens: int) -> None:
    """Add parameter tokens to every feed-forward, exactly, and train them from now on."""
    added = []
    layers: list[Pattention] = [block.get_submodule("mlp") for block in model.model.layers]  # type: ignore[misc]
    for i, layer in enumerate(layers):
        layer.add_group(name, tokens, generator=torch.Generator().manual_seed(i))
        group: Any = layer.groups[name]
        for linear in (group.keys, group.values):
            shard(linear)
            added.append(linear.weight)
    optimizer.add_param_group({"params": added})


def main() -> None:
    """Train, grow, train on."""
    dist.init_process_group()
    torch.manual_seed(0)  # every process draws the same model, and could as well read its part from files
    model = TokenformerForCausalLM(TokenformerConfig.from_preset("1m"))
    for block in model.model.layers:
        shard(block)
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = torch.Generator().manual_seed(dist.get_rank())  # each process would read text of its own

    def train(steps: int) -> None:
        for _ in range(steps):
            ids = torch.randint(0, 256, (4, 64), generator=text)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    train(4)
    ids = torch.arange(64)[None]
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        grow(model, optimizer, "grown", 128)
        after = model(input_ids=ids, use_cache=False).logits
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(4)
    new = [p for name, p in model.named_parameters() if ".grown." in name]
    moved = sum(not torch.equal(p.to_local(), kept[n].to_local()) for n, p in model.named_parameters())
    if dist.get_rank() == 0:
        assert all(isinstance(p, DTensor) and p.to_local().numel() * dist.get_world_size() == p.numel() for p in new)
        print(
            f"logits the same bits: {torch.equal(before, after)}; largest difference {(before - after).abs().max():.1e}"
        )
        print(f"{len(new)} new tensors, in parts; {moved} of {len(kept)} tensors have trained since")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
