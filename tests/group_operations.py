"""Tiny models of every kind, and what tests of operations on token groups do with them."""

import copy
import json
import os
import signal
import time
import traceback
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import SIZES, sample, tiny, tiny_vision
from transformers import AutoModelForCausalLM, LlamaConfig

from tokenformer import grow
from tokenformer.checkpoints.checkpoint import save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.verify import weight_files, weights_digest
from tokenformer.growth.architectures import token_groups
from tokenformer.growth.freeze import freeze_only, trainable_parts
from tokenformer.growth.groups import is_normalised
from tokenformer.growth.neurons import group_neurons


def ordinary(config=None):
    """A tiny ordinary transformer, by default a Llama with every bias."""
    biases = {"attention_bias": True, "mlp_bias": True}
    config = config or LlamaConfig(**SIZES, **biases, intermediate_size=56, num_key_value_heads=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    group_neurons(model)
    return model


def as_trained(model_or_config):
    """The norm to merge under, so that both children compute in the union what they did."""
    config = getattr(model_or_config, "config", model_or_config)
    return config.token_group_norm if is_normalised(config) else None


KINDS = {
    "paper": lambda: tiny(num_hidden_layers=2),
    "ffn": lambda: tiny("ffn", num_hidden_layers=2),
    "per_group": lambda: tiny(num_hidden_layers=2, token_group_norm="per_group"),
    "gelu": lambda: tiny(num_hidden_layers=2, norm_activation_type="gelu", pattention_bias=True),
    "vision": lambda: tiny_vision(num_hidden_layers=2),
    "llama": ordinary,
}


@torch.no_grad()
def logits(model):
    return model(**sample(model)).logits


def facts(model):
    """All that a model is, copied."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("token_groups", "n_inner")}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"config": config, "groups": token_groups(model.config), "weights": weights, "logits": logits(model)}


def same(a, b):
    return (
        (a["config"], a["groups"]) == (b["config"], b["groups"])
        and a["weights"].keys() == b["weights"].keys()
        and all(torch.equal(tensor, b["weights"][name]) for name, tensor in a["weights"].items())
        and torch.equal(a["logits"], b["logits"])
    )


def train(model, optimizer=torch.optim.AdamW, steps=2):
    """Train what is not frozen on random text or images; nothing else may move."""
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    training = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    step = optimizer(list(model.parameters()), lr=1e-2, weight_decay=0.1)
    model.zero_grad()
    for _ in range(steps):
        model(**random_lesson(model)).loss.backward()
        step.step()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[n], p) and parameters[n].grad is None for n, p in frozen.items())
    assert any(not torch.equal(parameters[n], p) for n, p in training.items())
    model.zero_grad()


def random_lesson(model):
    if model.main_input_name == "pixel_values":
        shape = (2, model.config.num_channels, *model.config.image_height_width)
        return {"pixel_values": torch.randn(shape), "labels": torch.randint(0, model.config.num_labels, (2,))}
    ids = torch.randint(0, SIZES["vocab_size"], (2, 16))
    return {"input_ids": ids, "labels": ids}


def train_only(model, group, **options):
    freeze_only(model, [part for part in trainable_parts(model) if part != group])
    train(model, **options)


def child(parent, name, **growth):
    model = copy.deepcopy(parent)
    grow(model, **(growth or {"ffn_param_tokens": "+12"}), name=name)
    train_only(model, name)
    return model


def adapted(model, targets):
    """Put LoRA on some maps, and give the model that peft wraps."""
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, lora).base_model.model


def quantised(model, targets):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda m, name: name.endswith(tuple(targets)))
    return model


def link(folder, parent):
    """Say in a checkpoint's lineage which one it came from."""
    lineage = (
        Lineage(weights_sha256=weights_digest(parent))
        .then("train")
        .model_copy(update={"weights_sha256": weights_digest(folder)})
    )
    (folder / "lineage.json").write_text(lineage.model_dump_json(exclude_none=True))


@pytest.fixture(params=["paper", "llama", "vision"], name="family")
def make_family(request, tmp_path):
    """A parent and two trained children of it on disk, and as they are in memory."""
    parent = {"paper": tiny, "llama": ordinary, "vision": tiny_vision}[request.param]()
    save_checkpoint(tmp_path / "parent", parent, None, Lineage())
    models = {"parent": parent, "a": child(parent, "a"), "b": child(parent, "b")}
    for name in "ab":
        save_checkpoint(tmp_path / name, models[name], None, Lineage())
        link(tmp_path / name, tmp_path / "parent")
    return tmp_path, models


def on_disk(folder):
    """Tensors by name, however the files are cut."""
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def same_files(a, b):
    x, y = on_disk(a), on_disk(b)
    assert x.keys() == y.keys()
    assert all(x[n].dtype == y[n].dtype and torch.equal(x[n], y[n]) for n in x)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (a, b)]
    older = ("rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor")  # beside `rope_parameters`
    x, y = ({k: v for k, v in config.items() if k not in older} for config in configs)
    assert x == y
    return True


def leftovers(folder):
    return sorted(f.name for f in folder.iterdir())


def run_and_kill(action: Callable[[], object], seconds: float) -> bool:
    """Act in a child and kill -9 it after a while; True when it had finished by then."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return True
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False
