"""What parameter tokens do for a word: predicted, against removing them one by one."""

import sys

import pytest
import torch
from rich.console import Console
from test_importance import ordinary, text
from tiny_models import make, tiny, tokens, two_groups

from tokenformer.cli.use_tables import activity_table, contribution_table
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import EvaluationError, GrowthError, MissingExtraError
from tokenformer.explain import explain, picture, promotes
from tokenformer.growth.architectures import architecture_of
from tokenformer.growth.importance import measure
from tokenformer.growth.neurons import group_neurons
from tokenformer.growth.operations import read_groups

EVERYTHING = 10**6


def model_of(kind):
    if kind not in ("llama", "gpt_neox", "gpt2", "opt"):
        return make(kind)
    model = ordinary(kind)
    group_neurons(model)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p *= 5  # so that every part of it shows in the logits
    return model


def values_of(model, contribution):
    """The parameter `[E, n]` whose columns are the values of a contribution's token group."""
    row = architecture_of(model.config)
    token_map = next(m for m in row.maps if m.name == contribution.map_name)
    block = model.base_model.get_submodule(row.blocks)[contribution.block]
    part = next(part.tensor for part in token_map.parts if part.axis == 1)
    return read_groups(block, token_map)[contribution.group][part]


@torch.no_grad()
def without(model, ids, contribution, target):
    """The target's logit once the value of one parameter token is zero."""
    column = values_of(model, contribution)[:, contribution.index]
    before = column.clone()
    column.zero_()
    logit = float(model(ids).logits[0, -1, target])
    column.copy_(before)
    return logit


def rank_correlation(a, b):
    ranks = [torch.tensor(x).argsort().argsort().double() for x in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


@pytest.mark.parametrize("kind", ["paper", "ffn", "grown", "llama", "gpt_neox", "gpt2"])
def test_contributions_predict_what_removal_does(kind):
    """Measured: 0.87 to 0.98 among the top 20, 0.88 to 0.998 with 40 drawn at random."""
    model, ids = model_of(kind), tokens(1, 12)
    found = explain(model, ids, top=EVERYTHING)
    drawn = [found.top[i] for i in torch.randperm(len(found.top))[:40]]
    for some, least in ((list(found.top[:20]), 0.7), ([*found.top[:20], *drawn], 0.8)):
        fell = [found.logit - without(model, ids, c, found.target) for c in some]
        assert rank_correlation([c.contribution for c in some], fell) > least


@pytest.mark.parametrize("kind", ["paper", "grown", "llama", "opt"])
def test_contribution_is_value_times_gradient(kind):
    model, ids = model_of(kind), tokens(1, 12)
    found = explain(model, ids, target=7, top=EVERYTHING)
    model(ids).logits[0, -1, 7].backward()
    totals = {}
    for c in found.top:
        values = values_of(model, c)
        expected = float((values.detach()[:, c.index] * values.grad[:, c.index]).sum())
        assert c.contribution == pytest.approx(expected, rel=1e-3, abs=1e-5)
        at = c.block, c.projection, c.group
        totals[at] = totals.get(at, 0.0) + abs(c.contribution)
    assert found.total == pytest.approx(totals, rel=1e-4)
    assert [abs(c.contribution) for c in found.top] == sorted((abs(c.contribution) for c in found.top), reverse=True)


def test_default_target_is_the_likeliest_and_weights_are_those_of_the_layer():
    model, ids = two_groups("ffn"), tokens(1, 9)
    found = explain(model, ids, top=5)
    logits = model(ids).logits[0, -1].detach()
    assert found.target == int(logits.argmax()) and found.prompt == tuple(ids[0].tolist())
    assert found.logit == pytest.approx(float(logits.max()), rel=1e-5)
    assert found.probability == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)
    assert len(found.top) == 5
    for c in found.top:
        seen = []
        layer = model.model.layers[c.block].mlp
        handle = layer.groups[c.group].values.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(ids)
        handle.remove()
        assert c.weight == pytest.approx(float(seen[0].detach()[0, c.position, c.index]), rel=1e-4)


def test_frozen_models_are_explained_and_left_as_they_were():
    model, ids = make("paper"), tokens(1, 9)
    free = explain(model, ids)
    model.requires_grad_(False).train()
    assert explain(model, ids) == free
    assert model.training and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_closed_group_contributes_nothing():
    model = two_groups("ffn")
    for block in model.model.layers:
        block.mlp.add_gate("more")
        torch.nn.init.constant_(block.mlp.gates["more"].bias, -1.0)
        torch.nn.init.zeros_(block.mlp.gates["more"].weight)
    found = explain(model, tokens(1, 9), top=EVERYTHING)
    assert {c.contribution for c in found.top if c.group == "more"} == {0.0}
    assert found.total[0, "ffn", "more"] == 0.0 < found.total[0, "ffn", "base"]


@pytest.mark.parametrize("kind", ["paper", "llama", "gpt_neox", "gpt2", "opt"])
def test_values_promote_what_the_head_reads_in_them(kind):
    model = model_of(kind)
    row = architecture_of(model.config)
    token_map = row.maps[-1]
    groups = read_groups(model.base_model.get_submodule(row.blocks)[1], token_map)
    part = next(part.tensor for part in token_map.parts if part.axis == 1)
    head = model.get_output_embeddings().weight.detach()
    value = groups["base"][part].detach()[:, 3]
    value.copy_(head[42] * 3)
    centred = value if kind == "llama" else value - value.mean()
    expected = (head @ centred).topk(4).indices.tolist()  # a new final norm's weight is one
    assert promotes(model, 1, token_map.name, "base", 3, top=4) == tuple(expected)
    assert expected[0] == 42
    against = (head @ -centred).topk(4).indices.tolist()
    assert promotes(model, 1, token_map.name, "base", 3, top=4, weight=-0.5) == tuple(against)


@pytest.mark.parametrize(
    "place", [(9, "mlp", "base", 0), (0, "mlp", "more", 0), (0, "mlp", "base", 160), (0, "self_attn.q_proj", "base", 0)]
)
def test_only_what_writes_into_the_residual_stream_promotes(place):
    with pytest.raises(GrowthError, match=r"there is no parameter token .* the model has 3 blocks"):
        promotes(tiny("paper"), *place)


@pytest.mark.parametrize(
    ("length", "target", "message"),
    [(0, None, "0 text tokens; the model reads 1 to 64"), (65, None, "65 text tokens"), (3, 128, "vocabulary of 128")],
)
def test_prompts_and_targets_that_cannot_be(length, target, message):
    with pytest.raises(EvaluationError, match=message):
        explain(tiny("ffn"), torch.zeros(1, length, dtype=torch.long), target=target)


def shown(table):
    console = Console(width=130)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_activity_table_has_a_row_for_each_projection_block_and_group():
    model = make("grown")
    lines = shown(activity_table(measure(model, text()))).splitlines()
    assert "53 text tokens" in lines[0]
    rows = [line.split() for line in lines[3:] if line.strip(" ─")]
    assert len(rows) == 3 * 4
    assert [row[0] for row in rows if row[0] in ("qkv", "output", "ffn")] == ["qkv", "output", "ffn"]
    assert rows[0][1:4] == ["0", "grown1", "24"] and rows[0][-2][:2] in ("q[", "k[", "v[")
    assert [row[-8] for row in rows].count("base") == 3


@pytest.fixture
def explained():
    model = tiny("paper", vocab_size=257)
    tokenizer = make_tokenizer("bytes", None)
    ids = tokenizer("cost: $5 or $6 [b]", add_special_tokens=False, return_tensors="pt")["input_ids"]
    return explain(model, ids, target=tokenizer.encode("[", add_special_tokens=False)[0], top=8)


def test_contribution_table_names_tokens_and_words(explained):
    lines = shown(contribution_table(explained, make_tokenizer("bytes", None))).splitlines()
    assert "'cost: $5 or $6 [b]' → '['" in lines[0]
    assert len([line for line in lines if line.strip()]) == 1 + 2 + 8
    for c, line in zip(explained.top, lines[4:], strict=False):
        assert str(c) in line and f"{c.contribution:+.4f}" in line
    assert str(explained.top[0]).startswith(f"block {explained.top[0].block} ")


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_picture(explained, tmp_path, ending):
    target = tmp_path / f"explained.{ending}"
    picture(explained, make_tokenizer("bytes", None), target)
    content = target.read_bytes()
    assert content.startswith(b"\x89PNG" if ending == "png" else b"<?xml")
    assert len(content) > 10_000


def test_a_picture_without_matplotlib(explained, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tokenformer\[demo\]'"):
        picture(explained, make_tokenizer("bytes", None), tmp_path / "explained.png")
    assert not list(tmp_path.iterdir())
