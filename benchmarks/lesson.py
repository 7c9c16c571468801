"""The texts of forgetting.py, cut into blocks: what is learned, what gates are fitted on, what is measured."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import torch
from smollm2 import MODEL, SPEECHES
from teach import Packed, excerpt, packed
from transformers import AutoTokenizer
from untold import capitals, glossary, next_sentences

from tokenformer.data.blocks import pack
from tokenformer.data.sources import load_documents
from tokenformer.data.text import hold_out

DOMAINS = ("shakespeare", "glossary", "python")
UNTOUCHED = ("speech", "old speech", "c++", "licence", "javascript")
# Packages whose descriptions are other text.
DESCRIBED = ("transformers", "peft")


@dataclass(frozen=True)
class Settings:
    """How much is done, beside the text tokens that a case learns.

    Attributes:
        batch_size, block_length: blocks a step, text tokens a block.
        text_bytes: UTF-8 bytes of each evaluation text, about.
        param_tokens: beside each map; the rank of LoRA.
        gate_blocks: training blocks of each text that gates are fitted on.
        questions: of each kind.
        seeds: of the measured runs.
    """

    batch_size: int = 2
    block_length: int = 128
    text_bytes: int = 2048
    param_tokens: int = 16
    gate_blocks: int = 48
    questions: int = 24
    seeds: tuple[int, ...] = (0, 1, 2)


FIRST_LOOK = Settings(text_bytes=1024, questions=12, seeds=(0,))
QUICK = Settings(batch_size=1, block_length=64, text_bytes=256, param_tokens=2, gate_blocks=4, questions=2, seeds=(0,))


class Lesson:
    """The texts of an experiment, cut into blocks."""

    def __init__(self, settings: Settings, *, tuning: bool) -> None:
        self.settings, self.tokenizer = settings, AutoTokenizer.from_pretrained(MODEL)
        self.facts = glossary()
        include = Path(torch.__file__).parent / "include" / "c10"
        speeches = SPEECHES / "package" / "data"
        texts = {
            "speech": (speeches / "2021_joseph_r_biden_d.txt").read_text(),
            "old speech": (speeches / "1861_abraham_lincoln_r.txt").read_text(),
            "c++": (include / "core" / "TensorImpl.h").read_text(),
            "licence": (Path(sysconfig.get_path("stdlib")) / "LICENSE.txt").read_text(),
            "javascript": (Path(torch.__file__).parent / "utils" / "model_dump" / "code.js").read_text(),
        }
        asked = {"capitals": capitals(), "next sentence": next_sentences(texts["speech"])}
        self.questions = {task: questions[: settings.questions] for task, questions in asked.items()}
        self.asked_of_facts = self.facts.questions[: settings.questions]
        self.blocks: dict[str, Any] = {}
        for domain, source in (("shakespeare", "shakespeare"), ("python", "python-stdlib")):
            documents, held = hold_out(load_documents(source), fraction=0.05, max_bytes=1)
            self.blocks[domain] = self._pack(documents.shuffle(seed=0).select(range(min(len(documents), 40))))
            texts[domain] = held["text"][0]
        self.blocks["glossary"] = self._pack(datasets.Dataset.from_dict({"text": self.facts.documents}))
        texts["glossary"] = self.facts.held_out
        files = [speeches / "2019_donald_j_trump_r.txt", speeches / "1862_abraham_lincoln_r.txt"]
        files += [include / "util" / "Half.h", include / "core" / "Device.h"]
        others = [file.read_text() for file in files] + [_description(name) for name in DESCRIBED]
        self.other = self._pack(datasets.Dataset.from_dict({"text": [excerpt(o, 5_000, at=0.5) for o in others]}))
        self.longer = {name: excerpt(t, 16 * settings.text_bytes, at=0.25) for name, t in texts.items()}
        parts = {name: excerpt(t, settings.text_bytes, at=0.75 if tuning else 0.25) for name, t in texts.items()}
        self.texts: dict[str, Packed] = packed(parts, self.tokenizer, block_length=settings.block_length)

    def _pack(self, documents: Any) -> Any:
        return pack(documents, self.tokenizer, block_length=self.settings.block_length)

    def some(self, text: str | None) -> Any:
        """Return the blocks of a text, or of the gates' other text, that gates are fitted on."""
        blocks = self.other if text is None else self.blocks[text]
        count = min(len(blocks), self.settings.gate_blocks)
        return blocks.select(range(0, len(blocks), max(1, len(blocks) // count))[:count])

    def beyond(self, domain: str) -> Any:
        """Return blocks of what is known of other text when a domain is learned."""
        earlier = DOMAINS[: DOMAINS.index(domain)]
        return datasets.concatenate_datasets([self.some(text) for text in (None, *earlier)])

    def replaying(self, domain: str) -> Any:
        """Return the blocks of a domain with every twentieth one of something else."""
        blocks, replayed = self.blocks[domain], self.beyond(domain)
        count = max(1, len(blocks) // 19)
        chosen = [i % len(replayed) for i in range(count)]
        return datasets.concatenate_datasets([blocks, replayed.select(chosen)])


def _description(package: str) -> str:
    """Return what an installed package says of itself, Markdown for the most part."""
    return str(metadata.metadata(package).json["description"])
