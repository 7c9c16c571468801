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
import copy
import io
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
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
import yaml
from hypothesis import strategies as st
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
ODD: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 10**12, 10**400, 0.5, 1e308, float("nan"), float("inf"),
    "", "x" * 3000, "../../outside", "/etc/passwd", "\x00", "\udcff", "__import__('os').system('touch ran')",
    [], {}, [[]], [None], {"": ""}, [0] * 100, ["a", 1], {"a": {"b": {}}},
]  # fmt: skip
ODD_YAML = ["&a [*a]", "!!python/object/apply:os.system [touch ran]", "2021-13-45", "!!int x", "!!float ''", "? [a]: b"]
ODD_YAML += ["[" * 3000, "a: &a [x, x]\nb: &b [*a, *a]\n", "<<: *nothing", "\t- x", "!!binary '%'", "0x_", "1:99:99"]
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


# ---------------------------------------------------------------------------------------------------------- changes


def change_bytes(draw: st.DataObject, content: bytes) -> bytes:
    """Flip, cut out, double and put in bytes; lengths and offsets are among those put in."""
    for _ in range(draw.draw(st.integers(1, 3))):
        begin = draw.draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw.draw(st.sampled_from([0, 1, 2, 8, 100, len(content)])))
        how = draw.draw(st.sampled_from(["cut", "double", "put in", "overwrite"]))
        number = draw.draw(st.sampled_from([0, 1, 255, 2**31 - 1, 2**32, 2**63, 2**64 - 1]))
        other = draw.draw(st.one_of(st.just(struct.pack("<Q", number)), st.binary(max_size=8)))
        if how == "double":
            other = content[begin:end] * 2
        elif how == "cut":
            other = b""
        elif how == "put in":
            end = begin
        content = content[:begin] + other + content[end:]
    return content


def change_fields(draw: st.DataObject, content: Any, *, times: int = 3) -> Any:
    """Exchange, take away, rename and move values anywhere in nested lists and dictionaries."""
    content = copy.deepcopy(content)
    for _ in range(draw.draw(st.integers(1, times))):
        places = list(_places(content))
        if not places:
            return draw.draw(st.sampled_from(ODD))
        holder, key = draw.draw(st.sampled_from(places))
        how = draw.draw(st.sampled_from(["odd", "odd", "odd", "like", "take away", "rename", "wrap", "move"]))
        value = holder[key]
        if how == "odd":
            holder[key] = copy.deepcopy(draw.draw(st.sampled_from(ODD)))
        elif how == "like" and isinstance(value, int | float):
            holder[key] = draw.draw(st.one_of(st.integers(-(2**40), 2**40), st.floats(), st.integers(-3, 300)))
        elif how == "like":
            holder[key] = draw.draw(st.text(max_size=20))
        elif how == "wrap":
            holder[key] = draw.draw(st.sampled_from([[value], {"x": value}, str(value)]))
        elif how == "move":
            other, there = draw.draw(st.sampled_from(places))
            holder[key] = copy.deepcopy(other.get(there) if isinstance(other, dict) else value)
        elif isinstance(holder, dict):
            del holder[key]
            if how == "rename":
                holder[draw.draw(st.sampled_from(["", "x", "../x", "\x00", "__class__"]))] = value
    return content


def change_json(draw: st.DataObject, content: bytes) -> bytes:
    """Change the values of a JSON file, or its bytes."""
    if draw.draw(st.integers(0, 4)) == 0:
        nested = draw.draw(st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xff\xfe", b""]))
        return draw.draw(st.one_of(st.just(nested), st.just(change_bytes(draw, content))))
    return json.dumps(change_fields(draw, json.loads(content))).encode()


def change_yaml(draw: st.DataObject, content: bytes) -> bytes:
    """Change the values of a YAML file, or put in what YAML can say and nobody expects."""
    if draw.draw(st.integers(0, 2)) == 0:
        lines = content.decode().splitlines()
        odd = draw.draw(st.sampled_from([*ODD_YAML, laughs()]))
        place = draw.draw(st.integers(0, len(lines) - 1))
        key = lines[place].partition(":")[0]
        lines[place] = f"{key}: {odd}" if draw.draw(st.booleans()) else odd
        return "\n".join(lines).encode()
    changed = change_fields(draw, yaml.safe_load(content))
    text = yaml.safe_dump(changed, allow_unicode=True)
    return text.encode(errors="replace")


def laughs() -> str:
    """Return ten lines that stand for a thousand million words."""
    lines = ["&l0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "[" + ", ".join(lines) + "]"


def change_tensors(draw: st.DataObject, content: bytes) -> bytes:
    """Change the header of a safetensors file, or any of its bytes."""
    if draw.draw(st.booleans()):
        return change_bytes(draw, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    for field in ("tokenformer_addon", "parent_sha256"):  # JSON within JSON
        if field in header.get("__metadata__", {}) and draw.draw(st.booleans()):
            inner = change_fields(draw, json.loads(header["__metadata__"][field]))
            header["__metadata__"][field] = json.dumps(inner)
            changed = json.dumps(header).encode()
            return struct.pack("<Q", len(changed)) + changed + content[8 + length :]
    changed = json.dumps(change_fields(draw, header)).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Say what unpickling calls."""
        return self.function, self.arguments


def odd_pickles() -> Iterator[Any]:
    """Yield what a pickle should not hold, or not at that size."""
    one = torch.zeros(1)
    yield Call(os.system, "touch ran")
    yield Call(eval, "open('ran', 'w')")
    yield {"w": Call(bytearray, 2**36)}
    yield {"w": one.expand(2**36)}
    yield {"w": one.as_strided((2**20, 2**20), (0, 0))}
    yield {"w": {"exp_avg": one.expand(2**36), "step": one}}
    yield {"w": torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), one, (2**40,), check_invariants=False)}
    yield {"w": torch.empty(2**40, device="meta")}
    yield {f"w{i}": torch.ones(1000).expand(1000, 1000) for i in range(50)}
    yield [1, 2, 3]
    yield {"module": {"module": {}}}
    yield {1: one, None: one}
    yield {"w": {"exp_avg": "text"}}
    yield None


def change_pickle(draw: st.DataObject, content: bytes) -> bytes:
    """Change the bytes of a torch file, or those in its archive; or give one that holds something else."""
    how = draw.draw(st.sampled_from(["bytes", "archive", "archive", "another", "deflate"]))
    if how == "bytes":
        return change_bytes(draw, content)
    if how == "another":
        odd, stream = list(odd_pickles()), io.BytesIO()
        number = draw.draw(st.integers(0, len(odd) - 1))
        torch.save(odd[number], stream, _use_new_zipfile_serialization=draw.draw(st.booleans()))
        return stream.getvalue()
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
        entries = {entry.filename: old.read(entry) for entry in old.infolist()}
        chosen = draw.draw(st.sampled_from(sorted(entries)))
        for name, data in entries.items():
            if name == chosen:
                data = bytes(2**26) if how == "deflate" else change_bytes(draw, data)
                name = draw.draw(st.sampled_from([name, name, name, "../../outside", "/outside", f"{name}x"]))
            new.writestr(name, data, zipfile.ZIP_DEFLATED if how == "deflate" else zipfile.ZIP_STORED)
    return stream.getvalue()


def change_lines(draw: st.DataObject, content: bytes) -> bytes:
    """Change one line of JSON, or bytes anywhere."""
    if draw.draw(st.booleans()):
        return change_bytes(draw, content)
    lines = content.splitlines()
    place = draw.draw(st.integers(0, len(lines) - 1))
    lines[place] = change_json(draw, lines[place])
    return b"\n".join(lines)


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(items):
        yield content, key
        yield from _places(value)


# ---------------------------------------------------------------------------------------------------------- readers


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


# ------------------------------------------------------------------------------------------------------------ rules


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
