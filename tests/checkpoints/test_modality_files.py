"""`tokenformer merge --by modality`: files that are the union in memory, a processor that transformers finds."""

import json

import pytest
import torch
from PIL import Image
from tiny_models import FFN, images, tiny, tiny_vision
from transformers import AutoModelForImageTextToText, AutoProcessor, ViTImageProcessorPil, pipeline
from typer.testing import CliRunner

from tokenformer import TokenformerForConditionalGeneration, load, merge, save
from tokenformer.checkpoints.verify import verify_checkpoint
from tokenformer.cli.app import app
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, GrowthError, TokenizerError

NAVY = Image.new("RGB", (40, 30), "navy")


def tell(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model of bytes, a vision model, and their union, which the command has written."""
    folder = tmp_path_factory.mktemp("senses")
    save(folder / "language", tiny("ffn", vocab_size=257), make_tokenizer("bytes", []))
    save(folder / "vision", tiny_vision("ffn"), ViTImageProcessorPil(size={"height": 12, "width": 16}))
    done = tell(
        "merge", folder / "language", folder / "vision", "-o", folder / "both", "--by", "modality", "--bridge", 4
    )
    assert done.exit_code == 0, done.output
    return folder


def test_the_files_hold_the_union_in_memory(folders):
    both, tokenizer, lineage = load(folders / "both")
    assert isinstance(both, TokenformerForConditionalGeneration)
    expected = merge(load(folders / "language")[0], load(folders / "vision")[0], by="modality", bridge=4)
    assert both.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, both.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert {name for name, p in both.named_parameters() if p.requires_grad} == {
        name for name, _ in both.named_parameters() if ".bridge." in name
    }
    event = lineage.last
    assert event.operation == "merge" and event.arguments["by"] == "modality" and event.arguments["bridge"] == 4
    assert event.parent == verify_checkpoint(folders / "language").weights_sha256
    assert event.arguments["other"] == verify_checkpoint(folders / "vision").weights_sha256
    assert tokenizer.convert_tokens_to_ids("<image>") == both.config.image_token_id == 257 == both.config.vocab_size
    card = (folders / "both" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "images of 12 × 16 pixels" in card


@pytest.mark.slow
def test_growing_and_dropping_on_disk_keep_both_senses(folders, tmp_path):
    assert tell("grow", folders / "both", "-o", tmp_path / "grown", "--ffn", "+8").exit_code == 0
    assert tell("drop", tmp_path / "grown", "grown1", "bridge", "-o", tmp_path / "bare").exit_code == 0
    ids, pixels = torch.randint(0, 257, (2, 9)), images()
    with torch.no_grad():
        for name in ("grown", "bare"):
            model = load(tmp_path / name)[0]
            assert torch.equal(model(ids).logits, load(folders / "language")[0](ids).logits)
            seen = load(folders / "vision")[0].model(pixels).last_hidden_state
            assert torch.equal(model.model(pixel_values=pixels).last_hidden_state, seen)
    assert AutoProcessor.from_pretrained(tmp_path / "bare").image_positions == 13
    assert tell("inspect", folders / "both").exit_code == 0
    assert tell("generate", folders / "both", "hello", "--max-new-tokens", 3).exit_code == 0


def test_the_processor_writes_placeholders_and_refuses_what_does_not_match(folders):
    processor = AutoProcessor.from_pretrained(folders / "both")
    model = AutoModelForImageTextToText.from_pretrained(folders / "both")
    batch = processor(images=[NAVY], text=["<image>hello", "no picture"], padding=True, return_tensors="pt")
    assert batch["pixel_values"].shape == (1, 3, 12, 16)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [13, 0]
    assert model(**batch).logits.shape == (2, 18, 257)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True) == "<image>What is it?\n"
    with pytest.raises(ValueError, match="Found total 0 <image> tokens and 1 images"):
        processor(images=[NAVY], text=["hello"])
    with pytest.raises(ValueError, match="Found 2 <image> tokens in the text but no images were passed"):
        processor(text=["<image><image>"])


def test_the_pipeline_describes_pictures_and_continues_text(folders):
    describe = pipeline("image-text-to-text", model=str(folders / "both"))
    chat = [{"role": "user", "content": [{"type": "image", "image": NAVY}, {"type": "text", "text": "What is it?"}]}]
    asked = {"max_new_tokens": 4, "do_sample": False}
    (from_chat,) = describe(chat, **asked, return_full_text=False)
    (plain,) = describe(images=NAVY, text="<image>What is it?\n", **asked, return_full_text=False)
    assert from_chat["generated_text"] == plain["generated_text"]


def test_checkpoints_that_cannot_be_united_leave_nothing(folders, tmp_path):
    sizes = {"vocab_size": 257, **FFN}
    wide = tiny_vision("ffn", hidden_size=96)
    save(tmp_path / "wide", wide, ViTImageProcessorPil(size={"height": 12, "width": 16}))
    save(tmp_path / "blind", tiny_vision("ffn"))
    save(tmp_path / "mute", tiny("ffn", **sizes))
    save(tmp_path / "foreign", tiny("ffn"), make_tokenizer("bytes", []))  # 128 rows for 257 entries
    language, vision, out = folders / "language", folders / "vision", tmp_path / "out"
    for one, other, error, message in (
        (language, tmp_path / "wide", GrowthError, "differ in hidden_size (64, 96)"),
        (language, tmp_path / "blind", CheckpointError, "has no image processor"),
        (tmp_path / "mute", vision, TokenizerError, "has no tokenizer"),
        (tmp_path / "foreign", vision, TokenizerError, "needs 257 rows of the model's embedding, which has 128"),
        (vision, language, GrowthError, "give them the other way round"),
    ):
        done = tell("merge", one, other, "-o", out, "--by", "modality")
        assert type(done.exception) is error and message in str(done.exception)
    both = folders / "both"
    assert "describes images in words" in str(tell("evaluate", both, "--images", "fashion-mnist").exception)
    for wish in (["--by", "modality", "--norm", "joint"], ["--bridge", "3"]):
        assert type(tell("merge", language, vision, "-o", out, *wish).exception) is GrowthError
    assert not out.exists()


def test_the_code_lies_beside_the_weights(folders):
    for name in ("modeling_tokenformer_multimodal", "processing_tokenformer_multimodal", "modality"):
        assert (folders / "both" / f"{name}.py").is_file()
    notes = [group["notes"] for group in json.loads(tell("inspect", folders / "both", "--json").output)["groups"]]
    assert notes == [["for text", "frozen"], ["for images", "frozen"], ["for images and text after them"]]
    config = json.loads((folders / "both" / "config.json").read_text())
    assert config["auto_map"]["AutoProcessor"] == "processing_tokenformer_multimodal.TokenformerProcessor"
