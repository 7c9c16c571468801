"""Training on images: the same stages, growth, resuming, lineage and card as on text."""

import copy
import gzip
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, pipeline
from typer.testing import CliRunner

from tokenformer.checkpoints.checkpoint import load_checkpoint, load_image_processor
from tokenformer.checkpoints.verify import verify_checkpoint
from tokenformer.cli.app import app
from tokenformer.data.images import images_of
from tokenformer.errors import CheckpointError, DataError, EvaluationError, RecipeError, TokenizerError
from tokenformer.evaluation import evaluate_images
from tokenformer.growth.freeze import freeze_only
from tokenformer.training.images import prepare_pictures
from tokenformer.training.log import read_log
from tokenformer.training.optimization import learning_rate, make_optimizer
from tokenformer.training.recipe import TrainingSection, parse_recipe
from tokenformer.training.train import train

NAMES = ["upper left", "upper right", "lower left", "lower right"]


def squares(count, seed):
    """A light square on a dark ground, whose quarter is the label."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    images = rng.integers(0, 90, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 120
    return images, labels.astype(np.uint8)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares")
    for part, count, seed in (("train", 400, 0), ("t10k", 60, 1)):
        for kind, array in zip(("images-idx3", "labels-idx1"), squares(count, seed), strict=True):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return str(folder)


@pytest.fixture(scope="module")
def content(source):
    return {
        "model": {
            "architecture": "tokenformer_vision",
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "qkv_param_tokens": 16,
            "output_param_tokens": 0,
            "ffn_param_tokens": 32,
        },
        "images": {"source": source, "labels": NAMES, "crop": 1, "label_smoothing": 0.1, "validation_fraction": 0.2},
        "training": {
            "batch_size": 16,
            "micro_batch_size": 8,
            "learning_rate": 5e-3,
            "save_every": 7,
            "log_every": 5,
            "evaluations_per_stage": 2,
            "threads": 1,
            "precision": "float32",
        },
        "stages": [
            {"images": 470},
            {"images": 470, "ffn_param_tokens": "+50%", "num_hidden_layers": 3, "name": "more"},
            {"images": 320, "qkv_param_tokens": "+8", "frozen": ["base", "embedding"], "batch_size": 32},
        ],
    }


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    folder, events = tmp_path_factory.mktemp("finished") / "run", []
    return folder, train(content, folder, on_event=events.append), events


def test_stages_grow_to_the_bit_learn_and_add_up(finished, content):
    folder, checkpoints, events = finished
    growths = [event for event in events if event["event"] == "growth"]
    assert len(growths) == 2 and all(g["logits_equal"] and g["loss_before"] == g["loss_after"] for g in growths)
    costs, seen = 0.0, 0
    for i, checkpoint in enumerate(checkpoints):
        model, tokenizer, lineage = load_checkpoint(checkpoint)
        assert tokenizer is None and model.config.id2label == dict(enumerate(NAMES))
        seen += 480 if i < 2 else 320
        freeze_only(model, ["base", "embedding"] if i == 2 else [])
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 3, 8, 8), labels=torch.tensor([0, 1])).loss.backward()
        costs += (480 if i < 2 else 320) * counter.get_total_flops() / 2
        last = lineage.last
        assert (last.images_seen, last.text_tokens_seen) == (seen, 0)
        assert last.training_flops == pytest.approx(costs)
        assert last.recipe == parse_recipe(content).model_dump(exclude_unset=True)
        assert last.data["training_images"] + last.data["validation_images"] == 400
        (read,) = last.data["reads"].values()
        assert read == {"share": 1.0, "passes": pytest.approx((480 if i < 2 else 320) / last.data["training_images"])}
    assert lineage.last.accuracy > 0.95 and lineage.last.loss < 0.3
    assert [event.operation for event in lineage.history] == ["train", "grow", "train", "grow", "train"]
    ends = [event for event in read_log(folder) if event["event"] == "end"]
    assert ends[-1]["images_seen"] == seen and ends[-1]["accuracy"] == lineage.last.accuracy


def test_what_a_stage_freezes_does_not_move_and_all_else_does(finished):
    *_, before, after = [load_file(checkpoint / "model.safetensors") for checkpoint in finished[1]]
    (new,) = json.loads((finished[1][-1] / "config.json").read_text())["token_groups"][1]["blocks"]
    for name, tensor in before.items():
        frozen = (".base." in name and f"layers.{new}." not in name) or "embeddings" in name or "classifier" in name
        assert torch.equal(tensor, after[name]) == frozen, name


def test_a_checkpoint_is_all_that_a_pipeline_needs(finished, source):
    checkpoint = finished[1][-1]
    classify = pipeline("image-classification", model=str(checkpoint))
    images, labels = squares(60, 1)
    found = [classify(Image.fromarray(image).convert("RGB"), top_k=1)[0]["label"] for image in images[:20]]
    assert np.mean([name == NAMES[label] for name, label in zip(found, labels, strict=False)]) >= 0.9
    card = (checkpoint / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "AutoImageProcessor.from_pretrained(folder)" in card
    assert "images of 8 × 8 pixels in patches of 4 × 4, 4 labels" in card
    assert "| Images seen | 1,280 |" in card and "of the labels found" in card and "ext token" not in card
    code = card.partition("```python\n")[2].partition("```")[0].replace('"."', repr(str(checkpoint)))
    exec(code, found := {})
    assert type(found["processor"]) is type(AutoImageProcessor.from_pretrained(checkpoint))


def test_the_image_processor_is_verified_and_read(finished, tmp_path):
    shutil.copytree(finished[1][0], tmp_path / "c")
    assert load_image_processor(tmp_path / "c").image_mean == (0.5, 0.5, 0.5)
    file = tmp_path / "c" / "preprocessor_config.json"
    file.write_text(file.read_text().replace("0.5", "0.4"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json has sha256"):
        verify_checkpoint(tmp_path / "c")
    file.write_text("{")
    with pytest.raises(CheckpointError, match="its image processor cannot be read"):
        load_image_processor(tmp_path / "c")


class Stop(Exception):
    pass


def test_an_interrupted_run_continues_to_the_same_bits(finished, content, tmp_path):
    def stop_at(stage, step):
        def on_event(event):
            if event["event"] == "progress" and (event["stage"], event["step"]) == (stage, step):
                raise Stop

        return on_event

    run, recipe = tmp_path / "run", parse_recipe(content)
    with pytest.raises(Stop):
        train(recipe, run, on_event=stop_at(1, 17))
    with pytest.raises(Stop):
        train(recipe, run, resume=True, on_event=stop_at(2, 23))
    again = train(recipe, run, resume=True)
    for ours, theirs in zip(again, finished[1], strict=True):
        for file in ("model.safetensors", "optimizer.pt", "config.json", "preprocessor_config.json"):
            if file == "optimizer.pt":
                states = [torch.load(c / file, weights_only=True) for c in (ours, theirs)]
                assert states[0].keys() == states[1].keys()
                assert all(torch.equal(states[0][n][m], states[1][n][m]) for n in states[0] for m in states[0][n])
            else:
                assert (ours / file).read_bytes() == (theirs / file).read_bytes()


def test_a_run_starts_from_a_checkpoint_and_its_processor(finished, content, tmp_path):
    shorter = {**content, "model": {"checkpoint": str(finished[1][0])}, "stages": [{"images": 32}]}
    (checkpoint,) = train(shorter, tmp_path / "run")
    _, _, lineage = load_checkpoint(checkpoint)
    assert lineage.last.images_seen == 480 + 32
    other = copy.deepcopy(shorter)
    other["images"]["labels"] = NAMES[::-1]
    with pytest.raises(RecipeError, match=r"stage1 tells upper left, .* apart, and the labels of the images are lower"):
        train(other, tmp_path / "other")


def test_smoothing_is_of_training_alone_and_the_same_in_pieces(finished, content):
    recipe = parse_recipe(content)
    material = prepare_pictures(recipe, finished[0], None)
    model, _, _ = load_checkpoint(finished[1][0])
    batch = material.collate([{"pixels": np.zeros((8, 8, 3), np.uint8), "label": i % 4} for i in range(6)])
    logits, labels = model(batch["pixel_values"]).logits, batch["labels"]
    want = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(material.loss({"logits": logits}, labels), want)
    pieces = [material.loss({"logits": logits[i : i + 2]}, labels[i : i + 2], torch.tensor(6)) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(pieces), want)
    plain = copy.deepcopy(content)
    del plain["images"]["label_smoothing"]
    assert prepare_pictures(parse_recipe(plain), finished[0], None).loss is None
    found = material.measure(model, recipe.training)
    rows = material.data.validation
    labels = torch.tensor(rows["label"])
    images = images_of(rows["pixels"], (8, 8))
    inputs = material.collate([{"pixels": image, "label": 0} for image in images])
    with torch.no_grad():
        logits = model(inputs["pixel_values"]).logits
    assert found.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.accuracy == (logits.argmax(-1) == labels).float().mean().item() and found.top5_accuracy == 1


def test_rates_count_images_and_patches_learn_as_a_head(finished, content):
    recipe = parse_recipe({**content, "training": {**content["training"], "warmup": 0.0, "decay": 1.0}})
    assert learning_rate(recipe, 2, 0) == pytest.approx(5e-3 * 320 / 1280)
    model, _, _ = load_checkpoint(finished[1][0])
    t = TrainingSection(optimizer="muon")
    optimizer = make_optimizer(model, t, {})
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[p] for p in model.model.embeddings.parameters()} == {t.head_rate} == {rates[model.classifier.weight]}
    assert {rates[p] for p in model.model.layers.parameters()} == {1.0}


# The command line


def run(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_checkpoint_is_evaluated_on_the_part_that_nobody_saw(finished, source):
    found = json.loads(run("evaluate", finished[1][-1], "--images", source, "--json"))["images"][0]
    model, _, _ = load_checkpoint(finished[1][-1])
    images, labels = squares(60, 1)
    x = torch.from_numpy(images)[:, None].expand(-1, 3, -1, -1).float() / 127.5 - 1
    with torch.no_grad():
        right = (model(x).logits.argmax(-1) == torch.from_numpy(labels).long()).float().mean().item()
    assert found["images"] == 60 and found["accuracy"] == pytest.approx(right) and right > 0.9
    assert f"{right:.2%}" in run("evaluate", finished[1][-1], "--images", source)
    processor = load_image_processor(finished[1][-1])
    backwards = evaluate_images(model, processor, source, labels=NAMES[::-1])
    assert backwards.images == 60 and backwards.accuracy < 0.1, "labels are matched by name"
    with pytest.raises(EvaluationError, match=r"tells upper left, .* apart, and .* has images of a, b"):
        evaluate_images(model, processor, source, labels=["a", "b", "lower left", "lower right"])


@pytest.mark.parametrize("command", [["generate"], ["evaluate", "--text", "x"], ["inspect", "--text", "x"]])
def test_commands_for_text_say_that_a_model_reads_images(command, finished):
    with pytest.raises(TokenizerError, match="stage3 reads images, and text was given"):
        run(command[0], finished[1][-1], *command[1:])


def test_inspect_and_the_closing_table_speak_of_images(finished):
    told = run("inspect", finished[1][-1])
    assert "4 labels" in told and "vocabulary" not in told and "1.28 k" in told
    facts = json.loads(run("inspect", finished[1][-1], "--json"))
    assert facts["labels"] == 4 and facts["groups"][1]["name"] == "more"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"data": {"source": "x"}}, RecipeError, "data is text to train on, and images is instead of it"),
        ({"images": None}, RecipeError, "'data' is missing: the text to train on, or images"),
        ({"stages": [{"text_tokens": 5}]}, RecipeError, r"'stages.0.images' is missing"),
        ({"stages": [{"images": 5, "text_tokens": 5}]}, RecipeError, r"stages.0.text_tokens does not go with images"),
        ({"stages": [{"images": 5, "sequence_length": 8}]}, RecipeError, r"stages.0.sequence_length does not go with"),
        ({"model": {"preset": "1m-modern"}}, RecipeError, "a 'tokenformer' model reads text, not images; give data"),
        ({"model": {"architecture": "llama"}}, RecipeError, "a 'llama' model reads text, not images"),
        ({"model": {"preset": "vit-b-86"}}, RecipeError, "there is no preset 'vit-b-86'"),
        (
            {"model": {"architecture": "tokenformer_vision", "preset": "vit-b-86"}},
            RecipeError,
            "there is no preset 'vit-b-86'; did you mean vit-b-86m",
        ),
        (
            {"model": {"architecture": "tokenformer_vision", "image_size": 30, "patch_size": 4}},
            RecipeError,
            "these sizes make no model: an image of 30 × 30 pixels is no whole number of patches",
        ),
        (
            {"model": {"architecture": "tokenformer_vision", "num_channels": 1}},
            RecipeError,
            "every image is read with 3",
        ),
        ({"images": {"source": "nowhere/at-all"}}, DataError, "images.source 'nowhere/at-all' is no folder or file"),
    ],
)
def test_recipes_that_make_no_sense_are_refused_before_anything_is_written(change, error, message, content, tmp_path):
    with pytest.raises(error, match=message):
        train({**content, **change}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_text_is_not_for_models_that_see(finished, tmp_path):
    text = {"data": {"source": "python-stdlib"}, "stages": [{"text_tokens": 10}]}
    for model in ({"architecture": "tokenformer_vision"}, {"checkpoint": str(finished[1][0])}):
        with pytest.raises(RecipeError, match="a 'tokenformer_vision' model reads images, not text"):
            train({"model": model, **text}, tmp_path / "run")


def test_other_images_do_not_continue_a_run(content, tmp_path):
    few = {**content, "stages": [{"images": 16}]}
    train(few, tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_text(log.read_text().replace('"images_sha256": "', '"images_sha256": "0'))
    with pytest.raises(DataError, match=r"the data is not what this run began with .*images_sha256"):
        train(few, tmp_path / "run", resume=True)
