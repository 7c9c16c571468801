"""Arms that read texts, sequences and batches of their own."""

import copy
import random
import statistics

import pytest
from comparisons import TOKENS, parsed
from group_operations import run_and_kill

from tokenformer.compare.arms import Run, segments
from tokenformer.compare.findings import Findings
from tokenformer.compare.forgetting import forgetting
from tokenformer.compare.page import Table, markdown_page
from tokenformer.compare.report import report
from tokenformer.compare.results import Results, read_results
from tokenformer.compare.run import load_text, work
from tokenformer.errors import RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for name, words in {"old": ["to", "be", "or", "not"], "new": ["def", "return", "self", "None"]}.items():
        dice = random.Random(name)
        (folder / name).mkdir()
        for i in range(20):
            text = f"{name} {i} " + " ".join(dice.choice(words) for _ in range(100))
            (folder / name / f"{i:02}.txt").write_text(text, encoding="utf-8")
    old, new = str(folder / "old"), str(folder / "new")
    later = {"mixture": {"new": {"source": new, "weight": 3}, "old": {"source": old}}}
    return {
        "question": "What is forgotten?",
        "data": {"mixture": {"old": {"source": old}}, "tokenizer": "bytes", "validation_fraction": 0.3},
        "training": {
            "batch_size": 4,
            "sequence_length": 32,
            "threads": 1,
            "precision": "float32",
            "evaluations_per_stage": 1,
            "save_every": 4,
        },
        "equal": "text_tokens",
        "budgets": [2560],
        "seeds": [0, 1],
        "learning_rates": [1e-2],
        "tuning_budget": 2560,
        "rules": {"reference": "new only"},
        "arms": {
            "new only": {
                "model": TOKENS,
                "stages": [{"at": 1280, "data": {"mixture": {"new": {"source": new}}}}],
            },
            "replayed": {"model": TOKENS, "stages": [{"at": 1280, "data": later}]},
            "mixed": {"model": TOKENS, "data": later},
            "short first": {
                "model": TOKENS,
                "training": {"sequence_length": 8, "batch_size": 8},
                "stages": [{"at": 640, "sequence_length": 32, "batch_size": 2, "ffn_param_tokens": 48}],
            },
        },
    }


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    recipe, folder = parsed(content), tmp_path_factory.mktemp("compare")
    Results(folder).begin(recipe, "trial", load_text(recipe, folder).report.facts)
    work(recipe, folder, list(recipe.arms))
    return folder, read_results(folder / "results.jsonl")


def chain(content, arm):
    recipe = parsed(content)
    return segments(recipe, Run(arm, 0, 1e-2, 2560.0))


def test_each_segment_reads_what_its_stage_says(content):
    assert [list(s.shares.items()) for s in chain(content, "replayed")] == [
        [("old", 1.0)],
        [("new", 0.75), ("old", 0.25)],
        [("new", 0.75), ("old", 0.25)],  # the decay goes on with it
    ]
    sizes = [(s.training.sequence_length, s.training.batch_size) for s in chain(content, "short first")]
    assert sizes == [(8, 8), (32, 2), (32, 2)]
    assert [s.growth is not None for s in chain(content, "short first")] == [False, True, False]
    assert not any(s.growth for s in chain(content, "replayed"))


def test_arms_that_begin_alike_share_their_beginning_and_no_more(content):
    ids = {arm: [s.id for s in chain(content, arm)] for arm in content["arms"]}
    assert ids["new only"][0] == ids["replayed"][0]
    rest = [name for arm, several in ids.items() for name in (several if arm != "new only" else several[1:])]
    assert len(set(rest)) == len(rest)


def test_texts_go_on_where_the_segments_before_have_stopped(content, finished):
    lines = {line["id"]: line for line in finished[1] if line["event"] == "segment"}
    read = [lines[s.id]["read"] for s in chain(content, "replayed")]
    assert read == [{"old": 40}, {"old": 46, "new": 18}, {"old": 50, "new": 30}]
    short = [lines[s.id] for s in chain(content, "short first")]
    assert [line["read"]["old"] for line in short] == [20, 64, 80]
    assert [line["text_tokens"] for line in short] == [640, 2048, 2560]


@pytest.mark.slow
def test_killed_comparisons_go_on_to_the_same_numbers(content, finished, tmp_path):
    recipe, kills, dice = parsed(content), 0, random.Random(0)
    Results(tmp_path).begin(recipe, "trial", load_text(recipe, tmp_path).report.facts)
    while not run_and_kill(lambda: work(recipe, tmp_path, list(recipe.arms)), dice.uniform(0.5, 1.5) + kills):
        kills += 1
    assert kills

    def results(folder):
        found = [line for line in read_results(folder / "results.jsonl") if line["event"] == "run"]
        return sorted((e["arm"], e["seed"], e["bits_per_byte"], *e["bits_per_byte_of"].items()) for e in found)

    assert results(tmp_path) == results(finished[0])


def test_the_report_says_what_each_text_is_and_how_much_was_forgotten(finished):
    lines = copy.deepcopy(finished[1])
    runs = {arm: [e for e in lines if e["event"] == "run" and e["arm"] == arm] for arm in ("new only", "mixed")}
    for run in runs["new only"]:
        run["curve"][0]["bits_per_byte_of"]["old"] = run["bits_per_byte_of"]["old"] - 0.5
    findings = Findings.of(lines)
    assert findings.grown("short first") and not findings.grown("replayed")
    (table,) = (element for element in forgetting(findings) if isinstance(element, Table))
    assert table.head == ["arm", "old", "new"]
    rows = {arm: texts for arm, *texts in table.rows}
    assert list(rows) == findings.ranking(2560)
    ends = {arm: statistics.fmean(run["bits_per_byte_of"]["old"] for run in several) for arm, several in runs.items()}
    assert rows["new only"][0] == f"{ends['new only']:.4f} (0.5000)"
    assert rows["mixed"][0] == f"{ends['mixed']:.4f} (0.0000)"  # it fell to the end
    assert "what was forgotten" in markdown_page("title", list(report(findings)))


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"stages": [{"at": 9, "sequence_length": 12}]}, r"arms.odd.stages.0.sequence_length is 12, which does not"),
        ({"data": {"source": "a", "mixture": {"b": 1}}}, "arms.odd.data: name one text as source, or several"),
        ({"data": {"mixture": {"old": 1}}}, "the text 'old' has two sources"),
        ({"stages": [{"at": 9, "data": {"mixture": {"new": 0}}}]}, "weight is 0: input should be greater than 0"),
    ],
)
def test_arms_that_cannot_read(content, arm, message):
    with pytest.raises(RecipeError, match=message):
        parsed(content, arms={**content["arms"], "odd": {"model": TOKENS, **arm}})


def test_short_sequences_read_more_text_for_equal_flops(content, tmp_path):
    """Shown where attention costs much: a narrow model with long sequences."""
    arms = {
        "long": {"model": TOKENS, "training": {"batch_size": 1}},
        "short": {"model": TOKENS, "training": {"sequence_length": 4, "batch_size": 8}},
    }
    recipe = parsed(
        content,
        arms=arms,
        equal="training_flops",
        budgets=[1e8],
        tuning_budget=1e8,
        seeds=[0],
        rules={"reference": "long"},
    )
    Results(tmp_path).begin(recipe, "trial", load_text(recipe, tmp_path).report.facts)
    work(recipe, tmp_path, list(recipe.arms))
    found = {e["arm"]: e for e in read_results(tmp_path / "results.jsonl") if e["event"] == "run"}
    assert found["short"]["training_flops"] == pytest.approx(found["long"]["training_flops"], rel=0.02)
    assert found["short"]["text_tokens"] > 1.1 * found["long"]["text_tokens"]
