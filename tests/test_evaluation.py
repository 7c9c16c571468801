"""Our own evaluation and lm-eval's agree, text by text and answer by answer."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny_models import tiny
from tokenizers import Tokenizer, models
from typer.testing import CliRunner

from tokenformer.checkpoints.checkpoint import save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.cli import app as cli
from tokenformer.data.tokenizer import make_tokenizer, open_tokenizer, vocabulary_size
from tokenformer.errors import EvaluationError, MissingExtraError, TokenformerError, TokenizerError
from tokenformer.evaluation import evaluate, evaluate_tasks, evaluate_text

TEXT = "Shall I compare thee to a summer's day? Thou art more lovely — and more temperate.\n" * 3
CHOICES = [
    {"question": "To be, or not to", "choices": [" be", " see", " bee, that is"], "answer": 0},
    {"question": "All the world's a", "choices": [" stage", " cage", " page"], "answer": 1},
]


@pytest.fixture
def model():
    """With a context long enough that nobody cuts the text up; other cuts would be other predictions."""
    return tiny(vocab_size=257, max_position_embeddings=512).double()


@pytest.fixture
def tokenizer():
    return make_tokenizer("bytes", None)


def task(folder, rows, **fields):
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = {
        "task": "local_task",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        **fields,
    }
    (folder / "task.yaml").write_text(json.dumps(content))
    return str(folder / "task.yaml")


@pytest.fixture
def text_task(tmp_path):
    metrics = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    return task(
        tmp_path,
        [{"page": TEXT}],
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=metrics,
    )


@pytest.fixture
def choice_task(tmp_path):
    return task(
        tmp_path,
        CHOICES,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )


def log_likelihood(model, tokenizer, context, continuation):
    """Sum of log-probabilities, one forward pass, no library."""
    ids = [tokenizer.eos_token_id, *tokenizer(context + continuation)["input_ids"]]
    new = len(tokenizer(continuation)["input_ids"])
    with torch.no_grad():
        predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(predicted[i - 1, ids[i]].item() for i in range(len(ids) - new, len(ids)))


def test_bits_per_byte_are_lm_evals(model, tokenizer, text_task, tmp_path):
    results = evaluate_tasks(model, tokenizer, [text_task])
    (tmp_path / "page.txt").write_text(TEXT)
    ours = evaluate_text(model, tokenizer, str(tmp_path / "page.txt"), block_length=512)
    # We also predict that the document ends, which lm-eval does not ask.
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]
    assert ours.text_tokens == len(ids)
    with torch.no_grad():
        end = -model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[tokenizer.eos_token_id].item()
    want = (ours.loss * ours.text_tokens - end) / math.log(2) / len(TEXT.encode())
    assert results["results"]["local_task"]["bits_per_byte,none"] == pytest.approx(want, rel=1e-6)
    by_hand = log_likelihood(model, tokenizer, "", TEXT)
    assert ours.loss * ours.text_tokens == pytest.approx(end - by_hand, rel=1e-6)


def test_choices_are_those_of_our_log_likelihoods(model, tokenizer, choice_task):
    results = evaluate_tasks(model, tokenizer, [choice_task])
    right = 0
    for row in CHOICES:
        likelihoods = [log_likelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        right += likelihoods.index(max(likelihoods)) == row["answer"]
    assert results["results"]["local_task"]["acc,none"] == right / len(CHOICES)
    limited = evaluate_tasks(model, tokenizer, [choice_task], limit=1)
    assert limited["n-samples"]["local_task"]["effective"] == 1


def test_lm_eval_log_likelihoods_are_ours(model, tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(row["question"], choice) for row in CHOICES for choice in row["choices"]]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    answers = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer).loglikelihood(requests, disable_tqdm=True)
    # lm-eval puts no end-of-text in front of a context that is not empty.
    for (context, continuation), (got, _) in zip(pairs, answers, strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        new = len(tokenizer(continuation)["input_ids"])
        with torch.no_grad():
            predicted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        want = sum(predicted[i - 1, ids[i]].item() for i in range(len(ids) - new, len(ids)))
        assert got == pytest.approx(want, rel=1e-5)


def test_command_line(model, tokenizer, choice_task, tmp_path):
    save_checkpoint(tmp_path / "ours", model.float(), tokenizer, Lineage())
    (tmp_path / "page.txt").write_text(TEXT)
    arguments = ["evaluate", str(tmp_path / "ours"), "--text", str(tmp_path / "page.txt"), "--tasks", choice_task]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "in text blocks of 512 text tokens" in done.output and "local_task" in done.output and "acc" in done.output
    with pytest.raises(EvaluationError, match="nothing to evaluate on: give --text"):
        CliRunner().invoke(cli.app, arguments[:2], catch_exceptions=False)


def test_blocks_longer_than_the_context(model, tokenizer):
    with pytest.raises(EvaluationError, match=r"text blocks of 513 text tokens were .*; the model reads 512 at most"):
        evaluate_text(model, tokenizer, "anything", block_length=513)


@pytest.mark.parametrize(
    ("context", "vocabulary", "length", "batch"),
    [(512, 257, 512, 16), (8192, 49152, 2048, 2), (131072, 2**20, 2048, 1), (1024, 50257, 1024, 5)],
)
def test_memory_chooses_the_batch_and_not_the_length(
    tokenizer, tmp_path, monkeypatch, context, vocabulary, length, batch
):
    (tmp_path / "page.txt").write_text(TEXT * 200)
    asked = {}
    monkeypatch.setattr(
        "tokenformer.evaluation.evaluate", lambda model, blocks, **rest: asked.update(rest, blocks=blocks)
    )
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=context, vocab_size=vocabulary))
    evaluate_text(model, tokenizer, str(tmp_path / "page.txt"))
    assert (len(asked["blocks"][0]["input_ids"]), asked["batch_size"]) == (length, batch)


def test_batches_do_not_change_what_is_measured(model, tokenizer, tmp_path):
    (tmp_path / "page.txt").write_text(TEXT)
    page = str(tmp_path / "page.txt")
    found = [evaluate_text(model, tokenizer, page, block_length=50, batch_size=size) for size in (1, 4, 16)]
    assert {one.text_tokens for one in found} == {len(tokenizer(TEXT)["input_ids"]) + 1}
    assert [one.loss for one in found] == pytest.approx([found[0].loss] * 3, rel=1e-12)


def test_a_failure_leaves_the_model_training_as_it_was(model):
    model.train()
    with pytest.raises(IndexError):
        evaluate(model, Dataset.from_dict({"input_ids": [[0, 1, 10**6]]}), num_bytes=1)
    assert model.training


def test_ids_beyond_the_embedding_are_refused_however_few_entries_there_are(model, tmp_path):
    vocabulary = {"<|endoftext|>": 0, "a": 1, "b": 400}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "tokenizer.json"))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "page.txt").write_text("abab")
    assert len(tokenizer) <= 257 and vocabulary_size(tokenizer) == 401
    with pytest.raises(TokenizerError, match=r"needs 401 rows of the model's embedding, which has 257"):
        evaluate_text(model, tokenizer, str(tmp_path / "page.txt"))


@pytest.mark.slow  # lm-eval reads all the tasks it brings
def test_unknown_tasks(model, tokenizer, choice_task):
    with pytest.raises(EvaluationError, match=r"knows no task 'pica', 'missing\.yaml', and there is no such file"):
        evaluate_tasks(model, tokenizer, ["pica", "piqa", choice_task, "missing.yaml"])


def test_tasks_whose_data_cannot_be_had(model, tokenizer, choice_task, tmp_path):
    (tmp_path / "data.jsonl").unlink()
    with pytest.raises(EvaluationError, match="could not run"):
        evaluate_tasks(model, tokenizer, [choice_task])


def test_the_missing_extra_is_named(model, tokenizer, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tokenformer\[evaluate\]'"):
        evaluate_tasks(model, tokenizer, ["anything"])
    assert issubclass(MissingExtraError, TokenformerError)
