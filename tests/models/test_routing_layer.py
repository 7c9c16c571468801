"""Routed groups: gates decide for each text token; with every gate closed the layer is the one without the group."""

import copy
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make, tiny, tokens
from transformers import AutoModelForCausalLM

from tokenformer import TokenformerConfig, TokenformerForCausalLM
from tokenformer.models.pattention import NORM_ACTIVATION_TYPES, Pattention

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def routed_layer(dtype=torch.float64, tokens=None, **kwargs):
    """Three groups, the last two routed, each by another feature of the input."""
    counts = tokens or {"base": 20, "a": 12, "b": 7}
    layer = Pattention(16, 24, counts, key_std=0.5, value_std=0.3, dtype=dtype, **kwargs)
    for i, name in enumerate(["a", "b"]):
        layer.add_gate(name)
        layer.gates[name].weight[0, i] = 1.0
        layer.gates[name].bias.zero_()
    return layer


def without(layer, *names):
    """The layer that never had these groups."""
    layer = copy.deepcopy(layer)
    for name in names:
        del layer.groups[name]
    layer.gates.clear()
    return layer


def row_by_row(layer, x):
    """What the definition says: every row through a layer of the groups that are open for it."""
    outs = []
    for row in x.reshape(-1, 16):
        closed = [name for name, gate in layer.gates.items() if gate(row) <= 0]
        outs.append(without(layer, *closed)(row[None]))
    return torch.cat(outs).view(*x.shape[:-1], 24)


def dense(layer, x):
    """What compilers and tracers run, run eagerly."""
    with patch("tokenformer.models.pattention._is_traced", return_value=True):
        return layer(x)


def near(a, b, dtype=torch.float64):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm() + 1e-13


def close_gates(model):
    for name, buffer in model.named_buffers():
        if ".gates." in name:
            buffer.fill_(-1.0 if name.endswith("bias") else 0.0)


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(NORM_ACTIVATION_TYPES),
    group_norm=st.sampled_from(["joint", "per_group"]),
    linear=st.booleans(),
    bias=st.booleans(),
    rows=st.integers(0, 12),
    fused=st.booleans(),
)
def test_every_row_sees_the_groups_open_for_it(norm, group_norm, linear, bias, rows, fused):
    layer = routed_layer(norm_activation_type=norm, token_group_norm=group_norm, linear=linear, bias=bias)
    layer.fused = fused
    x = torch.randn(2, rows, 16, dtype=torch.float64)
    if rows:
        near(layer(x), row_by_row(layer, x))
    else:
        assert layer(x).shape == (2, 0, 24)
    near(dense(layer, x), layer(x))


@pytest.mark.parametrize("norm", NORM_ACTIVATION_TYPES)
@pytest.mark.parametrize("group_norm", ["joint", "per_group"])
def test_compilers_tracers_and_functorch_compute_the_same_densely(norm, group_norm):
    layer = routed_layer(norm_activation_type=norm, token_group_norm=group_norm)
    x = torch.randn(2, 30, 16, dtype=torch.float64)
    near(torch.func.vmap(layer)(x), layer(x))
    if norm in ("l2_norm_gelu", "softmax"):
        torch._dynamo.reset()
        near(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
        near(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize("norm", NORM_ACTIVATION_TYPES)
def test_where_all_groups_are_closed_nothing_is_added(norm):
    layer = routed_layer(norm_activation_type=norm, tokens={"a": 12, "b": 7})
    x = torch.randn(40, 16, dtype=torch.float64).requires_grad_()
    shut = (x[:, 0] <= 0) & (x[:, 1] <= 0)
    for y in (layer(x), dense(layer, x)):
        assert shut.any() and not y[shut].any() and y[~shut].any(dim=1).all()
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.isfinite().all() and not grad[shut].any()
    near(layer(x), row_by_row(layer, x))


def test_gradients_go_through_the_partition():
    layer = routed_layer()
    x = torch.randn(5, 8, 16, dtype=torch.float64).requires_grad_()
    weight = torch.randn(5, 8, 24, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    partitioned = torch.autograd.grad((layer(x) * weight).sum(), wanted)
    masked = torch.autograd.grad((dense(layer, x) * weight).sum(), wanted)
    for a, b in zip(partitioned, masked, strict=True):
        near(a, b)


@pytest.mark.parametrize("shape", [(16,), (9, 16), (2, 9, 16), (0, 16), (2, 0, 16)])
def test_any_leading_shape(shape):
    layer = routed_layer()
    assert layer(torch.randn(shape, dtype=torch.float64)).shape == (*shape[:-1], 24)


def test_autocast_and_its_dtype():
    layer, x = routed_layer(torch.float32, tokens={"a": 12, "b": 7}), torch.randn(40, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    near(y, layer(x).bfloat16(), torch.bfloat16)


def test_a_group_closed_for_a_row_does_not_see_it():
    layer = routed_layer()
    x = torch.randn(50, 16, dtype=torch.float64)
    rows = []
    layer.groups["a"].keys.register_forward_hook(lambda m, args, out: rows.append(len(args[0])))
    layer(x)
    assert sum(rows) == (x[:, 0] > 0).sum() < 50


def test_a_new_gate_is_open_and_never_trains():
    layer = Pattention(16, 24, {"base": 20, "a": 12})
    x = torch.randn(9, 16)
    before, parameters = layer(x), len(list(layer.parameters()))
    layer.add_gate("a")
    assert torch.equal(layer(x), before)
    assert len(list(layer.parameters())) == parameters
    assert {n for n in layer.state_dict() if "gates" in n} == {"gates.a.weight", "gates.a.bias"}
    with pytest.raises(ValueError, match="no token group 'c' to route; there are base, a"):
        layer.add_gate("c")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "gelu_l1_norm", "gelu"])
@pytest.mark.parametrize("linear", [False, True])
def test_closed_gates_give_the_bits_of_the_layer_without_the_groups(dtype, norm, linear):
    layer = routed_layer(dtype, norm_activation_type=norm, linear=linear)
    for gate in layer.gates.values():
        gate.weight.zero_()
        gate.bias.fill_(-1.0)
    parent, x = without(layer, "a", "b"), torch.randn(3, 200, 16, dtype=dtype)
    assert torch.equal(layer(x), parent(x))
    with torch.no_grad():
        assert torch.equal(layer(x), parent(x))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(a).square().sum().backward()
    parent(b).square().sum().backward()
    assert torch.equal(a.grad, b.grad)


def routed_child(parent):
    """The parent with a routed group in every projection."""
    config = copy.deepcopy(parent.config)
    fields = config.to_dict()
    new = {"name": "memory", "qkv": 10, "output": 9, "ffn": 20, "routed": True}
    fields |= {f"{p}_param_tokens": None for p in ("qkv", "output", "ffn")}
    child = TokenformerForCausalLM._from_config(
        TokenformerConfig(**fields | {"token_groups": [*config.token_groups, new]}),
        attn_implementation=config._attn_implementation,
    ).to(parent.dtype)
    report = child.load_state_dict(parent.state_dict(), strict=False)
    assert not report.unexpected_keys and all(".memory." in key for key in report.missing_keys)
    return child.eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["paper", "ffn", "grown"])
def test_a_model_with_every_gate_closed_is_its_parent_to_the_last_bit(kind, dtype):
    parent = make(kind, dtype=dtype)
    child, ids = routed_child(parent), tokens()
    assert not torch.equal(child(ids).logits, parent(ids).logits)
    close_gates(child)
    assert torch.equal(child(ids).logits, parent(ids).logits)
    asked = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    more = {"return_dict_in_generate": True, "output_logits": True}
    a, b = (m.generate(ids, **asked, **more) for m in (child, parent))
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
    losses = []
    for model in (child.train(), parent.train()):
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append(loss)
    assert torch.equal(*losses)
    mine = dict(child.named_parameters())
    for name, p in parent.named_parameters():
        assert torch.equal(mine[name].grad, p.grad), name
    assert all(p.grad is None for name, p in mine.items() if ".memory." in name)


def test_routed_models_are_saved_and_loaded_with_their_gates(tmp_path):
    child, ids = routed_child(tiny()), tokens()
    close_gates(child)
    for i, layer in enumerate(child.pattention_layers["ffn"]):
        layer.gates["memory"].weight[0, i] = 5.0
        layer.gates["memory"].bias.zero_()
    child.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and loaded.config.token_groups == child.config.token_groups
    assert torch.equal(loaded(ids).logits, child(ids).logits)
    assert loaded.config.base_model_tp_plan == {}
    assert not any(".gates." in name for name, _ in loaded.named_parameters())
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    near(half(ids).logits, child(ids).logits.bfloat16(), torch.bfloat16)
    assert [g.get("routed") for g in loaded.config.token_groups] == [None, True]


def test_cached_generation_of_a_routed_model_is_its_uncached_one():
    child, ids = routed_child(tiny(dtype=torch.float64, num_hidden_layers=1)), tokens()
    for name, buffer in child.named_buffers():
        if ".gates." in name:
            buffer.normal_()
    full = child(ids).logits
    out = child(ids[:, :7], use_cache=True)
    pieces = [out.logits]
    for part in ids[:, 7:].split(1, dim=1):
        out = child(part, past_key_values=out.past_key_values, use_cache=True)
        pieces.append(out.logits)
    near(torch.cat(pieces, 1), full)
    torch._dynamo.reset()
    compiled = torch.compile(child, backend="aot_eager", fullgraph=True)
    near(compiled(ids, use_cache=False).logits, full)


def test_missing_gates_start_open(tmp_path):
    child = routed_child(tiny())
    state = {name: t for name, t in child.state_dict().items() if ".gates." not in name}
    child.save_pretrained(tmp_path, state_dict=state)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(report["missing_keys"]) == 2 * 5 * 3
    for model in (child, loaded):
        gates = [b for name, b in model.named_buffers() if ".gates." in name]
        assert len(gates) == 2 * 5 * 3
        assert all(b.unique().tolist() == ([1.0] if b.dim() == 1 else [0.0]) for b in gates)
