"""What a model costs, from its configuration alone: parameters, FLOPs, bytes."""

from __future__ import annotations

from .models.configuration_tokenformer import PROJECTIONS, TokenformerConfig

# Maps of one block per projection: query, key and value share the "qkv" count.
_MAPS = {projection: len(modules) for projection, modules in PROJECTIONS.items()}


def group_parameters(config: TokenformerConfig) -> dict[str, int]:
    """Parameters in each token group: keys and values of all its tokens in all blocks."""
    assert config.token_groups is not None
    per_token = 2 * config.hidden_size * config.num_hidden_layers
    return {group["name"]: per_token * sum(_MAPS[p] * group[p] for p in PROJECTIONS) for group in config.token_groups}


def group_tokens(config: TokenformerConfig) -> dict[str, int]:
    """Parameter tokens in each token group, over all projections and blocks."""
    return {name: n // (2 * config.hidden_size) for name, n in group_parameters(config).items()}


def parameters(config: TokenformerConfig) -> int:
    """All trainable numbers, the tied embedding counted once."""
    assert config.linear_projections is not None
    d = config.hidden_size
    linear = config.num_hidden_layers * d * d * sum(_MAPS[p] for p in config.linear_projections)
    embedding = config.vocab_size * d * (1 if config.tie_word_embeddings else 2)
    return sum(group_parameters(config).values()) + linear + embedding + 2 * d


def matrix_parameters(config: TokenformerConfig) -> int:
    """Parameters that multiply every text token: all but the final norm, the embedding once (as the output head)."""
    head = config.vocab_size * config.hidden_size
    return parameters(config) - 2 * config.hidden_size - (0 if config.tie_word_embeddings else head)


def forward_flops(config: TokenformerConfig, context: int) -> float:
    """FLOPs per text token of one forward pass over `context` text tokens.

    2N + 4·layers·hidden·context (paper, table 3), N including the output head; attention counted without the causal
    half, norms and activations not at all.
    """
    return 2.0 * matrix_parameters(config) + 4.0 * config.num_hidden_layers * config.hidden_size * context


def training_flops(config: TokenformerConfig, context: int, *, frozen_parameters: int = 0) -> float:
    """FLOPs per text token of forward and backward: three forward passes, less the frozen weights' gradients."""
    return 3.0 * forward_flops(config, context) - 2.0 * frozen_parameters


def training_bytes(config: TokenformerConfig) -> int:
    """Bytes of float32 weights, gradients and AdamW's two moments; activations come on top."""
    return 16 * parameters(config)
