import pytest
import torch
import torch.nn.functional as F
from golden_data import inputs, outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tokenformer.models.pattention import NORM_ACTIVATION_TYPES, Pattention, default_tau, pattention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def layer_and_input(dtype=torch.float32, tokens=None, n_rows=150, **kwargs):
    layer = Pattention(24, 40, tokens or {"base": 56, "more": 16}, key_std=0.5, value_std=0.3, dtype=dtype, **kwargs)
    return layer, torch.randn(2, n_rows // 2, 24, dtype=dtype)


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


@pytest.mark.parametrize("norm", NORM_ACTIVATION_TYPES)
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
@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm"])
@pytest.mark.parametrize("fused", [True, False])
def test_added_group_changes_no_bit_and_learns(dtype, norm, fused):
    layer, x = layer_and_input(dtype, norm_activation_type=norm)
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
    for norm in ("l2_norm_gelu", "gelu_l2_norm"):
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
