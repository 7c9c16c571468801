"""The official code's forward pass, written down plainly from its facts (tests/golden/OFFICIAL_CODE_FACTS.md).

Works on its own state dict and YAML fields and shares nothing with src/, so that a conversion has something to be wrong
against at sizes for which no golden outputs exist.
"""

import torch
import torch.nn.functional as F

MODULES = ("attention.query", "attention.key", "attention.value", "attention.proj", "mlp")


def fields(*, layers, hidden, heads, qkv, proj, ffn, seq=32, norm_activation_type="l2_norm_gelu", **_):
    """YAML fields of a model; keyword names are those of the golden manifest."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "qkv_slot_num": qkv,
        "proj_slot_num": proj,
        "ffn_slot_num": ffn,
        "max_position_embeddings": seq,
        "pos_emb": "rotary",
        "rotary_pct": 0.25,
        "norm": "layernorm_nonparam",
        "final_norm": "layernorm",
        "no_weight_tying": False,
        "attention_config": [[["tokenformer"], layers]],
        "norm_activation_type": norm_activation_type,
        "tokenizer-type": "HFTokenizer",
    }


def logits(state, yaml, ids):
    """Logits `[B, T, V]` of text tokens `[B, T]`."""
    kind, heads = yaml["norm_activation_type"], yaml["num_attention_heads"]

    def project(x, prefix):
        k, v = state[f"{prefix}.key_param_tokens"], state[f"{prefix}.value_param_tokens"]
        s, n = x @ k.T, len(k)
        if kind == "l2_norm_gelu":
            w = F.gelu(s / s.norm(dim=-1, keepdim=True) * n**0.5)
        elif kind == "gelu_l2_norm":
            w = F.gelu(s) / F.gelu(s).norm(dim=-1, keepdim=True) * n**0.5
        else:
            w = s.exp() / s.exp().sum(-1, keepdim=True) * n
        return w @ v

    def rotate(x):
        head_dim = x.shape[-1]
        dims = int(head_dim * yaml["rotary_pct"])
        angles = torch.arange(x.shape[2])[:, None] * 10000.0 ** -(torch.arange(0, dims, 2) / dims)
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        turned, rest = x[..., :dims], x[..., dims:]
        half = torch.cat([-turned[..., dims // 2 :], turned[..., : dims // 2]], -1)
        return torch.cat([turned * cos + half * sin, rest], -1)

    x = state["sequential.0.word_embeddings.weight"][ids]
    rows, length, width = x.shape
    for i in range(2, yaml["num_layers"] + 2):
        h = F.layer_norm(x, (width,))
        q, k, v = (
            project(h, f"sequential.{i}.attention.{name}").view(rows, length, heads, -1).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        scores = rotate(q) @ rotate(k).transpose(2, 3) / q.shape[-1] ** 0.5
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        context = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + project(context.transpose(1, 2).reshape(rows, length, width), f"sequential.{i}.attention.proj")
        x = x + project(F.layer_norm(x, (width,)), f"sequential.{i}.mlp")
    norm = f"sequential.{yaml['num_layers'] + 3}.norm"
    x = F.layer_norm(x, (width,), state[f"{norm}.weight"], state[f"{norm}.bias"])
    return x @ state["sequential.0.word_embeddings.weight"].T
