import copy

import pytest
import torch
import torch.nn.functional as F
from golden_data import inputs, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenformer.models.pattention import (
    NORM_ACTIVATION_TYPES,
    Pattention,
    pattention,
)
from tokenformer.models.token_group import default_tau, draw_tokens, zero_of_new_group

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer_and_input(dtype=torch.float32, tokens=None, n_rows=150, **kwargs):
    layer = Pattention(24, 40, tokens or {"base": 56, "more": 16}, key_std=0.5, value_std=0.3, dtype=dtype, **kwargs)
    return layer, torch.randn(2, n_rows // 2, 24, dtype=dtype)


def random_biases(layer):
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)


def run(layer, x, fused=True):
    """Output and the gradient of x and of every parameter, for one fixed random loss."""
    layer.fused = fused
    x = x.clone().requires_grad_()
    y = layer(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    wanted = [x, *[p for p in layer.parameters() if p.requires_grad]]
    return [y, *torch.autograd.grad((y * weight).sum(), wanted)]


def assert_near(a, b, relative):
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a.double() - b.double()).norm() <= relative * b.double().norm() + 1e-13


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax"])
@pytest.mark.parametrize("fused", [True, False])
def test_golden_case_p(norm, fused):
    given_, want = inputs("P"), outputs("P")
    layer = Pattention(24, 40, 56, norm_activation_type=norm)
    layer.fused = fused
    with torch.no_grad():
        layer.groups["base"].keys.weight.copy_(given_["case_p.key_param_tokens"])
        layer.groups["base"].values.weight.copy_(given_["case_p.value_param_tokens"].t())
    x = given_["case_p.input"].requires_grad_()
    y = layer(x)
    loss = (y * given_["case_p.loss_weights"]).sum()
    gx, gk, gv = torch.autograd.grad(loss, [x, layer.groups["base"].keys.weight, layer.groups["base"].values.weight])
    torch.testing.assert_close(y, want[f"{norm}.output"], rtol=0, atol=2e-5)
    torch.testing.assert_close(loss, want[f"{norm}.loss"].reshape(()), rtol=2e-6, atol=2e-5)
    for got, name in ((gx, "grad_input"), (gk, "grad_key"), (gv.t(), "grad_value")):
        assert_near(got, want[f"{norm}.{name}"], 1e-4)


def test_golden_case_n():
    """The norms the model uses around Pattention: parameter-free in blocks, learned at the end, both with eps 1e-5."""
    given_, want = inputs("N"), outputs("N")
    x = given_["case_n.input"].requires_grad_()
    block = F.layer_norm(x, (64,), eps=1e-5)
    final = F.layer_norm(x, (64,), given_["case_n.final_norm.weight"], given_["case_n.final_norm.bias"], eps=1e-5)
    for y, name in ((block, "block"), (final, "final")):
        (gx,) = torch.autograd.grad((y * given_["case_n.loss_weights"]).sum(), x)
        torch.testing.assert_close(y, want[f"{name}.output"], rtol=0, atol=2e-5)
        assert_near(gx, want[f"{name}.grad_input"], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("tokens", [{"base": 56}, {"base": 56, "more": 16, "most": 1}])
def test_fused_path_equals_reference(dtype, linear, tokens):
    layer, x = layer_and_input(dtype, tokens, linear=linear)
    for fast, plain in zip(run(layer, x, True), run(layer, x, False), strict=True):
        assert_near(fast, plain, TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 200), counts=st.lists(st.integers(2, 40), min_size=1, max_size=3), frozen=st.integers(0, 5))
def test_fused_gradients_for_any_shape_and_any_frozen_map(rows, counts, frozen):
    layer, x = layer_and_input(torch.float64, {f"g{i}": n for i, n in enumerate(counts)}, 2 * rows)
    parameters = list(layer.parameters())
    if len(parameters) > 1:
        parameters[frozen % len(parameters)].requires_grad_(False)
    for fast, plain in zip(run(layer, x, True), run(layer, x, False), strict=True):
        assert_near(fast, plain, 1e-12)


def test_layer_equals_reference_function():
    for norm in NORM_ACTIVATION_TYPES:
        layer, x = layer_and_input(norm_activation_type=norm)
        groups = layer.groups.values()
        keys, values = [g.keys.weight for g in groups], [g.values.weight for g in groups]
        want = pattention(x, keys, values, tau=layer.tau, norm_activation_type=norm)
        assert_near(layer(x), want, 1e-6)


def test_gradients_reach_an_input_that_alone_needs_them():
    layer, x = layer_and_input(torch.float64)
    layer.requires_grad_(False)
    for fast, plain in zip(run(layer, x, True), run(layer, x, False), strict=True):
        assert_near(fast, plain, 1e-12)


@pytest.mark.parametrize("loss", [torch.sum, lambda y: y.square().sum()], ids=["linear", "square"])
def test_second_derivatives_are_those_of_the_reference(loss):
    """A gradient penalty; the linear loss's first derivative needs no gradient of the outputs."""
    layer, x = layer_and_input(torch.float64, {"base": 24, "more": 8})
    found = []
    for fused in (True, False):
        layer.fused, inputs = fused, x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(layer(inputs)), inputs, create_graph=True)
        wanted = [inputs, *layer.parameters()]
        found.append([gradient, *torch.autograd.grad(gradient.square().sum(), wanted)])
    for fast, plain in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert_near(fast, plain, 1e-9)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rows_of_any_size_give_the_outputs_of_their_direction(dtype, tolerance, norm, fused):
    """The norm cancels the length of a row, whose square is beyond float32 from 1.8e19 on."""
    layer, x = layer_and_input(dtype, norm_activation_type=norm)
    exact, _ = layer_and_input(torch.float64, norm_activation_type=norm)
    exact.load_state_dict(layer.state_dict())
    for size in (1e10, 1e20, 1e25, 1e30):
        huge = (x.double() * size).to(dtype)
        assert_near(run(layer, huge, fused)[0], run(exact, huge.double(), False)[0].to(dtype), tolerance)
        with torch.no_grad():
            layer.fused = fused
            assert_near(layer(huge), exact(huge.double()).to(dtype), tolerance)
        assert all(gradient.isfinite().all() for gradient in run(layer, huge, fused))


def test_autocast_runs_and_returns_its_dtype():
    layer, x = layer_and_input()
    with torch.autocast("cpu", torch.bfloat16):
        fast, plain = run(layer, x, True), run(layer, x, False)
    assert fast[0].dtype == torch.bfloat16 and fast[1].dtype == torch.float32
    for a, b in zip(fast, plain, strict=True):
        assert_near(a, b, 2e-2)


def test_fused_path_keeps_one_wide_activation_and_reference_more():
    layer, x = layer_and_input(tokens={"base": 512})
    kept = {}
    for fused in (True, False):
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.__setitem__(t.data_ptr(), t.numel()) or t, lambda t: t
        ):
            run(layer, x, fused)
        kept[fused] = sum(n == 150 * 512 for n in sizes.values())
    assert kept[True] == 1 < kept[False]


@pytest.mark.parametrize("change", ["hook", "subclass", "replaced_forward"])
def test_changed_maps_are_called_not_read(change):
    """LoRA, quantisers and tensor parallelism change nn.Linear in these ways; reading its weight would skip them."""
    layer, x = layer_and_input()
    keys = layer.groups["more"].keys
    before = layer(x)
    if change == "hook":
        keys.register_forward_hook(lambda m, args, out: out * 2)
    elif change == "subclass":
        keys.__class__ = type("Doubled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    else:
        original = keys.forward
        keys.forward = lambda x: 2 * original(x)
    changed = layer(x)
    assert not torch.allclose(before, changed)
    keys_2 = [layer.groups["base"].keys.weight, 2 * keys.weight]
    values = [g.values.weight for g in layer.groups.values()]
    torch.testing.assert_close(changed, pattention(x, keys_2, values, tau=layer.tau))


def test_works_under_functorch_and_compile():
    layer, x = layer_and_input(torch.float64)
    jacobian = torch.func.jacrev(layer)(x[0, :2])
    assert_near(jacobian, torch.autograd.functional.jacobian(layer, x[0, :2]), 1e-10)
    assert_near(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "gelu_l1_norm", "gelu"])
@pytest.mark.parametrize(("fused", "bias"), [(True, False), (False, False), (False, True)])
def test_added_group_changes_no_bit_and_learns(dtype, norm, fused, bias):
    layer, x = layer_and_input(dtype, norm_activation_type=norm, bias=bias)
    random_biases(layer)
    layer.fused = fused
    before = layer(x)
    tau, weights = layer.tau, [id(p) for p in layer.parameters()]
    layer.add_group("new", 30)
    assert torch.equal(layer(x), before)
    assert layer.tau == tau and [id(p) for p in layer.parameters()][: len(weights)] == weights
    layer(x).square().sum().backward()
    assert layer.groups["new"].keys.weight.grad.abs().max() > 0
    with torch.no_grad():
        layer.groups["new"].keys.weight -= 0.01 * layer.groups["new"].keys.weight.grad
    layer.zero_grad()
    layer(x).square().sum().backward()
    assert layer.groups["new"].values.weight.grad.abs().max() > 0


@pytest.mark.parametrize("norm", NORM_ACTIVATION_TYPES)
def test_first_group_beside_a_linear_map_is_exact_too(norm):
    layer, x = layer_and_input(tokens={"base": 0}, norm_activation_type=norm)
    before = layer(x)
    assert torch.equal(before, F.linear(x, layer.linear.weight)) and layer.tau is None
    layer.add_group("new", 16)
    assert torch.equal(layer(x), before) and layer.tau == default_tau(16, norm)
    layer(x).square().sum().backward()
    assert layer.groups["new"].values.weight.grad.abs().max() > 0


def test_softmax_refuses_to_grow_and_says_why():
    layer, _ = layer_and_input(norm_activation_type="softmax")
    with pytest.raises(ValueError, match=r"exp\(0\) = 1"):
        layer.add_group("new", 4)
    assert list(layer.groups) == ["base", "more"]


def test_an_all_zero_row_gives_zeros_and_finite_gradients():
    for norm in ("l2_norm_gelu", "gelu_l2_norm", "gelu_l1_norm"):
        layer, x = layer_and_input(norm_activation_type=norm)
        results = run(layer, torch.zeros_like(x))
        assert torch.equal(results[0], torch.zeros_like(results[0]))
        assert all(r.isfinite().all() for r in results)


def test_growth_recomputing_tau_would_change_the_function():
    """What the official growth does (PAPER: relative layer error 1.06 for 576 -> 2140 zero keys)."""
    layer, x = layer_and_input(tokens={"base": 576})
    before = layer(x)
    layer.add_group("new", 2140 - 576)
    layer.tau = default_tau(2140, "l2_norm_gelu")
    assert (layer(x) - before).norm() / before.norm() > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": -1}, "-1 parameter tokens"),
        ({"num_tokens": {"keys": 3}}, "'keys' cannot be used"),
        ({"num_tokens": {"a.b": 3}}, r"'a\.b' cannot be used"),
        ({"num_tokens": 3, "norm_activation_type": "l2"}, "must be one of l2_norm_gelu"),
        ({"num_tokens": 3, "token_group_norm": "each"}, "is 'each'; it must be one of joint, per_group"),
    ],
)
def test_impossible_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Pattention(8, 8, **arguments)


def test_add_group_errors():
    layer, _ = layer_and_input()
    with pytest.raises(ValueError, match="'base' exists already"):
        layer.add_group("base", 3)
    with pytest.raises(ValueError, match="at least one"):
        layer.add_group("new", 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_inference_gives_the_bits_of_training(dtype):
    layer, x = layer_and_input(dtype, n_rows=600)
    with torch.no_grad():
        inference = layer(x)
    assert torch.equal(inference, layer(x).detach())


def test_without_a_norm_it_is_a_feed_forward_with_biases():
    layer, x = layer_and_input(torch.float64, {"base": 56}, norm_activation_type="gelu", bias=True, linear=True)
    random_biases(layer)
    keys, values = layer.groups["base"].keys, layer.groups["base"].values
    want = layer.linear(x) + F.linear(F.gelu(F.linear(x, keys.weight, keys.bias)), values.weight, layer.bias)
    assert_near(layer(x), want, 1e-14)


def test_biases_enter_scores_before_the_norm_and_the_output_once():
    layer, x = layer_and_input(torch.float64, bias=True)
    assert sorted(n for n, _ in layer.named_parameters() if n.endswith("bias")) == [
        "bias",
        "groups.base.keys.bias",
        "groups.more.keys.bias",
    ]
    assert not any(p.any() for n, p in layer.named_parameters() if n.endswith("bias"))
    random_biases(layer)
    groups = layer.groups.values()
    with_one = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)
    keys = [torch.cat([g.keys.weight, g.keys.bias[:, None]], dim=1) for g in groups]
    want = pattention(with_one, keys, [g.values.weight for g in groups], tau=layer.tau) + layer.bias
    assert_near(layer(x), want, 1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


def test_a_linear_map_alone_gets_an_output_bias_only():
    layer = Pattention(24, 40, 0, bias=True)
    random_biases(layer)
    x = torch.randn(3, 24)
    assert_near(layer(x), F.linear(x, layer.linear.weight, layer.bias), 1e-6)
    before = layer(x)
    layer.add_group("new", 8)
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("norm", NORM_ACTIVATION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_group_is_the_sum_of_layers_of_one_group(norm, dtype):
    both, x = layer_and_input(dtype, norm_activation_type=norm, token_group_norm="per_group")
    alone = []
    for name in both.groups:
        layer = copy.deepcopy(both)
        for other in [other for other in both.groups if other != name]:
            del layer.groups[other]
        layer.token_group_norm = "joint"
        alone.append(layer)
    a, b = (run(layer, x) for layer in alone)
    together = run(both, x)
    assert torch.equal(together[0], a[0] + b[0])
    for got, want in zip(together[2:], [*a[2:], *b[2:]], strict=True):
        assert torch.equal(got, want)
    for fast, plain in zip(together, run(both, x, False), strict=True):
        assert_near(fast, plain, TOLERANCE[dtype])


@pytest.mark.parametrize("fused", [True, False])
def test_with_one_group_both_norms_are_the_same_bits(fused):
    layer, x = layer_and_input(tokens={"base": 56})
    joint = run(layer, x, fused)
    layer.token_group_norm = "per_group"
    assert all(torch.equal(a, b) for a, b in zip(joint, run(layer, x, fused), strict=True))


@pytest.mark.parametrize("norm", NORM_ACTIVATION_TYPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_per_group_grows_exactly_even_under_softmax(norm, dtype):
    layer, x = layer_and_input(dtype, norm_activation_type=norm, token_group_norm="per_group")
    before = layer(x)
    layer.add_group("new", 30)
    assert torch.equal(layer(x), before)
    assert not layer.groups["new"].values.weight.any() and layer.groups["new"].keys.weight.all()
    layer(x).square().sum().backward()
    assert layer.groups["new"].values.weight.grad.abs().max() > 0


def test_what_is_zero_in_a_new_group():
    assert zero_of_new_group(True, "joint") == "keys"
    assert [zero_of_new_group(*case) for case in ((False, "joint"), (False, "per_group"), (True, "per_group"))] == [
        "values"
    ] * 3


def test_drawn_tokens_depend_on_the_generator_alone():
    def draw(**changes):
        arguments = {"zero": "keys", "std": 0.5, "generator": torch.Generator().manual_seed(4)} | changes
        return draw_tokens(12, 20, 300, **arguments)

    keys, values = draw()
    assert keys.shape == (300, 12) and values.shape == (20, 300) and values.is_contiguous()
    assert not keys.any() and abs(values.std() / 0.5 - 1) < 0.05
    assert torch.equal(draw()[1], values)
    keys, values = draw(zero="values", dtype=torch.bfloat16)
    assert keys.all() and not values.any() and keys.dtype == values.dtype == torch.bfloat16
    torch.manual_seed(7)
    assert torch.equal(draw(generator=None)[1], draw_tokens(12, 20, 300, zero="keys", std=0.5, generator=_seeded(7))[1])


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_nothing_is_drawn_on_the_meta_device():
    state = torch.get_rng_state()
    for arguments in ({"device": "meta"}, {}):
        with torch.device("meta"):
            tokens = draw_tokens(12, 20, 30, zero="keys", std=0.5, **arguments)
        assert all(t.is_meta for t in tokens)
    layer = Pattention(12, 20, 6, device="meta", bias=True)
    layer.add_group("new", 5)
    assert all(p.is_meta for p in layer.parameters()) and torch.equal(torch.get_rng_state(), state)


def test_a_generator_decides_what_a_group_starts_with():
    groups = []
    for _ in range(2):
        layer, _ = layer_and_input()
        layer.add_group("new", 9, _seeded(5))
        groups.append(layer.groups["new"])
        assert type(groups[-1].keys) is nn.Linear and groups[-1].keys.weight.requires_grad
    assert torch.equal(groups[0].values.weight, groups[1].values.weight)
    assert abs(groups[0].values.weight.std() / 0.3 - 1) < 0.15


@settings(max_examples=15, deadline=None)
@given(
    keep=st.floats(0.01, 1.0),
    norm=st.sampled_from(NORM_ACTIVATION_TYPES),
    group_norm=st.sampled_from(["joint", "per_group"]),
    bias=st.booleans(),
)
def test_a_prefix_is_the_layer_of_the_first_tokens(keep, norm, group_norm, bias):
    layer, x = layer_and_input(torch.float64, norm_activation_type=norm, token_group_norm=group_norm, bias=bias)
    random_biases(layer)
    counts = {name: -int(-(keep * g.keys.out_features - 1e-9) // 1) for name, g in layer.groups.items()}
    kinds = {"norm_activation_type": norm, "token_group_norm": group_norm, "tau": layer.tau}
    small = Pattention(24, 40, counts, bias=bias, dtype=torch.float64, **kinds)
    state = {
        name: t[: counts[name.split(".")[1]]] if ".keys." in name else t[:, : counts[name.split(".")[1]]]
        for name, t in layer.state_dict().items()
        if name != "bias"
    }
    small.load_state_dict(state | ({"bias": layer.bias.detach()} if bias else {}))
    small.fused = False
    layer.keep = keep
    assert_near(layer(x), small(x), 1e-13)


def test_a_prefix_alone_gets_gradients_and_is_no_part_of_the_state():
    layer, x = layer_and_input(tokens={"base": 10})
    names = set(layer.state_dict())
    whole = layer(x)
    layer.keep = 0.3
    layer(x).square().sum().backward()
    keys, values = layer.groups["base"].keys.weight.grad, layer.groups["base"].values.weight.grad
    assert keys[:3].any(dim=1).all() and not keys[3:].any()
    assert values[:, :3].any(dim=0).all() and not values[:, 3:].any()
    assert set(layer.state_dict()) == names
    layer.keep = 1.0
    assert torch.equal(layer(x), whole)


def test_a_prefix_of_changed_maps_is_refused():
    layer, x = layer_and_input()
    layer.groups["more"].keys.register_forward_hook(lambda m, args, out: out)
    layer.keep = 0.5
    with pytest.raises(ValueError, match=r"keep is 0\.5, but this layer's maps are quantised"):
        layer(x)


def test_gelu_l1_norm_is_that_of_the_papers_table_4():
    layer, x = layer_and_input(torch.float64, norm_activation_type="gelu_l1_norm")
    groups = list(layer.groups.values())
    activated = [F.gelu(x @ group.keys.weight.T) for group in groups]
    total = sum(a.abs().sum(-1, keepdim=True) for a in activated)
    expected = sum(a / total * layer.num_tokens @ g.values.weight.T for a, g in zip(activated, groups, strict=True))
    assert_near(layer(x), expected, 1e-6)
    assert layer.tau == layer.num_tokens
