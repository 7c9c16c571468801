"""LoRA on the keys and values of token groups, by peft: real adapters, trained, merged, saved and loaded."""

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from tiny_models import tokens, two_groups
from torch import nn

from tokenformer import TokenformerForCausalLM, grow
from tokenformer.errors import GrowthError
from tokenformer.models.pattention import Pattention

# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {"every group": ["keys", "values"], "one group": r".*\.groups\.more\.(keys|values)"}
FAMILIES = ["paper", "ffn"]


def add_lora(model, targets="every group", **changes):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=TARGETS[targets], **changes)
    return get_peft_model(model, config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def train(model, steps=3):
    """Train what is trainable, and return which parameters got a gradient other than 0 in the last step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    model.eval()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def maps(model, names=("keys", "values")):
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(names)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_adapter_changes_no_bit(family, dtype):
    model = two_groups(family, dtype)
    before, wanted = logits(model), maps(model)
    adapted = add_lora(model)
    assert [n for n, m in model.named_modules() if hasattr(m, "lora_A")] == wanted
    assert len(wanted) == 3 * 2 * {"paper": 6, "ffn": 2}[family]  # blocks, maps, groups
    assert torch.equal(logits(adapted), before)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", TARGETS)
def test_only_adapters_train_and_switching_them_off_gives_the_model_back_bit_for_bit(family, targets):
    model = two_groups(family)
    before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    tuned_maps = [name for name in maps(model) if targets == "every group" or ".more." in name]
    adapted = add_lora(model, targets)
    moved = train(adapted)
    assert moved == {f"base_model.model.{name}.lora_{part}.default.weight" for name in tuned_maps for part in "AB"}
    assert moved == {name for name, p in adapted.named_parameters() if p.requires_grad}
    with_adapter = logits(adapted)
    assert (with_adapter - before).abs().max() > 0.1
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(adapted), with_adapter)
    without = adapted.unload()
    assert without is model and torch.equal(logits(without), before)
    after = without.state_dict()
    assert list(after) == list(weights) and all(torch.equal(after[k], weights[k]) for k in weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merging_adds_exactly_the_product_of_the_adapter(family, dtype, tmp_path):
    by_hand = two_groups(family, dtype)
    adapted = add_lora(two_groups(family, dtype))
    train(adapted)
    with_adapter = logits(adapted)
    with torch.no_grad():
        for name in maps(by_hand):
            lora = adapted.base_model.model.get_submodule(name)
            down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight
            by_hand.get_submodule(name).weight += (up @ down) * (6 / 4)
    merged = adapted.merge_and_unload()

    assert type(merged) is TokenformerForCausalLM
    want, got = by_hand.state_dict(), merged.state_dict()
    assert list(got) == list(want) and all(torch.equal(got[k], want[k]) for k in want)
    merged_logits = logits(merged)
    assert torch.equal(merged_logits, logits(by_hand))
    torch.testing.assert_close(
        merged_logits, with_adapter, rtol=0, atol={torch.float32: 2e-5, torch.float64: 4e-14}[dtype]
    )
    assert all(layer._can_fuse() for layer in merged.modules() if isinstance(layer, Pattention) and layer.groups)

    merged.save_pretrained(tmp_path)
    loaded = TokenformerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), merged_logits)
    grow(loaded, ffn_param_tokens="+25%", num_hidden_layers="+1")
    assert torch.equal(logits(loaded), merged_logits)


def test_unmerging_subtracts_and_so_rounds():
    """A merged adapter is gone for good only up to rounding; keep it unmerged, or the base, for the bits."""
    model = two_groups("paper")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = add_lora(model)
    train(adapted)
    adapted.merge_adapter()
    adapted.unmerge_adapter()
    after = adapted.unload().state_dict()
    for name, weight in weights.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=2**-22)
    assert any(not torch.equal(after[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_group_alone_can_be_adapted_and_merged(family):
    model = two_groups(family)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    adapted = add_lora(model, "one group")
    train(adapted)
    merged = adapted.merge_and_unload().state_dict()
    changed = {name for name in weights if not torch.equal(merged[name], weights[name])}
    assert changed == {f"model.layers.{i}.mlp.groups.more.{m}.weight" for i in range(3) for m in ("keys", "values")}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_is_saved_and_loaded_onto_its_base(family, targets, tmp_path):
    two_groups(family).save_pretrained(tmp_path / "base")
    adapted = add_lora(TokenformerForCausalLM.from_pretrained(tmp_path / "base"), targets)
    train(adapted)
    want = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    base = TokenformerForCausalLM.from_pretrained(tmp_path / "base")
    untuned = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), want) and not torch.equal(want, untuned)
    by_name = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(by_name), want)


def test_tokens_grown_beside_an_adapter_change_nothing():
    adapted = add_lora(two_groups("paper"))
    train(adapted)
    before = logits(adapted)
    grow(adapted.base_model.model, qkv_param_tokens="+8", ffn_param_tokens="+8", name="most")
    assert torch.equal(logits(adapted), before)


def test_blocks_are_not_added_while_an_adapter_is_on():
    """A copy's zero weights would not silence its adapter."""
    adapted = add_lora(two_groups("paper"))
    train(adapted)
    before = logits(adapted)
    with pytest.raises(GrowthError, match=r"cannot add blocks.*peft.*Linear; merge adapters first"):
        grow(adapted.base_model.model, ffn_param_tokens="+8", num_hidden_layers="+1")
    assert torch.equal(logits(adapted), before)
