"""Tiny models of other people's architectures, of four kinds, and what each reads."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    xLSTMConfig,
    xLSTMForCausalLM,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(5))
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}
DELTA_NET = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=48, vocab_size=64, bos_token_id=1, eos_token_id=2)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=4)),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "mamba2": lambda: Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1,
            chunk_size=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    ),
    "xlstm": lambda: xLSTMForCausalLM(
        xLSTMConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0, ffn_proj_factor=1.0,
            ffn_round_up_to_multiple_of=8, chunk_size=4, autocast_kernel_dtype="float32",
        )
    ),
    "recurrent_gemma": lambda: RecurrentGemmaForCausalLM(
        RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3, "intermediate_size": 96}, lru_width=32)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4)),
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, **EXPERTS, **DELTA_NET)),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).eval()


def outputs(model: nn.Module) -> torch.Tensor:
    kind = model.config.model_type
    if kind == "vit":
        pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
        return model(pixel_values=pixels.to(model.dtype)).logits
    return model(input_ids=IDS, **({"decoder_input_ids": IDS} if kind == "t5" else {})).logits
