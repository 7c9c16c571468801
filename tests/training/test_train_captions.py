"""Training on captions: a model that reads text and images learns to name what it sees, and only the bridge moves."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny, tiny_vision
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTImageProcessorPil

from tokenformer import load, save, train
from tokenformer.checkpoints.modality import merge_modality_checkpoints
from tokenformer.checkpoints.rewrite import open_checkpoint
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import RecipeError
from tokenformer.training.captions import prepare_captions
from tokenformer.training.recipe import parse_recipe


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """A recipe for a union that has seen nothing, on pictures of day and of night."""
    folder = tmp_path_factory.mktemp("sky")
    for label, light in (("day", 200), ("night", 20)):
        (folder / "sky" / label).mkdir(parents=True)
        for i in range(24):
            pixels = np.random.default_rng([light, i]).integers(light, light + 50, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "sky" / label / f"{i}.png")
    save(folder / "language", tiny("ffn", vocab_size=257), make_tokenizer("bytes", []))
    save(folder / "vision", tiny_vision("ffn", num_labels=2), ViTImageProcessorPil(size={"height": 12, "width": 16}))
    sources = (open_checkpoint(folder / name) for name in ("language", "vision"))
    merge_modality_checkpoints(*sources, folder / "both", bridge=4)
    return {
        "model": {"checkpoint": str(folder / "both")},
        "images": {"source": str(folder / "sky"), "captions": ["It is {label}.", "Now: {label}"]},
        "training": {"batch_size": 8, "threads": 1, "learning_rate": 0.02, "evaluations_per_stage": 1},
        "stages": [{"images": 160}],
    }


def test_the_bridge_learns_captions_and_nothing_else_moves(content, tmp_path):
    (last,) = train(content, tmp_path / "run")
    before, (after, _, lineage) = load(content["model"]["checkpoint"])[0], load(last)
    moved = {n for n, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[n])}
    assert moved == {name for name in before.state_dict() if ".bridge." in name}
    ids = torch.randint(0, 257, (2, 12))
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)
    assert lineage.last.accuracy == 1.0 and lineage.last.images_seen == 160 and lineage.last.training_flops > 0


def test_captions_are_counted_and_name_their_labels(content):
    recipe, folder = parse_recipe(content), content["model"]["checkpoint"]
    model = load(folder)[0]
    data = prepare_captions(recipe, None, model.config)
    rows = [{"pixels": np.zeros((12, 16, 3), np.uint8), "label": i, "place": i} for i in range(2)]
    batch = data.collate(rows)
    texts = [data.processor.tokenizer.decode(row[row >= 0]) for row in batch["labels"]]
    assert texts == ["It is day.<|endoftext|>", "Now: night<|endoftext|>"]
    ids, named = data.captions[1][1]
    assert data.processor.tokenizer.decode([i for i, names in zip(ids, named, strict=True) if names]) == "night"
    model.set_attn_implementation("eager")  # the counter does not know all that the others do
    model.requires_grad_(True)
    sample = data.sample(1)
    with FlopCounterMode(display=False) as counter:
        model.train()(**sample, use_cache=False).logits.sum().backward()
    assert data.flops(model, recipe.training) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {"captions": ["It is."]}}, "one {label} in each; 'It is.' does not"),
        ({"images": {"label_smoothing": 0.1}}, "label_smoothing is for labels, and captions are instead of them"),
        (
            {"model": {"checkpoint": None, "preset": "1m"}},
            "is a 'tokenformer' model. `tokenformer merge LANGUAGE VISION",
        ),
        ({"images": None, "data": {"source": "x"}, "stages": [{"text_tokens": 9}]}, "learns from images with captions"),
        ({"images": {"captions": None}}, "describes images in words; say in images.captions how"),
    ],
)
def test_recipes_that_do_not_fit(content, tmp_path, change, message):
    changed = {**content, **{k: {**content.get(k, {}), **v} if isinstance(v, dict) else v for k, v in change.items()}}
    changed = {
        k: {f: x for f, x in v.items() if x is not None} if isinstance(v, dict) else v
        for k, v in changed.items()
        if v is not None
    }
    with pytest.raises(RecipeError, match=None) as caught:
        train(changed, tmp_path / "run")
    assert message in str(caught.value) and not (tmp_path / "run").exists()
