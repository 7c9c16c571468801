"""What transformers asks of every decoder in its shared model tests, asked of ours in every shape growth gives them.

tests/test_model.py has the rest: caches, single left-padded rows, backends' logits, compilation, Auto classes.
"""

import pytest
import torch
from safetensors import safe_open
from tiny_models import KINDS, SIZES, close, make, tokens

from tokenformer import TokenformerForCausalLM
from tokenformer.cost import parameters

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 6}
WITH_GRADIENTS = ["eager", "sdpa"]  # flex attention has no backward on a CPU, and is compiled for a minute


def ids_of(model, prompt: torch.Tensor, **how) -> torch.Tensor:
    """What `generate` adds to the prompt, without stopping at an end of text."""
    return model.generate(prompt, **GREEDY | {"attention_mask": torch.ones_like(prompt)} | how)[:, prompt.shape[1] :]


# Embeddings and head


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_resizing_the_vocabulary_keeps_what_is_left(kind, tied, tmp_path):
    model, ids = make(kind, tie_word_embeddings=tied), tokens()
    before = model(ids).logits
    for asked, multiple, size in ((SIZES["vocab_size"] + 10, None, 138), (138, 64, 192), (100, None, 100)):
        model.resize_token_embeddings(asked, pad_to_multiple_of=multiple)
        assert model.config.vocab_size == model.vocab_size == model.get_input_embeddings().num_embeddings == size
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
        assert parameters(model.config) == sum(p.numel() for p in model.parameters())
        logits = model(ids.clamp(max=size - 1), labels=ids.clamp(max=size - 1)).logits
        assert logits.shape[-1] == size
        if size > SIZES["vocab_size"]:
            assert torch.equal(logits[..., : SIZES["vocab_size"]], before)
            assert model(torch.full((1, 3), size - 1)).logits.isfinite().all()
    small = ids.clamp(max=99)
    model.save_pretrained(tmp_path)
    loaded = TokenformerForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 100
    assert torch.equal(loaded(small).logits, model(small).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_head_is_tied_or_not_through_saving(kind, tied, tmp_path):
    model, ids = make(kind, tie_word_embeddings=tied), tokens()
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 (not a mapping)
    loaded, report = TokenformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.config.tie_word_embeddings = True
    loaded.tie_weights()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("whole", [True, False])
def test_embeddings_can_be_read_and_replaced(whole):
    model = make("grown") if whole else make("grown").model
    decoder = model.model if whole else model
    assert model.get_input_embeddings() is decoder.embed_tokens
    new = torch.nn.Embedding(SIZES["vocab_size"], SIZES["hidden_size"])
    model.set_input_embeddings(new)
    assert decoder.embed_tokens is new
    assert model(tokens(), output_hidden_states=True).hidden_states[0].equal(new(tokens()))
    assert model.get_output_embeddings() is (model.lm_head if whole else None)
    if whole:
        head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"], bias=False)
        model.set_output_embeddings(head)
        assert model.lm_head is head


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_instead_of_text_tokens(kind):
    model, ids = make(kind), tokens()
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embedded).logits, model(ids).logits)
    close(
        model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False, eos_token_id=None), ids_of(model, ids)
    )


# Outputs


@pytest.mark.parametrize("kind", KINDS)
def test_attentions_are_causal_distributions(kind):
    model, ids = make(kind, attention="eager"), tokens()
    out = model(ids, output_attentions=True, use_cache=True)
    assert len(out.attentions) == SIZES["num_hidden_layers"]
    for weights in out.attentions:
        assert weights.shape == (2, SIZES["num_attention_heads"], 20, 20)
        close(weights.sum(-1), torch.ones(2, SIZES["num_attention_heads"], 20))
        assert not weights.triu(1).any() and weights.tril().count_nonzero() > 0
    step = model(ids[:, :1], past_key_values=out.past_key_values, output_attentions=True)
    assert step.attentions[0].shape == (2, SIZES["num_attention_heads"], 1, 21)
    assert model(ids).attentions is None


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_the_inputs_of_the_blocks_and_the_final_norm(kind):
    model, ids = make(kind), tokens()
    inputs = []
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    states = model(ids, output_hidden_states=True).hidden_states
    for state, wanted in zip(states, [*inputs, model.model(ids).last_hidden_state], strict=True):
        assert torch.equal(state, wanted)
    some = model(ids, output_hidden_states=[1, -1]).hidden_states
    assert [s is not None for s in some] == [False, True, False, True]
    assert torch.equal(some[1], states[1])


@pytest.mark.parametrize("attention", WITH_GRADIENTS)
def test_gradient_can_be_retained_in_hidden_states_and_attentions(attention):
    model = make("grown", attention=attention)
    out = model(tokens(), output_hidden_states=True, output_attentions=attention == "eager")
    kept = [*out.hidden_states, *(out.attentions or ())]
    for tensor in kept:
        tensor.retain_grad()
    out.logits[0, -1, 0].backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in kept)


def test_tuples_say_what_named_outputs_say():
    model, ids = make("grown", attention="eager"), tokens()
    asked = {"labels": ids, "output_hidden_states": True, "output_attentions": True, "use_cache": True}
    named = model(ids, **asked)
    loss, logits, past, states, attentions = model(ids, **asked, return_dict=False)
    assert torch.equal(loss, named.loss) and torch.equal(logits, named.logits)
    assert past.get_seq_length() == named.past_key_values.get_seq_length() == 20
    for a, b in ((states, named.hidden_states), (attentions, named.attentions)):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    model.config.use_cache = False
    assert model(ids).past_key_values is None and len(model(ids, return_dict=False)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_batch_do_not_see_each_other(kind):
    model, ids = make(kind), tokens(3)
    whole = model(ids).logits
    assert torch.equal(model(ids).logits, whole)
    for i in range(3):
        close(model(ids[i : i + 1]).logits[0], whole[i])


def test_only_the_logits_asked_for():
    model, ids = make("ffn"), tokens()
    full = model(ids).logits
    close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    close(model(ids, logits_to_keep=torch.tensor([0, 7])).logits, full[:, [0, 7]])


def test_loss_honours_what_trainer_passes():
    model, ids = make("paper"), tokens()
    labels = ids.clone()
    labels[:, :9] = -100
    mean, kept = model(ids, labels=labels).loss, 2 * 11
    close(model(ids, labels=labels, num_items_in_batch=torch.tensor(4 * kept)).loss, mean / 4)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    close(model(ids, labels=ids, shift_labels=shifted).loss, mean)


# Attention


@pytest.mark.parametrize("kind", KINDS)
def test_attention_backend_can_be_set_on_a_living_model(kind):
    model, ids = make(kind), tokens()
    want = model(ids).logits
    attentions = []
    for name in ("eager", "sdpa", "eager"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == model.model.config._attn_implementation == name
        out = model(ids, output_attentions=name == "eager")
        close(out.logits, want)
        attentions.append(out.attentions)
    assert attentions[1] is None and len(attentions[0]) == SIZES["num_hidden_layers"]
    assert all(torch.equal(a, b) for a, b in zip(attentions[0], attentions[2], strict=True))
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("no_such_attention")


@pytest.mark.slow  # torch compiles flex attention in C++
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*:DeprecationWarning")  # torch 2.13, of its own mask
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_flex_attention_sees_padding_and_packed_texts(kind):
    model, ids = make(kind), tokens()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None].expand(2, -1)
    seen = []
    for name in ("sdpa", "flex_attention"):
        model.set_attn_implementation(name)
        padded = model(ids, attention_mask=mask).logits[mask.bool()]
        packed = model(ids, position_ids=positions, use_cache=False).logits
        seen.append((padded, packed))
    for a, b in zip(*seen, strict=True):
        close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_sdpa_give_the_same_gradients(kind):
    ids, grads = tokens(), []
    for attention in WITH_GRADIENTS:
        model = make(kind, attention=attention).train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("attention", WITH_GRADIENTS)
def test_texts_packed_into_one_row_do_not_see_each_other(attention):
    model, ids = make("grown", attention=attention), tokens(1)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    close(packed[:, :8], model(ids[:, :8], use_cache=False).logits)
    close(packed[:, 8:], model(ids[:, 8:], use_cache=False).logits)


@pytest.mark.parametrize("attention", WITH_GRADIENTS)
def test_mask_of_four_dimensions_is_used_as_it_is(attention):
    """Three continuations of a shared prefix in one row, as speculative decoding sends them."""
    model, ids = make("paper", attention=attention), tokens(1)
    prefix, ends = ids[:, :6], ids[0, 6:9]
    mask = torch.full((9, 9), -torch.inf).triu(1)
    mask[6:, 6:] = torch.full((3, 3), -torch.inf).fill_diagonal_(0)
    positions = torch.tensor([[*range(6), 6, 6, 6]])
    together = model(ids[:, :9], attention_mask=mask[None, None], position_ids=positions).logits[0, 6:]
    apart = torch.cat([prefix.expand(3, -1), ends[:, None]], 1)
    close(together, model(apart).logits[:, -1])


@pytest.mark.parametrize("attention", WITH_GRADIENTS)
def test_sees_left_padding_in_any_row_of_a_batch(attention):
    model, ids = make("grown", attention=attention), tokens(3)
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate((20, 13, 5)):
        padded[row, : 20 - length], mask[row, : 20 - length] = 7, 0
    for how in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        together = ids_of(model, padded, attention_mask=mask, **how)
        for row, length in enumerate((20, 13, 5)):
            assert torch.equal(together[row], ids_of(model, ids[row : row + 1, 20 - length :], **how)[0]), (how, row)


# Generation


def test_beam_sampling_and_several_answers():
    model, prompt = make("grown"), tokens(2, 8)
    torch.manual_seed(0)
    a = ids_of(model, prompt, num_beams=4, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    b = ids_of(model, prompt, num_beams=4, do_sample=True, num_return_sequences=3, use_cache=False)
    assert a.shape == (6, 6) and torch.equal(a, b)


# Training


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_run_twice_and_give_the_same_gradients(kind, reentrant):
    model, ids = make(kind).train(), tokens()
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: runs.append(1))
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_activation_checkpointing == checkpointed
        model.zero_grad()
        runs.clear()
        model(ids, labels=ids).loss.backward()
        assert len(runs) == 1 + checkpointed
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    model.activation_checkpointing_disable()
    assert not model.is_activation_checkpointing


@pytest.mark.parametrize("reentrant", [True, False])
def test_frozen_model_passes_gradient_to_what_is_added(reentrant):
    """As PEFT trains: everything frozen, checkpointing on, inputs made to require gradient."""
    model, ids = make("grown").train().requires_grad_(False), tokens()
    group = model.model.layers[0].mlp.groups["grown1"].requires_grad_()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in group.parameters())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_inputs_can_be_made_to_require_gradient_and_not():
    model, ids = make("ffn").requires_grad_(False), tokens()
    for wanted in (True, False):
        model.enable_input_require_grads() if wanted else model.disable_input_require_grads()
        assert model(ids).logits.requires_grad == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_one_batch_can_be_learnt_by_heart(kind):
    model, ids = make(kind).train(), tokens()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = model(ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3 and losses[-1] < 0.1
    with torch.no_grad():
        assert torch.equal(ids_of(model.eval(), ids[:, :12], max_new_tokens=8), ids[:, 12:])
