"""lm-eval on a checkpoint: its own command on a local task, `tokenformer evaluate`, and our log-likelihoods agree.

Needs: pip install 'tokenformer[evaluate]'. The task asks which way round the words of the next line of Shakespeare go.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from record import arguments, record

from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.data.sources import load_documents
from tokenformer.evaluation import evaluate_tasks
from tokenformer.quiet import quiet_libraries

QUESTIONS = 200
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}


def write_task(folder: Path) -> list[dict[str, Any]]:
    """Write a multiple-choice task into `folder` as lm-eval reads it, and return its questions."""
    lines = [line.strip() for line in load_documents("shakespeare")[0]["text"].splitlines() if len(line) > 20]
    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for i in chance.sample(range(len(lines) - 1), QUESTIONS):
        words, answer = lines[i + 1].split(), chance.randrange(2)
        choices = ["\n" + " ".join(words), "\n" + " ".join(reversed(words))]
        rows.append({"line": lines[i], "choices": choices[::-1] if answer else choices, "answer": answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "next_line",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{line}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "next_line.yaml").write_text(json.dumps(task))
    return rows


@torch.no_grad()
def main() -> None:
    """Run all three and compare."""
    args = arguments(__doc__)
    quiet_libraries()
    model, tokenizer, _ = load_checkpoint(args.checkpoint)
    assert tokenizer is not None

    def log_likelihood(context: str, continuation: str) -> float:
        ids = tokenizer(context + continuation)["input_ids"]
        new = len(ids) - len(tokenizer(context)["input_ids"])
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(scores[i - 1, ids[i]].item() for i in range(len(ids) - new, len(ids)))

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = write_task(folder)
        command: list[str | Path] = [
            Path(sysconfig.get_path("scripts")) / "lm_eval",
            *("--model", "hf", "--model_args", f"pretrained={args.checkpoint},trust_remote_code=True"),
            *(
                "--device",
                "cpu",
                "--tasks",
                folder / "next_line.yaml",
                "--log_samples",
                "--output_path",
                folder / "out",
            ),
        ]
        subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True)
        theirs = json.loads(next(folder.glob("out/**/results_*.json")).read_text())["results"]["next_line"]["acc,none"]
        samples = [json.loads(line) for line in next(folder.glob("out/**/samples_*.jsonl")).read_text().splitlines()]
        front = evaluate_tasks(model, tokenizer, [str(folder / "next_line.yaml")])["results"]["next_line"]["acc,none"]

    worst, right = 0.0, 0
    for sample in samples:
        row = rows[sample["doc_id"]]
        ours = [log_likelihood(str(row["line"]), choice) for choice in row["choices"]]
        given = [float(answer[0]) for answer in sample["filtered_resps"]]
        worst = max(worst, *(abs(a - b) / abs(b) for a, b in zip(given, ours, strict=True)))
        right += ours.index(max(ours)) == row["answer"]
    assert len(samples) == QUESTIONS and worst < 1e-4
    assert theirs == front == right / QUESTIONS

    record(
        args.results,
        "lm-eval",
        packages=["lm-eval", "torch", "transformers", "tokenformer"],
        ran=f"lm_eval --model hf, trust_remote_code, on a local task of {QUESTIONS} questions; tokenformer evaluate",
        result=f"accuracy {theirs:.3f} by both and by our own log-likelihoods, within {worst:.0e} of lm-eval's",
        limits="tasks that lm-eval downloads were not run: no network here",
        accuracy=theirs,
        largest_difference=worst,
    )


if __name__ == "__main__":
    main()
