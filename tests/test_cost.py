import pytest
import torch
from tiny_models import FAMILIES, tiny, tokens
from torch.utils.flop_counter import FlopCounterMode

from tokenformer import cost, grow


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_groups_match_the_model(family):
    model = tiny(family)
    grow(model, ffn_param_tokens="+24", name="more")
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters())
    for group, count in cost.group_parameters(model.config).items():
        assert count == sum(p.numel() for name, p in model.named_parameters() if f".groups.{group}." in name)
    assert cost.group_tokens(model.config)["more"] == 24 * 3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", [False, True])
def test_flops_match_what_torch_counts(family, frozen):
    model, ids = tiny(family, attention="eager").train(), tokens()
    if frozen:
        for layers in model.pattention_layers.values():
            for layer in layers:
                layer.groups.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    count = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    want = cost.training_flops(model.config, ids.shape[1], frozen_parameters=count) * ids.numel()
    assert abs(counter.get_total_flops() / want - 1) < 0.03


def test_forward_flops_are_the_papers_formula():
    config = tiny().config
    n = cost.parameters(config) - 2 * config.hidden_size
    assert cost.forward_flops(config, 20) == 2 * n + 4 * 3 * 64 * 20
    with torch.device("meta"):
        assert cost.training_bytes(config) == 16 * cost.parameters(config)
