"""A TokenFormer that reads text and images: what sees what, caches, batches, and what transformers asks of it."""

import copy
import functools

import pytest
import torch
from tiny_models import close, images, tiny, tiny_vision, tokens

from tokenformer import TokenformerForCausalLM, merge

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 5}


@functools.cache
def both(attention="sdpa"):
    model = merge(tiny(attention=attention), tiny_vision(attention=attention), by="modality", bridge=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".bridge." in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    return model


def placeholders(rows=1, count=1):
    config = both().config
    return torch.full((rows, count * config.image_positions), config.image_token_id)


def seen(text, count=1):
    return torch.cat([placeholders(len(text), count), text], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_sees_what_came_before_and_an_image_sees_itself(attention):
    model, text, pixels = both(attention), tokens(1, 6), images(2)
    first, second, third = text.split(2, dim=1)
    ids = torch.cat([first, placeholders(), second, placeholders(), third], dim=1)
    n = model.config.image_positions
    before = model.model(ids, pixel_values=pixels).last_hidden_state

    def moved(**changes):
        after = model.model(**{"input_ids": ids, "pixel_values": pixels, **changes}).last_hidden_state
        return ((after - before).abs().amax(-1)[0] > 1e-5).nonzero().flatten().tolist()

    other = ids.clone()
    other[0, 1] += 1
    assert moved(input_ids=other) == list(range(1, ids.shape[1]))
    other = ids.clone()
    other[0, -1] += 1
    assert moved(input_ids=other) == [ids.shape[1] - 1]
    one, two = pixels.clone(), pixels.clone()
    one[0, :, -4:, -4:], two[1, :, -4:, -4:] = 0.0, 0.0  # the last patch, which the class token before it sees
    assert moved(pixel_values=one) == list(range(2, ids.shape[1]))
    assert moved(pixel_values=two) == list(range(4 + n, ids.shape[1]))


@torch.no_grad()
def test_steps_from_a_cache_are_the_whole_sequence():
    model, ids, pixels = both(), seen(tokens()), images()
    whole, start = model(ids, pixel_values=pixels).logits, model.config.image_positions + 3
    out = model(ids[:, :start], pixel_values=pixels, use_cache=True)
    close(out.logits, whole[:, :start])
    for place in range(start, ids.shape[1]):
        out = model(ids[:, place : place + 1], past_key_values=out.past_key_values)
        close(out.logits[:, 0], whole[:, place])


@torch.no_grad()
def test_a_second_image_may_come_after_a_cache():
    model, text, pixels = both(), tokens(1, 6), images(2)
    parts = torch.cat([text[:, :3], placeholders()], dim=1), torch.cat([text[:, 3:], placeholders(), text[:, :1]], 1)
    whole = model(torch.cat(parts, dim=1), pixel_values=pixels).logits
    out = model(parts[0], pixel_values=pixels[:1], use_cache=True)
    close(
        model(parts[1], pixel_values=pixels[1:], past_key_values=out.past_key_values).logits,
        whole[:, -len(parts[1][0]) :],
    )


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}])
def test_a_batch_with_and_without_images_writes_what_each_row_writes(how):
    model, text, pixels = both(), tokens(3, 4), images(2)
    n = model.config.image_positions
    rows = [seen(text[:1]), text[1:2], seen(text[2:], 1)]
    ids = torch.cat([torch.nn.functional.pad(row, (4 + n - row.shape[1], 0)) for row in rows])
    mask = torch.ones_like(ids)
    mask[1, :n] = 0
    found = model.generate(input_ids=ids, attention_mask=mask, pixel_values=pixels, **GREEDY, **how)[:, 4 + n :]
    for i, (row, image) in enumerate(zip(rows, (pixels[:1], None, pixels[1:]), strict=True)):
        alone = model.generate(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=image, **GREEDY, **how)
        assert torch.equal(found[i], alone[0, row.shape[1] :])


def test_only_the_bridge_learns_and_checkpointed_gradients_are_the_same():
    model, ids, pixels = copy.deepcopy(both()).train(), seen(tokens()), images()
    loss = model(ids, pixel_values=pixels, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == {name for name, _ in model.named_parameters() if ".bridge." in name}
    assert all(gradient.any() for gradient in gradients.values())
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(ids, pixel_values=pixels, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in gradients:
            close(parameter.grad, gradients[name])
    labels = ids.masked_fill(ids == model.config.image_token_id, -100)
    assert torch.equal(
        model(ids, pixel_values=pixels, labels=labels).loss, model(ids, pixel_values=pixels, labels=ids).loss
    )


def test_attention_is_a_distribution_over_what_is_seen():
    model, ids = both("eager"), seen(tokens(2, 3))
    n = model.config.image_positions
    out = model(ids, pixel_values=images(), output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 3 and len(out.hidden_states) == 4
    for weights in out.attentions:
        close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights[:, :, :n, :n] > 0).all() and not weights[:, :, :n, n:].any()
        assert not weights[:, :, n:, n:].triu(1).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_ids": seen(tokens(1, 2))},
            r"placeholders for 1 images \(13 of token 128, 13 each\), and 0 images were",
        ),
        (
            {"input_ids": tokens(1, 2), "pixel_values": images(1)},
            "placeholders for 0 images .* and 1 images were given",
        ),
        (
            {"input_ids": seen(tokens(1, 2))[:, 1:], "pixel_values": images(1)},
            "sequence 1 .* has 12 placeholders, and an",
        ),
        ({"inputs_embeds": torch.zeros(1, 2, 64), "pixel_values": images(1)}, "images were given with inputs_embeds"),
        (
            {"input_ids": seen(tokens(1, 2)), "pixel_values": images(1, 8, 8)},
            "the images have 8 × 8 pixels, the model reads",
        ),
        (
            {"input_ids": tokens(1, 2), "inputs_embeds": torch.zeros(1, 2, 64)},
            "give one of input_ids and inputs_embeds",
        ),
        ({}, "give input_ids, inputs_embeds or pixel_values"),
    ],
)
def test_inputs_that_do_not_fit_together(given, message):
    with pytest.raises(ValueError, match=message):
        both()(**given)


def test_a_map_called_alone_says_why_it_cannot_act():
    with pytest.raises(ValueError, match="outside of its model, which knows what each position holds"):
        both().model.layers[0].mlp(torch.zeros(1, 2, 64))


def test_an_image_given_to_a_model_that_reads_text():
    model = tiny()
    assert isinstance(model, TokenformerForCausalLM)
    with pytest.raises(ValueError, match="pixel_values were given, and this model reads text alone"):
        model(tokens(), pixel_values=images())
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(tokens(), pixel_values=images(), **GREEDY)
