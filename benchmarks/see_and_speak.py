"""What a language model that sees costs and gains: the bridge of a merge by modality, LLaVA's projector, all weights.

    python benchmarks/see_and_speak.py                 # some hours of one core
    python benchmarks/see_and_speak.py --share 0.1     # a tenth of all training: a first look

The rules, stated before the first result. A language model (recipes/speak.yaml) and a vision model (recipes/see.yaml)
of one size are trained once. Then three ways to make them one learn the captions of recipes/see-and-speak.yaml on as
many images of Fashion-MNIST, in the same order, by AdamW without weight decay; its learning rate rises over a tenth of
the steps and falls to 0:

- `bridge`: merge by modality; the new token group trains.
- `projector`: as LLaVA, frozen vision model, projector of as many weights in two layers, frozen language model that
  reads what it gives in place of embeddings.
- `full`: merge by modality; everything trains.

Each takes the learning rate that is best for seed 0 by loss; where that is the first or last of its grid, the grid goes
on. Then seeds 1 and 2. Judged on the first 2,000 images of the test part: nats per text token of a caption, and the
share of images whose label greedy writing gets right, given the words before it; and on Shakespeare: bits per byte
before and after, and whether the logits are the same bits. Every run is a line of
benchmarks/results/see_and_speak.jsonl, and is not run again.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from layer import machine
from teach import MAX_GRAD_NORM, rise_and_fall
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from tokenformer import TokenformerProcessor, load, merge, text_blocks, train
from tokenformer.checkpoints.checkpoint import load_image_processor
from tokenformer.data.image_section import ImageSection
from tokenformer.data.images import Varied, images_of, prepare_images
from tokenformer.data.order import training_order
from tokenformer.evaluation import evaluate
from tokenformer.growth.freeze import freeze_only
from tokenformer.models.processing_tokenformer_multimodal import IMAGE_TOKEN
from tokenformer.quiet import quiet_libraries
from tokenformer.training.captions import PROMPT, CaptionMaterial
from tokenformer.training.recipe import TrainingSection

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRIDS = {"bridge": [1e-3, 3e-3, 1e-2], "projector": [1e-3, 3e-3, 1e-2], "full": [3e-4, 1e-3, 3e-3]}
WHAT_TRAINS = {
    "bridge": "the bridge of a merge by modality",
    "projector": "a projector, as in LLaVA",
    "full": "everything, after a merge by modality",
}
SEEDS, BRIDGE, BATCH, VALIDATION = (0, 1, 2), 16, 64, 2_000
JUDGE = TrainingSection(micro_batch_size=250)


class Projected(nn.Module):
    """LLaVA's way: a projector turns what a frozen vision model gives into embeddings for a frozen language model."""

    def __init__(self, language: Any, vision: Any, weights: int) -> None:
        super().__init__()
        width = language.config.hidden_size
        self.language, self.vision = language.requires_grad_(False), vision.requires_grad_(False)
        hidden = weights // (2 * width)
        maps = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, bias=False)
        self.projector = nn.Sequential(maps[0], nn.GELU(), maps[1])
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **more: Any) -> CausalLMOutputWithPast:
        is_image = input_ids == self.language.config.vocab_size
        embeddings = self.language.get_input_embeddings()(torch.where(is_image, 0, input_ids))
        if pixel_values is not None:
            seen = self.projector(self.vision.model(pixel_values).last_hidden_state)
            embeddings = embeddings.masked_scatter(is_image.unsqueeze(-1), seen.flatten(0, 1))
        return self.language(inputs_embeds=embeddings, **more)


def make(arm: str, language: Any, vision: Any) -> Any:
    """Return the model of an arm, of which what trains has `requires_grad`."""
    both = merge(language, vision, by="modality", bridge=BRIDGE)
    if arm == "projector":
        return Projected(language, vision, sum(p.numel() for p in both.parameters() if p.requires_grad))
    if arm == "full":
        freeze_only(both, [])
    return both


def learn(model: Any, data: CaptionMaterial, *, images: int, rate: float, seed: int) -> float:
    """Train what has `requires_grad` on images with captions; returns the seconds that it took."""
    steps = images // BATCH
    order = training_order(len(data.data.train), 0, steps * BATCH, seed=seed)
    rows = Varied(data.data, order, data.section, seed=seed, first=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rise_and_fall(step, steps))
    model.train()
    began = time.perf_counter()
    for step in range(steps):
        batch = data.collate(rows.__getitems__(range(step * BATCH, (step + 1) * BATCH)))
        model(**batch, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return time.perf_counter() - began


def recipe(name: str, share: float) -> dict[str, Any]:
    """Read a recipe, with so much of its training."""
    content: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    for stage in content["stages"]:
        stage.update({unit: round(stage[unit] * share) for unit in ("text_tokens", "images") if unit in stage})
    return content


def parents(folder: Path, share: float) -> tuple[Any, Any, CaptionMaterial, Any]:
    """Return the two models, trained once, and what they learn and keep: captions, and some text."""
    last = {}
    for name in ("speak", "see"):
        run = folder / f"{name}-{share:g}"
        done = (run / "stage1").exists()
        last[name] = (
            run / "stage1" if done else train(recipe(name, share), run, resume=(run / "recipe.yaml").exists())[-1]
        )
    tokenizer: Any
    language, tokenizer, _ = load(last["speak"])
    vision = load(last["see"])[0]
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    positions = vision.config.num_patches + (vision.config.pooling == "cls")
    processor = TokenformerProcessor(load_image_processor(last["see"]), tokenizer, image_positions=positions)
    section = ImageSection(**recipe("see-and-speak", share)["images"])
    images = prepare_images(section, size=vision.config.image_height_width)
    images = replace(images, validation=images.validation.select(range(min(VALIDATION, len(images.validation)))))
    text = text_blocks("shakespeare", tokenizer, block_length=128).select(range(64))
    return language, vision, CaptionMaterial(images, section, processor), text


def run_arm(arm: str, rate: float, seed: int, share: float, given: tuple[Any, Any, CaptionMaterial, Any]) -> Any:
    """Train one arm and append its line to the results; returns the model."""
    language, vision, data, text = given
    torch.manual_seed(seed)
    model = make(arm, copy.deepcopy(language), copy.deepcopy(vision))
    speaks = model.language if arm == "projector" else model
    num_bytes = len("".join(data.processor.tokenizer.batch_decode(text[:]["input_ids"])).encode())
    ids = torch.tensor(text[:8]["input_ids"])
    with torch.no_grad():
        before, before_bits = speaks(ids).logits, evaluate(speaks, text, num_bytes=num_bytes).bits_per_byte
    images = recipe("see-and-speak", share)["stages"][0]["images"]
    seconds = learn(model, data, images=images, rate=rate, seed=seed)
    with torch.no_grad():
        equal = torch.equal(speaks(ids).logits, before)
    found = data.measure(model, JUDGE)
    line = {
        "arm": arm,
        "learning_rate": rate,
        "seed": seed,
        "share": share,
        "images": images,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "loss": found.loss,
        "accuracy": found.accuracy,
        "bits_per_byte_before": before_bits,
        "bits_per_byte_after": evaluate(speaks, text, num_bytes=num_bytes).bits_per_byte,
        "text_logits_equal": equal,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    assert equal or arm == "full", "only the arm that trains the language model may change what it writes"
    with open(RESULTS / "see_and_speak.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{arm} {rate:g} seed {seed}: {found.accuracy:.1%}, {found.loss:.3f} nats", flush=True)
    return model


def lines(share: float) -> list[dict[str, Any]]:
    """Read what was measured with this share of training."""
    file = RESULTS / "see_and_speak.jsonl"
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [line for line in found if line["share"] == share]


def next_case(arm: str, share: float) -> tuple[float, int] | None:
    """Return learning rate and seed of the next run of an arm; None when it is done."""
    first = {line["learning_rate"]: line["loss"] for line in lines(share) if line["arm"] == arm and line["seed"] == 0}
    for rate in GRIDS[arm]:
        if rate not in first:
            return rate, SEEDS[0]
    best = min(first, key=lambda rate: first[rate])
    if best in (min(first), max(first)):
        return (float(f"{best / 3:.1g}") if best == min(first) else float(f"{best * 3:.1g}")), SEEDS[0]
    done = {line["seed"] for line in lines(share) if line["arm"] == arm and line["learning_rate"] == best}
    return next(((best, seed) for seed in SEEDS if seed not in done), None)


def table(measured: list[dict[str, Any]]) -> str:
    """Return a row for each arm at its best learning rate: mean over its seeds, and the least and the most."""
    rows = [
        "| what trains | weights | learning rate | seeds | labels found | nats per text token | bits/byte of text |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm, what in WHAT_TRAINS.items():
        own = [line for line in measured if line["arm"] == arm]
        rate = min((line for line in own if line["seed"] == 0), key=lambda line: line["loss"])["learning_rate"]
        best = [line for line in own if line["learning_rate"] == rate]
        right, loss, bits = ([line[name] for line in best] for name in ("accuracy", "loss", "bits_per_byte_after"))
        before = f"{best[0]['bits_per_byte_before']:.3f}"
        same = "the same bits" if all(line["text_logits_equal"] for line in best) else f"{statistics.mean(bits):.3f}"
        rows.append(
            f"| {what} | {best[0]['trained_parameters']:,} | {rate:g} | {len(best)} | {statistics.mean(right):.1%} "
            f"({min(right):.1%} to {max(right):.1%}) | {statistics.mean(loss):.3f} | {before}, then {same} |"
        )
    return "\n".join(rows)


def draw(model: Any, data: CaptionMaterial, file: Path) -> None:
    """Draw held-out images, what the model writes about them, and what they show."""
    import matplotlib.pyplot as plt

    some = data.data.validation.select(range(12))
    pixels = images_of(some["pixels"], data.data.size)
    batch = data.processor(images=list(pixels), text=[PROMPT] * len(some), return_tensors="pt")
    written = model.generate(**batch, max_new_tokens=24, do_sample=False, pad_token_id=0)
    texts = data.processor.tokenizer.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    figure, axes = plt.subplots(3, 4, figsize=(9, 6.5), layout="constrained")
    for axis, image, text, label in zip(axes.flat, pixels, texts, some["label"], strict=True):
        axis.imshow(image)
        axis.set_axis_off()
        name = data.data.labels[label]
        colour = "tab:green" if name in text else "tab:red"
        axis.set_title(f"{text.strip()}\n({name})", fontsize=8, color=colour, wrap=True)
    figure.savefig(file, dpi=80)


def main() -> None:
    """Run what is missing, one run after the other, and draw what the bridge has learned to say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of all training: less is a first look")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "see_and_speak", help="folder of the two models")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_libraries()
    given = parents(arguments.runs, arguments.share)
    while cases := [(arm, case) for arm in GRIDS if (case := next_case(arm, arguments.share)) is not None]:
        # Of the arm that is least done, so that whatever is there compares.
        arm, (rate, seed) = min(cases, key=lambda case: sum(line["arm"] == case[0] for line in lines(arguments.share)))
        model = run_arm(arm, rate, seed, arguments.share, given)
        found = [line["loss"] for line in lines(arguments.share) if line["arm"] == "bridge"]
        if arm == "bridge" and lines(arguments.share)[-1]["loss"] == min(found):
            draw(model, given[2], RESULTS / "see_and_speak.png")


if __name__ == "__main__":
    main()
