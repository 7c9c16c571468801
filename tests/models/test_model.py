import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from golden_data import FOLDER, MANIFEST, formula, inputs, outputs
from golden_models import load_official, official_config
from tiny_models import FAMILIES, PAPER, SIZES, tiny, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.cache_utils import StaticCache

from tokenformer import PRESETS, TokenformerConfig, TokenformerForCausalLM, TokenformerModel, grow
from tokenformer.cost import parameters


def case(letter, prefix):
    return {k.removeprefix(prefix): v for k, v in inputs(letter).items() if k.startswith(prefix)}


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_golden_case_a(attention):
    sizes = MANIFEST["cases"]["A"]["config"]
    config = TokenformerConfig(
        vocab_size=8,
        hidden_size=sizes["hidden"],
        num_attention_heads=sizes["heads"],
        num_hidden_layers=1,
        qkv_param_tokens=sizes["qkv"],
        output_param_tokens=sizes["proj"],
        ffn_param_tokens=sizes["ffn"],
    )
    model = TokenformerModel._from_config(config, attn_implementation=attention)
    layer, want, given = model.layers[0], outputs("A"), inputs("A")
    table = load_official(layer, "A", case("A", "case_a.layer."))

    def run(module, x):
        x = x.clone().requires_grad_()
        position_ids = torch.arange(x.shape[1])[None]
        mask = torch.full((1, 1, x.shape[1], x.shape[1]), -torch.inf).triu(1)
        y = module(
            x,
            attention_mask=mask,
            position_embeddings=model.rotary_emb(x, position_ids),
        )
        return x, y[0] if isinstance(y, tuple) else y

    x, y = run(layer.self_attn, given["case_a.attention_input"])
    torch.testing.assert_close(y, want["attention.output"], rtol=0, atol=2e-5)
    x, y = run(layer, given["case_a.layer_input"])
    torch.testing.assert_close(y, want["layer.output"], rtol=0, atol=2e-5)
    (y * given["case_a.layer_loss_weights"]).sum().backward()
    assert relative(x.grad, want["layer.grad_input"]) < 1e-4
    for name, (parameter, transposed) in table.items():
        got = parameter.grad.t() if transposed else parameter.grad
        assert relative(got, want[f"layer.grad.{name}"]) < 1e-4, name


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("letter", ["M", "M_gelu_l2_norm", "M_softmax"])
def test_golden_case_m(letter, attention):
    facts = MANIFEST["cases"][letter]
    sizes = facts["config"]
    config = official_config(letter)
    model = TokenformerForCausalLM._from_config(config, attn_implementation=attention)
    table = load_official(model, "M", case(letter, "case_m."))
    want = outputs(letter)
    ids, labels = torch.tensor(facts["tokens"]), torch.tensor(facts["labels"])
    out = model(ids, output_hidden_states=True)
    torch.testing.assert_close(out.logits, want["logits"], rtol=0, atol=5e-5)
    names = ["hidden.embedding", *(f"hidden.layer{i}" for i in range(sizes["layers"] - 1))]
    for name, hidden in zip(names, out.hidden_states, strict=False):
        torch.testing.assert_close(hidden, want[name], rtol=0, atol=5e-5)
    torch.testing.assert_close(out.hidden_states[-1], want["hidden.final_norm"], rtol=0, atol=5e-5)
    per_token = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(per_token.view_as(labels), want["per_token_loss"], rtol=2e-6, atol=5e-5)
    loss = per_token.mean()
    assert abs(loss.item() - facts["results"]["loss"]) < 2e-6 * facts["results"]["loss"]
    loss.backward()
    for name, print_ in facts["results"]["grad_fingerprints"].items():
        parameter, transposed = table[name]
        grad = (parameter.grad.t() if transposed else parameter.grad).double()
        probe = formula(f"probe.{name}", list(grad.shape)).double()
        l2 = print_["l2"]
        assert abs(grad.norm().item() - l2) <= 1e-4 * l2, name
        assert abs((grad * probe).sum().item() - print_["dot_probe"]) <= 1e-3 * l2, name
        assert abs(grad.sum().item() - print_["sum"]) <= 1e-3 * l2, name
    for name, value in want.items():
        if name.startswith("grad."):
            parameter, transposed = table[name.removeprefix("grad.")]
            assert relative(parameter.grad.t() if transposed else parameter.grad, value) < 1e-4, name


def test_labels_give_the_shifted_mean_cross_entropy():
    model, ids = tiny(), tokens()
    want = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=ids).loss, want)


PINNED = {
    "124m": 123_569_664,
    "354m": 354_190_848,
    "757m": 753_796_608,
    "1.4b": 1_309_705_728,
    "150m": 151_881_216,
    "450m": 454_166_528,
    "900m": 903_252_480,
    "1.5b": 1_587_219_456,
    "owt2-354m": 353_503_232,
    "owt2-757m": 756_156_416,
    "1m": 1_573_120,
    "4m": 4_325_760,
    "8m": 9_437_696,
    "24m": 25_166_592,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_parameter_counts(name):
    config = TokenformerConfig.from_preset(name)
    with torch.device("meta"):
        model = TokenformerForCausalLM(config)
    count = sum(p.numel() for p in model.parameters())
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert count == PINNED[name.removesuffix("-ffn").removesuffix("-modern")] + head == parameters(config)


def test_modern_presets_are_the_ffn_family_with_sound_scales_and_a_head_of_its_own():
    for name in PINNED:
        mine, theirs = (TokenformerConfig.from_preset(f"{name}-{family}").to_dict() for family in ("modern", "ffn"))
        changed = {k: v for k, v in mine.items() if theirs[k] != v}
        assert changed == {"use_embedding_norm": True, "output_initializer_range": 0.0, "tie_word_embeddings": False}


def test_official_state_dicts_have_our_counts():
    official = json.loads((FOLDER / "official_state_dicts.json").read_text())
    text = json.dumps(official)
    for name in ("150m", "450m", "900m", "1.5b", "owt2-354m", "owt2-757m"):
        assert str(PINNED[name]) in text


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("1m-modem", "did you mean 1m-modern or [^ ]+-modern or [^ ]+-modern[?]"),
        ("gpt2", "there are 124m, 354m, .*, 24m, and each with -ffn or -modern behind it"),
    ],
)
def test_an_unknown_preset_is_told_the_nearest_or_the_sizes(name, hint):
    with pytest.raises(ValueError, match=f"no preset '{name}'; {hint}$"):
        TokenformerConfig.from_preset(name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_equals_uncached(family, attention, cache):
    model, ids = tiny(family, attention=attention), tokens()
    full = model(ids).logits
    past = StaticCache(config=model.config, max_cache_len=32) if cache == "static" else None
    out = model(ids[:, :7], past_key_values=past, use_cache=True)
    pieces = [out.logits]
    for part in (ids[:, 7:12], *ids[:, 12:].split(1, dim=1)):
        out = model(part, past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family):
    model, ids = tiny(family), tokens(1)
    padded = torch.cat([torch.full((1, 5), 9), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), torch.ones_like(ids)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    model.generation_config.pad_token_id = 9
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    left = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(plain[:, -6:], left[:, -6:])


@pytest.mark.parametrize(
    "attention, stance",
    [
        ("eager", "default"),
        ("flex_attention", "force_eager"),  # what it computes, without the half minute that compiling its kernel takes
        pytest.param("flex_attention", "default", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("use_qk_norm", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@torch.no_grad()
def test_attention_backends_agree_with_sdpa(attention, stance, use_qk_norm):
    ids = tokens()
    other, sdpa = (tiny(attention=name, use_qk_norm=use_qk_norm) for name in (attention, "sdpa"))
    with torch.compiler.set_stance(stance):
        torch.testing.assert_close(other(ids).logits, sdpa(ids).logits, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = tokens()
    grads = []
    for checkpointing in (False, True):
        model = tiny().train()
        if checkpointing:
            model.activation_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiles_as_one_graph(family):
    model, ids = tiny(family), tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inductor_trains_the_same_step():
    ids = tokens()
    model, compiled = tiny().train(), torch.compile(tiny().train(), fullgraph=True)
    for m in (model, compiled):
        m(ids, labels=ids, use_cache=False).loss.backward()
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_classes_and_safetensors_round_trip(family, tmp_path):
    model, ids = tiny(family, token_groups=None), tokens()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, TokenformerConfig) and config.to_dict()["token_groups"] == model.config.token_groups
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, TokenformerForCausalLM) and not any(report.values())
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert isinstance(AutoModel.from_pretrained(tmp_path), TokenformerModel)


def test_every_derived_field_survives_saving(tmp_path):
    """A configuration whose values equal the defaults of another width must not be derived again on loading."""
    groups = [{"name": "a", "qkv": 700, "output": 700, "ffn": 3000}, {"name": "b", "qkv": 68, "output": 68, "ffn": 72}]
    config = TokenformerConfig(hidden_size=1024, num_attention_heads=16, token_groups=groups, qkv_tau=26.0)
    config.save_pretrained(tmp_path)
    loaded = TokenformerConfig.from_pretrained(tmp_path)
    assert loaded.token_groups == groups and loaded.qkv_param_tokens == 768
    assert (loaded.qkv_tau, loaded.ffn_tau) == (26.0, math.sqrt(3072))


def test_initial_weights_follow_the_official_scales():
    config = TokenformerConfig(**{**SIZES, **PAPER, "hidden_size": 256, "output_param_tokens": 0})
    block = TokenformerForCausalLM(config).model.layers[0]
    wang = 2 / (3 * math.sqrt(256))
    group = block.self_attn.q_proj.groups["base"]
    for weight, std in ((group.keys, 0.02), (group.values, wang), (block.self_attn.o_proj.linear, wang)):
        assert abs(weight.weight.std().item() / std - 1) < 0.05


def test_values_may_start_at_another_scale():
    sizes = {**SIZES, **PAPER, "hidden_size": 256, "output_param_tokens": 0}
    block = TokenformerForCausalLM(TokenformerConfig(**sizes, value_initializer_range=0.5)).model.layers[0]
    group, wang = block.mlp.groups["base"], 2 / (3 * math.sqrt(256))
    for weight, std in ((group.keys, 0.02), (group.values, 0.5), (block.self_attn.o_proj.linear, wang)):
        assert abs(weight.weight.std().item() / std - 1) < 0.05


def test_what_writes_to_the_residual_stream_may_start_silent():
    """At 0 every block passes on what it gets; the keys, and values of q, k and v, are as always, and so is growth."""
    for family in (PAPER, {"qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 160}):
        model = TokenformerForCausalLM(TokenformerConfig(**SIZES, **family, output_initializer_range=0.0))
        states = model.model(tokens(), output_hidden_states=True).hidden_states
        assert torch.equal(states[0], states[2])
        block = model.model.layers[0]
        assert block.self_attn.v_proj(states[0]).any() and block.mlp.groups["base"].keys.weight.any()
        grow(model, ffn_param_tokens="+16", name="more")
        assert block.mlp.groups["more"].values.weight.std() > 0.02
    sizes = {**SIZES, **PAPER, "hidden_size": 256, "ffn_param_tokens": 512}
    block = TokenformerForCausalLM(TokenformerConfig(**sizes, output_initializer_range=0.03)).model.layers[0]
    for module, std in ((block.mlp, 0.03), (block.self_attn.o_proj, 0.03), (block.self_attn.v_proj, 2 / (3 * 16))):
        assert abs(module.groups["base"].values.weight.std().item() / std - 1) < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_embeddings_may_be_normalised(dtype):
    model, ids = tiny("ffn", use_embedding_norm=True).to(dtype), tokens()
    first = model.model(ids, output_hidden_states=True).hidden_states[0]
    assert first.dtype == dtype
    torch.testing.assert_close(first.float().square().mean(-1), torch.ones(ids.shape), rtol=0.01, atol=0.01)
    direction = F.cosine_similarity(first.float(), model.model.embed_tokens(ids).float(), dim=-1)
    torch.testing.assert_close(direction, torch.ones(ids.shape), rtol=0.01, atol=0.01)


def test_linear_attention_family_is_a_plain_attention():
    """With 0 attention tokens the maps are bias-free linear maps and nothing else."""
    model = tiny("ffn")
    names = [n for n, _ in model.model.layers[0].self_attn.named_parameters()]
    assert names == [f"{p}_proj.linear.weight" for p in "qkvo"]


def test_speaks_gpt_neox_rotary_and_attention():
    """An -ffn attention with GPT-NeoX's weights computes what transformers' GPT-NeoX computes."""
    neox_config = GPTNeoXConfig(
        vocab_size=128,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=8,
        attention_bias=False,
    )
    neox = GPTNeoXForCausalLM(neox_config).gpt_neox.eval()
    mine = tiny("ffn").model
    attention, theirs = mine.layers[0].self_attn, neox.layers[0].attention
    fused = theirs.query_key_value.weight.view(4, 3, 16, 64)
    with torch.no_grad():
        for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
            getattr(attention, name).linear.weight.copy_(fused[:, i].reshape(64, 64))
        attention.o_proj.linear.weight.copy_(theirs.dense.weight)
    x, positions = torch.randn(2, 9, 64), torch.arange(9)[None]
    mask = torch.full((1, 1, 9, 9), -torch.inf).triu(1)
    a, _ = attention(x, attention_mask=mask, position_embeddings=mine.rotary_emb(x, positions))
    b, _ = theirs(x, attention_mask=mask, position_embeddings=neox.rotary_emb(x, positions))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "3"}, "expected int, got str"),
        ({"hidden_size": 65}, "65 is not a multiple of num_attention_heads 4"),
        ({"norm_activation_type": "l2"}, "must be one of l2_norm_gelu"),
        ({"token_group_norm": "each"}, "is 'each'; it must be one of joint, per_group"),
        ({"value_initializer_range": 0.0}, "value_initializer_range is 0.0; it must be positive"),
        ({"output_initializer_range": -0.1}, "output_initializer_range is -0.1; it cannot be negative"),
        (
            {"token_groups": [{"name": "a", "qkv": 48, "output": 40, "ffn": [80, 80]}], "ffn_param_tokens": None},
            "lists ffn parameter tokens for 2 blocks, but num_hidden_layers is 3",
        ),
        (
            {"token_groups": [{"name": "a", "qkv": 48, "output": 40, "ffn": [80, -1, 80]}], "ffn_param_tokens": None},
            "-1 parameter tokens",
        ),
        (
            {
                "token_groups": [{"name": "a", "qkv": 48, "output": 40, "ffn": [80, 0, 80]}],
                "linear_projections": [],
                "ffn_param_tokens": None,
            },
            "'ffn' has neither parameter tokens nor a linear map in block 1",
        ),
        ({"qkv_param_tokens": -3}, "-3 parameter tokens"),
        ({"token_groups": [{"name": "a", "ffn": 5}]}, "add up to 0"),
        (
            {"token_groups": [{"name": "a", **{"qkv": 48, "output": 40, "ffn": 160}}, {"name": "a"}]},
            "names must differ",
        ),
        ({"linear_projections": [], "ffn_param_tokens": 0}, "neither parameter tokens nor a linear map"),
    ],
)
def test_impossible_configurations(changes, message):
    with pytest.raises(Exception, match=message):
        TokenformerConfig(**{**SIZES, **PAPER, **changes})


def test_exactly_one_kind_of_input():
    model = tiny()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    copy.deepcopy(model)(inputs_embeds=torch.randn(1, 4, 64))


def unequal(**changes):
    """A model whose blocks have other numbers of parameter tokens: no "b" in the second, and one ffn without any."""
    groups = [
        {"name": "a", "qkv": 24, "output": [20, 12, 9], "ffn": [80, 60, 0]},
        {"name": "b", "qkv": [8, 0, 4], "output": 6, "ffn": [16, 0, 0]},
    ]
    counts = dict.fromkeys(PAPER)
    return tiny(token_groups=groups, linear_projections=["ffn"], **counts, **changes)


def test_blocks_may_differ_in_parameter_tokens(tmp_path):
    model, ids = unequal(), tokens()
    config = model.config
    assert [getattr(config, name) for name in PAPER] == [32, 26, 96]
    assert (config.qkv_tau, config.ffn_tau) == (math.sqrt(32), math.sqrt(96))
    layers = model.pattention_layers
    assert [list(layer.groups) for layer in layers["ffn"]] == [["a", "b"], ["a"], []]
    assert [layer.num_tokens for layer in layers["qkv"]] == [32] * 3 + [24] * 3 + [28] * 3
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.config.token_groups == config.token_groups
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_notes_of_a_group_are_kept_and_others_stay_as_they_were():
    groups = [{"name": "a", **dict.fromkeys(("qkv", "output", "ffn"), 8), "routed": False}]
    groups.append({"name": "b", "ffn": 4, "blocks": [1], "routed": True})
    config = TokenformerConfig(**SIZES, token_groups=groups)
    assert config.token_groups == [
        {"name": "a", "qkv": 8, "output": 8, "ffn": 8},
        {"name": "b", "qkv": 0, "output": 0, "ffn": 4, "routed": True, "blocks": [1]},
    ]
    assert TokenformerConfig(**config.to_dict()).token_groups == config.token_groups
    model = TokenformerForCausalLM(config)
    assert [list(layer.gates) for layer in model.pattention_layers["ffn"]] == [["b"]] * 3
    assert not any(layer.gates for layer in model.pattention_layers["output"])


def test_biases_of_a_new_model_are_zero_and_counted():
    model = TokenformerForCausalLM(TokenformerConfig(**SIZES, **PAPER, pattention_bias=True))
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias") and "norm" not in name}
    assert len(biases) == 2 * 5 * 3 and not any(p.any() for p in biases.values())
    assert parameters(model.config) == sum(p.numel() for p in model.parameters())


def test_parallel_residual_adds_both_maps_of_the_blocks_input():
    model = tiny(use_parallel_residual=True)
    block, x = model.model.layers[0], torch.randn(2, 5, 64)
    rotary = model.model.rotary_emb(x, torch.arange(5)[None])
    attended = block.self_attn(block.input_layernorm(x), attention_mask=None, position_embeddings=rotary)[0]
    y = block(x, attention_mask=None, position_embeddings=rotary)
    torch.testing.assert_close(y, x + attended + block.mlp(block.post_attention_layernorm(x)))
    assert not torch.allclose(y, tiny().model.layers[0](x, attention_mask=None, position_embeddings=rotary))


@torch.no_grad()
def test_qk_norm_divides_each_head_by_its_root_mean_square():
    model, plain, ids = tiny("ffn", use_qk_norm=True), tiny("ffn"), tokens()
    assert plain.state_dict().keys() == model.state_dict().keys()

    def normalised(module, inputs, output):
        heads = output.unflatten(-1, (4, 16))
        return (heads / (heads.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2)

    for layer in plain.model.layers:
        layer.self_attn.q_proj.register_forward_hook(normalised)
        layer.self_attn.k_proj.register_forward_hook(normalised)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits, tiny("ffn")(ids).logits, atol=0.1)


NEW_KINDS = {
    "normalised queries and keys": {"use_qk_norm": True},
    "biases, parallel": {"pattention_bias": True, "use_parallel_residual": True},
    "no norm, untied": {"norm_activation_type": "gelu", "pattention_bias": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", NEW_KINDS)
def test_new_kinds_round_trip_and_generate(kind, tmp_path):
    model, ids = tiny(**NEW_KINDS[kind]), tokens()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.normal_(std=0.2)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    first = model(ids[:, :9], use_cache=True)
    rest = model(ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_what_existed_before_has_the_names_it_had():
    for family in FAMILIES:
        names = set(tiny(family).state_dict())
        assert not any((name.endswith(".bias") and "norm" not in name) or ".gates." in name for name in names)
    config = json.loads(TokenformerConfig().to_json_string())
    assert config["token_groups"] == [{"name": "base", "qkv": 768, "output": 768, "ffn": 3072}]
