"""Tracers take Pattention's plain path; tests/serve/ has what engines make of it."""

import pytest
import torch
from tiny_models import FAMILIES, images, tiny, tiny_vision, tokens

from tokenformer import Pattention

DYNAMIC = torch.export.Dim.DYNAMIC


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
# transformers' own output capturing, in every model of theirs
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_torch_export_gives_the_same_logits_at_other_shapes(family, strict):
    model = tiny(family)
    shapes = {"input_ids": {0: DYNAMIC, 1: DYNAMIC}, "use_cache": None}
    program = torch.export.export(model, (tokens(2, 7),), {"use_cache": False}, dynamic_shapes=shapes, strict=strict)
    ids = tokens(3, 13)
    torch.testing.assert_close(program.module()(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
def test_torch_export_gives_the_same_labels_of_other_batches(pooling):
    model = tiny_vision(pooling=pooling)
    program = torch.export.export(model, (images(2),), dynamic_shapes={"pixel_values": {0: DYNAMIC}})
    torch.testing.assert_close(program.module()(images(5)).logits, model(images(5)).logits)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_torchscript_traces_the_plain_path():
    layer = Pattention(16, 16, {"base": 24, "more": 8})
    traced = torch.jit.trace(layer, torch.randn(2, 3, 16))
    x = torch.randn(5, 300, 16)
    torch.testing.assert_close(traced(x), layer(x))
