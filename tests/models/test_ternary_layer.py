"""Ternary maps: their numbers beside transformers' own class, the straight-through gradient, two bits a weight."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import close
from torch import nn
from transformers.integrations.bitnet import AutoBitLinear, BitLinear, pack_weights

from tokenformer import Pattention
from tokenformer.models.pattention import pattention
from tokenformer.models.ternary import (
    PackedLinear,
    TernaryLinear,
    pack_numbers,
    rounded_to_int8,
    ternary,
    unpack_numbers,
)

DTYPES = [torch.float32, torch.bfloat16]


def like(linear: nn.Linear, kind: type, **arguments) -> nn.Module:
    other = kind(linear.in_features, linear.out_features, bias=True, dtype=linear.weight.dtype, **arguments)
    other.load_state_dict(linear.state_dict())
    return other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [False, True])
def test_numbers_and_gradients_are_those_of_transformers_class(dtype, zero):
    torch.manual_seed(0)
    ours = TernaryLinear(24, 10, dtype=dtype)
    if zero:
        nn.init.zeros_(ours.weight)
    theirs = like(ours, AutoBitLinear, online_quant=True)
    x = torch.randn(3, 5, 24, dtype=dtype)
    x[0, 0] = 0
    found = []
    for linear in (ours, theirs):
        given_x = x.clone().requires_grad_()
        with torch.compiler.set_stance("force_eager"):  # theirs is compiled otherwise
            out = linear(given_x)
            out.square().sum().backward()
        found.append([out, given_x.grad, linear.weight.grad, linear.bias.grad])
    assert all(torch.equal(a, b) and torch.isfinite(a).all() for a, b in zip(*found, strict=True))


def test_weights_have_three_values_and_inputs_255():
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    scale = weight.abs().mean()
    close(ternary(weight).unique(), torch.tensor([-1.0, 0.0, 1.0]) * scale)
    x = torch.randn(2, 500, generator=torch.Generator().manual_seed(1))
    steps = rounded_to_int8(x) * 127 / x.abs().amax(-1, keepdim=True)
    close(steps, steps.round())
    assert steps.abs().max() <= 127.001 and (rounded_to_int8(x) - x).abs().max() <= x.abs().max() / 127


def test_a_group_of_zero_keys_gives_zeros_and_learns():
    layer = Pattention(8, 6, {"old": 5, "new": 4}, weights="ternary")
    old = Pattention(8, 6, {"old": 5}, weights="ternary")
    nn.init.zeros_(layer.groups.new.keys.weight)
    old.groups.old.load_state_dict(layer.groups.old.state_dict())
    old.tau = layer.tau
    x = torch.randn(7, 8)
    out = layer(x)
    assert torch.equal(out, old(x))
    out.square().sum().backward()
    assert layer.groups.new.keys.weight.grad.isfinite().all() and layer.groups.new.keys.weight.grad.any()


def test_a_layer_computes_what_the_equations_say_of_rounded_maps():
    layer = Pattention(8, 6, {"a": 5, "b": 4}, weights="ternary", group_weights={"b": "float"}, bias=False)
    x = torch.randn(7, 8)
    scores = [F.linear(rounded_to_int8(x), ternary(layer.groups.a.keys.weight)), layer.groups.b.keys(x)]
    norm = torch.sqrt(sum(s.square().sum(-1, keepdim=True) for s in scores) + layer.eps)
    a, b = (F.gelu(s * layer.tau / norm) for s in scores)
    wanted = rounded_to_int8(a) @ ternary(layer.groups.a.values.weight).t() + b @ layer.groups.b.values.weight.t()
    close(layer(x), wanted)
    both = [layer.groups.a, layer.groups.b]
    as_float = pattention(x, [g.keys.weight for g in both], [g.values.weight for g in both], tau=layer.tau)
    assert (layer(x) - as_float).norm() > 0.01 * as_float.norm()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 19), columns=st.integers(1, 5), seed=st.integers(0, 99))
def test_four_numbers_go_into_a_byte_and_come_out_again(rows, columns, seed):
    numbers = torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    packed = pack_numbers(numbers)
    assert packed.dtype == torch.uint8 and packed.shape == (-(-rows // 4), columns)
    assert torch.equal(unpack_numbers(packed, rows), numbers)
    if rows % 4 == 0:
        assert torch.equal(packed, pack_weights(numbers.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_map_computes_the_same_and_transformers_reads_it(dtype):
    torch.manual_seed(0)
    linear = TernaryLinear(24, 12, dtype=dtype)
    packed, x = PackedLinear.of(linear), torch.randn(5, 24, dtype=dtype)
    assert torch.equal(packed(x), linear(x))
    assert packed.weight.nbytes * 4 == linear.weight.numel()
    theirs = BitLinear(24, 12, bias=True, dtype=dtype)
    theirs.load_state_dict({name: t.to(dtype) if name == "bias" else t for name, t in packed.state_dict().items()})
    with torch.compiler.set_stance("force_eager"):
        close(theirs(x).float(), linear(x).float(), 1e-5 if dtype is torch.float32 else 0.05)


# torch's own, as it follows any autograd.Function
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")
def test_it_compiles_in_one_graph():
    layer = Pattention(8, 6, {"a": 5, "b": 4}, weights="ternary")
    x = torch.randn(7, 8, requires_grad=True)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    close(compiled(x), layer(x))
    close(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0])


def test_another_word_is_refused():
    with pytest.raises(ValueError, match="weights is 'trenary'; it must be one of float, ternary, packed"):
        Pattention(8, 6, 4, weights="trenary")
