"""Give damaged and hostile files to what reads files, and see that it refuses them as it should.

    python benchmarks/hostile.py [--inputs 10000] [--seed 0]

Every input is a file that this package, or transformers, has written, with a few changes drawn by hypothesis: values
in it exchanged for what nobody expects there, bytes flipped, cut out and put in, tensors and pickles that are larger
than their file, paths that lead out of the folder. Rules, stated before the first input. What reads it succeeds, or
raises one of our errors, which the command line prints and answers with exit code 2. It takes at most 5 seconds, and
memory of at most twice the file beside 200 MB. It changes no file outside its folder, opens no connection, starts no
program, and runs no code from the file.

A line for each kind of input is appended to results/hostile.jsonl. What broke a rule is kept in a folder, whose name is
printed; exit code 1.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from mutations import change_json, change_lines, change_pickle, change_tensors, change_yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tokenformer import TokenformerConfig, TokenformerError, TokenformerForCausalLM, grow, load, save, split
from tokenformer.checkpoints.addons import attach_operation
from tokenformer.checkpoints.beside import read_addon
from tokenformer.checkpoints.checkpoint import save_checkpoint
from tokenformer.checkpoints.facts import checkpoint_facts
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.checkpoints.rewrite import open_checkpoint, rewrite
from tokenformer.compare.recipe import load_compare_recipe
from tokenformer.convert.files import convert_official, convert_to_official
from tokenformer.data.files import read_texts
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.growth.freeze import freeze_operation
from tokenformer.growth.groups import drop_operation
from tokenformer.plan import conclusions, read_plan
from tokenformer.quiet import quiet_libraries
from tokenformer.training.preparation import check_resumable
from tokenformer.training.recipe import load_recipe

RESULTS = Path(__file__).parent / "results" / "hostile.jsonl"
RECIPES = Path(__file__).parent.parent / "recipes"
SECONDS, TIMES_THE_FILE, BESIDE = 5.0, 2, 200_000_000
SIZES = {"vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"qkv_param_tokens": 8, "output_param_tokens": 8, "ffn_param_tokens": 16}


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        file: the one that is changed, in a folder of the corpus.
        change: makes of its bytes, by what it draws, others.
        read: reads the folder as a command does.
        beside: what else it reads, of the corpus.
    """

    file: str
    change: Callable[[st.DataObject, bytes], bytes]
    read: Callable[[Path], Any]
    beside: tuple[str, ...] = ()


def read_checkpoint(folder: Path, name: str = "model") -> None:
    """Do what inspect, generate and freeze do; refused is what any of them refuses."""
    refused = []
    for read in (checkpoint_facts, load, partial(_rewritten, folder / "out")):
        try:
            read(folder / name)
        except TokenformerError as error:
            refused.append(error)
    if refused:
        raise refused[0]


def _rewritten(output: Path, path: Path) -> None:
    stored = open_checkpoint(path)
    try:
        rewrite(stored, output, freeze_operation(stored.config, ["embedding"]))
    finally:
        stored.verification.exception()


def read_file_addon(folder: Path) -> None:
    """Do what attach does with an add-on of one file."""
    stored = open_checkpoint(folder / "parent")
    rewrite(stored, folder / "out", attach_operation(stored.config, stored.tensors, folder / "addon.safetensors"))


def read_folder_addon(folder: Path) -> None:
    """Do what generate and attach do with an add-on folder."""
    read_addon(folder / "addon")
    load(folder / "addon")


def read_official(folder: Path) -> None:
    """Do what convert official does."""
    convert_official(folder / "official.bin", folder / "official.yml", folder / "out")


def read_run(folder: Path) -> None:
    """Do what train --resume does first."""
    check_resumable(load_recipe(folder / "recipe.yaml"), folder / "run")


KINDS = {
    "recipe": Kind("recipe.yaml", change_yaml, lambda folder: load_recipe(folder / "recipe.yaml")),
    "comparison": Kind("compare.yaml", change_yaml, lambda folder: load_compare_recipe(folder / "compare.yaml")),
    "plan": Kind("plan.yaml", change_yaml, lambda folder: conclusions(read_plan(folder / "plan.yaml"))),
    "run": Kind("run/recipe.yaml", change_yaml, read_run, ("recipe.yaml",)),
    "configuration": Kind("model/config.json", change_json, read_checkpoint),
    "Llama's configuration": Kind("llama/config.json", change_json, partial(read_checkpoint, name="llama")),
    "weights": Kind("model/model.safetensors", change_tensors, read_checkpoint),
    "index": Kind("sharded/model.safetensors.index.json", change_json, partial(read_checkpoint, name="sharded")),
    "lineage": Kind("model/lineage.json", change_json, read_checkpoint),
    "generation settings": Kind("model/generation_config.json", change_json, read_checkpoint),
    "tokenizer": Kind("model/tokenizer.json", change_json, read_checkpoint),
    "tokenizer's settings": Kind("model/tokenizer_config.json", change_json, read_checkpoint),
    "add-on file": Kind("addon.safetensors", change_tensors, read_file_addon, ("parent",)),
    "add-on's settings": Kind("addon/addon_config.json", change_json, read_folder_addon, ("llama",)),
    "add-on's weights": Kind("addon/addon_model.safetensors", change_tensors, read_folder_addon, ("llama",)),
    "optimizer": Kind("model/optimizer.pt", change_pickle, lambda folder: load_states(folder / "model")),
    "official weights": Kind("official.bin", change_pickle, read_official, ("official.yml",)),
    "official settings": Kind("official.yml", change_yaml, read_official, ("official.bin",)),
    "JSON lines": Kind("text.jsonl", change_lines, lambda folder: list(read_texts(folder / "text.jsonl", "text"))),
}


def write_corpus(folder: Path) -> None:
    """Write a file of every kind, as the package writes it."""
    folder.mkdir()
    torch.manual_seed(0)
    model = TokenformerForCausalLM(TokenformerConfig(**SIZES, **TOKENS))
    tokenizer = make_tokenizer("bytes", None)
    grow(model, ffn_param_tokens="+8", name="more")
    lineage = Lineage().then("train", recipe={"stages": [{"text_tokens": 1}]}, arguments={"stage": 1})

    def states(into: Path) -> None:
        zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        of = {name: {"step": torch.ones(()), "exp_avg": zero, "exp_avg_sq": zero} for name, zero in zeros.items()}
        torch.save(of, into / "optimizer.pt")

    save_checkpoint(folder / "model", model, tokenizer, lineage, extra=states)
    grown = open_checkpoint(folder / "model")
    convert_to_official(folder / "model", folder / "official.bin")
    more = {"intermediate_size": 24, "num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2}
    save(folder / "llama", LlamaForCausalLM(LlamaConfig(**SIZES, **more)))
    model.save_pretrained(folder / "sharded", max_shard_size="20KB")
    split(model, "more", folder / "addon.safetensors")
    rewrite(grown, folder / "parent", drop_operation(grown.config, ["more"]))
    parent, _, _ = load(folder / "llama")
    grow(parent, at="q_proj", tokens=4, name="beside")
    split(parent, "beside", folder / "addon")
    for name, source in {"recipe": "quick", "compare": "compare/pays", "plan": "plan/paper"}.items():
        shutil.copyfile(RECIPES / f"{source}.yaml", folder / f"{name}.yaml")
    (folder / "run").mkdir()
    shutil.copyfile(folder / "recipe.yaml", folder / "run" / "recipe.yaml")
    rows = [{"text": f"line {i}", "id": i} for i in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


class Watch:
    """What this process does while a file is read, as Python's audit hooks tell it: to be made once in a process."""

    STARTS = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
    CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")

    def __init__(self) -> None:
        self.folder: str | None = None
        self.broken: list[str] = []
        sys.addaudithook(self._see)

    @contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        """Give the list of rules that are broken within the context."""
        self.folder, self.broken = str(folder.resolve()), []
        try:
            yield self.broken
        finally:
            self.folder = None

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in self.STARTS:
            self.broken.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._check(arguments[0])
        elif event in self.CHANGES and not any(isinstance(a, int) and a >= 0 for a in arguments[1:]):  # no dir_fd
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                self._check(path)
        elif event == "exec" and str(getattr(arguments[0], "co_filename", "")).startswith(self.folder):
            self.broken.append(f"ran {arguments[0].co_filename}")

    def _check(self, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            where = os.path.abspath(os.fsdecode(path))
            if not where.startswith((self.folder or "", "/dev/")):
                self.broken.append(f"changed {where}")


class Slow(BaseException):
    """It took too long; no handler of errors takes it for one."""


def _slow(number: int, frame: Any) -> None:
    raise Slow


def attack(name: str, corpus: Path, place: Path, *, inputs: int, seed: int) -> dict[str, Any]:
    """Give so many inputs of a kind, in a process of its own with little memory; returns what came of them.

    "problems" are dictionaries of a word for what is wrong and the file that did it, kept in `place`.
    """
    receive, send = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            send.send(_attack(name, corpus, place, inputs, seed))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        found = {"outcomes": {}, "problems": [{"what": "the process died", "kept": str(place)}]}
    os.waitpid(child, 0)
    return found


def _attack(name: str, corpus: Path, place: Path, inputs: int, seed: int) -> dict[str, Any]:
    kind, watch = KINDS[name], Watch()
    outcomes, problems, seen = Counter[str](), list[dict[str, str]](), set[str]()
    original = (corpus / kind.file).read_bytes()
    place.mkdir()
    (place / "elsewhere").mkdir()
    os.chdir(place / "elsewhere")
    memory = _status("VmSize") + 2**32
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGPROF, _slow)
    warnings.simplefilter("ignore")
    quiet_libraries()
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)  # Rust writes there that it panics

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def give(draw: st.DataObject) -> None:
        folder = place / "input"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for part in (kind.file.partition("/")[0], *kind.beside):
            copy = shutil.copytree if (corpus / part).is_dir() else shutil.copyfile
            copy(corpus / part, folder / part)
        (folder / kind.file).with_name("lineage.json").unlink(missing_ok=True)
        content = kind.change(draw, original)
        (folder / kind.file).write_bytes(content)
        outcome = judge(lambda: kind.read(folder), watch, folder, size=len(content))
        outcomes[outcome if outcome in ("read", "refused") else "broken"] += 1
        if outcome not in ("read", "refused") and outcome not in seen:
            seen.add(outcome)
            kept = place / f"{len(seen)}-{Path(kind.file).name}"
            kept.write_bytes(content)
            problems.append({"what": outcome, "kept": str(kept)})

    give()
    return {"outcomes": dict(outcomes), "problems": problems}


def judge(read: Callable[[], Any], watch: Watch, folder: Path, *, size: int) -> str:
    """Return "read", "refused", or which rule was broken."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
    before, began, outcome = _status("VmRSS"), time.process_time(), "read"
    with watch.over(folder) as broken:
        signal.setitimer(signal.ITIMER_PROF, 4 * SECONDS)
        try:
            read()
        except TokenformerError:
            outcome = "refused"
        except Slow:
            outcome = f"took more than {4 * SECONDS} seconds"
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            ours = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "tokenformer" in f.filename]
            outcome = f"{type(error).__name__} {' '.join(ours[-3:])}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    took, more = time.process_time() - began, _status("VmHWM") - before
    if broken:
        return f"touched what it should not: {broken[0]}"
    if outcome in ("read", "refused") and took > SECONDS:
        return f"took {took:.0f} seconds"
    if outcome in ("read", "refused") and more > TIMES_THE_FILE * size + BESIDE:
        return f"took {more >> 20} MiB of memory for {size:,} bytes"
    return outcome


def _status(field: str) -> int:
    """Return a size of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    return 1024 * int(found[1]) if found else 0


def main() -> None:
    """Attack every kind, and append what came of it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    place, problems = Path(tempfile.mkdtemp(prefix="hostile")), 0
    write_corpus(place / "corpus")
    for number, name in enumerate(given.kinds):
        began, inputs = time.monotonic(), -(-given.inputs // len(given.kinds))
        found = attack(name, place / "corpus", place / str(number), inputs=inputs, seed=given.seed)
        line = {
            "kind": name,
            "inputs": sum(found["outcomes"].values()),
            **found["outcomes"],
            "problems": [problem["what"] for problem in found["problems"]],
            "seconds": round(time.monotonic() - began, 1),
            "seed": given.seed,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        problems += len(found["problems"])
        print(line, *(problem["kept"] for problem in found["problems"]), sep="\n", flush=True)
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
    if problems:
        sys.exit(f"{problems} rules were broken; the inputs are kept in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
