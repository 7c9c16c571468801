import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tiny

from tokenformer import TokenformerConfig, grow


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_compute_what_one_does(family, tmp_path):
    """Logits, gradients and generated text, with a group grown beside the first and heads left whole."""
    model = tiny(family)
    grow(model, ffn_param_tokens="+32", qkv_param_tokens="+16")
    model.save_pretrained(tmp_path)
    worker = Path(__file__).parent / "tensor_parallel_worker.py"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        "29577",
        str(worker),
    ]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal") == 2 and " 0 tensors split" not in done.stdout


def test_what_is_rounded_by_one_scale_is_not_split():
    """Half of a ternary map has another scale: the logits were off by a third of the largest."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    groups = [{"name": "base", "qkv": 8, "output": 8, "ffn": 8, "weights": "ternary"}]
    assert TokenformerConfig(**sizes).base_model_tp_plan
    assert TokenformerConfig(**sizes, weights="ternary").base_model_tp_plan == {}
    assert TokenformerConfig(**sizes, token_groups=groups).base_model_tp_plan == {}
