"""The ways to grow that are compared: what each keeps, what it changes, and that all of it can learn."""

import copy
import itertools
import math

import pytest
import torch
from tiny_models import tiny, tokens
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tokenformer import TokenformerConfig, TokenformerForCausalLM
from tokenformer.compare import methods
from tokenformer.compare.methods import METHODS, grow_by
from tokenformer.errors import GrowthError
from tokenformer.growth.neurons import GroupedLinear, group_neurons

SMALL = {"hidden_size": 32, "num_hidden_layers": 2}
COUNTS = {"qkv_param_tokens": 64, "output_param_tokens": "+8", "ffn_param_tokens": "+50%"}


def tokenformer(**changes):
    return tiny(**{**SMALL, "dtype": torch.float64, **changes})


def neox(**changes):
    """A GPT-NeoX every number of which shows in the logits."""
    sizes = {"vocab_size": 128, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM._from_config(GPTNeoXConfig(**{**sizes, **SMALL, **changes}), dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.eval()


CASES = {
    "exact": (tokenformer, {**COUNTS, "num_hidden_layers": 3}),
    "exact neox": (neox, {"ffn_param_tokens": "+16", "num_hidden_layers": 4}),
    "exact per group": (tokenformer, {"ffn_param_tokens": "+16", "norm": "per_group"}),
    "random_keys": (tokenformer, COUNTS),
    "random_keys on linear maps": (lambda: tokenformer(family="ffn"), {"qkv_param_tokens": 16}),
    "recomputed_tau": (tokenformer, COUNTS),
    "published": (tokenformer, COUNTS),
    "shrink_pad_perturb": (tokenformer, {**COUNTS, "num_hidden_layers": 3}),
    "shrink_pad_perturb neox": (neox, {"ffn_param_tokens": "+16", "shrink": 0.5}),
    "hyperclone": (neox, {"factor": 2}),
    "stack": (tokenformer, {"num_hidden_layers": 4}),
    "stack neox": (neox, {"num_hidden_layers": 6}),
    "random_blocks": (tokenformer, {"num_hidden_layers": 3}),
    "random_blocks neox": (neox, {"num_hidden_layers": 3}),
    "random_blocks on none": (lambda: tokenformer(num_hidden_layers=0), {"num_hidden_layers": 2}),
    "random_blocks neox on none": (lambda: neox(num_hidden_layers=0), {"num_hidden_layers": 2}),
}
every_case = pytest.mark.parametrize("case", CASES)


def train(model, states, steps=3):
    """Train everything on random text, and give the optimizer's states by name."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parameters = dict(model.named_parameters())
    for name, state in states.items():
        optimizer.state[parameters[name]] = copy.deepcopy(state)
    for step in range(steps):
        optimizer.zero_grad()
        ids = tokens(4, 16).roll(step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return {name: optimizer.state[p] for name, p in parameters.items()}


def grown(case):
    """The model before, the optimizer's states then, the model afterwards, and the states now."""
    make, amounts = CASES[case]
    model = make()
    states = train(model, {}, steps=1)
    before = copy.deepcopy(model)
    return before, states, *grow_by(model, states, case.split()[0], seed=0, **amounts)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


def is_close(a, b, tolerance=1e-10):
    return (a - b).norm() <= tolerance * b.norm()


def same_weights(a, b):
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


@every_case
def test_the_configuration_says_what_the_model_is(case, tmp_path):
    _, _, model, _ = grown(case)
    fresh = type(model)(copy.deepcopy(model.config)).to(torch.float64).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, dtype="auto", output_loading_info=True)
    assert not any(report.values())
    for other in (fresh, loaded):
        assert is_close(logits(other), logits(model))
    assert all(m.config is model.config for m in model.modules() if hasattr(m, "layer_idx")) or "exact" in case
    with torch.no_grad():
        cache = model(tokens()[:, :9], use_cache=True).past_key_values
        rest = model(tokens()[:, 9:], past_key_values=cache).logits
    assert is_close(rest, logits(model)[:, 9:])


@every_case
def test_a_seed_decides_all_that_is_drawn_and_no_other_draw_is_moved(case):
    make, amounts = CASES[case]
    grown, following = [], []
    for seed in (0, 0, 1):
        model = make()
        torch.manual_seed(len(grown))
        expected = torch.random.get_rng_state()
        grown.append(grow_by(model, {}, case.split()[0], seed=seed, **amounts)[0])
        following.append(torch.equal(torch.random.get_rng_state(), expected))
    assert same_weights(grown[0], grown[1]) and all(following)
    assert same_weights(grown[0], grown[2]) is (case.split()[0] == "stack")


@every_case
def test_what_goes_on_keeps_its_state_and_everything_learns(case):
    before, states, model, kept = grown(case)
    parameters = dict(model.named_parameters())
    assert all(kept[n]["exp_avg"].shape == parameters[n].shape for n in kept)
    if case.startswith("shrink"):
        assert not kept
    elif case != "hyperclone":
        old = {id(states[name]): p for name, p in before.named_parameters()}
        assert {id(state) for state in kept.values()} == old.keys()
        assert all(torch.equal(parameters[n], old[id(state)]) for n, state in kept.items())
    assert all(p.requires_grad for p in parameters.values())
    start = {n: p.detach().clone() for n, p in parameters.items()}
    states = train(model, kept)
    assert not [n for n, p in parameters.items() if torch.equal(p, start[n])]
    assert all(s["step"] == 3 + (n in kept) for n, s in states.items())


@pytest.mark.parametrize("case", [case for case in CASES if "exact" in case])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_exact_growth_is_bit_for_bit(case, dtype):
    make, amounts = CASES[case]
    model = make().to(dtype)
    before = logits(model)
    model, _ = grow_by(model, {}, "exact", seed=0, **amounts)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("case", [case for case in CASES if "exact" not in case and case != "hyperclone"])
def test_the_others_change_the_outputs(case):
    before, _, model, _ = grown(case)
    assert not is_close(logits(model), logits(before), tolerance=1e-3)


@pytest.mark.parametrize("method", ["random_keys", "recomputed_tau", "published"])
def test_departures_compute_what_one_group_of_all_tokens_does(method):
    before, _, model, _ = grown(method)
    totals = {"qkv_param_tokens": 64, "output_param_tokens": 48, "ffn_param_tokens": 240}
    sizes = {f: getattr(before.config, f) for f in ("vocab_size", "hidden_size", "num_attention_heads")}
    fields = {**sizes, **totals, "num_hidden_layers": 2}
    # A new configuration has τ = √n, as the official code at every size.
    taus = (
        {f: getattr(before.config, f) for f in ("qkv_tau", "output_tau", "ffn_tau")} if method == "random_keys" else {}
    )
    whole = TokenformerForCausalLM(TokenformerConfig(**fields, **taus)).to(torch.float64)
    weights = {name: w for name, w in model.state_dict().items() if ".groups." not in name}
    for name in whole.state_dict():
        if ".groups." in name:
            halves = [model.state_dict()[name.replace(".base.", f".{group}.")] for group in ("base", "grown1")]
            weights[name] = torch.cat(halves, dim=0 if ".keys." in name else 1)
            std = 0.02 if ".keys." in name else 2 / (2 * math.sqrt(32))
            drawn = std if method != "recomputed_tau" or ".values." in name else 0.0
            assert halves[1].std() == pytest.approx(drawn, rel=0.2)
    whole.load_state_dict(weights, strict=True)
    assert is_close(logits(whole), logits(model))


def test_recomputing_tau_alone_scales_what_the_activation_sees():
    before, _, model, _ = grown("recomputed_tau")
    for projection, n in {"qkv": 64, "output": 48, "ffn": 240}.items():
        layers = model.pattention_layers[projection]
        assert {layer.tau for layer in layers} == {getattr(model.config, f"{projection}_tau")} == {math.sqrt(n)}
    assert before.config.ffn_tau == math.sqrt(160)


@pytest.mark.parametrize("case", ["shrink_pad_perturb", "shrink_pad_perturb neox"])
def test_shrink_pad_perturb_adds_a_new_model_to_the_shrunk_old_one(case):
    before, states, model, kept = grown(case)
    make, amounts = CASES[case]
    drawn = dict(grow_by(make(), {}, "shrink_pad_perturb", seed=0, **{**amounts, "shrink": 0})[0].named_parameters())
    new = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float64)
    group_neurons(new)
    group_neurons(before)
    old, usual = dict(before.named_parameters()), dict(new.named_parameters())
    assert states and not kept
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            assert drawn[name].std().item() == pytest.approx(usual[name].std().item(), rel=0.2)
            padded = old[name] if name in old else torch.zeros_like(weight)
            assert torch.allclose(weight, amounts.get("shrink", 0.4) * padded + drawn[name], rtol=1e-12)
        elif name in old:
            assert torch.equal(weight, old[name])


@pytest.mark.parametrize(("factor", "rotary"), [(2, 0.5), (3, 1.0)])
@pytest.mark.parametrize(("tied", "parallel", "bias"), list(itertools.product([False, True], repeat=3)))
def test_hyperclone_keeps_the_function_at_a_multiple_of_the_width(tied, parallel, bias, factor, rotary):
    fields = {"tie_word_embeddings": tied, "use_parallel_residual": parallel, "attention_bias": bias}
    model = neox(**fields, rotary_pct=rotary)
    old = {name: weight.shape for name, weight in model.state_dict().items()}
    before = logits(model)
    wide, _ = grow_by(model, {}, "hyperclone", seed=0, factor=factor)
    assert is_close(logits(wide), before)
    for name, weight in wide.state_dict().items():
        vocabulary = name in ("gpt_neox.embed_in.weight", "lm_head.weight")
        by = factor if vocabulary or weight.dim() == 1 else factor**2
        assert weight.numel() == by * math.prod(old[name])
    c = wide.config
    assert (c.hidden_size, c.num_attention_heads, c.intermediate_size) == (32 * factor, 4 * factor, 48 * factor)


def test_hyperclone_keeps_token_groups_silent_blocks_and_what_comes_after():
    model, before = neox(), logits(neox())
    model, states = grow_by(model, {}, "exact", seed=0, ffn_param_tokens="+16", num_hidden_layers=3)
    assert torch.equal(logits(model), before)
    model, states = grow_by(model, states, "hyperclone", seed=0, factor=2)
    assert is_close(logits(model), before)
    assert model.config.token_groups == [{"name": "base", "ffn": 96}, {"name": "grown1", "ffn": 32, "blocks": [2]}]
    model, states = grow_by(model, train(model, states), "exact", seed=0, ffn_param_tokens="+16")
    model, states = grow_by(model, train(model, states), "stack", seed=0, num_hidden_layers=6)
    train(model, states)


@pytest.mark.parametrize("tied", [False, True])
def test_hyperclones_optimizer_remembers_the_gradients_that_exact_copies_would_have_had(tied, monkeypatch):
    monkeypatch.setattr(methods, "_SIGNAL_TO_NOISE_DB", math.inf)
    ids, model = tokens(), neox(tie_word_embeddings=tied)
    group_neurons(model)
    model(ids, labels=ids).loss.backward()
    states = {
        name: {"step": torch.tensor(7.0), "exp_avg": p.grad, "exp_avg_sq": p.grad**2}
        for name, p in model.named_parameters()
    }
    wide, moved = grow_by(model, states, "hyperclone", seed=0, factor=2)
    wide(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in wide.named_parameters()}
    assert moved.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(moved[name]["exp_avg"], gradient, rtol=1e-8, atol=1e-12)
        assert torch.allclose(moved[name]["exp_avg_sq"], gradient**2, rtol=1e-8, atol=1e-20)
        assert moved[name]["step"] == 7


def furthest_copies(model):
    """How far apart the two copies of an embedding are, relative to it."""
    a, b = model.gpt_neox.embed_in.weight.detach().chunk(2, dim=1)
    return (a - b).norm() / a.norm()


def test_copies_part_in_training_by_the_noise_alone(monkeypatch):
    noisy, states = grow_by(neox(), {}, "hyperclone", seed=0, factor=2)
    assert furthest_copies(noisy) == 0
    train(noisy, states)
    assert furthest_copies(noisy) > 1e-4
    monkeypatch.setattr(methods, "_SIGNAL_TO_NOISE_DB", math.inf)
    equal, states = grow_by(neox(), {}, "hyperclone", seed=0, factor=2)
    train(equal, states)
    assert furthest_copies(equal) < 1e-8


@pytest.mark.parametrize("case", ["stack", "stack neox"])
def test_stacking_repeats_the_blocks_and_shares_nothing(case):
    before, _, model, _ = grown(case)
    prefix = "gpt_neox.layers" if "neox" in case else "model.layers"
    weights, old = model.state_dict(), before.state_dict()
    for i in range(model.config.num_hidden_layers):
        for name in (n for n in old if n.startswith(f"{prefix}.{i % 2}.")):
            assert torch.equal(weights[name.replace(f"{prefix}.{i % 2}.", f"{prefix}.{i}.")], old[name])
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))


@pytest.mark.parametrize("case", ["random_blocks", "random_blocks neox", "random_blocks on none"])
def test_random_blocks_are_those_of_a_new_model(case):
    _, _, model, _ = grown(case)
    torch.manual_seed(0)
    new = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float64)
    assert same_weights(model.base_model.layers[-1], new.base_model.layers[-1])
    mlps = [m for m in model.modules() if isinstance(m, GroupedLinear)]
    assert len(mlps) == ("neox" in case) * 2 * model.config.num_hidden_layers


ERRORS = {
    "there is no growth method 'grow'; there are exact": (neox, "grow", {}),
    "grows gpt_neox models; this is a 'tokenformer'": (tokenformer, "hyperclone", {"factor": 2}),
    "grows tokenformer models; this is a 'gpt_neox'": (neox, "published", {"ffn_param_tokens": 256}),
    "was given num_hidden_layers, factor; it takes num_hidden_layers": (
        neox,
        "stack",
        {"num_hidden_layers": 4, "factor": 2},
    ),
    "was given num_hidden_layers; it takes qkv": (tokenformer, "random_keys", {"num_hidden_layers": 4}),
    "was given nothing; it takes factor": (neox, "hyperclone", {"factor": None}),
    "factor is 1.5": (neox, "hyperclone", {"factor": 1.5}),
    "factor is 1;": (neox, "hyperclone", {"factor": 1}),
    "ask for a multiple": (neox, "stack", {"num_hidden_layers": 3}),
    "asked 2, found 0: stacking": (lambda: neox(num_hidden_layers=0), "stack", {"num_hidden_layers": 2}),
    "growing never takes away": (neox, "random_blocks", {"num_hidden_layers": 1}),
    "already has num_hidden_layers 2": (tokenformer, "random_blocks", {"num_hidden_layers": 2}),
    "no parameter tokens of the kind qkv_param_tokens": (neox, "exact", {"qkv_param_tokens": 64}),
    "without blocks has nothing to grow from": (
        lambda: neox(num_hidden_layers=0),
        "exact",
        {"num_hidden_layers": 2},
    ),
    "normalises with softmax": (
        lambda: tokenformer(norm_activation_type="softmax"),
        "published",
        {"ffn_param_tokens": "+8"},
    ),
    "τ can be recomputed where": (
        lambda: tokenformer(token_group_norm="per_group"),
        "recomputed_tau",
        {"ffn_param_tokens": "+8"},
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_refusals_say_why_and_change_nothing(message):
    make, method, amounts = ERRORS[message]
    model = make()
    with pytest.raises(GrowthError) as error:
        grow_by(model, {}, method, seed=0, **amounts)
    assert message in str(error.value)
    assert same_weights(model, make()) and torch.equal(logits(model), logits(make()))


def test_every_method_is_tried():
    assert {case.split()[0] for case in CASES} == set(METHODS)
