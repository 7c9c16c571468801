import itertools

import pytest
import torch
from golden_data import MANIFEST, inputs, outputs
from golden_models import load_official, official_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, tiny, tokens
from transformers import AutoModelForCausalLM

from tokenformer import TokenformerConfig, TokenformerForCausalLM, grow
from tokenformer.errors import GrowthError
from tokenformer.growth.grow import resolve_amount

EVERYTHING = {"qkv_param_tokens": 64, "output_param_tokens": "+50", "ffn_param_tokens": "+50%", "num_hidden_layers": 5}


def all_logits(model, ids):
    """Uncached logits, then those of a cached prefix and of single steps after it."""
    out = model(ids[:, :9], use_cache=True)
    pieces = [model(ids, use_cache=False).logits, out.logits]
    for step in ids[:, 9:].split(1, dim=1):
        out = model(step, past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    return pieces


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
@torch.no_grad()
def test_growth_is_bit_for_bit(family, dtype, attention, norm):
    model, ids = tiny(family, attention=attention, dtype=dtype, norm_activation_type=norm), tokens()
    before = all_logits(model, ids)
    for _ in range(2):
        sizes = {k: "+50" for k in EVERYTHING if k != "num_hidden_layers"} | {"num_hidden_layers": "+2"}
        grow(model, **sizes)
        assert all(torch.equal(a, b) for a, b in zip(before, all_logits(model, ids), strict=True))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.differing_executors])
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    steps=st.lists(
        st.dictionaries(st.sampled_from(sorted(EVERYTHING)), st.integers(1, 5), min_size=1), min_size=1, max_size=3
    ),
    rows=st.integers(1, 3),
    length=st.integers(1, 30),
    changes=st.fixed_dictionaries(
        dict.fromkeys(
            ("use_qk_norm", "use_embedding_norm", "elementwise_affine", "use_parallel_residual"), st.booleans()
        )
    ),
)
@torch.no_grad()
def test_any_sequence_of_growths_is_bit_for_bit(family, steps, rows, length, changes):
    model, ids = tiny(family, **changes), tokens(rows, length)
    before = model(ids).logits
    for step in steps:
        grow(model, **{field: f"+{n}" for field, n in step.items()})
    assert torch.equal(model(ids).logits, before)


def test_totals_names_and_configuration(tmp_path):
    model, ids = tiny(), tokens()
    taus = model.config.qkv_tau, model.config.output_tau, model.config.ffn_tau
    kept = {name: id(p) for name, p in model.named_parameters() if "layers.0" in name or "layers" not in name}
    grow(model, **EVERYTHING, name="second")
    config = model.config
    assert (config.qkv_param_tokens, config.output_param_tokens, config.ffn_param_tokens) == (64, 90, 240)
    assert config.token_groups[1] == {"name": "second", "qkv": 16, "output": 50, "ffn": 80, "blocks": [2, 4]}
    assert config.num_hidden_layers == 5 == len(model.model.layers)
    assert (config.qkv_tau, config.output_tau, config.ffn_tau) == taus
    assert kept.items() <= {name: id(p) for name, p in model.named_parameters()}.items()
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    grow(model, ffn_param_tokens="+1")
    assert [g["name"] for g in config.token_groups] == ["base", "second", "grown1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_new_tokens_and_blocks_receive_gradient_and_move(family):
    """Keys and values both zero would never learn: each new pair has a nonzero gradient at once or one step later."""
    model, ids = tiny(family).train(), tokens()
    old = {id(p) for p in model.parameters()}
    grow(model, qkv_param_tokens="+16", output_param_tokens="+16", ffn_param_tokens="+16", num_hidden_layers="+2")
    new = {name: p for name, p in model.named_parameters() if id(p) not in old}
    start = {name: p.detach().clone() for name, p in new.items()}
    assert new
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    touched = set()
    for _ in range(4):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        touched |= {name for name, p in new.items() if p.grad is not None and p.grad.abs().max() > 0}
        if not touched - {None}:
            pytest.fail("no new parameter has a gradient")
        optimizer.step()
    assert touched == set(new)
    assert all(not torch.equal(p, start[name]) for name, p in new.items())


def test_new_values_are_as_spread_as_the_configuration_says():
    model = tiny(hidden_size=256, value_initializer_range=0.5)
    grow(model, ffn_param_tokens="+64", qkv_param_tokens="+64", num_hidden_layers="+1")
    for layer in (model.model.layers[0].mlp, model.model.layers[2].self_attn.k_proj):
        new = layer.groups["grown1"]
        assert not new.keys.weight.any() and abs(new.values.weight.std().item() / 0.5 - 1) < 0.05


def test_depth_inserts_copies_evenly_and_numbers_the_blocks():
    model = tiny(num_hidden_layers=3)
    first = model.model.layers[0].self_attn.q_proj.groups["base"].keys.weight
    grow(model, num_hidden_layers=6)
    assert [b.self_attn.layer_idx for b in model.model.layers] == list(range(6))
    zero = [bool((b.mlp.groups["base"].values.weight == 0).all()) for b in model.model.layers]
    assert zero == [False, True] * 3
    assert torch.equal(model.model.layers[1].self_attn.q_proj.groups["base"].keys.weight, first)


@torch.no_grad()
def test_depth_is_exact_under_softmax_but_tokens_are_refused():
    model, ids = tiny(norm_activation_type="softmax"), tokens()
    before = model(ids).logits
    with pytest.raises(GrowthError, match=r"exp\(0\) = 1"):
        grow(model, ffn_param_tokens="+1", num_hidden_layers="+1")
    assert len(model.model.layers) == 3
    grow(model, num_hidden_layers="+1")
    assert torch.equal(model(ids).logits, before)


def test_preset_growth_reaches_the_preset():
    sizes = {"num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 16}
    model = TokenformerForCausalLM(TokenformerConfig.from_preset("124m", **sizes))
    grow(model, preset="354m", num_hidden_layers=1)
    assert (model.config.qkv_param_tokens, model.config.ffn_param_tokens) == (2140, 8560)
    with pytest.raises(GrowthError, match="hidden_size 1024, the model 768"):
        grow(model, preset="450m")
    with pytest.raises(GrowthError, match="use_embedding_norm True, the model False"):
        grow(model, preset="757m-modern")


@torch.no_grad()
def test_official_growth_with_tau_kept_is_ours():
    """Golden case G: zero keys at the old √n reproduce case M; zero keys at the recomputed √n, as published, do not."""
    facts = MANIFEST["cases"]["M"]
    model = TokenformerForCausalLM(official_config("M"))
    load_official(
        model, "M", {k.removeprefix("case_m."): v for k, v in inputs("M").items() if k.startswith("case_m.sequ")}
    )
    ids = torch.tensor(facts["tokens"])
    grow(model, qkv_param_tokens="+32", output_param_tokens="+32", ffn_param_tokens="+128")
    want = outputs("G")
    torch.testing.assert_close(model(ids).logits, want["zero_key_tau_frozen.logits"], rtol=0, atol=5e-5)
    assert (model(ids).logits - want["zero_key.logits"]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to grow: the model already has qkv_param_tokens 48"),
        ({"ffn_param_tokens": 160}, "nothing to grow"),
        ({"ffn_param_tokens": 159}, "ffn_param_tokens asked 159, found 160"),
        ({"num_hidden_layers": 2}, "num_hidden_layers asked 2, found 3"),
        ({"num_loops": 1}, "nothing to grow: .* num_loops 1"),
        ({"num_loops": 0}, "num_loops asked 0, found 1"),
        ({"ffn_param_tokens": "+5k"}, r"is .\+5k.; write a total"),
        ({"ffn_param_tokens": "1.5"}, "write a total"),
        ({"ffn_param_tokens": "50%"}, "write a total"),
        ({"ffn_param_tokens": "+0"}, "adds nothing"),
        ({"ffn_param_tokens": "+1", "name": "base"}, "'base' exists already"),
        ({"ffn_param_tokens": "+1", "name": "values"}, "'values' cannot be used"),
        ({"ffn_param_tokens": "+1", "num_hidden_layers": "+1", "name": "training"}, "'training' cannot be used"),
        ({"ffn_param_tokens": "+1", "name": "embedding"}, "'embedding' cannot be used"),
        ({"preset": "2m"}, "no preset '2m'; did you mean 24m or 124m or 8m?"),
    ],
)
def test_refusals_leave_the_model_untouched(arguments, message):
    model = tiny()
    before = model.config.to_dict(), [name for name, _ in model.named_parameters()]
    with pytest.raises(GrowthError, match=message):
        grow(model, **arguments)
    assert before == (model.config.to_dict(), [name for name, _ in model.named_parameters()])


@given(current=st.integers(1, 10**6), added=st.integers(1, 10**6))
def test_amounts(current, added):
    assert resolve_amount(current + added, current, what="n") == current + added
    assert resolve_amount(f"+{added}", current, what="n") == current + added
    assert resolve_amount("+100%", current, what="n") == 2 * current
    assert resolve_amount(None, current, what="n") == current


def test_every_pair_of_projections_can_grow_alone():
    ids = tokens()
    for pair in itertools.combinations(("qkv_param_tokens", "output_param_tokens", "ffn_param_tokens"), 2):
        model = tiny("ffn")
        with torch.no_grad():
            before = model(ids).logits
            grow(model, **dict.fromkeys(pair, "+8"))
            assert torch.equal(model(ids).logits, before)
        assert [f"{p}_param_tokens" in pair for p in ("qkv", "output")] == [
            model.config.qkv_tau is not None,
            model.config.output_tau is not None,
        ]
