"""Several processes of one run, as torchrun starts them."""

import json
import os
import subprocess
import sys

import pytest
from test_damage import content  # noqa: F401

RANK = """
import json, os, signal, sys
from tokenformer.training.train import train
from tokenformer.training.watch import Watcher

whole = Watcher.on_step_begin

def interrupted(self, args, state, control, **kwargs):
    if state.global_step == {"0": 2, "1": 4}[os.environ["RANK"]]:
        signal.raise_signal(signal.SIGINT)
    return whole(self, args, state, control, **kwargs)

recipe, run, resume = sys.argv[1:]
if resume == "no":
    Watcher.on_step_begin = interrupted
try:
    train(json.loads(recipe), run, resume=resume == "yes")
except KeyboardInterrupt:
    sys.exit(0 if resume == "no" else 1)
sys.exit(0 if resume == "yes" else 1)
"""


@pytest.mark.slow
def test_interrupts_in_different_steps_stop_all_ranks_in_one_step(content, tmp_path):  # noqa: F811
    (tmp_path / "rank.py").write_text(RANK, encoding="utf-8")
    recipe = json.dumps({**content, "stages": [{"text_tokens": 320}]})
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "rank.py"), recipe]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*start, str(tmp_path / "run"), "no"], env=environment, timeout=200, check=True)
    assert (tmp_path / "run" / "stage1.partial" / "checkpoint-3" / "complete").exists()
    subprocess.run([*start, str(tmp_path / "run"), "yes"], env=environment, timeout=200, check=True)
    assert (tmp_path / "run" / "stage1" / "model.safetensors").exists()
