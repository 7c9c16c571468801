"""A checkpoint carries the model's code and loads where this package is not installed."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, images, tiny, tiny_vision, tokens
from transformers import AutoConfig, AutoModelForCausalLM, ViTImageProcessorPil
from typer.testing import CliRunner

import tokenformer
from tokenformer import TokenformerForCausalLM, TokenformerProcessor, grow, merge, pack, save
from tokenformer.cli.app import app
from tokenformer.data.tokenizer import make_tokenizer

FILES = [
    "configuration_blocks.py",
    "configuration_tokenformer.py",
    "fused.py",
    "modality.py",
    "modeling_tokenformer.py",
    "names.py",
    "pattention.py",
    "ternary.py",
    "token_group.py",
]
VISION_FILES = [*FILES, "configuration_tokenformer_vision.py", "modeling_tokenformer_vision.py"]
CODE = {name: (Path(tokenformer.__file__).parent / "models" / name).read_text() for name in VISION_FILES}
ASKED = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# Load a folder trusting nobody. Then load every one by each Auto class, run it, save it, load and run what was saved.
LOAD = f"""
import sys
from importlib.util import find_spec
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

assert find_spec("tokenformer") is None
ids = torch.tensor({tokens().tolist()})
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
assert not any("modeling_tokenformer" in name for name in sys.modules)
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    assert type(base).__name__ == "TokenformerModel" and type(model).__name__ == "TokenformerForCausalLM"
    assert type(config) is type(base.config) is type(model.config)
    model.save_pretrained(folder + "/again")
    base.save_pretrained(folder + "/base")
    again = AutoModelForCausalLM.from_pretrained(folder + "/again", trust_remote_code=True)
    base_again = AutoModel.from_pretrained(folder + "/base", trust_remote_code=True)
    found = dict(hidden=base(ids).last_hidden_state, logits=model(ids).logits, written=model.generate(ids, **{ASKED}))
    found |= dict(hidden_again=base_again(ids).last_hidden_state, logits_again=again(ids).logits)
    save_file(found, folder + "/found.safetensors")
"""
LOAD_VISION = """
import sys
from importlib.util import find_spec
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification, pipeline

assert find_spec("tokenformer") is None
folder, images = sys.argv[1], load_file(sys.argv[1] + "/images.safetensors")["images"]
model, report = AutoModelForImageClassification.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
assert not any(report.values()), report
assert type(model).__name__ == "TokenformerForImageClassification"
model.save_pretrained(folder + "/again")
again = AutoModelForImageClassification.from_pretrained(folder + "/again", trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
classify = pipeline("image-classification", model=folder, trust_remote_code=True)
picture = ((images[0] + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
from PIL import Image
print(classify(Image.fromarray(picture), top_k=1)[0]["label"])
found = dict(logits=model(images).logits, again=again(images).logits, pooled=base(images).pooler_output.contiguous())
save_file(found, folder + "/found.safetensors")
"""

LOAD_MULTIMODAL = """
import sys
from importlib.util import find_spec
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

assert find_spec("tokenformer") is None
folder, asked = sys.argv[1], dict(trust_remote_code=True)
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **asked)
assert not any(report.values()), report
processor = AutoProcessor.from_pretrained(folder, **asked)
batch = processor(images=Image.new("RGB", (16, 12), "navy"), text="<image>What?", return_tensors="pt")
model.save_pretrained(folder + "/again")
processor.save_pretrained(folder + "/again")
describe = pipeline("image-text-to-text", model=folder + "/again", **asked)
(said,) = describe(images=Image.new("RGB", (16, 12), "navy"), text="<image>What?", max_new_tokens=3, do_sample=False)
print(type(processor).__name__, type(describe.processor).__name__, said["generated_text"][:12])
save_file({**batch, "logits": model(**batch).logits}, folder + "/found.safetensors")
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run code by a Python that has every library of this one except this package, however it is installed here."""
    home = tmp_path_factory.mktemp("without_the_package")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home / "venv"], check=True, timeout=120)
    (home / "libraries").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "tokenformer" not in entry.name:
            (home / "libraries" / entry.name).symlink_to(entry)
    environment = {
        **os.environ,
        "PYTHONPATH": str(home / "libraries"),
        "HF_HOME": str(home / "huggingface"),
        "HF_MODULES_CACHE": str(home / "modules"),
        "HF_HUB_OFFLINE": "1",
    }

    def call(code, *arguments):
        command = [home / "venv" / "bin" / "python", "-c", code, *arguments]
        return subprocess.run(
            command, env=environment, cwd=home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
        )

    return call


def test_code_that_is_not_ours_is_told_of_and_not_run(tmp_path):
    tokenformer.save(tmp_path / "c", tiny("ffn"))
    tokenformer.load(tmp_path / "c")  # without a warning
    file = tmp_path / "c" / "modeling_tokenformer.py"
    file.write_text(file.read_text(encoding="utf-8") + "raise SystemExit('ran')\n", encoding="utf-8")
    (tmp_path / "c" / "more.py").write_text("raise SystemExit('ran')", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"2 code files in .* differ .*: modeling_tokenformer\.py, more\.py\. They"):
        tokenformer.load(tmp_path / "c")
    done = CliRunner().invoke(app, ["inspect", str(tmp_path / "c")])
    assert "trust_remote_code=True would run them" in done.output and done.exit_code == 0


def test_loads_runs_and_saves_without_the_package_once_it_is_trusted(run, tmp_path):
    ids, models = tokens(), {}
    for family in (*FAMILIES, "packed"):
        model = tiny("ffn", weights="ternary") if family == "packed" else tiny(family)
        models[tmp_path / family] = model
        grow(model, ffn_param_tokens="+50%", num_hidden_layers="+1")
        if family == "packed":
            pack(model)
        model.save_pretrained(tmp_path / family)
    done = run(LOAD, *models)
    assert done.returncode == 0, done.stderr
    assert f"The repository {next(iter(models))} contains custom code" in done.stdout
    assert done.stdout.endswith("Please pass the argument `trust_remote_code=True` to allow custom code to be run.\n")
    for folder, model in models.items():
        found, want = load_file(folder / "found.safetensors"), model(ids, output_hidden_states=True)
        for name in ("hidden", "hidden_again"):
            assert torch.equal(found[name], want.hidden_states[-1])
        for name in ("logits", "logits_again"):
            assert torch.equal(found[name], want.logits)
        assert torch.equal(found["written"], model.generate(ids, **ASKED))
        configs = [json.loads((folder / copy / "config.json").read_text()) for copy in ("", "again", "base")]
        assert configs[0] == configs[1] == configs[2] | {"architectures": ["TokenformerForCausalLM"]}
        for copy in (folder, folder / "again", folder / "base"):
            assert {file.name: file.read_text() for file in copy.glob("*.py")} == {name: CODE[name] for name in FILES}
        back = AutoModelForCausalLM.from_pretrained(folder / "again", trust_remote_code=True)
        assert type(back) is TokenformerForCausalLM, "the package comes before the code in the checkpoint"
        assert torch.equal(back(ids).logits, want.logits)


@pytest.mark.slow
def test_an_image_classifier_does_too(run, tmp_path):
    model = tiny_vision()
    grow(model, ffn_param_tokens="+50%", num_hidden_layers="+1")
    model.save_pretrained(tmp_path)
    half = [0.5, 0.5, 0.5]
    ViTImageProcessorPil(size={"height": 12, "width": 16}, image_mean=half, image_std=half).save_pretrained(tmp_path)
    x = (((images() + 1) * 127.5).round() / 127.5 - 1).contiguous()
    save_file({"images": x}, tmp_path / "images.safetensors")
    done = run(LOAD_VISION, tmp_path)
    assert done.returncode == 0, done.stderr
    found, want = load_file(tmp_path / "found.safetensors"), model(x)
    assert torch.equal(found["logits"], want.logits) and torch.equal(found["again"], want.logits)
    assert torch.equal(found["pooled"], model.model(x).pooler_output)
    assert done.stdout.split()[-1] == model.config.id2label[want.logits[0].argmax().item()]
    assert {file.name: file.read_text() for file in (tmp_path / "again").glob("*.py")} == CODE
    auto_map = AutoConfig.from_pretrained(tmp_path / "again").auto_map
    assert auto_map["AutoModel"] == "modeling_tokenformer_vision.TokenformerVisionModel"


@pytest.mark.slow
def test_a_model_that_reads_both_does_too_with_its_processor(run, tmp_path):
    both = merge(tiny("ffn", vocab_size=257), tiny_vision("ffn"), by="modality")
    tokenizer = make_tokenizer("bytes", [])
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    images = ViTImageProcessorPil(size={"height": 12, "width": 16})
    save(tmp_path / "both", both, TokenformerProcessor(images, tokenizer, image_positions=13))
    done = run(LOAD_MULTIMODAL, tmp_path / "both")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("TokenformerProcessor TokenformerProcessor <image>What?"[:40])
    found = load_file(tmp_path / "both" / "found.safetensors")
    with torch.no_grad():
        assert torch.equal(both(**{k: v for k, v in found.items() if k != "logits"}).logits, found["logits"])
    card = (tmp_path / "both" / "README.md").read_text()
    assert "AutoProcessor.from_pretrained(folder, trust_remote_code=True)" in card
