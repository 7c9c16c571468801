"""Grow SmolLM2 by a tenth of its neurons and two blocks, and give what is new random values, so that tools must run it.

    python examples/ecosystem/grow_llama.py MODEL OUTPUT

MODEL is the folder that benchmarks/smollm2.py makes, runs/smollm2/model. Without values other than zero what is new
adds nothing, and a tool that left it out would go unnoticed.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tokenformer import grow


@torch.no_grad()
def main(source: str, output: str) -> None:
    """Read, grow, write."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    grow(model, ffn_param_tokens="+10%", num_hidden_layers="+2", name="more")
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".groups.more." in name and not parameter.any():
            parameter.normal_(std=0.02)
    for block in model.config.token_groups[-1]["blocks"]:
        model.model.layers[block].self_attn.o_proj.weight.normal_(std=0.01)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(source).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
