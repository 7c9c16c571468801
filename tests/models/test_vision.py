"""The image classifier: sizes, what transformers asks of image classifiers, growth to the bit, and real training."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_models import FAMILIES, close, images, sample, tiny, tiny_vision
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTImageProcessorPil,
    pipeline,
)

from tokenformer import TokenformerForImageClassification, TokenformerVisionConfig, TokenformerVisionModel, grow
from tokenformer.cost import parameters

KINDS = [*FAMILIES, "grown"]
# Paper, table 2: 86M, 109M, 307M and 407M.
PINNED = {"vit-b-86m": 86_446_312, "vit-b-109m": 114_757_864, "vit-l-307m": 304_005_096, "vit-l-407m": 404_668_392}


def make(kind, **changes):
    if kind != "grown":
        return tiny_vision(kind, **changes)
    model = tiny_vision("ffn", **changes)
    grow(model, qkv_param_tokens=24, output_param_tokens=20, ffn_param_tokens="+32")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".groups.grown1." in name:
                p.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return model


# Sizes


@pytest.mark.parametrize("name", TokenformerVisionConfig.presets)
def test_preset_parameter_counts(name):
    config = TokenformerVisionConfig.from_preset(name, num_labels=1000)
    with torch.device("meta"):
        count = sum(p.numel() for p in TokenformerForImageClassification(config).parameters())
    assert count == PINNED[name.removesuffix("-ffn").removesuffix("-modern")] == parameters(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "an image of 30 × 30 pixels is no whole number of patches of 4 × 4"),
        ({"image_size": [32, 30]}, "an image of 32 × 30 pixels is no whole number"),
        ({"image_size": [4, 4, 4]}, r"image_size is \[4, 4, 4\]"),
        ({"num_channels": 0}, "num_channels 0"),
        ({"pooling": "max"}, "pooling is 'max'; it must be one of mean, cls"),
        ({"ffn_param_tokens": 0, "linear_projections": []}, "'ffn' has neither parameter tokens nor a linear map"),
    ],
)
def test_impossible_sizes_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        tiny_vision(**changes)


# What it computes


@torch.no_grad()
def test_patches_are_what_a_convolution_makes_of_them():
    model, x = tiny_vision(pooling="mean"), images()
    embeddings = model.model.embeddings
    linear = embeddings.patch_embeddings
    convolved = F.conv2d(x, linear.weight.view(64, 3, 4, 4), linear.bias, stride=4).flatten(2).transpose(1, 2)
    close(embeddings(x) - embeddings.position_embeddings, convolved)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_the_head_reads_what_the_configuration_says(pooling):
    model, x = tiny_vision(pooling=pooling), images()
    out = model.model(x)
    assert out.last_hidden_state.shape == (2, 12 + (pooling == "cls"), 64)
    pooled = out.last_hidden_state.mean(1) if pooling == "mean" else out.last_hidden_state[:, 0]
    assert torch.equal(out.pooler_output, pooled)
    assert torch.equal(model(x).logits, model.classifier(pooled))


@torch.no_grad()
def test_every_patch_sees_every_other_and_knows_where_it_is():
    model, x = tiny_vision(pooling="mean"), images(1)
    before = model.model(x).last_hidden_state
    for corner in (0, -1):
        y = x.clone()
        y[..., corner, corner] += 1
        assert ((model.model(y).last_hidden_state - before).abs().amax(-1) > 1e-5).all()
    patches = x.unfold(2, 4, 4).unfold(3, 4, 4)
    moved = patches.flip(2, 3).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)
    assert (model(moved).logits - model(x).logits).abs().max() > 1e-2


@torch.no_grad()
def test_embeddings_are_normalised_where_the_configuration_says_so():
    model = tiny_vision(use_embedding_norm=True)
    first = model(images(), output_hidden_states=True).hidden_states[0]
    close(first.square().mean(-1), torch.ones(2, 13))


@pytest.mark.parametrize("width", [64, 60, 6])
@torch.no_grad()
def test_positions_begin_as_waves_about_as_large_as_patches(width):
    silent = {"hidden_size": width, "num_attention_heads": 2, "output_initializer_range": 0.0, "image_size": [8, 12]}
    model = TokenformerVisionModel(TokenformerVisionConfig(**silent, patch_size=4, pooling="cls", num_hidden_layers=1))
    out = model(images(2, 8, 12), output_hidden_states=True)
    assert torch.equal(model.norm(out.hidden_states[0]), out.last_hidden_state), "blocks begin silent"
    positions, quarter = model.embeddings.position_embeddings[0], width // 4
    assert not positions[0].any() and positions[0].requires_grad == positions.requires_grad
    for number, (row, column) in enumerate((row, column) for row in range(2) for column in range(3)):
        frequencies = 10000.0 ** (-torch.arange(quarter) / quarter)
        angles = [torch.tensor(float(place)) * frequencies for place in (row, column)]
        waves = torch.cat([wave(angle) for wave in (torch.sin, torch.cos) for angle in angles])
        close(positions[1 + number, : 4 * quarter], waves)
        assert not positions[1 + number, 4 * quarter :].any()
    patches = model.embeddings.patch_embeddings(torch.rand(1000, 48) * 2 - 1)
    assert 0.3 < patches.std() / positions[1:, : 4 * quarter].square().mean().sqrt() < 1.5


# Conventions


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attentions_are_distributions_over_all_positions(kind):
    model = make(kind, attention="eager")
    out = model(images(), output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3 and len(out.hidden_states) == 4
    for weights in out.attentions:
        assert weights.shape == (2, 4, 13, 13)
        close(weights.sum(-1), torch.ones(2, 4, 13))
        assert weights.triu(1).any()
    logits, states, attentions = model(images(), output_attentions=True, output_hidden_states=True, return_dict=False)
    assert torch.equal(logits, out.logits) and torch.equal(states[-1], out.hidden_states[-1]) and len(attentions) == 3
    sdpa = copy.deepcopy(model)
    sdpa.set_attn_implementation("sdpa")
    close(sdpa(images()).logits, out.logits)


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other():
    model, x = make("grown"), images(3)
    for i in range(3):
        close(model(x[i : i + 1]).logits[0], model(x).logits[i])


def test_labels_give_the_loss_that_the_problem_asks_for():
    model, labels = tiny_vision(), torch.tensor([1, 4])
    logits = model(images()).logits
    close(model(images(), labels=labels).loss, F.cross_entropy(logits, labels))
    several = tiny_vision(problem_type="multi_label_classification")
    targets = F.one_hot(labels, 5).float()
    close(several(images(), labels=targets).loss, F.binary_cross_entropy_with_logits(logits, targets))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@torch.no_grad()
def test_images_of_another_size_are_read_between_the_learned_positions(pooling):
    model = tiny_vision(pooling=pooling)
    assert torch.equal(model(images(), interpolate_pos_encoding=True).logits, model(images()).logits)
    larger = images(2, 24, 20)
    assert model.model(larger, interpolate_pos_encoding=True).last_hidden_state.shape[1] == 30 + (pooling == "cls")
    positions = model.model.embeddings.position_embeddings
    positions.copy_(positions[:, -1:].expand_as(positions))
    close(model.model.embeddings.interpolated(6, 5)[:, -1:], positions[:, -1:])


@pytest.mark.parametrize(
    ("x", "asked", "message"),
    [
        (torch.zeros(1, 3, 24, 16), {}, "the images have 24 × 16 pixels, the model reads 12 × 16; resize them"),
        (torch.zeros(1, 3, 22, 16), {"interpolate_pos_encoding": True}, "22 × 16 .* no whole number of patches of 4"),
        (torch.zeros(1, 1, 12, 16), {}, "the images have 1 channels, the model reads 3"),
        (None, {}, "give pixel_values"),
    ],
)
def test_images_that_it_cannot_read_are_refused(x, asked, message):
    with pytest.raises(ValueError, match=message):
        tiny_vision()(x, **asked)


def test_checkpointing_gradients_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = make("grown").train()
        if checkpointing:
            model.activation_checkpointing_enable()
            assert model.is_activation_checkpointing
        model(images(), labels=torch.tensor([1, 4])).loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        close(a, b, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_saved_and_loaded_by_the_auto_classes(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is TokenformerVisionConfig
    again, report = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is TokenformerForImageClassification and not any(report.values())
    assert torch.equal(again(images()).logits, model(images()).logits)
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is TokenformerVisionModel
    assert torch.equal(base(images()).pooler_output, model.model(images()).pooler_output)
    other = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert other(images()).logits.shape == (2, 7)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_computes_the_same():
    model = make("grown")
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(images()).logits, model(images()).logits)


# Growth


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_growth_is_bit_for_bit(family, dtype, attention):
    model, x = tiny_vision(family, attention=attention, dtype=dtype), images().to(dtype)
    before = model(x).logits
    for _ in range(2):
        grow(model, qkv_param_tokens="+50", output_param_tokens="+50", ffn_param_tokens="+50", num_hidden_layers="+2")
        assert torch.equal(model(x).logits, before)


def test_it_grows_to_a_preset_of_its_own():
    with torch.device("meta"):
        model = TokenformerForImageClassification(TokenformerVisionConfig.from_preset("vit-b-86m", num_labels=1000))
        grow(model, preset="vit-b-109m")
    assert sum(p.numel() for p in model.parameters()) == PINNED["vit-b-109m"]


def test_text_and_images_go_through_the_same_blocks():
    text, vision = tiny(), tiny_vision()
    assert [type(m) for m in text.model.layers.modules()] == [type(m) for m in vision.model.layers.modules()]
    vision.model.layers.load_state_dict(text.model.layers.state_dict())


# For real


class Pictures(Dataset):
    """A light square on a dark ground, whose quarter is the label."""

    def __init__(self, size: int) -> None:
        rng = np.random.default_rng(0)
        self.labels = rng.integers(0, 4, size)
        self.pictures = rng.integers(0, 90, (size, 12, 16, 3), dtype=np.uint8)
        for picture, label in zip(self.pictures, self.labels, strict=True):
            picture[6 * (label // 2) :, 8 * (label % 2) :][:6, :8] += 120

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict:
        picture = torch.from_numpy(self.pictures[i]).permute(2, 0, 1).float()
        return {"pixel_values": picture / 127.5 - 1, "labels": int(self.labels[i])}


def test_trainer_teaches_it_and_a_pipeline_classifies_pictures(tmp_path):
    names = ["upper left", "upper right", "lower left", "lower right"]
    config = TokenformerVisionConfig.from_preset(
        "vit-b-86m-modern",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_param_tokens=64,
        image_size=[12, 16],
        patch_size=4,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    torch.manual_seed(0)
    model, data = TokenformerForImageClassification(config), Pictures(256)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=32,
        max_steps=150,
        learning_rate=3e-3,
        logging_steps=150,
        label_smoothing_factor=0.1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    assert trainer.evaluate()["eval_right"] > 0.95
    model.save_pretrained(tmp_path / "model")
    half = [0.5, 0.5, 0.5]
    processor = ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=half, image_std=half)
    processor.save_pretrained(tmp_path / "model")
    assert type(AutoImageProcessor.from_pretrained(tmp_path / "model")) is ViTImageProcessorPil
    classify = pipeline("image-classification", model=str(tmp_path / "model"))
    for i in range(4):
        found = classify(Image.fromarray(data.pictures[i]), top_k=2)
        assert found[0]["label"] == names[data.labels[i]] and found[0]["score"] > found[1]["score"]
        with torch.no_grad():
            want = model.eval()(data[i]["pixel_values"][None]).logits.softmax(-1).max()
        assert found[0]["score"] == pytest.approx(want.item(), abs=1e-3)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["id2label"]["0"] == "upper left"


def test_what_a_tiny_model_reads_is_what_it_says():
    assert sample(tiny()).keys() == {"input_ids"} and sample(tiny_vision()).keys() == {"pixel_values"}
