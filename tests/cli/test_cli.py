"""The command line as a user meets it: what it prints, what it refuses, and with which exit code."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from comparisons import comparison
from hub_server import serve_hub  # noqa: F401
from tiny_models import SIZES, tiny
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.checkpoints.verify import verify_checkpoint
from tokenformer.cli import app as cli
from tokenformer.training.recipe import EXAMPLE, parse_recipe

RECIPE = {
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "qkv_param_tokens": 0,
        "output_param_tokens": 0,
        "ffn_param_tokens": 32,
    },
    "data": {"tokenizer": "bytes", "validation_fraction": 0.1},
    "training": {"batch_size": 4, "sequence_length": 64, "threads": 1, "save_every": 2, "log_every": 1},
    "stages": [{"text_tokens": 1000}, {"text_tokens": 1000, "ffn_param_tokens": "+50%"}],
}


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command in this process; return (exit code, stdout, stderr), of processes that it starts as well."""

    def call(*arguments, columns=200):
        monkeypatch.setattr(sys, "argv", ["tokenformer", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", str(columns))
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog. " * 12)
    return folder


@pytest.fixture
def recipe(tmp_path, text):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({**RECIPE, "data": {**RECIPE["data"], "source": str(text)}}))
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, text):
    from tokenformer.training.train import train

    content = {**RECIPE, "data": {**RECIPE["data"], "source": str(text)}}
    return train(parse_recipe(content), tmp_path_factory.mktemp("run") / "run")[-1]


@pytest.mark.parametrize(
    "line",
    [
        "generate {} the --max-new-tokens 5",
        "evaluate {} --text {}",
        "inspect {} --text {}",
        "prune {} --text {} --keep 0.5 -o {}",
    ],
)
def test_a_torch_that_was_built_for_gpus_runs_without_one(run, checkpoint, text, tmp_path, monkeypatch, line):
    """As pip installs it by default; it names the accelerator that it was built for, whether there is one or not."""
    if not torch.accelerator.is_available():
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: torch.device("cuda"))
    code, _, err = run(*line.format(checkpoint, text, tmp_path / "new").split())
    assert code == 0, err


def test_train_shows_growth_and_a_table_and_names_the_checkpoint(run, recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("train", recipe)
    assert code == 0 and err == "" and "…" not in out
    assert "grown before stage 2: validation loss" in out and "logits bit for bit equal" in out
    assert "stage 2, 0.02 M" in out and "100%" in out
    assert "bits/byte" in out and "Final checkpoint: runs/tiny/stage2" in out
    assert "no such" not in out
    code, _, err = run("train", recipe)
    assert code == 2 and "runs/tiny exists already; --resume to continue it, --force to replace it" in err
    assert run("train", recipe, "--resume")[0] == 0
    assert run("train", recipe, "--force")[0] == 0


def test_grow_keeps_the_logits_and_extends_the_lineage(run, checkpoint, tmp_path):
    code, out, _ = run("grow", checkpoint, "-o", tmp_path / "new", "--ffn-param-tokens", "+50%", "--name", "extra")
    assert code == 0 and "extra" in out and f"Written: {tmp_path / 'new'}" in out
    old, tokenizer, _ = load_checkpoint(checkpoint)
    new, _, lineage = load_checkpoint(tmp_path / "new")
    ids = torch.tensor([tokenizer("the quick brown")["input_ids"]])
    assert torch.equal(old(ids).logits, new(ids).logits)
    assert new.config.ffn_param_tokens == 72 and new.config.token_groups[-1]["name"] == "extra"
    assert load_states(tmp_path / "new").keys() == load_states(checkpoint).keys() != set()
    assert lineage.last.operation == "grow" and lineage.last.parent == verify_checkpoint(checkpoint).weights_sha256
    code, _, err = run("grow", checkpoint, "-o", tmp_path / "new", "--ffn-param-tokens", "+1")
    assert code == 2 and "exists already" in err and "--force" in err
    assert run("grow", checkpoint, "-o", tmp_path / "new", "--num-hidden-layers", "4", "--force")[0] == 0
    assert load_checkpoint(tmp_path / "new")[0].config.num_hidden_layers == 4


def test_a_checkpoint_replaced_by_its_own_grown_self_is_told_as_it_was(run, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "c")
    code, out, _ = run("grow", tmp_path / "c", "-o", tmp_path / "c", "--ffn", "+8", "--name", "more", "--force")
    before, _, after = out.partition(" after ")
    assert code == 0 and "more" in after and "before" in before and "more" not in before


def test_costs_that_nobody_told_are_not_said_to_be_nothing(run, tmp_path):
    save_checkpoint(tmp_path / "c", tiny("ffn"), None, Lineage())
    code, out, _ = run("grow", tmp_path / "c", "-o", tmp_path / "new", "--ffn", "+8")
    assert code == 0 and "0 s" not in out and "0.00e00" not in out


def test_help_tells_defaults_that_are_no_values_and_short_names_of_options(run):
    for command, words in (("train", "[default: runs/NAME of the recipe]"), ("grow", "--ffn AMOUNT")):
        code, out, _ = run(command, "--help", columns=80)
        assert code == 0 and words in " ".join(out.split())


def test_every_command_says_in_a_whole_sentence_what_it_does(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = run("--help")[1]
    assert "..." not in out.partition("Commands:")[2] and max(map(len, out.splitlines())) <= 80


def test_inspect_shows_groups_memory_and_lineage(run, checkpoint):
    code, out, _ = run("inspect", checkpoint)
    assert code == 0
    assert "Training needs 0.362 MB" in out and " 0.0 " not in out
    for word in ("base", "grown1", "everything else", "MB", "Lineage", "stage: 2", "ffn_param_tokens: +50%", "sha256"):
        assert word in out


def test_inspect_and_evaluate_tell_machines_what_they_tell_people(run, checkpoint, text):
    found = json.loads(run("inspect", checkpoint, "--json")[1])
    model = load_checkpoint(checkpoint)[0]
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == 4 * found["parameters"]
    parts = [*found["groups"], found["everything_else"]]
    assert sum(part["parameters"] for part in parts) == found["parameters"]
    assert [group["name"] for group in found["groups"]] == ["base", "grown1"]
    assert found["groups"][1]["counts"] == {"qkv": [0, 0], "output": [0, 0], "ffn": [16, 16]}
    lineage = verify_checkpoint(checkpoint)
    assert found["weights_sha256"] == lineage.weights_sha256 and len(found["history"]) == len(lineage.history)
    code, out, _ = run("evaluate", checkpoint, "--text", text, "--json")
    found = json.loads(out)
    assert (
        code == 0
        and found["tasks"] == {}
        and found["text"][0].keys()
        == {
            "source",
            "loss",
            "bits_per_byte",
            "text_tokens",
        }
    )
    assert run("inspect", checkpoint, "--json", "--prompt", "x")[0] == 2


def check_quiet(run, *commands):
    """Check what commands print in a terminal of 80 columns: nothing on stderr, and on stdout whole lines of ours."""
    for arguments in commands:
        code, out, err = run(*arguments, columns=80)
        assert (code, err) == (0, ""), arguments
        assert "it/s" not in out and "…" not in out, out
        assert "Warning" not in out and "loss_type" not in out


def test_no_other_library_writes_to_the_terminal(run, checkpoint, text, tmp_path):
    new, addon = ["-o", tmp_path / "new", "--force"], tmp_path / "addon.safetensors"
    judged = ["--text", text]
    check_quiet(
        run,
        ["grow", checkpoint, *new, "--ffn", "+8", "--name", "more"],
        ["split", tmp_path / "new", "more", "-o", addon],
        ["attach", checkpoint, addon, "-o", tmp_path / "attached", "--name", "other"],
        ["merge", tmp_path / "new", tmp_path / "attached", "-o", tmp_path / "merged"],
        ["freeze", checkpoint, "base", *new],
        ["unfreeze", checkpoint, "base", *new],
        ["drop", checkpoint, "grown1", *new],
        ["consolidate", checkpoint, *new],
        ["prune", checkpoint, *new, "--keep", "0.5", *judged],
        ["sort", checkpoint, *new, *judged],
        ["shrink", tmp_path / "new", "--keep", "0.5", "-o", tmp_path / "half"],
        ["route", checkpoint, "grown1", *new, "--own", text, "--other", text],
        ["inspect", checkpoint, *judged, "--prompt", "the quick"],
        ["generate", checkpoint, "the quick", "--max-new-tokens", "4"],
        ["evaluate", checkpoint, *judged],
        ["recipe"],
    )
    code, _, err = run("slice", checkpoint, *new, *judged)
    assert code == 0 and "sort" in err and len(err.splitlines()) == 1


def test_no_other_library_writes_while_checkpoints_are_converted_and_published(run, hub, tmp_path):
    save_checkpoint(tmp_path / "c", tiny(), None, Lineage())
    GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=64)).save_pretrained(tmp_path / "neox")
    assert run("recipe")[0] == 0  # takes what saving has printed
    check_quiet(
        run,
        ["convert", "to-official", tmp_path / "c", "-o", tmp_path / "c.bin"],
        ["convert", "official", tmp_path / "c.bin", "--config", tmp_path / "c.yml", "-o", tmp_path / "again"],
        ["convert", "transformer", tmp_path / "neox", "-o", tmp_path / "ours"],
        ["push", tmp_path / "again", "someone/model"],
    )


@pytest.mark.slow
def test_no_other_library_writes_while_arms_are_compared(run, tmp_path):
    (tmp_path / "text").mkdir()
    content = comparison(tmp_path / "text")
    arms = {"small": content["arms"]["small"]}
    short = {"seeds": [0], "budgets": [1280], "learning_rates": [1e-2], "arms": arms}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**content, **short}))
    results = tmp_path / "out" / "results.jsonl"
    check_quiet(
        run,
        ["compare", tmp_path / "r.yaml", "-o", tmp_path / "out", "--workers", "1"],
        ["report", results, "-o", tmp_path / "report"],
    )
    code, out, _ = run("report", results, "-o", tmp_path / "report", "--json")
    found = json.loads(out)
    assert code == 0 and found.keys() == {"report", "runs"} and found["report"] == str(tmp_path / "report/report.html")
    facts = {"training_flops", "text_tokens", "seconds", "parameters", "loss", "bits_per_byte", "tuning_bits_per_byte"}
    assert [run.keys() for run in found["runs"]] == [{"arm", "seed", "learning_rate", "budget", "segments", *facts}]


def test_a_share_of_what_nobody_sorted_is_taken_with_a_note(run, checkpoint, text, tmp_path):
    commands = (["shrink", "-o", tmp_path / "half", "--force"], ["evaluate", "--text", text])
    for name, *arguments in commands:
        code, _, err = run(name, checkpoint, *arguments, "--keep", "0.5")
        assert code == 0 and "lineage tells of no sort and no nested_dropout" in err and len(err.splitlines()) == 1
    assert run("sort", checkpoint, "--text", text, "-o", tmp_path / "sorted")[0] == 0
    for name, *arguments in commands:
        assert run(name, tmp_path / "sorted", *arguments, "--keep", "0.5")[2] == ""
    assert run("evaluate", checkpoint, "--text", text, "--keep", "1")[2] == ""


@pytest.mark.parametrize(("stage", "ordered"), [(1, True), (2, False)])
def test_nested_dropout_puts_the_tokens_in_order_in_the_stage_that_has_it(stage, ordered):
    stages = [{"text_tokens": 1, "nested_dropout": 0.5}, {"text_tokens": 1}]
    lineage = Lineage().then("train", arguments={"stage": stage}, recipe={"stages": stages})
    assert lineage.ordered is ordered and not Lineage().ordered


def test_generate_streams_the_same_text_for_the_same_seed(run, checkpoint):
    arguments = ("generate", checkpoint, "the quick", "--max-new-tokens", "20", "--seed", "1")
    code, out, _ = run(*arguments)
    assert code == 0 and out.startswith("the quick") and len(out) > len("the quick\n")
    assert run(*arguments)[1] == out
    assert run("generate", checkpoint, "--temperature", "0", "--max-new-tokens", "500")[0] == 0


def test_recipe_prints_one_that_parses_and_explains_every_field(run):
    code, out, _ = run("recipe")
    assert code == 0 and parse_recipe(yaml.safe_load(out)) == parse_recipe(yaml.safe_load(EXAMPLE))
    code, out, _ = run("recipe", "--explain")
    assert code == 0 and "training.learning_rate" in out and "stages[].frozen" in out and "UTF-8 bytes" in out


def edit(file, **sections):
    content = yaml.safe_load(file.read_text())
    for key, value in sections.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"lerning_rate": 1}}, "unknown key 'training.lerning_rate'; did you mean 'learning_rate'?"),
        ({"stages": [{"text_tokens": 9, "ffn_parm_tokens": 3}]}, "'stages.0.ffn_parm_tokens'; did you mean 'ffn_param"),
        ({"data": {"source": "no/such/file.txt"}}, "'no/such/file.txt': there is no file or folder /"),
        ({"data": {"text_column": "body", "source": "rows.jsonl"}}, "no column 'body', only text"),
        ({"data": {"tokenizer": "bpe:100"}}, 'write "bpe:N" with N above 256'),
        ({"training": {"sequence_length": 100_000}}, "shorter than one text block of 100000 text tokens"),
        ({"stages": [{"text_tokens": 500}, {"text_tokens": 9, "ffn_param_tokens": 16}]}, "asked 16, found 32"),
    ],
)
def test_mistakes_in_a_recipe(run, recipe, tmp_path, monkeypatch, sections, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(9)))
    edit(recipe, **sections)
    code, _, err = run("train", recipe)
    assert code == 2 and message in err and "Traceback" not in err


def test_missing_recipe_and_unknown_option(run, tmp_path):
    code, _, err = run("train", tmp_path / "none.yaml")
    assert code == 2 and "cannot read recipe" in err
    code, _, err = run("train", tmp_path)
    assert code == 2 and "it is a folder; give the YAML file that says what to do" in err
    (tmp_path / "recipe.yaml").touch()
    code, _, err = run("train", tmp_path)
    assert code == 2 and f"it is a folder; did you mean {tmp_path / 'recipe.yaml'}?" in err
    code, _, err = run("train", "--rezume")
    assert code == 2 and "--resume" in err


def test_damaged_checkpoints_are_found_before_anything_is_written(run, checkpoint, tmp_path):
    for damage, message in ((lambda b: b[:-100], "cannot be read"), (lambda b: b[:-1] + bytes([b[-1] ^ 1]), "sha256")):
        copy = tmp_path / "copy"
        subprocess.run(["cp", "-r", checkpoint, copy], check=True)
        weights = copy / "model.safetensors"
        weights.write_bytes(damage(weights.read_bytes()))
        (tmp_path / "target").mkdir()
        for command in (
            ["grow", copy, "-o", tmp_path / "target", "--ffn-param-tokens", "+1", "--force"],
            ["generate", copy],
        ):
            code, _, err = run(*command)
            assert code == 2 and "is damaged" in err and message in err
        assert not list((tmp_path / "target").iterdir())
        subprocess.run(["rm", "-r", copy, tmp_path / "target"], check=True)


def test_tokenizer_that_does_not_match_the_model(run, checkpoint, tmp_path):
    _, tokenizer, _ = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "c", tiny("ffn"), tokenizer, Lineage())
    code, _, err = run("generate", tmp_path / "c", "hello")
    assert code == 2 and "tokenizer" in err and "257 rows of the model's embedding, which has 128" in err


def test_a_checkpoint_that_is_not_there(run, tmp_path):
    for command in ("inspect", "generate"):
        code, _, err = run(command, tmp_path / "none")
        assert code == 2 and "no checkpoint at" in err


def test_a_folder_of_checkpoints_is_no_checkpoint_and_the_last_of_them_is_meant(run, checkpoint):
    code, _, err = run("inspect", checkpoint.parent)
    assert code == 2 and f"did you mean {checkpoint}?" in err


def test_a_prompt_longer_than_the_context(run, checkpoint):
    code, _, err = run("generate", checkpoint, "x" * 100)
    assert code == 2 and "101 text tokens long; the model reads at most 64" in err


@pytest.mark.slow
def test_two_processes_train_what_one_does(run, recipe, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29578", "-m", "tokenformer"]
    done = subprocess.run(
        [sys.executable, *command, "train", recipe, "-o", tmp_path / "two"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout.count("Final checkpoint") == 1, done.stderr[-2000:]
    assert run("train", recipe, "-o", tmp_path / "one")[0] == 0
    losses = [verify_checkpoint(tmp_path / name / "stage2").last.loss for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_full_disk(run, checkpoint, tmp_path):
    """A file-size limit makes writes fail the way a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        code, _, err = run("grow", checkpoint, "-o", tmp_path / "new", "--ffn-param-tokens", "+64")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "could not write" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_of_the_processes_of_a_run_one_says_that_it_was_interrupted(run, recipe, monkeypatch, tmp_path, rank, lines):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("tokenformer.training.train.train", interrupt)
    code, _, err = run("train", recipe, "-o", tmp_path / "run")
    assert code == 130 and len(err.splitlines()) == lines


def test_ctrl_c_saves_and_says_how_to_continue(recipe, tmp_path):
    edit(recipe, stages=[{"text_tokens": 10_000_000}])
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenformer", "train", recipe, "-o", tmp_path / "run"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"train"' in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"tokenformer train {recipe} -o {tmp_path / 'run'} --resume" in err
    assert list(Path(tmp_path, "run").glob("stage1.partial/checkpoint-*/complete"))
