"""One grammar of `model:` in training recipes, comparisons and plans."""

import pytest
from comparisons import SMALL, comparison, parsed
from test_damage import content  # noqa: F401
from torch import nn
from transformers import AutoConfig

from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.errors import RecipeError, TokenizerError
from tokenformer.growth.architectures import token_groups
from tokenformer.models.ternary import TernaryLinear
from tokenformer.plan import Plan
from tokenformer.sections import parse_sections
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

HARDWARE = {"device": "h100", "utilisation": 0.4}
PARSERS = {
    "training": lambda model, folder: parse_recipe(
        {"model": model, "data": {"source": "x"}, "stages": [{"text_tokens": 1}]}
    ),
    "comparison": lambda model, folder: parsed(comparison(folder), arms={"small": {"model": model}}),
    "plan": lambda model, folder: parse_sections(
        Plan, {"context": 8, "hardware": HARDWARE, "grown": [{"model": model, "text_tokens": 1}]}, where="plan"
    ),
}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"architecture": "gpt_nex"}, "model: there is no architecture 'gpt_nex'; there are tokenformer, "),
        ({"preset": "9m"}, "model: there is no preset '9m'; did you mean 900m or 8m or 4m?"),
        ({"architecture": "llama", "preset": "1m"}, "model: presets are sizes of TokenFormers; take out preset or"),
        ({"hiden_size": 8}, "model: 'tokenformer' models have no 'hiden_size'; did you mean 'hidden_size'?"),
        ({"preste": "1m"}, "model: 'tokenformer' models have no 'preste'; did you mean 'preset'?"),
        ({"architecture": "gpt2", "n_hed": 2}, "model: 'gpt2' models have no 'n_hed'; did you mean 'n_head'?"),
        (
            {"architectures": "gpt2"},
            "model: 'tokenformer' models have no 'architectures'; did you mean 'architecture'?",
        ),
        ({**SMALL, "hidden_size": -8}, "model.hidden_size is -8: input should be greater than 0"),
    ],
)
def test_the_same_mistake_is_refused_in_the_same_words(model, message, tmp_path):
    for parse in PARSERS.values():
        with pytest.raises(RecipeError) as caught:
            parse(model, tmp_path)
        assert message in str(caught.value)


def test_a_ternary_model_trains_and_grows_a_float_group(content, tmp_path):  # noqa: F811
    grown = {**content["stages"][1], "weights": "float"}
    whole = {**content, "model": {**content["model"], "weights": "ternary"}, "stages": [content["stages"][0], grown]}
    events: list = []
    checkpoints = train(parse_recipe(whole), tmp_path / "run", on_event=events.append)
    assert next(event for event in events if event["event"] == "growth")["logits_equal"]
    model, _, _ = load_checkpoint(checkpoints[-1])
    assert [group.weights for group in token_groups(model.config)] == ["ternary", "float"]
    block = model.model.layers[0]
    kinds = [type(block.mlp.groups.base.keys), type(block.self_attn.q_proj.linear), type(block.mlp.groups.grown1.keys)]
    assert kinds == [TernaryLinear, TernaryLinear, nn.Linear]


def test_weights_of_a_stage_that_adds_none_are_refused(content):  # noqa: F811
    stages = [{**content["stages"][0], "weights": "ternary"}]
    with pytest.raises(RecipeError, match="adds no parameter tokens; those of the first model go into model"):
        parse_recipe({**content, "stages": stages})


def test_any_architecture_trains_from_scratch_and_grows(content, tmp_path):  # noqa: F811
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    recipe = {**content, "model": {"architecture": "llama", **small}}
    first, last = train(parse_recipe(recipe), tmp_path / "run")
    model, _, lineage = load_checkpoint(last)
    assert [AutoConfig.from_pretrained(c).intermediate_size for c in (first, last)] == [24, 32]
    assert model.config.tie_word_embeddings and model.config.model_type == "llama"
    assert [event.operation for event in lineage.history] == ["train", "grow", "train"]


def test_a_vocabulary_or_context_that_is_too_small_is_refused(content, tmp_path):  # noqa: F811
    sizes = {"architecture": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    with pytest.raises(TokenizerError, match=r"the model has 99 rows: take vocab_size out of model"):
        train(parse_recipe({**content, "model": {**sizes, "vocab_size": 99}}), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"sequence_length is 16, more than the 8 text tokens that the model can"):
        train(parse_recipe({**content, "model": {**sizes, "n_positions": 8}}), tmp_path / "run")
    assert not list(tmp_path.iterdir())
