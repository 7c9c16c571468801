"""TokenFormers with the tensors of the official code's golden cases."""

import torch
from golden_data import MANIFEST

from tokenformer import TokenformerConfig

OFFICIAL_NAMES = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.proj": "self_attn.o_proj",
    "mlp": "mlp",
}


def load_official(module, prefix, official, layer_offset=2):
    """Copy official tensors into a model or one block; returns {official name: (our parameter, transposed)}."""
    mine = dict(module.named_parameters())
    table = {}
    for name in official:
        parts = name.split(".")
        if "_param_tokens" not in name:
            ours = {"word_embeddings": "model.embed_tokens.weight", "norm": f"model.norm.{parts[-1]}"}[parts[-2]]
            table[name] = (mine[ours], False)
            continue
        if parts[0] == "sequential":
            where, rest = f"model.layers.{int(parts[1]) - layer_offset}.", parts[2:]
        else:
            where, rest = "", parts
        projection = where + OFFICIAL_NAMES[".".join(rest[:-1])]
        kind = "keys" if rest[-1].startswith("key") else "values"
        table[name] = (mine[f"{projection}.groups.base.{kind}.weight"], kind == "values")
    with torch.no_grad():
        for name, (parameter, transposed) in table.items():
            value = official[name]
            parameter.copy_(value.t() if transposed else value)
    assert {id(p) for p, _ in table.values()} == {id(p) for p in module.parameters()}, f"{prefix}: parameters left over"
    return table


def official_config(letter):
    """Our configuration of a whole-model golden case."""
    sizes = MANIFEST["cases"][letter]["config"]
    return TokenformerConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        qkv_param_tokens=sizes["qkv"],
        output_param_tokens=sizes["proj"],
        ffn_param_tokens=sizes["ffn"],
        norm_activation_type=sizes["norm_activation_type"],
    )
