"""Put the figures of benchmarks/results/ into the README and the docs, between their markers."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare
import continual
import forgetting
import see_and_speak
import smollm2
import teach

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def lines(name: str) -> list[dict[str, Any]]:
    """Read one results file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def demo() -> str:
    """Return the demo's table and its growth lines."""
    rows = [
        "| stage | parameters | parameter tokens | text tokens | training FLOPs | seconds | val. loss | bits/byte |"
    ]
    rows.append("|---|--:|---|--:|--:|--:|--:|--:|")
    growths = []
    for r in lines("demo"):
        if "row" not in r:
            equal = "bit for bit equal" if r["logits_equal"] else "NOT equal"
            growths.append(
                f"- grown before stage {r['stage']}: validation loss {r['loss_before']:.6f} before, "
                f"{r['loss_after']:.6f} after; logits {equal}"
            )
            continue
        groups = ", ".join(f"{name} {count:,}" for name, count in r["parameter_tokens"].items())
        rows.append(
            f"| {r['row']} | {r['parameters']:,} | {groups} | {r['text_tokens_seen']:,} | {r['training_flops']:.3g} "
            f"| {r['training_seconds']:.0f} | {r['loss']:.4f} | {r['bits_per_byte']:.4f} |"
        )
    return "\n".join([*rows, "", *growths])


def benchmarks() -> str:
    """Return a row per goal and case: the newest measurement of each, on the most threads that were measured."""
    measured = lines("layer") + lines("train_step")
    threads = max(line["case"]["threads"] for line in measured)
    newest: dict[tuple[str, str], str] = {}
    for line in measured:
        case = line["case"]
        if case["threads"] != threads:
            continue
        if "family" in case:
            label = f"{case['what']}, {case['family']} family, {case['dtype']}"
        else:
            label = f"layer, {case['text_tokens']} × {case['width']} × {case['param_tokens']}, {case['dtype']}"
        for name, figure in line.items():
            if not isinstance(figure, dict) or "asked" not in figure:
                continue
            spread = " ({:.2f}–{:.2f})".format(*figure["quartiles"]) if "quartiles" in figure else ""
            sign = "≥" if "speed" in name else "≤"
            met = "yes" if figure["met"] else "**no**"
            newest[label, name] = (
                f"| {label} | {name} | {sign} {figure['asked']:.2f} | {figure['reached']:.2f}{spread} | {met} |"
            )
        if "fraction_of_memory_bandwidth" in line:
            share = line["fraction_of_memory_bandwidth"]
            both = f"{share[case['family']]:.2f}, GPT-NeoX {share['gpt_neox']:.2f}"
            newest[label, "bandwidth"] = f"| {label} | share of measured memory bandwidth | | {both} | |"
    head = [f"| on {threads} threads | ratio | asked | reached (quartiles) | met |", "|---|---|--:|--:|:-:|"]
    return "\n".join([*head, *newest.values()])


def costs() -> str:
    """Return what a reader of the README wants to know of the figures below: a row for each kind of cost."""
    measured = {tuple(line["case"].values()): line for line in lines("layer") + lines("train_step")}

    def ratio(name: str, **case: object) -> str:
        (found,) = (line[name]["reached"] for line in measured.values() if case.items() <= line["case"].items())
        return f"{found:.2f} ×"

    float32 = {"dtype": "float32", "threads": 2}
    layer = ratio("time fused/mlp", text_tokens=2048, width=768, param_tokens=3072, **float32)
    steps = [ratio("train time/gpt_neox", what="train", family=f, **float32) for f in ("paper", "ffn")]
    speeds = [ratio("decode speed/gpt_neox", what="decode", family=f, **float32) for f in ("paper", "ffn")]
    grown = next(r for r in reversed(lines("rewrite")) if r["operation"] == "grow" and r["source_bytes"] > 1e9)
    seconds, memory = statistics.median(grown["seconds"]), grown["peak"] / 1e9
    (installed,) = {r["way"]: r for r in lines("install") if (r["way"], r["step"]) == ("uv", "demo")}.values()
    raced = [r["cpu_seconds"] for r in lines("race")]
    race = statistics.median(ours / theirs for theirs, ours in zip(raced[::2], raced[1::2], strict=True))
    rows = [
        "| what | beside what | cost |",
        "|---|---|--:|",
        "| installing for `make demo`, from wheels on the disk, on two busy cores | "
        f"| {installed['seconds_so_far']:.0f} s, {installed['megabytes']:,} MB |",
        f"| a `Pattention` with 3,072 parameter tokens, both passes | a GELU MLP of that size | {layer} the time |",
        f"| a training step, parameter tokens everywhere | a GPT-NeoX of that size | {steps[0]} the time |",
        f"| a training step, parameter tokens in the feed-forward | the same | {steps[1]} the time |",
        f"| decoding, parameter tokens everywhere | the same | {speeds[0]} the speed |",
        f"| decoding, parameter tokens in the feed-forward | the same | {speeds[1]} the speed |",
        f"| training to the loss of nanoGPT's recipe for CPUs, and below | nanoGPT itself "
        f"| {race:.2f} × the CPU time |",
        f"| growing a checkpoint of 1.5B parameters on disk | copying its files "
        f"| {grown['ratio']:.2f} × the time: {seconds:.0f} s, {memory:.2f} GB of memory |",
    ]
    return "\n".join(rows)


def installing() -> str:
    """Return a row per way and step of installing: its newest measurement."""
    newest = {(r["way"], r["step"]): r for r in lines("install")}
    rows = ["| way | up to | seconds | packages | MB on disk | load of the machine |", "|---|---|--:|--:|--:|--:|"]
    for (way, step), r in newest.items():
        size, load = f"{r['packages']} | {r['megabytes']:,}", f"{r['load_before']:.1f}"
        rows.append(f"| {way} | {step} | {r['seconds_so_far']:.0f} | {size} | {load} |")
    return "\n".join(rows)


def ecosystem() -> str:
    """Return a row per tool: its newest outcome."""
    newest = {line["tool"]: line for line in lines("ecosystem")}
    rows = ["| tool | versions | what was run | result | limits |", "|---|---|---|---|---|"]
    for line in newest.values():
        versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items() if name != "tokenformer")
        cells = [line["tool"], versions, line["ran"], line["result"], line["limits"]]
        rows.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(rows)


def convert() -> str:
    """Return a row per released size: its newest measurement."""
    newest = {line["preset"]: line for line in lines("convert")}
    rows = ["| size | weights | file, GB | peak memory, GB | of it imports | peak / file | seconds |"]
    rows.append("|---|---|--:|--:|--:|--:|--:|")
    for r in newest.values():
        file, peak, imports = (f"{r[name] / 1e9:.2f}" for name in ("file", "peak", "imports"))
        rows.append(
            f"| {r['preset']} | {r['dtype']} | {file} | {peak} | {imports} | {r['ratio']:.2f} | {r['seconds']:.0f} |"
        )
    return "\n".join(rows)


def smollm2_results() -> str:
    """Return what each arm learned and forgot, and the learning rates that were tried."""
    return f"{smollm2.results_table(lines('smollm2'))}\n\nTuning, change in bits per byte:\n\n" + smollm2.tuning_table(
        lines("smollm2")
    )


def continual_results() -> str:
    """Return the texts after every step, and the learning rates that were tried."""
    return f"{continual.results_table(lines('continual'))}\n\nTuning:\n\n" + continual.tuning_table(lines("continual"))


def forgetting_results() -> str:
    """Return what was learned and forgotten on SmolLM2, so far as that has been run."""
    return forgetting.report(teach.lines(RESULTS / "forgetting.jsonl"))


def routing() -> str:
    """Return when gates are open and what that saves."""
    return continual.routing_table(lines("continual"))


def merging() -> str:
    """Return what becomes of children trained apart under either norm."""
    return continual.merging_table(lines("continual"))


def rewriting() -> str:
    """Return a row per operation on a checkpoint of 1.5B parameters: its newest measurement."""
    newest = {(r["model"], r["operation"]): r for r in lines("rewrite") if r["source_bytes"] > 1e9}
    rows = ["| model | operation | files, GB | peak memory, GB | of it imports | seconds | time / copying the files |"]
    rows.append("|---|---|--:|--:|--:|--:|--:|")
    for (model, operation), r in newest.items():
        file, peak, imports = (f"{r[name] / 1e9:.2f}" for name in ("source_bytes", "peak", "imports"))
        seconds = statistics.median(r["seconds"])
        rows.append(f"| {model} | {operation} | {file} | {peak} | {imports} | {seconds:.1f} | {r['ratio']:.2f} |")
    return "\n".join(rows)


def preparing() -> str:
    """Return what preparing text takes: speed beside the tokenizer's, and memory."""
    newest = {tuple(line["case"].items()): line for line in lines("text")}
    rows = [
        "| cores | text, MB | prepare, MB a core second | tokenizer alone | ratio (quartiles) | of core time |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    memory = ["| text, MB | peak memory, MB | of it imports | bytes kept a byte of text |", "|--:|--:|--:|--:|"]
    for line in newest.values():
        case = line["case"]
        if case["what"] == "memory":
            peak, kept = line["peak megabytes"]["reached"], line["bytes in the cache a byte of text"]
            memory.append(f"| {case['megabytes']} | {peak:.0f} | {line['of it imports']} | {kept:.2f} |")
            continue
        wall, cpu = (line[name] for name in ("prepare speed/tokenizers", "cpu prepare speed/tokenizers"))
        ratios = ["{:.2f} ({:.2f}–{:.2f})".format(ratio["reached"], *ratio["quartiles"]) for ratio in (wall, cpu)]
        speed = [f"{line['megabytes'][f'{arm} per cpu second']:.2f}" for arm in ("prepare", "tokenizer")]
        rows.append(f"| {' | '.join([str(case['cores']), str(case['megabytes']), *speed, *ratios])} |")
    return "\n".join([*rows, "", *memory])


def comparisons() -> str:
    """Return the answers of all comparisons that there are results of."""
    there = [name for name in compare.NAMES if (compare.RESULTS / name / "results.jsonl").exists()]
    return "\n\n".join(compare.summary(name) for name in there)


def racing() -> str:
    """Return what the race found: loss and CPU time of each, and their ratio with its spread."""
    raced = lines("race")
    of = {who: [line for line in raced if line["who"] == who] for who in ("nanoGPT", "tokenformer")}
    rows = ["| | runs | validation loss, nats a character | CPU seconds |", "|---|--:|--:|--:|"]
    for who, runs in of.items():
        losses, seconds = ([run[fact] for run in runs] for fact in ("loss", "cpu_seconds"))
        worst = f"{min(losses):.3f} to {max(losses):.3f}"
        rows.append(f"| {who} | {len(runs)} | {worst} | {min(seconds):.0f} to {max(seconds):.0f} |")
    ratios = [b["cpu_seconds"] / a["cpu_seconds"] for a, b in zip(*of.values(), strict=True)]
    middle = statistics.median(ratios)
    return "\n".join([*rows, "", f"Ours takes {middle:.2f} × the CPU time ({min(ratios):.2f} to {max(ratios):.2f})."])


def attending() -> str:
    """Return what parameter tokens that attend to one another gain, or that nobody has measured it here."""
    measured = lines("attending") if (RESULTS / "attending.jsonl").exists() else []
    if len({(line["attends"], line["seed"]) for line in measured}) < 6:
        return "Not measured yet: `python benchmarks/attending.py` does, in ten minutes of one idle core."
    rows = [
        "| parameter tokens of a feed-forward | parameters in use | trained | text tokens | rate | bits per byte |",
        "|---|--:|--:|--:|--:|---|",
    ]
    means = []
    for attends, label in ((False, "as they are"), (True, "after attending to one another")):
        own = [line for line in measured if line["attends"] is attends]
        rate = statistics.multimode(line["learning_rate"] for line in own)[0]
        final = [line for line in own if line["learning_rate"] == rate]
        scores = [line["report_bits_per_byte"] for line in final]
        means.append({line["seed"]: line["report_bits_per_byte"] for line in final})
        first = final[0]
        rows.append(
            f"| {label} | {first['parameters']:,} | {first['trained']:,} | {first['text_tokens']:,} | {rate:g} "
            f"| {statistics.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f}, {len(scores)} seeds) |"
        )
    gained = [means[1][seed] - means[0][seed] for seed in sorted(means[0])]
    each = ", ".join(f"{gain:+.4f}" for gain in gained)
    return "\n".join([*rows, "", f"Seed by seed, attending changes the bits per byte by {each}."])


# What docs/fast.md calls the figures and the arms of benchmarks/decode.py.
DECODING = {
    "bandwidth": "share of measured memory bandwidth, float32",
    "int8": "int8 beside float32, text tokens a second",
    "batch 8": "8 sequences beside one, text tokens a second",
    "prompt": "prompt of 512 text tokens: share of the speed of a matrix product",
    "closed gates": "tokens beside every map, the sequence's gate closed, beside none: text tokens a second",
    "llama.cpp": "SmolLM2-135M in int8 beside llama.cpp's Q8_0, text tokens a second",
}
ARMS = {
    "eager": "PyTorch",
    "float32": "OpenVINO",
    "int8": "OpenVINO int8",
    "genai": "GenAI",
    "genai int8": "GenAI int8",
    "llama.cpp": "llama.cpp",
}


def decoding() -> str:
    """Return the newest figures of decoding for each model and number of threads, then text tokens a second."""
    if not (RESULTS / "decode.jsonl").exists():
        return "It has not been run yet on a machine that does nothing else."
    newest = {(line["case"]["model"], line["case"]["threads"]): line for line in lines("decode")}
    rows = ["| model | threads | figure | asked | reached (quartiles) | met |", "|---|--:|---|--:|--:|:-:|"]
    speeds = [f"| text tokens a second | threads | {' | '.join(ARMS.values())} |", f"|---|--:|{'--:|' * len(ARMS)}"]
    for (model, threads), line in newest.items():
        for name, told in DECODING.items():
            if name in line:
                found = line[name]
                reached = "{:.2f} ({:.2f}–{:.2f})".format(found["reached"], *found["quartiles"])
                met = "yes" if found["met"] else "**no**"
                rows.append(f"| {model} | {threads} | {told} | ≥ {found['asked']:.2f} | {reached} | {met} |")
        seconds = [line["seconds"].get(arm) for arm in ARMS]
        cells = ["–" if s is None else f"{line['new_text_tokens'] / s:.1f}" for s in seconds]
        speeds.append(f"| {model} | {threads} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", *speeds])


def parallel() -> str:
    """Return what every layout of one model over several processes takes and gives: its newest line."""
    if not (RESULTS / "parallel.jsonl").exists():
        return "Not measured yet."
    newest = {tuple(line["case"].values()): line for line in lines("parallel")}
    rows = [
        "| fsdp × tensor | sequences a step | memory of a process (asked) | speed, one process = 1 (asked) | rounds |",
        "|---|--:|--:|--:|--:|",
    ]
    for line in newest.values():
        told = {name: f" ({line[name]['asked']})" if name in line else "" for name in ("memory", "speed")}
        size = line["memory"]["reached"] if "memory" in line else 1
        speeds = sorted(line["speeds"])
        middle, spread = statistics.median(speeds), f"{speeds[0]:.2f}–{speeds[-1]:.2f}"
        fsdp, tensor, sequences = (line["case"][field] for field in ("fsdp", "tensor", "sequences"))
        speed = f"{middle:.2f}, {spread}" if fsdp * tensor > 1 else "1"
        cells = f"{size:.2f}{told['memory']} | {speed}{told['speed']} | {line['rounds']}"
        rows.append(f"| {fsdp} × {tensor} | {sequences} | {cells} |")
    return "\n".join(rows)


def seeing() -> str:
    """Return what ways to make a language model see have come to, with the most training that all were given."""
    file = RESULTS / "see_and_speak.jsonl"
    measured = lines("see_and_speak") if file.exists() else []
    whole = [
        share
        for share in {line["share"] for line in measured}
        if {line["arm"] for line in measured if line["share"] == share} == set(see_and_speak.GRIDS)
    ]
    if not whole:
        return "Not measured yet: `make see-and-speak` does, in about an hour of one idle core."
    found = [line for line in measured if line["share"] == max(whole)]
    of = "" if max(whole) == 1 else f"A first look, with {max(whole):.0%} of all training. "
    if len({line["seed"] for line in found}) < 3:
        of += "A first look, for not all seeds have been run. "
    return (
        f"{of}Each way learned from {found[0]['images']:,} images:\n\n{see_and_speak.table(found)}\n\n"
        "![What the bridge has learned to say of held-out images](../benchmarks/results/see_and_speak.png)"
    )


def faults() -> str:
    """Return what became of commands that were disturbed: the newest lines of each command and way."""
    newest = {(line["command"], line["way"]): line for line in lines("torture")}
    words = {
        "clock": "killed at a random moment",
        "change": "killed before a change to the disk",
        "two": "two at once, one killed",
        "full": "disk full from a change on",
        "small": "disk takes small files only",
        "read-only": "disk read-only",
    }
    rows = ["| | times | found old | in part | new | lost, mixed or left |", "|---|--:|--:|--:|--:|--:|"]
    for way, what in words.items():
        of = [line for (_, named), line in newest.items() if named == way]
        found = [sum(line["found"][state] for line in of) for state in ("old", "in part", "new")]
        counts = [sum(line["times"] for line in of), *found, sum(line["wrong"] for line in of)]
        rows.append(f"| {what} | {' | '.join(map(str, counts))} |")
    commands = sorted({command for command, _ in newest})
    return "\n".join([*rows, "", f"The commands: {', '.join(f'`{command}`' for command in commands)}."])


def hostile() -> str:
    """Return what became of hostile files: the newest line of each kind."""
    newest = {line["kind"]: line for line in lines("hostile")}
    rows = ["| changed | inputs | read | refused | rules broken |", "|---|--:|--:|--:|--:|"]
    for kind, line in newest.items():
        rows.append(f"| {kind} | {' | '.join(str(line.get(f, 0)) for f in ('inputs', 'read', 'refused', 'broken'))} |")
    total = [sum(line.get(fact, 0) for line in newest.values()) for fact in ("inputs", "read", "refused", "broken")]
    return "\n".join([*rows, f"| together | {' | '.join(map(str, total))} |"])


PAGES: dict[str, tuple[Callable[[], str], ...]] = {
    "README.md": (costs,),
    "docs/compare.md": (racing, comparisons, attending),
    "docs/ecosystem.md": (ecosystem, convert),
    "docs/promises.md": (faults, hostile),
    "docs/fast.md": (decoding,),
    "docs/many-devices.md": (parallel,),
    "docs/results/knowledge.md": (merging, smollm2_results, continual_results, routing, forgetting_results),
    "docs/see-and-speak.md": (seeing,),
    "docs/results/speed.md": (demo, benchmarks, rewriting, preparing, installing),
}


def filled(page: str) -> str:
    """Return the text of `page` with every marked section rewritten from the results."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for section in PAGES[page]:
        pattern = rf"(<!-- results: {section.__name__} -->\n).*?(<!-- end -->)"
        content = section().replace("\\", "\\\\")
        text, found = re.subn(pattern, rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"{page} has {found} sections marked {section.__name__!r}; it needs one")
    return text


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(filled(page), encoding="utf-8")
