"""int8 by torchao through transformers' `quantization_config`: every map of every token group, and what that costs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tokens, two_groups
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from tokenformer import TokenformerForCausalLM, grow
from tokenformer.errors import GrowthError
from tokenformer.models.pattention import Pattention

# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SCHEMES = {"weight only": Int8WeightOnlyConfig, "dynamic": Int8DynamicActivationInt8WeightConfig}
FAMILIES = ["paper", "ffn"]


def quantised(model, folder, scheme="weight only"):
    model.save_pretrained(folder)
    config = TorchAoConfig(SCHEMES[scheme]())
    return TokenformerForCausalLM.from_pretrained(folder, quantization_config=config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def maps(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_map_is_quantised_and_the_logits_are_those_of_the_rounded_weights(family, scheme, tmp_path):
    model = two_groups(family)
    int8 = quantised(model, tmp_path, scheme)
    assert all(type(m.weight) is Int8Tensor and m.weight.qdata.dtype == torch.int8 for m in maps(int8).values())
    assert not any(layer._can_fuse() for layer in int8.modules() if isinstance(layer, Pattention) and layer.groups)
    assert type(int8.lm_head.weight) is nn.Parameter and int8.lm_head.weight is int8.model.embed_tokens.weight

    original, got = logits(model), logits(int8)
    with torch.no_grad():
        for name, plain in maps(model).items():
            plain.weight.copy_(maps(int8)[name].weight.dequantize())
    rounded = logits(model)
    # 0.023 is what rounding to 8 bits costs these weights; 7 bits cost 0.046, a group left out of a block 0.07.
    assert 0.01 < distance(rounded, original) < 0.03
    # Weights are all that "weight only" rounds; "dynamic" rounds what goes into a map as well, which costs as much.
    least, most = {"weight only": (0, 2e-6), "dynamic": (0.01, 0.035)}[scheme]
    assert least <= distance(got, rounded) < most


@pytest.mark.parametrize("scheme", SCHEMES)
def test_maps_shrink_to_a_quarter_and_come_back_from_disk_bit_for_bit(scheme, tmp_path):
    model = two_groups("paper")
    int8 = quantised(model, tmp_path / "float32", scheme)
    int8.save_pretrained(tmp_path / "int8")
    in_maps, rest = 4 * sum(m.weight.numel() for m in maps(model).values()), 4 * model.lm_head.weight.numel()
    size = {name: (tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", "int8")}
    assert size["float32"] > in_maps + rest
    # int8 has a float32 scale and an int8 zero point a row, and a longer header.
    assert size["int8"] < 0.25 * in_maps + rest + 60_000 < 0.6 * size["float32"]
    loaded = TokenformerForCausalLM.from_pretrained(tmp_path / "int8").eval()
    assert all(type(m.weight) is Int8Tensor for m in maps(loaded).values())
    assert torch.equal(logits(loaded), logits(int8))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tokens_grown_beside_quantised_ones_change_no_bit(scheme, tmp_path):
    int8 = quantised(two_groups("paper"), tmp_path, scheme)
    before = logits(int8)
    grow(int8, qkv_param_tokens="+8", ffn_param_tokens="+50%", name="most")
    assert torch.equal(logits(int8), before)
    with pytest.raises(GrowthError, match=r"cannot add blocks.*Int8Tensor.*before it is quantised"):
        grow(int8, num_hidden_layers="+1")
    assert torch.equal(logits(int8), before)


def test_lora_trains_on_a_quantised_base_and_merges_into_it(tmp_path):
    int8 = quantised(two_groups("paper"), tmp_path)
    before = {n: (m.weight.qdata.clone(), m.weight.scale.clone()) for n, m in maps(int8).items()}
    adapted = get_peft_model(int8, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["keys", "values"]))
    untrained = logits(adapted.eval())
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = adapted(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), untrained)
    for name, (qdata, scale) in before.items():
        weight = adapted.base_model.model.get_submodule(name).base_layer.weight
        assert torch.equal(weight.qdata, qdata) and torch.equal(weight.scale, scale)
    tuned = logits(adapted)
    merged = adapted.merge_and_unload()
    assert all(type(m.weight) is Int8Tensor for m in maps(merged).values())
    # The sum is rounded to int8 anew.
    assert distance(logits(merged), tuned) < 0.02 < distance(tuned, untrained)
