"""What moves in a stage: Muon beside AdamW, what optimizers remember of earlier stages, and schedules."""

import copy
import io
import signal

import pytest
import torch
from group_operations import ordinary
from safetensors.torch import load_file
from tiny_models import tiny, two_groups
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from tokenformer import grow
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.growth.freeze import freeze_only
from tokenformer.growth.groups import consolidate_operation, drop_operation
from tokenformer.growth.operations import apply
from tokenformer.growth.state import move_states
from tokenformer.training.muon import Muon
from tokenformer.training.optimization import grow_with_states, learning_rate, make_optimizer
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

ADAMW, MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
BIASED = {"pattention_bias": True, "norm_activation_type": "gelu", "tie_word_embeddings": False}


def recipe_of(optimizer="muon", **training):
    return parse_recipe(
        {
            "model": {},
            "data": {"source": "x"},
            "training": {"optimizer": optimizer, "batch_size": 1, "sequence_length": 2, **training},
            "stages": [{"text_tokens": 20}, {"text_tokens": 20}],
        }
    )


def take_steps(model, *optimizers, steps=2, seed=0):
    """Train on random text at a learning rate of 0.01."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(0, 128, (2, 16), generator=generator)
        model(ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            optimizer.step()
            optimizer.zero_grad()


def named(model, optimizer):
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def in_blocks(name, parameter):
    return ".layers." in name and parameter.dim() == 2


@pytest.mark.parametrize("make", [lambda: tiny(**BIASED), lambda: two_groups("ffn"), ordinary])
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(make):
    model = make()
    twin = copy.deepcopy(model)
    take_steps(model, make_optimizer(model, recipe_of(weight_decay=0.1).training, {}))
    parameters = dict(twin.named_parameters())
    matrices = [p for name, p in parameters.items() if in_blocks(name, p)]
    others = [p for name, p in parameters.items() if not in_blocks(name, p)]
    muon = Muon(matrices, weight_decay=0.1)
    decayed = [{"params": [p for p in others if p.dim() == 2]}]
    rest = [{"params": [p for p in others if p.dim() == 1], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(decayed + rest, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    take_steps(twin, muon, adamw)
    assert equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(
    ("frozen", "kind"), [(["embedding", "final_norm"], Muon), (["base", "linear_maps"], torch.optim.AdamW)]
)
def test_one_optimizer_is_enough_where_the_other_has_nothing_to_train(frozen, kind):
    model = tiny()
    freeze_only(model, frozen)
    optimizer = make_optimizer(model, recipe_of().training, {})
    assert type(optimizer) is kind
    take_steps(model, optimizer)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("tied", [True, False])
def test_kinds_of_parameters_have_rates_of_their_own(optimizer, tied):
    """Width 64 where the rate was found at 16: AdamW's matrices and head take a quarter, Muon's all of it."""
    model = tiny(tie_word_embeddings=tied)
    t = recipe_of(optimizer, embedding_rate=5.0, head_rate=0.5, rate_width=16).training
    groups = make_optimizer(model, t, {}).param_groups
    rates = {p: group["lr"] for group in groups for p in group["params"]}
    for name, p in model.named_parameters():
        if name == "model.embed_tokens.weight":
            assert rates[p] == (0.5 if tied else 5.0)
        elif name == "lm_head.weight":
            assert rates[p] == 0.125
        else:
            assert rates[p] == (0.25 if in_blocks(name, p) and optimizer == "adamw" else 1.0)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_new_parameters_can_stand_apart(optimizer):
    """Apart or not, every parameter has its kind's rate and decay, and old ones their state."""
    model, t = tiny(), recipe_of(optimizer).training
    first = make_optimizer(model, t, {})
    take_steps(model, first)
    states = {name: dict(first.state[p]) for name, p in model.named_parameters()}
    states = grow_with_states(model, states, ffn_param_tokens="+16")
    together, apart = (make_optimizer(model, t, states, apart=apart) for apart in (False, True))
    new = {p for group in apart.param_groups if group["new"] for p in group["params"]}
    assert new == {p for name, p in model.named_parameters() if ".grown1." in name} and not new & apart.state.keys()
    assert not any(group["new"] for group in together.param_groups)
    facts = [
        {p: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
        for optimizer in (together, apart)
    ]
    assert facts[0] == facts[1] and together.state.keys() == apart.state.keys()


def test_the_schedule_multiplies_the_rates_of_all_kinds(content, tmp_path):
    """AdamW's first step has the size of the rate, whatever the gradient."""
    training = content["training"] | {"optimizer": "adamw", "head_rate": 4.0, "weight_decay": 0.0, "warmup": 0.0}
    run = content | {
        "training": training | {"learning_rate": 1e-3, "schedule": "constant"},
        "stages": [{"text_tokens": 1}],
    }
    recipe = parse_recipe(run)
    last = train(recipe, tmp_path / "run")[-1]
    trained = load_file(last / "model.safetensors")
    states = load_states(last)
    assert states["model.embed_tokens.weight"]["step"] == 1
    torch.manual_seed(recipe.seed)
    config = AutoConfig.from_pretrained(last)
    first = AutoModelForCausalLM.from_config(config).state_dict()
    for name, rate in (("model.embed_tokens.weight", 4e-3), ("model.layers.0.self_attn.q_proj.linear.weight", 1e-3)):
        moved = (trained[name] - first[name]).abs()
        assert moved.max() == pytest.approx(rate, rel=0.01)


def test_a_state_dict_carries_the_optimizer_over():
    model = tiny()
    optimizer = make_optimizer(model, recipe_of().training, {})
    take_steps(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    twin = copy.deepcopy(model)
    other = make_optimizer(twin, recipe_of().training, {})
    other.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    take_steps(model, optimizer, seed=1)
    take_steps(twin, other, seed=1)
    assert equal(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(("earlier", "later"), [("adamw", "muon"), ("muon", "adamw"), ("muon", "muon")])
def test_a_parameter_keeps_the_state_of_its_own_optimizer_alone(earlier, later):
    model = tiny()
    first = make_optimizer(model, recipe_of(earlier).training, {})
    take_steps(model, first)
    states = named(model, first)
    kept = named(model, make_optimizer(model, recipe_of(later).training, states))
    matrices = {name for name, p in model.named_parameters() if in_blocks(name, p)}
    assert kept.keys() == (states.keys() if earlier == later else states.keys() - matrices)
    for name, state in kept.items():
        assert state.keys() == (MUON if name in matrices else ADAMW) and equal(state, states[name])
        assert all(tensor is not states[name][key] for key, tensor in state.items())
    assert not named(model, make_optimizer(model, recipe_of(earlier, keep_optimizer_state=False).training, states))


def test_growing_keeps_momentum_and_new_tokens_start_without():
    model = tiny("ffn")
    optimizer = make_optimizer(model, recipe_of().training, {})
    take_steps(model, optimizer)
    before = {p: state["momentum_buffer"] for p, state in optimizer.state.items() if "momentum_buffer" in state}
    states = grow_with_states(model, named(model, optimizer), ffn_param_tokens="+8", num_hidden_layers="+1")
    grown = make_optimizer(model, recipe_of().training, states)
    after = {p: state["momentum_buffer"] for p, state in grown.state.items() if "momentum_buffer" in state}
    assert before.keys() == after.keys() and all(torch.equal(before[p], after[p]) for p in before)
    take_steps(model, grown)


@pytest.mark.parametrize("elder", ["muon", "adamw"])
def test_states_move_with_their_tokens_also_where_two_optimizers_trained_them(elder):
    model, states = tiny(**BIASED), {}
    grow(model, ffn_param_tokens="+48", name="more")
    for kind, part in ((elder, ""), ("muon", ".more.")):
        optimizer = make_optimizer(model, recipe_of(kind).training, {})
        take_steps(model, optimizer)
        states |= {name: state for name, state in named(model, optimizer).items() if part in name}
    rest = {name for name in states if ".more." not in name}
    assert move_states(model.config, states, drop_operation(model.config, ["more"])).keys() == rest

    operation = consolidate_operation(model.config)
    moved = move_states(model.config, states, operation)
    assert moved.keys() == rest
    for name in rest:
        ours, theirs = states[name], states.get(name.replace(".base.", ".more."))
        if ".mlp.groups." not in name:
            assert equal(moved[name], ours)
            continue
        assert moved[name].keys() == ours.keys() | theirs.keys()
        for moment in moved[name].keys() - {"step"}:
            old, new = moved[name][moment].tensor_split([160], dim=int("values" in name))
            assert torch.equal(old, ours[moment]) if moment in ours else not old.any()
            assert torch.equal(new, theirs[moment]) if moment in theirs else not new.any()
    apply(model, operation)
    for kind in ("muon", elder):
        optimizer = make_optimizer(model, recipe_of(kind).training, moved)
        assert named(model, optimizer).keys() >= {name for name in rest if ".mlp." in name}
        take_steps(model, optimizer)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    text.write_text("".join(f'{{"text": "{i} squared is {i * i}. "}}\n' * 3 for i in range(200)))
    model = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "use_qk_norm": True}
    training = {"batch_size": 4, "sequence_length": 16, "optimizer": "muon", "evaluations_per_stage": 1, "threads": 1}
    return {
        "model": model | {"qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 16},
        "data": {"source": str(text), "tokenizer": "bytes"},
        "training": training,
        "stages": [{"text_tokens": 320}, {"text_tokens": 320, "ffn_param_tokens": "+8"}],
    }


def test_a_run_with_muon_resumes_to_the_same_bits(content, tmp_path):
    def interrupt(event):
        if event["event"] == "progress" and event["stage"] == 2 and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    recipe = parse_recipe(content)
    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", on_event=interrupt)
    parts = train(recipe, tmp_path / "parts", resume=True)
    for a, b in zip(whole, parts, strict=True):
        assert equal(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
        states, same = load_states(a), load_states(b)
        assert states.keys() == same.keys() and all(equal(states[name], same[name]) for name in states)
        assert all(s.keys() == (MUON if ".layers." in name else ADAMW) for name, s in states.items())


@pytest.mark.parametrize(("keep", "steps"), [(True, 10), (False, 5)])
def test_a_stage_may_start_the_optimizer_afresh(content, tmp_path, keep, steps):
    training = content["training"] | {"optimizer": "adamw", "keep_optimizer_state": keep}
    last = train(parse_recipe(content | {"training": training}), tmp_path / "run")[-1]
    assert load_states(last)["model.embed_tokens.weight"]["step"] == steps


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_weight_decay_does_not_hold_new_tokens_back(optimizer):
    """Zero keys have nothing to decay: their first step is the same with it and without, bit for bit."""
    keys = []
    for weight_decay in (0.0, 0.5):
        model = tiny()
        grow(model, ffn_param_tokens="+8", name="more", seed=1)
        take_steps(model, make_optimizer(model, recipe_of(optimizer, weight_decay=weight_decay).training, {}), steps=1)
        keys.append(model.model.layers[0].mlp.groups["more"].keys.weight)
    assert keys[0].any() and torch.equal(*keys)


def test_constant_warms_up_over_all_stages_and_holds():
    recipe = recipe_of(schedule="constant", warmup=0.2, learning_rate=0.5)
    rates = [learning_rate(recipe, stage, step) for stage in range(2) for step in range(10)]
    assert rates[:4] == pytest.approx([0.1, 0.2, 0.3, 0.4]) and rates[4:] == [0.5] * 16


def test_the_neurons_of_an_ordinary_model_keep_their_states_when_it_grows():
    config = GPTNeoXConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    model = GPTNeoXForCausalLM(config)
    states = {name: {"exp_avg": torch.full_like(p, i)} for i, (name, p) in enumerate(model.named_parameters())}
    weight = model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight.clone()
    other = {"exp_avg": torch.zeros(1)}
    moved = grow_with_states(model, {**states, "another.weight": other}, ffn_param_tokens="+8")
    assert moved.pop("another.weight") is other  # of no parameter here, so of no token group
    parameters = dict(model.named_parameters())
    assert len(moved) == len(states) and all(parameters[n].shape == s["exp_avg"].shape for n, s in moved.items())
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h.groups.base.weight"
    assert torch.equal(parameters[name], weight)
    assert moved[name] is states["gpt_neox.layers.0.mlp.dense_h_to_4h.weight"]
