"""Recipes of any architecture that transformers has, with linear maps and with parameter tokens in their place."""

import json

import pytest
import torch
import zoo
from comparisons import comparison, parsed
from test_damage import content  # noqa: F401
from test_model_section import PARSERS
from torch import nn
from zoo import IDS

from tokenformer import drop, grow, load, tokenise
from tokenformer.cli.app import main
from tokenformer.compare.results import Results, read_results
from tokenformer.compare.run import load_text, rehearse, work
from tokenformer.compare.scales import initial_scales
from tokenformer.cost import counted_flops, training_flops_of
from tokenformer.errors import RecipeError, TokenformerError
from tokenformer.growth.sites import sites
from tokenformer.training.log import read_log
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

MODELS = {
    "xlstm": {"num_heads": 2, "ffn_round_up_to_multiple_of": 8, "chunk_size": 8, "autocast_kernel_dtype": "float32"},
    "mamba2": {"num_heads": 4, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "recurrent_gemma": {"num_attention_heads": 2, "intermediate_size": 32, "lru_width": 16},
    "qwen3_next": {
        **{field: size for field, size in zoo.DELTA_NET.items() if field != "layer_types"},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "num_experts_per_tok": 2},
    },
}
GROW = {"at": "all-linear", "tokens": 3, "name": "more"}


def model(kind, **changes):
    return {"architecture": kind, "hidden_size": 16, "num_hidden_layers": 1, **MODELS[kind], **changes}


def say(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["tokenformer", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "100")
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("kind", "tokenised"),
    [("xlstm", True), *(pytest.param(k, t, marks=pytest.mark.slow) for k in MODELS for t in (True, False))],
)
def test_it_trains_on_text_and_grows_at_its_maps(kind, tokenised, content, tmp_path, monkeypatch, capsys):  # noqa: F811
    start = model(kind, **({"tokenise": {"at": "all-linear"}} if tokenised else {}))
    stages = [{"text_tokens": 512, "learning_rate": 0.01}, {"text_tokens": 512, **GROW}]
    if tokenised:
        stages[1]["frozen"] = ["base"]  # else all but the new tokens is, for an add-on
    recipe = parse_recipe({**content, "model": start, "stages": stages})
    first, last = train(recipe, tmp_path / "run")
    events = read_log(tmp_path / "run")
    losses = [event["loss"] for event in events if event["event"] == "evaluation"]
    [growth] = [event for event in events if event["event"] == "growth"]
    assert growth["logits_equal"] and losses[-1] < losses[0] < 5.6  # ln 257 is 5.5
    (before, _, _), (after, _, lineage) = load(first), load(last)
    assert [event.operation for event in lineage.history] == ["train", "grow", "train"]
    flops = counted_flops(before, recipe.training.sequence_length) * lineage.history[0].text_tokens_seen
    assert lineage.history[0].training_flops == pytest.approx(flops)
    drop(after, ["more"])
    assert torch.equal(after(IDS, use_cache=False).logits, before(IDS, use_cache=False).logits)
    if not tokenised:
        return
    for verb, options in (
        ("grow", ["--at", "out_proj|linear_y", "--tokens", "2", "--name", "again"]),
        ("drop", ["again"]),
    ):
        code, told = say(monkeypatch, capsys, verb, last, *options, "-o", tmp_path / verb)
        assert code == 0 and "Written" in told.out
        last = tmp_path / verb
    assert (last / "model.safetensors").read_bytes() == (tmp_path / "run/stage2/model.safetensors").read_bytes()
    code, told = say(monkeypatch, capsys, "inspect", last, "--json")
    assert code == 0 and [group["name"] for group in json.loads(told.out)["groups"]] == ["base", "more"]
    code, told = say(monkeypatch, capsys, "shrink", last, "--keep", "0.5", "-o", tmp_path / "less")
    assert code == 2 and "for which this is not done file by file" in told.err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"architecture": "xlstmm"}, "model: there is no architecture 'xlstmm'; there are tokenformer, "),
        (model("xlstm", num_attention_heads=2), "model: 'xlstm' models have no 'num_attention_heads'; did you mean"),
        (model("xlstm", weights="ternary"), "weights is ternary, but the maps of a 'xlstm' model are float"),
        (model("xlstm", tokenise={"at": "q", "tokens": 0}), "model.tokenise.tokens is 0: input should be greater"),
    ],
)
def test_mistakes_in_an_architecture(section, message, tmp_path):
    for parse in PARSERS.values():
        with pytest.raises(RecipeError) as caught:
            parse(section, tmp_path)
        assert message in str(caught.value)


def test_maps_that_are_not_there_are_named_before_anything_trains(content, tmp_path):  # noqa: F811
    for start, second, message in (
        (
            {"tokenise": {"at": "q_proj"}},
            {},
            r"model: tokenise: no linear map of this xLSTM.* is named 'q_proj'",
        ),
        ({}, {"at": "q"}, r"stages.1: tokens is None for maps named 'q'"),
        ({}, {"num_hidden_layers": 2}, r"stages.1: where a 'xlstm' model keeps its neurons is not in the table"),
        ({"tokenise": {}}, {"num_hidden_layers": 2}, r"stages.1: this 'xlstm' model has parameter tokens in place of"),
    ):
        stages = [{"text_tokens": 32}, {"text_tokens": 32, **second}]
        with pytest.raises(TokenformerError, match=message):
            train(parse_recipe({**content, "model": model("xlstm", **start), "stages": stages}), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["xlstm", "mamba2", "recurrent_gemma"])
def test_initial_scales_are_those_of_what_blocks_add(kind):
    made = zoo.make(kind)
    blocks = initial_scales(made, IDS)
    assert len(blocks) == made.config.num_hidden_layers
    assert all(scales["stream"] > 0 and scales["attention"] > 0 for scales in blocks)
    # Mamba-2 has no feed-forward, and that of transformers' xLSTM begins silent.
    assert {scales["feed_forward"] > 0 for scales in blocks} == {kind == "recurrent_gemma"}
    block = next(m for m in made.modules() if isinstance(m, nn.ModuleList) and len(m) == len(blocks))[0]
    stream, added = [], []
    block.register_forward_hook(lambda module, arguments, output: stream.append(arguments[0]))
    block.register_forward_hook(
        lambda module, arguments, output: added.append(output[0] if type(output) is tuple else output)
    )
    made(input_ids=IDS, use_cache=False)
    if kind == "mamba2":  # whose block adds one thing alone
        assert (added[0] - stream[0]).square().mean().sqrt().item() == pytest.approx(blocks[0]["attention"], rel=1e-3)
    assert stream[0].square().mean().sqrt().item() == pytest.approx(blocks[0]["stream"], rel=1e-3)


def test_flops_are_those_of_the_products():
    """An equal number of parameters costs equally much, and what grows beside maps costs three passes of its own."""
    plain, tokens = zoo.make("mamba2"), tokenise(zoo.make("mamba2"))
    before, after = training_flops_of(plain, 8), training_flops_of(tokens, 8)
    numbers = [sum(p.numel() for p in m.parameters() if p.dim() == 2) for m in (plain, tokens)]
    assert after - before == pytest.approx(6 * (numbers[1] - numbers[0]))
    grow(plain, at="in_proj", tokens=4)
    more = sum(p.numel() for layer in sites(plain).values() for p in layer.parameters())
    assert training_flops_of(plain, 8) - before == pytest.approx(6 * more)


@pytest.mark.slow
def test_architectures_are_compared_and_grow_at_their_maps(tmp_path):
    (tmp_path / "text").mkdir()
    stages = [{"at": 640, "grow": {"at": "all-linear", "tokens": 2}}]
    arms = {
        "xLSTM": {"model": model("xlstm"), "stages": stages},
        "Mamba-2": {"model": model("mamba2", tokenise={"at": "all-linear"}), "stages": stages},
    }
    recipe = parsed(
        comparison(tmp_path / "text"), arms=arms, learning_rates=[1e-2], seeds=[3], rules={"reference": "xLSTM"}
    )
    folder = tmp_path / "out"
    folder.mkdir()
    text = load_text(recipe, folder)
    rehearse(recipe, text)
    Results(folder).begin(recipe, "trial", {"text_sha256": "a"})
    work(recipe, folder, list(arms))
    runs = [line for line in read_results(folder / "results.jsonl") if line["event"] == "run"]
    assert {run["arm"] for run in runs} == set(arms)
    assert all(growth["logits_equal"] for run in runs for growth in run["growths"])
    grown = next(run for run in runs if run["arm"] == "Mamba-2" and run["growths"])
    assert grown["parameters"] == grown["growths"][0]["parameters_after"] > grown["growths"][0]["parameters_before"]


def test_what_no_plan_can_compute_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"is a 'xlstm' model, of which FLOPs can be counted and not computed"):
        PARSERS["plan"](model("xlstm", vocab_size=64), tmp_path)
