import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import FAMILIES, tiny

from tokenformer import grow


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
