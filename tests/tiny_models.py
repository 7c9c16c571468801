"""Tiny models for tests."""

import torch

from tokenformer import (
    TokenformerConfig,
    TokenformerForCausalLM,
    TokenformerForImageClassification,
    TokenformerVisionConfig,
    grow,
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PAPER = {"qkv_param_tokens": 48, "output_param_tokens": 40, "ffn_param_tokens": 160}
FFN = {"qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 160}
FAMILIES = {"paper": PAPER, "ffn": FFN}
KINDS = [*FAMILIES, "grown"]


def tiny(family: str = "paper", *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes):
    """A model with weights large enough that every part of it shows in the logits."""
    config = TokenformerConfig(**{**SIZES, **FAMILIES[family], **changes})
    return _loud(TokenformerForCausalLM, config, attention, dtype)


def tiny_vision(family: str = "paper", *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes):
    """Likewise an image classifier: 3 × 4 patches of 4 × 4 pixels, 5 labels."""
    sizes = {field: SIZES[field] for field in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    own = {"image_size": [12, 16], "patch_size": 4, "num_labels": 5, "pooling": "cls"}
    config = TokenformerVisionConfig(**{**sizes, **own, **FAMILIES[family], **changes})
    return _loud(TokenformerForImageClassification, config, attention, dtype)


def _loud(kind, config, attention: str, dtype: torch.dtype):
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() >= 2:
                p.normal_(std=0.2)
    return model.to(dtype).eval()


def images(rows: int = 2, height: int = 12, width: int = 16) -> torch.Tensor:
    return torch.rand((rows, 3, height, width), generator=torch.Generator().manual_seed(3)) * 2 - 1


def sample(model) -> dict[str, torch.Tensor]:
    """What a tiny model reads: text, or images."""
    return {"pixel_values": images()} if model.main_input_name == "pixel_values" else {"input_ids": tokens()}


def tokens(rows: int = 2, length: int = 20) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(3))


def make(kind: str, **changes):
    """A tiny model of a family, or "grown": linear maps beside a group, and two groups in the feed-forward."""
    if kind != "grown":
        return tiny(kind, **changes)
    model = tiny("ffn", **changes)
    grow(model, qkv_param_tokens=24, output_param_tokens=20, ffn_param_tokens="+32")
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".groups.grown1." in name:
                p.normal_(std=0.2)
    return model


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def two_groups(family, dtype=torch.float32, make=tiny):
    """Two token groups in each feed-forward, and keys of the new one as random as those of the old."""
    model = make(family, dtype=dtype)
    grow(model, ffn_param_tokens="+48", name="more")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".more.keys.weight"):
                weight.normal_(std=0.2)
    return model
