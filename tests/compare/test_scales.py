"""What drowns what at initialisation, on models of which it is known."""

import pytest
import torch
from comparisons import TOKENS, comparison, parsed
from tiny_models import SIZES, tokens
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, NanoChatConfig

from tokenformer import TokenformerConfig
from tokenformer.compare.results import Results, read_results
from tokenformer.compare.run import load_text, work
from tokenformer.compare.scales import drowned, initial_scales, relative
from tokenformer.compare.segment import initial_line

KNOWN = {**SIZES, "num_hidden_layers": 2}
PUBLISHED = {"qkv_param_tokens": 64, "output_param_tokens": 64, "ffn_param_tokens": 256}


def drawn(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("parallel", [False, True])
def test_published_scales_drown_the_embedding_of_a_small_model(parallel):
    """Width 64, two layers: the embedding has 0.02, what the first block adds is of the order of one."""
    blocks = initial_scales(drawn(TokenformerConfig(**KNOWN, **PUBLISHED, use_parallel_residual=parallel)), tokens())
    assert blocks[0]["stream"] == pytest.approx(0.02, rel=0.1)
    assert 0.1 < blocks[0]["attention"] < 2 and 0.1 < blocks[0]["feed_forward"] < 5
    first, second = drowned(blocks)
    assert first.startswith("the attention of block 1 adds ") and first.endswith(" × the stream it is added to")
    assert second.startswith("the feed-forward of block 1 adds ")
    assert all(relative(blocks[1], part) < 2 for part in ("attention", "feed_forward"))  # nothing is left to drown


@pytest.mark.parametrize(
    ("changes", "stream"), [({"use_embedding_norm": True}, 1.0), ({"output_initializer_range": 0.0}, 0.02)]
)
def test_normalised_embeddings_and_silent_outputs_drown_nothing(changes, stream):
    blocks = initial_scales(drawn(TokenformerConfig(**KNOWN, **PUBLISHED, **changes)), tokens())
    assert blocks[0]["stream"] == pytest.approx(stream, rel=0.1)
    assert drowned(blocks) == []


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**KNOWN, intermediate_size=256),
        GPTNeoXConfig(**KNOWN, intermediate_size=256, use_parallel_residual=False),
        LlamaConfig(**KNOWN, intermediate_size=176),
        NanoChatConfig(**KNOWN, intermediate_size=256),
        GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    ],
    ids=["gpt_neox", "gpt_neox-sequential", "llama", "nanochat", "gpt2"],
)
def test_a_planted_drowning_is_found_in_an_ordinary_transformer(config):
    model = drawn(config)
    sound = initial_scales(model, tokens())
    assert drowned(sound) == []
    names = {"gpt_neox": "attention.dense", "gpt2": "attn.c_proj"}
    blocks = model.base_model.get_submodule("h" if config.model_type == "gpt2" else "layers")
    with torch.no_grad():
        blocks[1].get_submodule(names.get(config.model_type, "self_attn.o_proj")).weight.mul_(1e5)
    planted = initial_scales(model, tokens())
    assert planted[0] == sound[0]
    assert planted[1]["attention"] == pytest.approx(1e5 * sound[1]["attention"], rel=1e-3)
    [told] = [text for text in drowned(planted) if "attention" in text]
    assert told.startswith("the attention of block 2 adds ")


def test_measuring_changes_nothing_and_leaves_nothing_behind():
    model = drawn(TokenformerConfig(**KNOWN, **PUBLISHED))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert initial_scales(model, tokens()) == initial_scales(model, tokens())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.base_model.layers.modules())


def test_what_is_added_to_nothing_drowns_it():
    silent = {"stream": 0.0, "attention": 0.0, "feed_forward": 0.0}
    assert drowned([]) == drowned([silent]) == []
    assert drowned([{**silent, "attention": 0.1}]) == ["the attention of block 1 adds inf × the stream it is added to"]


def test_each_arm_has_a_line_of_its_own_in_the_results(tmp_path):
    (tmp_path / "text").mkdir()
    recipe = parsed(comparison(tmp_path / "text"), arms={"small": {"model": TOKENS}}, learning_rates=[1e-2], seeds=[3])
    folder = tmp_path / "out"
    folder.mkdir()
    Results(folder).begin(recipe, "trial", {"text_sha256": "a"})
    text = load_text(recipe, folder)
    expected = initial_line(recipe, "small", text)
    work(recipe, folder, ["small"])
    work(recipe, folder, ["small"])
    assert [line for line in read_results(folder / "results.jsonl") if line["event"] == "initial"] == [expected]
    assert (expected["arm"], expected["seed"], len(expected["blocks"])) == ("small", 3, 1)
