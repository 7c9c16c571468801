"""The report is made from lines whose truth is known: bits per byte fall by a slope for each factor e of FLOPs."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from tokenformer import cost
from tokenformer.compare.accounting import saving
from tokenformer.compare.chart import interactive_curves
from tokenformer.compare.conclusions import limits
from tokenformer.compare.findings import Findings
from tokenformer.compare.page import Code, Paragraph, Table, html_page, markdown_page, scientific
from tokenformer.compare.pictures import _spread
from tokenformer.compare.report import write_report
from tokenformer.errors import CheckpointError, DataError, EvaluationError, RecipeError

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = {"architecture": "tokenformer", **SMALL}
FAMILIES = {
    "gpt-neox": {"architecture": "gpt_neox", **SMALL, "intermediate_size": 64},
    "tokenformer": {**TOKENS, "qkv_param_tokens": 16, "output_param_tokens": 16, "ffn_param_tokens": 64},
    "ffn": {**TOKENS, "qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 64},
}
# name: family, size factor, how it grows, bits per byte at 1e11 FLOPs, slope per factor e.
ARMS = {
    "gpt-neox scratch": ("gpt-neox", 4, None, 2.40, 0.240),
    "gpt-neox small, trained on": ("gpt-neox", 1, None, 2.12, 0.150),
    "gpt-neox hyperclone": ("gpt-neox", 4, "hyperclone", 2.20, 0.202),
    "gpt-neox stack": ("gpt-neox", 4, "stack", 2.21, 0.205),
    "gpt-neox random blocks": ("gpt-neox", 4, "random_blocks", 2.25, 0.200),
    "gpt-neox MLP widened": ("gpt-neox", 4, "exact", 2.15, 0.185),
    "tokenformer scratch": ("tokenformer", 4, None, 2.52, 0.230),
    "tokenformer small, trained on": ("tokenformer", 1, None, 2.25, 0.150),
    "tokenformer grown exactly": ("tokenformer", 4, "exact", 2.28, 0.190),
    "tokenformer as published": ("tokenformer", 4, "published", 2.31, 0.180),
    "tokenformer recomputed τ": ("tokenformer", 4, "recomputed_tau", 2.30, 0.182),
    "tokenformer random keys": ("tokenformer", 4, "random_keys", 2.29, 0.185),
    "ffn scratch": ("ffn", 4, None, 2.38, 0.245),
    "ffn small, trained on": ("ffn", 1, None, 2.10, 0.152),
    "ffn grown exactly": ("ffn", 4, "exact", 2.12, 0.190),
    "ffn grown, old tokens frozen": ("ffn", 4, "exact", 2.16, 0.175),
}
GPT2_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
BUDGETS = [2e11, 4e11, 8e11, 1.6e12]
GROWTH = [1e11, 3e11]


def model(arm, *, last):
    """Fields of an arm's first or last configuration."""
    family, factor, method = ARMS[arm][:3]
    field = "intermediate_size" if family == "gpt-neox" else "ffn_param_tokens"
    return {**FAMILIES[family], field: 64 * (factor if last or not method else 1)}


def recipe(arms=tuple(ARMS), seeds=(0, 1, 2), **changes):
    stages = {
        arm: [{"at": at, "method": ARMS[arm][2], "ffn_param_tokens": "+50%"} for at in GROWTH if ARMS[arm][2]]
        for arm in arms
    }
    return {
        "question": "Does growing by parameter tokens pay, and against what?",
        "data": {"source": "python-stdlib", "tokenizer": "bytes"},
        "training": {"batch_size": 16, "sequence_length": 128, "schedule": "wsd", "decay": 0.2, "threads": 1},
        "budgets": BUDGETS,
        "seeds": list(seeds),
        "learning_rates": [1e-3, 2e-3, 4e-3],
        "tuning_budget": BUDGETS[0],
        "rules": {"reference": arms[0], "confidence": 0.95, "threshold": 0.01},
        "arms": {arm: {"model": model(arm, last=False), "stages": stages[arm]} for arm in arms},
        **changes,
    }


def best_rate(arm):
    """The learning rate to train with: at the end of the grid for one arm."""
    return 4e-3 if arm == "gpt-neox scratch" else 2e-3


def run(arm, seed, budget, rate=2e-3, purpose="final"):
    family, factor, method, level, slope = ARMS[arm]
    config = model(arm, last=True)
    noise = np.random.default_rng(seed).normal(scale=0.01) + np.random.default_rng([seed, len(arm)]).normal(scale=0.003)
    bits = level - slope * math.log(budget / 1e11) + noise + 0.02 * abs(math.log2(rate / best_rate(arm)))
    jump = 0.0 if method in ("exact", "hyperclone") else 0.3
    text_tokens = budget / 6e5 / (factor if method is None else (1 + factor) / 2)
    return {
        "event": "run",
        "arm": arm,
        "seed": seed,
        "learning_rate": rate,
        "purpose": purpose,
        "budget": budget,
        "training_flops": budget,
        "text_tokens": int(text_tokens),
        "seconds": budget / (2e9 if family == "gpt-neox" else 1.5e9),
        "bits_per_byte": bits,
        "loss": bits * math.log(2),
        "tuning_bits_per_byte": bits + 0.01,
        "parameters": 60_000 * factor,
        "config": {
            **{("model_type" if field == "architecture" else field): value for field, value in config.items()},
            "vocab_size": 259,
            "max_position_embeddings": 128,
        },
        "growths": [
            {
                "method": method,
                "training_flops": at,
                "text_tokens": int(at / 6e5),
                "seconds": at / 2e9,
                "parameters_before": 60_000 * 2**i,
                "parameters_after": 60_000 * 2 ** (i + 1),
                "bits_per_byte_before": 2.5 - 0.1 * i,
                "bits_per_byte_after": 2.5 - 0.1 * i + jump,
                "logits_equal": not jump,
            }
            for i, at in enumerate(GROWTH)
            if method and at < 0.8 * budget
        ],
        "curve": [],
    }


def comparison(arms=tuple(ARMS), seeds=(0, 1, 2), budgets=BUDGETS, **changes):
    """The lines of a whole comparison."""
    begun = {
        "event": "recipe",
        "name": "seeds-question",
        "recipe": recipe(arms, seeds, **changes),
        "date": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "2.13"},
        "machine": {"cpu": "a CPU", "accelerator": None},
        "threads": 1,
    }
    lines = [begun, {"event": "segment", "id": "0"}]
    for arm in arms:
        lines += [run(arm, seeds[0], BUDGETS[0], tried, "tuning") for tried in (1e-3, 2e-3, 4e-3)]
        lines += [run(arm, seed, budget, best_rate(arm)) for seed in seeds for budget in budgets]
    return json.loads(json.dumps(lines))


SCRATCH, TRAINED_ON, WIDENED = "gpt-neox scratch", "gpt-neox small, trained on", "gpt-neox MLP widened"
THREE = (SCRATCH, TRAINED_ON, WIDENED)


class Page(HTMLParser):
    """Tags that are open, text outside of scripts, scripts, every address, and the order in which things stand."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.scripts, self.addresses, self.ids, self.order = [], [], [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.order.append(tag)
        for name, value in attributes:
            self.addresses += [value] if name in ("href", "src") else []
            self.ids += [value] if name == "id" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def traces_of(page):
    """What the chart of a page is told to draw."""
    script = page.scripts[-1]
    return json.JSONDecoder().raw_decode(script[script.index("[", script.index("Plotly.newPlot(")) :])[0]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    path = write_report(comparison(), folder)
    assert path == folder / "report.html"
    return folder


@pytest.fixture
def unrendered(monkeypatch):
    """Pictures are drawn but not written: what takes the time."""
    monkeypatch.setattr("tokenformer.compare.pictures._rendered", lambda figure: (b"", b""))


def test_page_is_whole_and_needs_nothing_from_elsewhere(written):
    html = (written / "report.html").read_text()
    page = Page(html)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    links = {address for address in page.addresses if address.startswith("#")}
    assert {link[1:] for link in links} <= set(page.ids)
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses if address not in links)
    assert "link" not in page.order
    assert not re.search(r"@import|url\(", "".join(page.text))


def test_page_opens_with_picture_table_paragraph_and_folds_long_lists(written):
    order = Page((written / "report.html").read_text()).order
    places = [order.index(tag) for tag in ("h1", "figure", "table", "p", "nav", "h2", "details")]
    assert places == sorted(places)
    html = (written / "report.html").read_text()
    for summary in ("All arms at", "Results at", "The whole recipe", "Bits per byte against seconds of training"):
        assert f"<details><summary>{summary}" in html


def test_the_charts_data_are_those_of_the_results():
    findings = Findings.of(comparison(THREE))
    traces = traces_of(Page(interactive_curves(findings)))
    curves = {trace["legendgroup"]: trace for trace in traces if trace["mode"] == "lines+markers"}
    assert list(curves) == findings.by_rank()
    for arm, trace in curves.items():
        assert list(zip(trace["x"], trace["y"], strict=True)) == findings.curve(arm)
        assert all(
            re.match(rf"<b>{arm}</b><br>{bits:.4f} ± 0\.\d{{4}} bits per byte<br>.* training FLOPs<br>", text)
            for bits, text in zip(trace["y"], trace["text"], strict=True)
        )
    assert [curves[arm]["line"]["dash"] for arm in THREE] == ["dash", "dash", "solid"]
    [grown] = [trace for trace in traces if trace["mode"] == "markers"]
    assert (grown["legendgroup"], grown["x"]) == (WIDENED, GROWTH)
    assert "grows by exact after 3·10¹¹ training FLOPs:<br>120,000 → 240,000 parameters" in grown["text"][1]


def test_markdown_names_pictures_that_are_there(written):
    markdown = (written / "report.md").read_text()
    pictures = re.findall(r"!\[.*\]\((.*)\)", markdown)
    assert len(pictures) == 5
    assert {path.name for path in written.iterdir()} == {"report.html", "report.md", *pictures}
    assert all((written / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.M):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1


def test_same_lines_give_the_same_bytes(tmp_path):
    lines = comparison(THREE[:2], seeds=(0, 1), budgets=BUDGETS[:2])
    first = write_report(lines, tmp_path / "a").parent
    second = write_report([lines[0], *reversed(lines[1:])], tmp_path / "b").parent
    assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())


def test_answers_in_words(written):
    text = (written / "report.md").read_text()
    assert "the largest budget, ffn grown exactly, which grows, comes out first of 16 arms" in text
    ahead = r"ffn grown exactly is ahead of gpt-neox scratch in this first look, by 0\.\d{4} ± 0\.\d{4} bits per byte"
    assert re.search(ahead, text)
    assert "The largest learning rate that was tried is the best for gpt-neox scratch (0.004): a larger one" in text
    assert "Tuning is not finished for gpt-neox scratch; `tokenformer compare`" in text.replace("\\", "")
    assert "before these arms had grown for the last time: gpt-neox hyperclone, gpt-neox stack, gpt-neox random" in text
    assert (
        "| tokenformer as published | 2 | published | 3·10¹¹ | 120,000 → 240,000 | 2.4000 | 2.7000 | +0.3000 | no |"
        in text
    )
    assert "| ffn grown exactly | 1 | exact | 10¹¹ | 60,000 → 120,000 | 2.5000 | 2.5000 | +0.0000 | yes |" in text
    assert "python-stdlib" in text


def test_savings_and_crossings_are_those_of_the_known_curves():
    findings = Findings.of(comparison(seeds=(0,)))
    assert findings.own_base(WIDENED) == TRAINED_ON
    other = comparison(seeds=(0,))
    other[0]["recipe"]["arms"][TRAINED_ON]["training"] = {"optimizer": "muon"}
    assert Findings.of(other).own_base(WIDENED) is None
    assert findings.best(BUDGETS[-1], grown=False) == "ffn small, trained on"
    noise = {arm: run(arm, 0, 1e11)["bits_per_byte"] for arm in ARMS}
    target = run(SCRATCH, 0, BUDGETS[-1], 4e-3)["bits_per_byte"]
    spent = saving(findings, WIDENED, SCRATCH)
    assert spent.flops == pytest.approx(1e11 * math.exp((noise[WIDENED] - target) / ARMS[WIDENED][4]))
    assert spent.share == pytest.approx(spent.flops / BUDGETS[-1])
    assert saving(findings, "tokenformer scratch", SCRATCH) is None


def test_reference_and_best_share_one_p_value():
    findings = Findings.of(comparison())
    for budget in BUDGETS:
        best = findings.ranking(budget)[0]
        there, back = findings.contrasts(budget, SCRATCH)[best], findings.contrasts(budget, best)[SCRATCH]
        assert back.p == there.p
        assert back.difference.mean == -there.difference.mean


def test_tables_hold_the_means_of_the_lines(written):
    lines = [line for line in comparison() if line.get("arm") == WIDENED and line.get("budget") == BUDGETS[-1]]
    mean = np.mean([line["bits_per_byte"] for line in lines])
    rows = [
        row.split(" | ") for row in (written / "report.md").read_text().splitlines() if row.startswith(f"| {WIDENED}")
    ]
    assert any(
        row[1].startswith(f"{mean:.4f} ± ") and row[-2:] == [f"{lines[0]['text_tokens']:,}", "800 |"] for row in rows
    )
    tuning = 3 * BUDGETS[0]
    assert any(row[-3:] == ["0.001, 0.002, 0.004", "0.002", f"{scientific(tuning)} |"] for row in rows)


def test_attention_is_what_cost_says(written):
    config = AutoConfig.for_model(**run("tokenformer scratch", 0, BUDGETS[0])["config"])
    part = 4 * SMALL["num_hidden_layers"] * SMALL["hidden_size"] * 4096
    share = part / cost.forward_flops(config, 4096)
    row = next(r for r in (written / "report.md").read_text().splitlines() if r.startswith("| tokenformer scratch, "))
    assert row.split(" | ")[3] == f"{scientific(part)} ({share:.0%})"


def test_an_interrupted_comparison_says_what_is_missing(tmp_path, unrendered):
    lines = comparison(THREE)
    lines = [
        line
        for line in lines
        if not (line.get("purpose") == "final" and line["arm"] == WIDENED and line["budget"] > BUDGETS[1])
        and not (line.get("purpose") == "final" and line["arm"] == SCRATCH and line["seed"] == 2)
    ]
    text = write_report(lines, tmp_path).with_suffix(".md").read_text()
    assert "Some runs are missing or diverged; they are listed below." in text
    assert f"At 4·10¹¹ training FLOPs, the largest budget that all arms have reached, {WIDENED}" in text
    assert f"6 of the 12 runs of {WIDENED} are missing (8·10¹¹: seeds 0, 1, 2; 1.6·10¹²: seeds 0, 1, 2)." in text
    assert f"4 of the 12 runs of {SCRATCH} are missing (2·10¹¹: seed 2;" in text


@pytest.mark.parametrize("kept", [(SCRATCH,), (WIDENED,), (TRAINED_ON, WIDENED)])
def test_arms_that_have_not_begun_are_no_obstacle(tmp_path, unrendered, kept):
    lines = [line for line in comparison(THREE, budgets=BUDGETS[:1]) if line.get("arm", kept[0]) in kept]
    text = write_report(lines, tmp_path).with_suffix(".md").read_text()
    assert all(f"12 of the 12 runs of {arm} are missing" in text for arm in THREE if arm not in kept)


def test_one_seed_gives_no_intervals(tmp_path, unrendered):
    text = write_report(comparison(THREE, seeds=(0,)), tmp_path).with_suffix(".md").read_text()
    assert "with one seed there is no interval" in text
    assert "no difference here can be told from chance" in text
    assert "±" not in text


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_divergence_is_told(tmp_path, unrendered, nothing):
    lines = comparison(THREE)
    line = next(line for line in lines if line.get("purpose") == "final" and line["arm"] == WIDENED)
    line["bits_per_byte"] = nothing
    text = write_report(lines, tmp_path).with_suffix(".md").read_text()
    assert f"{WIDENED} diverged with seed 0 and budget 2·10¹¹" in text
    assert f"runs of {WIDENED} are missing" not in text
    assert "nan" not in text


@pytest.mark.parametrize(("changes", "told"), [({}, "attn_pdrop 0.1"), (dict.fromkeys(GPT2_DROPOUT, 0.0), None)])
def test_arms_that_train_with_dropout_are_named(tmp_path, unrendered, changes, told):
    """GPT-2 and OPT do unless told otherwise; what is meant for heads that no language model has is left out."""
    lines = comparison(THREE[:2], budgets=BUDGETS[:1])
    for line in lines:
        if line.get("arm") == SCRATCH:
            line["config"] = {
                "model_type": "gpt2",
                "n_embd": 16,
                "n_layer": 1,
                "n_head": 2,
                "vocab_size": 259,
                **changes,
            }
    text = write_report(lines, tmp_path).with_suffix(".md").read_text()
    assert ("train with dropout" in text) == bool(told)
    assert told is None or f"{SCRATCH} (resid_pdrop 0.1, embd_pdrop 0.1, {told})." in text


def sound(lines):
    """The same comparison under conditions that make it a claim."""
    arms = list(lines[0]["recipe"]["arms"])
    scales = [{"stream": 1.0, "attention": 0.5, "feed_forward": 2.0}]
    initial = [{"event": "initial", "arm": arm, "seed": 0, "blocks": scales} for arm in arms]
    beyond = [run(SCRATCH, 0, BUDGETS[0], 8e-3, "tuning")] if SCRATCH in arms else []
    runs = [{**line, "text_tokens": 10**9} if line["event"] == "run" else line for line in [*lines, *beyond]]
    return runs + initial


def little_text(lines):
    return [{**line, "text_tokens": 19 * 60_000} if line.get("arm") == TRAINED_ON else line for line in lines]


def rate_at_the_end(lines):
    return [line for line in lines if line.get("learning_rate") != 8e-3]


def unmeasured(lines):
    return [line for line in lines if line["event"] != "initial" or line["arm"] != WIDENED]


def drowned(lines):
    flood = [{"stream": 0.02, "attention": 0.5, "feed_forward": 0.01}]
    return [
        {**line, "blocks": flood} if line["event"] == "initial" and line["arm"] == SCRATCH else line for line in lines
    ]


def words(folder, lines):
    """What a reader of the two pages sees, pictures' descriptions and chart included."""
    path = write_report(lines, folder)
    page = Page(path.read_text(encoding="utf-8"))
    return " ".join([*page.text, page.scripts[-1], path.with_suffix(".md").read_text(encoding="utf-8")])


def test_a_claim_says_better_and_worse(tmp_path, unrendered):
    text = words(tmp_path, sound(comparison(THREE, budgets=BUDGETS[-1:])))
    assert f"{WIDENED}, which grows, is the best of 3 arms" in text
    assert f"{WIDENED} is better than {SCRATCH} by" in text
    assert "first look" not in text and "ahead" not in text


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (little_text, "text tokens a parameter, where a claim about quality needs 20 or more"),
        (rate_at_the_end, "the learning rates of 1 of 3 arms lie at the end of those that were tried"),
        (unmeasured, "the initial scales of 1 of 3 arms were not measured"),
        (drowned, "parts of 1 of 3 arms drown the others at initialisation"),
    ],
)
def test_a_first_look_says_neither_better_nor_worse_anywhere(tmp_path, unrendered, changed, reason):
    seeds = (0,) if changed is drowned else (0, 1, 2)
    text = words(tmp_path, changed(sound(comparison(THREE, seeds=seeds, budgets=BUDGETS[-2:]))))
    assert re.search(rf"This is a first look: [^.]*{reason}", text)
    assert "in this first look, by" in text
    assert not re.search("better|worse", text, flags=re.I)


def test_a_smaller_budget_with_little_text_is_a_first_look_beside_a_claim(tmp_path, unrendered):
    lines = [
        {**line, "text_tokens": 10_000} if line["event"] == "run" and line["budget"] == BUDGETS[0] else line
        for line in sound(comparison(THREE, budgets=BUDGETS[:2]))
    ]
    findings = Findings.of(lines)
    assert findings.doubts(BUDGETS[0]) and not findings.doubts(BUDGETS[1])
    kinds = [{contrast.verdict.kind for contrast in findings.contrasts(b, SCRATCH).values()} for b in BUDGETS[:2]]
    assert all(re.search("ahead|behind", kind) for kind in kinds[0])
    assert all(re.search("better|worse", kind) for kind in kinds[1])


def test_what_results_rest_on_is_tabulated(tmp_path, unrendered):
    lines = drowned(sound(comparison(THREE, budgets=BUDGETS[-1:])))
    path = write_report(lines, tmp_path)
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    config = AutoConfig.for_model(**run(SCRATCH, 0, BUDGETS[0])["config"])
    outside, share = cost.block_parameters(config), cost.head_share(config, 128)
    row = f"| {SCRATCH} | 240,000 | {outside:,} | 4,167 | {1e9 / outside:,.0f} | {share:.1%} | 0.02 | 25 | 0.5 |"
    assert row in text
    assert f"| {SCRATCH} | 1 | 0.02 | 0.5 | 0.01 |" in text
    assert share < 0.15 and f"{SCRATCH} ({share:.0%})" not in text
    small = cost.head_share(AutoConfig.for_model(**run(TRAINED_ON, 0, BUDGETS[0])["config"]), 128)
    assert f"more than 15% of the training FLOPs of {TRAINED_ON} ({small:.0%}): these" in text
    assert f"{SCRATCH} (the attention of block 1 adds 25 × the stream it is added to)." in text


def test_rates_that_were_not_tuned_are_told():
    findings = Findings.of(sound(comparison(THREE[1:], budgets=BUDGETS[:1], learning_rates=[2e-3])))
    assert findings.doubts(BUDGETS[0]) == ["the learning rates of 2 of 2 arms were not tuned"]
    _, bullets = limits(findings)
    assert "No learning rate was tuned: every arm trains with 0.002." in bullets.items


@pytest.mark.parametrize(("budgets", "short"), [(BUDGETS, True), ([1e11, 2e11, 3.2e12], False)])
def test_short_curves_are_called_short(tmp_path, unrendered, budgets, short):
    text = words(tmp_path, comparison(THREE[:2], budgets=budgets))
    assert ("The curves are short: budgets span a factor of 8, and" in text) == short


def test_what_was_added_and_where_is_told(tmp_path, unrendered):
    lines = comparison(THREE[:2], budgets=BUDGETS[:1])
    later = {**lines[0], "recipe": recipe(THREE), "date": "2026-02-03", "machine": {"cpu": "another"}}
    text = write_report([later, *lines], tmp_path).with_suffix(".md").read_text()
    assert f"Added 2026-02-03: arms {WIDENED}." in text
    assert "Machine: cpu a CPU; 1 thread a run; torch 2.13." in text
    assert "Machine: cpu another;" in text
    assert "Seconds of different machines cannot be compared." in text


def test_text_is_never_markup(tmp_path):
    evil = '<script>alert(1)</script> | $x$ `*` & "quoted", long, in any script: 汉字'
    text = json.dumps(comparison(THREE, budgets=BUDGETS[:1], question=evil)).replace(WIDENED, json.dumps(evil)[1:-1])
    path = write_report(json.loads(text), tmp_path)
    page = Page(path.read_text())
    assert page.open == []
    assert evil in "".join(page.text)
    assert page.order.count("script") == 3  # plotly's settings, plotly, and the chart
    assert "<script>alert" not in "".join(page.scripts)
    told = [text for trace in traces_of(page) for text in (trace["name"], *trace["text"]) if "alert" in text]
    assert len(told) > 2 and all("&lt;script&gt;alert(1)&lt;/script&gt;" in text for text in told)
    assert "\\<script>alert(1)\\</script> \\| $x$ \\`\\*\\`" in path.with_suffix(".md").read_text()


@given(st.lists(st.floats(0, 1), min_size=1, max_size=16))
def test_labels_never_cover_each_other(wanted):
    placed = _spread(sorted(wanted, reverse=True), gap=1 / 16)
    assert all(upper - lower >= 1 / 16 - 1e-9 for upper, lower in pairwise(placed))
    assert placed[-1] >= -1e-9
    assert placed[0] <= 1 + 1e-9


def test_elements_by_hand():
    elements = [Paragraph("a ± b", lead=True), Table(["n", "x"], [["a|b", "1.5"]], marked=["a|b"]), Code("k: <v>")]
    assert '<p class="lead">a&nbsp;±&nbsp;b</p>' in html_page("t", elements)
    assert '<tr class="mark"><td>a|b</td><td class="n">1.5</td></tr>' in html_page("t", elements)
    assert "<pre>k: &lt;v&gt;</pre>" in html_page("t", elements)
    assert (
        markdown_page("t", elements) == "# t\n\n**a ± b**\n\n| n | x |\n| --- | --: |\n| a\\|b | 1.5 |\n\n    k: <v>\n"
    )


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.4, "1,234"), (1e6, "10⁶"), (1.6e12, "1.6·10¹²"), (2.346e11, "2.35·10¹¹")]
)
def test_scientific(value, text):
    assert scientific(value) == text


def test_nothing_to_report(tmp_path):
    lines = comparison(THREE)
    with pytest.raises(RecipeError, match="no recipe among 0 lines"):
        write_report([], tmp_path / "no")
    with pytest.raises(EvaluationError, match="none of 3 arms has finished a final run"):
        write_report([line for line in lines if line.get("purpose") != "final"], tmp_path / "no")
    with pytest.raises(RecipeError, match="'ffn scratch' is in the results"):
        write_report([*lines, run("ffn scratch", 0, BUDGETS[0])], tmp_path / "no")
    one, other = ({**lines[0], "date": date, "text": {"text_sha256": date}} for date in ("2026-01-03", "2026-01-04"))
    with pytest.raises(DataError, match="text_sha256 2026-01-03 then 2026-01-04"):
        write_report([*lines, other, one], tmp_path / "no")
    Findings.of([*lines, one, {**other, "text": one["text"]}])
    with pytest.raises(RecipeError, match="several comparisons"):
        write_report([*lines, *comparison(THREE, question="Another?")], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_folder_that_is_a_file(tmp_path, unrendered):
    (tmp_path / "taken").touch()
    with pytest.raises(CheckpointError, match="taken"):
        write_report(comparison(THREE, budgets=BUDGETS[:1]), tmp_path / "taken")
