"""The law in a report is that of the runs it was planted in."""

import numpy as np
import pytest
from transformers import AutoConfig

from tokenformer import cost
from tokenformer.compare.findings import Findings
from tokenformer.compare.page import Heading, Paragraph, Table
from tokenformer.compare.scaling import scaling

WIDTHS = [16, 32, 64, 128]
BUDGETS = [1e10, 1e11, 1e12]
PLANTED = (0.9, 6.0, 0.3, 40.0, 0.35)


def model(width):
    return {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * width}


def comparison(*, seeds=(0, 1, 2), widths=tuple(WIDTHS), grown=0):
    """Lines of runs that follow the law; the last `grown` arms are meant to grow."""
    arms = {
        f"width {width}": {
            "model": {"architecture": "gpt_neox", **model(width)},
            "stages": [{"at": 1e9, "num_hidden_layers": 3}] if i >= len(widths) - grown else [],
        }
        for i, width in enumerate(widths)
    }
    recipe = {
        "question": "How large?",
        "data": {"source": "examples", "tokenizer": "bytes"},
        "budgets": BUDGETS,
        "seeds": list(seeds),
        "learning_rates": [1e-3],
        "tuning_budget": BUDGETS[0],
        "rules": {"reference": "width 16"},
        "arms": arms,
    }
    yield {"event": "recipe", "name": "sizes", "date": "2026-01-01", "recipe": recipe}
    random, (E, A, alpha, B, beta) = np.random.default_rng(0), PLANTED
    for width in widths:
        config = {"model_type": "gpt_neox", **model(width), "vocab_size": 259}
        size = cost.block_parameters(AutoConfig.for_model(**config))
        for budget in BUDGETS:
            for seed in seeds:
                text = budget / size / 6
                yield {
                    "event": "run",
                    "purpose": "final",
                    "arm": f"width {width}",
                    "seed": seed,
                    "learning_rate": 1e-3,
                    "budget": budget,
                    "text_tokens": text,
                    "bits_per_byte": (E + A / size**alpha + B / text**beta) * np.exp(random.normal(0, 0.002)),
                    "config": config,
                    "growths": [],
                }


def test_the_planted_law_is_tabulated():
    heading, paragraph, table, told = scaling(Findings.of(list(comparison())))
    assert isinstance(heading, Heading) and isinstance(table, Table)
    assert "fitted to all runs of width 16, width 32, width 64, width 128" in paragraph.text
    rows = {row[0]: [float(x) for x in row[1:]] for row in table.rows}
    assert rows["α"][0] == pytest.approx(0.3, abs=0.03) and rows["β"][0] == pytest.approx(0.35, abs=0.03)
    assert all(low <= value <= high for value, low, high in rows.values())
    assert "single runs differ from it by 0.2%" in told.text


def test_too_few_sizes_have_no_law_and_too_few_seeds_are_told():
    assert list(scaling(Findings.of(list(comparison(widths=WIDTHS[:3]))))) == []
    assert list(scaling(Findings.of(list(comparison(grown=1))))) == []
    *_, told = scaling(Findings.of(list(comparison(seeds=(0,)))))
    assert isinstance(told, Paragraph) and told.text.startswith("It cannot be fitted: a law of size and text needs")
