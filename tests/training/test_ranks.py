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


STREAM = """
import json, os, signal, sys
from pathlib import Path
from tokenformer.training.text import TextMaterial
from tokenformer.training.train import train
from tokenformer.training.watch import Watcher

recipe, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
collate, step_begins = TextMaterial.collate, Watcher.on_step_begin
read = {"whole": [], "parts": []}

def interrupt(self, args, state, control, **kwargs):
    if state.global_step == 3:
        signal.raise_signal(signal.SIGINT)
    return step_begins(self, args, state, control, **kwargs)

def run(name, **options):
    def noted(self, rows):
        read[name].extend(row["input_ids"] for row in rows)
        return collate(self, rows)

    TextMaterial.collate = noted
    train(recipe, folder / name, **options)

run("whole")
Watcher.on_step_begin = interrupt
try:
    run("parts")
except KeyboardInterrupt:
    Watcher.on_step_begin = step_begins
run("parts", resume=True)
(folder / os.environ["RANK"]).write_text(json.dumps(read))
"""


@pytest.mark.slow
def test_each_process_trains_on_its_own_share_of_a_stream_and_goes_on_in_it(content, tmp_path):  # noqa: F811
    (tmp_path / "rank.py").write_text(STREAM, encoding="utf-8")
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Document {i} says {i**7} and {i**5}. " * 9, encoding="utf-8")
    data = {"source": str(tmp_path / "text"), "tokenizer": "bytes", "streaming": True, "validation_fraction": 0.2}
    recipe = {**content, "data": data, "stages": [{"text_tokens": 320}]}
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "rank.py")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*start, json.dumps(recipe), str(tmp_path)], env=environment, timeout=300, check=True)
    read = [json.loads((tmp_path / rank).read_text()) for rank in "01"]
    for own in read:
        assert own["parts"] == own["whole"] and len(own["whole"]) >= 8
    first, second = (set(map(tuple, own["whole"])) for own in read)
    assert not first & second
    whole, parts = (tmp_path / name / "stage1" / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
