"""What `tokenformer inspect` says of a checkpoint without torch is what its model says."""

import subprocess
import sys

import pytest
import torch
from group_operations import ordinary
from tiny_models import make, tiny, two_groups
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, OPTConfig, Phi3Config

from tokenformer import cost, freeze, grow
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.facts import checkpoint_facts
from tokenformer.checkpoints.lineage import Lineage

_SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def from_config(config):
    return AutoModelForCausalLM.from_config(config)


MODELS = {
    "paper": lambda: tiny(),
    "grown": lambda: make("grown"),
    "blocks": lambda: grown(two_groups("ffn"), num_hidden_layers="+2"),
    "loops": lambda: grown(tiny(), ffn_param_tokens="+8", num_loops=3),
    "untied": lambda: tiny(tie_word_embeddings=False),
    "biased": lambda: tiny(norm_activation_type="gelu", pattention_bias=True),
    "llama": lambda: grown(ordinary(), ffn_param_tokens="+8"),
    "gpt2": lambda: grown(
        from_config(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2)), ffn_param_tokens="+8"
    ),
    "gpt_neox": lambda: from_config(GPTNeoXConfig(**_SIZES, intermediate_size=48)),
    "opt": lambda: from_config(OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64)),
    "phi3": lambda: grown(
        from_config(Phi3Config(**_SIZES, intermediate_size=48, pad_token_id=0)), ffn_param_tokens="+8"
    ),
}


def wider(config):
    return grown(from_config(config), ffn_param_tokens="+8")


def grown(model, **growth):
    grow(model, **growth, name="new")
    freeze(model, ["base"])
    return model


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_facts_are_those_of_the_model(kind, dtype, tmp_path):
    save_checkpoint(tmp_path / "c", MODELS[kind]().to(dtype), None, Lineage())
    config, facts = load_checkpoint(tmp_path / "c")[0].config, checkpoint_facts(tmp_path / "c")
    assert facts["parameters"] == cost.parameters(config)
    assert facts["bytes"] == facts["parameters"] * dtype.itemsize
    assert facts["training_bytes"] == cost.training_bytes(config)
    assert {g["name"]: g["tokens"] for g in facts["groups"]} == cost.group_tokens(config)
    assert {g["name"]: g["parameters"] for g in facts["groups"]} == cost.group_parameters(config)
    assert all(g["bytes"] == g["parameters"] * dtype.itemsize for g in facts["groups"])
    assert facts["num_loops"] == getattr(config, "num_loops", 1)
    assert [facts[field] for field in ("num_hidden_layers", "hidden_size", "vocab_size")] == [
        getattr(config, field) for field in ("num_hidden_layers", "hidden_size", "vocab_size")
    ]
    assert ("frozen" in facts["groups"][0]["notes"]) == bool(getattr(config, "frozen", None))


def test_inspecting_imports_nothing_slow(tmp_path):
    save_checkpoint(tmp_path / "c", two_groups("ffn"), None, Lineage())
    code = (
        "import sys; from tokenformer.cli.app import main; sys.argv = ['tokenformer', 'inspect', sys.argv[1]]\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], capture_output=True, text=True, timeout=60)
    assert "more" in done.stdout and done.stdout.splitlines()[-1] == "set()" and not done.stderr
