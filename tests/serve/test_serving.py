"""Exports: on every engine that is installed here they are the model, and what cannot be one is refused.

`make test` has ONNX Runtime; `make ecosystem` runs the same file where all engines are.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_models
import torch
import zoo
from transformers import AutoTokenizer
from transformers.exporters import ExportedModel
from typer.testing import CliRunner

from tokenformer import (
    CheckpointError,
    ConversionError,
    ExportedForCausalLM,
    MissingExtraError,
    evaluate,
    export,
    grow,
    save,
)
from tokenformer.cli.app import app
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.serve import engines
from tokenformer.serve import export as exporting

TOKENIZER = make_tokenizer("bytes", None)
TEXT = "To be, or not to be, that is the question.\n" * 60
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "beams": {"do_sample": False, "num_beams": 3, "repetition_penalty": 1.2},
}
INSTALLED = [
    pytest.param(name, marks=[] if name == "onnx" else pytest.mark.slow)
    for name, engine in engines.ENGINES.items()
    if all(map(find_spec, engine.packages))
]
# Of torch's, onnxscript's, NNCF's and torchao's own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "hamlet.txt"
    file.write_text(TEXT, encoding="utf-8")
    return str(file)


def small(kind: str, *, looped: bool = False):
    """A block whose parameter tokens are in two groups; `looped`: that runs twice, with a third in the second loop."""
    model = tiny_models.make(kind, vocab_size=len(TOKENIZER), num_hidden_layers=1, eos_token_id=None)
    grow(model, ffn_param_tokens="+16", name="more")
    if looped:
        grow(model, ffn_param_tokens="+8", num_loops=2, name="again")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".more." in name or ".again." in name:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module", params=INSTALLED)
def made(request, text, tmp_path_factory):
    """A model and its export."""
    model, folder = small("paper"), tmp_path_factory.mktemp("export") / "out"
    model.generation_config.eos_token_id = None
    written = export(model, TOKENIZER, folder, to=request.param, text=text)
    assert list(model.config.token_groups)[1]["name"] == "more"  # the model itself is left alone
    return model, folder, written


def generated(model, ways):
    """Continue two texts. Where the first is padded, maps read rows of zeros, whose norm would divide 0 by 0."""
    prompt = TOKENIZER(["To be", "a question:"], padding=True, padding_side="left", return_tensors="pt")
    torch.manual_seed(5)
    return model.generate(**prompt, max_new_tokens=12, **ways)


def test_an_export_writes_what_the_model_writes(made):
    model, folder, _ = made
    exported = ExportedForCausalLM.from_pretrained(folder)
    for ways in WAYS.values():
        assert torch.equal(generated(exported, ways), generated(model, ways))


def test_an_export_is_measured_as_the_model_is(made, text):
    model, folder, written = made
    found = evaluate(ExportedForCausalLM.from_pretrained(folder), TOKENIZER, text, block_length=32)
    assert found.loss == pytest.approx(evaluate(model, TOKENIZER, text, block_length=32).loss, abs=1e-4)
    assert written.exported_bits_per_byte == pytest.approx(written.bits_per_byte, abs=1e-4)
    assert 0 < written.logits_difference < 1e-3 * written.largest_logit


def test_the_commands_take_an_export(made, text):
    _, folder, _ = made
    done = CliRunner().invoke(app, ["generate", str(folder), "To be", "--max-new-tokens", "5", "--seed", "1"])
    assert done.exit_code == 0 and done.output.startswith("To be"), done.output
    done = CliRunner().invoke(app, ["evaluate", str(folder), "--text", text, "--sequence-length", "32", "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["text"][0]["loss"] > 0, done.output
    refused = CliRunner().invoke(app, ["inspect", str(folder)])
    assert isinstance(refused.exception, CheckpointError) and "is an export for" in str(refused.exception)
    kept = CliRunner().invoke(app, ["generate", str(folder), "--keep", "0.5"])
    assert "is whole" in str(kept.exception)


def test_what_an_export_tells_of_itself(made):
    _, folder, written = made
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{written.bits_per_byte:.4f}" in card and f"--to {written.engine}" in card
    event = json.loads((folder / "lineage.json").read_text(encoding="utf-8"))["history"][-1]
    assert event["operation"] == "export" and event["arguments"]["to"] == written.engine
    assert AutoTokenizer.from_pretrained(folder)("ab")["input_ids"] == TOKENIZER("ab")["input_ids"]


def test_another_model_than_the_one_that_was_given_is_not_written(made, text, tmp_path, monkeypatch):
    _, folder, written = made
    monkeypatch.setattr(exporting, "trace", lambda *_: ExportedModel.from_pretrained(folder))
    other = small("paper")
    other.model.layers[0].mlp.groups["more"].values.weight.data[3, 5] += 1.0
    with pytest.raises(ConversionError, match="nothing was written"):
        export(other, TOKENIZER, tmp_path / "other", to=written.engine, text=text)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("to", INSTALLED)
@pytest.mark.parametrize("kind", ["ffn", "routed", "looped", "llama", "gpt2"])
def test_other_models_are_exported_likewise(kind, to, text, tmp_path):
    if kind in ("llama", "gpt2"):
        model = zoo.make(kind)
        model.resize_token_embeddings(len(TOKENIZER))
        grow(model, ffn_param_tokens="+16", name="more")
    else:
        model = small("ffn" if kind == "ffn" else "paper", looped=kind == "looped")
    if kind == "routed":
        for layer in model.pattention_layers["ffn"]:
            layer.add_gate("more")
            layer.gates["more"].weight.normal_()
        model.config.token_groups[1]["routed"] = True
    model.generation_config.eos_token_id = None
    if (kind, to) == ("gpt2", "executorch"):
        with pytest.raises(ConversionError, match="cannot take a GPT2LMHeadModel"):
            export(model, TOKENIZER, tmp_path / "out", to=to, text=text)
        return
    export(model, TOKENIZER, tmp_path / "out", to=to, text=text)
    ways = WAYS["greedy"]
    assert torch.equal(generated(ExportedForCausalLM.from_pretrained(tmp_path / "out"), ways), generated(model, ways))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "weights"),
    [(name, weights) for name, engine in engines.ENGINES.items() for weights in engine.weights],
)
def test_fewer_bits_a_weight_are_smaller_and_nearly_the_model(to, weights, text, tmp_path):
    engine = engines.ENGINES[to]
    for package in (*engine.packages, *engine.weights[weights][0]):
        pytest.importorskip(package)
    model = small("paper")
    written = export(model, TOKENIZER, tmp_path / "out", to=to, weights=weights, text=text)
    assert written.logits_difference > 0
    assert written.exported_bits_per_byte < 1.05 * written.bits_per_byte
    assert generated(ExportedForCausalLM.from_pretrained(tmp_path / "out"), WAYS["beams"]).shape[1] > 12


@pytest.mark.slow
def test_openvino_holds_one_text_at_a_time(text, tmp_path):
    pytest.importorskip("openvino")
    model = small("paper")
    export(model, TOKENIZER, tmp_path / "out", text=text)
    exported = ExportedForCausalLM.from_pretrained(tmp_path / "out")
    ids = tiny_models.tokens()
    first = exported(ids)
    torch.testing.assert_close(exported(ids[:, :1], past_key_values=first.past_key_values).logits.shape[1], 1)
    stale = exported(ids).past_key_values
    exported(ids)
    with pytest.raises(ValueError, match="one at a time"):
        exported(ids[:, :1], past_key_values=stale)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model = small("ffn")
    for arguments, message in (
        ({"to": "tensorrt"}, "no engine is called 'tensorrt'"),
        ({"to": "onnx", "weights": "int3"}, "has no 'int3' weights here; it has int8, int4"),
    ):
        with pytest.raises(ConversionError, match=message):
            export(model, TOKENIZER, tmp_path / "out", **arguments)
    with pytest.raises(ConversionError, match="takes what reads text and continues it"):
        export(tiny_models.tiny_vision(), TOKENIZER, tmp_path / "out", to="onnx")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        export(model, TOKENIZER, tmp_path / "there", to="onnx")
    with pytest.raises(CheckpointError, match=r"no export\.json"):
        ExportedForCausalLM.from_pretrained(tmp_path)
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tokenformer\[openvino\]"):
        export(model, TOKENIZER, tmp_path / "out")
    save(tmp_path / "model", model, TOKENIZER)
    refused = CliRunner().invoke(app, ["export", str(tmp_path / "model"), "--to", "onnx", "-o", str(tmp_path / "out")])
    assert isinstance(refused.exception, MissingExtraError) and not Path(tmp_path / "out").exists()
