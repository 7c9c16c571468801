"""`generate`, in all its ways, says what decoding step by step without a cache says."""

import pytest
import torch
from tiny_models import FAMILIES, tiny, tokens
from transformers import CompileConfig, pipeline

from tokenformer import grow
from tokenformer.data.tokenizer import make_tokenizer

STEPS = 12
MODELS = [*FAMILIES, "grown"]
# No end of text: every row runs to the last step.
PLAIN = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 9}


def make(kind):
    """A model of a family, or one grown whose new weights are then not zero any more; float64 leaves no ties."""
    if kind in FAMILIES:
        return tiny(kind, dtype=torch.float64)
    model = tiny(dtype=torch.float64)
    grow(model, qkv_param_tokens="+50%", output_param_tokens="+50%", ffn_param_tokens="+50%", num_hidden_layers="+1")
    grow(model, ffn_param_tokens="+10%", num_loops=2)
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.any():
                weight.normal_(std=0.05)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make(request.param)


@pytest.fixture(scope="module")
def greedy(model):
    """Prompts of three rows, and what follows them."""
    return tokens(3), decode(model, tokens(3))


@torch.no_grad()
def check(model, ids, want, **way):
    """Assert that `generate` continues `ids` to `want`, by way of the logits that decoding without a cache sees."""
    out = model.generate(ids, **PLAIN, **way, return_dict_in_generate=True, output_logits=True)
    assert torch.equal(out.sequences, want)
    logits = model(want, use_cache=False).logits[:, ids.shape[1] - 1 : -1].float()
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, rtol=1e-5, atol=1e-5)


def likeliest(logits):
    return logits.argmax(-1, keepdim=True)


@torch.no_grad()
def decode(model, ids, choose=likeliest, steps=STEPS):
    """Append to `ids` what `choose` takes from the last logits, computing everything anew in every step."""
    for _ in range(steps):
        ids = torch.cat([ids, choose(model(ids, use_cache=False).logits[:, -1].float())], 1)
    return ids


@pytest.mark.parametrize(
    "way",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}],
    ids=["dynamic", "uncached", "static", "chunked"],
)
def test_greedy(model, greedy, way):
    check(model, *greedy, **way)


# "eager" traces and runs the graph; inductor writes and compiles C++ for it.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_greedy_with_a_static_cache_compiles_once(model, greedy, backend):
    config = CompileConfig(fullgraph=True, mode="default", backend=backend)
    config._compile_all_devices = True  # else transformers compiles on accelerators only, in silence
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    check(model, *greedy, cache_implementation="static", compile_config=config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_conversation_goes_on_from_its_cache(model, greedy):
    ids, want = greedy
    first = model.generate(ids, **PLAIN | {"max_new_tokens": 5}, return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(3, 4)], 1)
    got = model.generate(more, **PLAIN, past_key_values=first.past_key_values)
    assert torch.equal(got, decode(model, more)) and torch.equal(first.sequences, want[:, : ids.shape[1] + 5])


def test_a_row_that_ends_leaves_the_others_going(model, greedy):
    ids, want = greedy
    written = want[:, ids.shape[1] :].tolist()
    end = next(i for i in written[0] if i not in written[1] + written[2])
    expected = want.clone()
    expected[0, ids.shape[1] + written[0].index(end) + 1 :] = PLAIN["pad_token_id"]
    assert torch.equal(model.generate(ids, **PLAIN | {"eos_token_id": end}), expected)


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_left_padded_rows_say_what_each_says_alone(model, way):
    prompts = [tokens(3)[i, :n] for i, n in enumerate((20, 7, 12))]
    padded = torch.full((3, 20), 9)
    mask = torch.zeros(3, 20, dtype=torch.long)
    for row, seen, prompt in zip(padded, mask, prompts, strict=True):
        row[-len(prompt) :], seen[-len(prompt) :] = prompt, 1
    together = model.generate(padded, attention_mask=mask, **PLAIN, **way)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row[20:], decode(model, prompt[None])[0, len(prompt) :])


def warp(logits, temperature=1.3, top_k=20, top_p=0.9):
    """Probabilities of the likeliest `top_k` that make up `top_p`, sharpened or flattened by the temperature."""
    logits = logits / temperature
    logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    kept = probabilities.cumsum(-1) - probabilities < top_p
    return logits.masked_fill(~torch.zeros_like(kept).scatter(1, order, kept), -torch.inf).softmax(-1)


@pytest.mark.parametrize("cache", [True, False])
def test_sampling(model, greedy, cache):
    ids, likeliest = greedy
    asked = {**PLAIN, "do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9, "use_cache": cache}
    torch.manual_seed(5)
    got = model.generate(ids, **asked)
    torch.manual_seed(5)
    want = decode(model, ids, lambda logits: torch.multinomial(warp(logits), 1))
    assert torch.equal(got, want) and not torch.equal(got, likeliest)


@torch.no_grad()
def beams(model, prompt, width):
    """Continuations of one row that beam search finds, likeliest first: [(log probability, text tokens)]."""
    found = [(0.0, prompt)]
    for _ in range(STEPS):
        candidates = []
        for score, ids in found:
            logp = model(ids[None], use_cache=False).logits[0, -1].float().log_softmax(-1)
            candidates += [(score + p, torch.cat([ids, torch.tensor([i])])) for i, p in enumerate(logp.tolist())]
        found = sorted(candidates, key=lambda c: -c[0])[:width]
    return found


def test_beam_search(model):
    ids, width = tokens(2, 8), 3
    out = model.generate(
        ids,
        **PLAIN,
        num_beams=width,
        num_return_sequences=width,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    want = [beam for row in ids for beam in beams(model, row, width)]
    assert torch.equal(out.sequences, torch.stack([beam for _, beam in want]))
    torch.testing.assert_close(out.sequences_scores, torch.tensor([score for score, _ in want]), rtol=1e-4, atol=1e-4)
    assert not torch.equal(out.sequences[::width], decode(model, ids))


@pytest.mark.parametrize("helper", ["the model it grew from", "prompt lookup"])
def test_assisted_decoding_says_the_same_in_fewer_passes(helper):
    model, parent, ids = make("grown"), tiny(dtype=torch.float64), tokens(1, 6).repeat(1, 3)
    steps, passes = 24, []
    want = decode(model, ids, steps=steps)
    asked = {"assistant_model": parent} if helper == "the model it grew from" else {"prompt_lookup_num_tokens": 3}
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    got = model.generate(ids, **PLAIN | {"max_new_tokens": steps}, **asked)
    assert torch.equal(got, want) and not torch.equal(got, decode(parent, ids, steps=steps))
    assert len(passes) < steps


@pytest.mark.parametrize("family", FAMILIES)
def test_text_generation_pipeline(family, tmp_path):
    tokenizer = make_tokenizer("bytes", None)
    model = tiny(family, vocab_size=len(tokenizer), dtype=torch.float64)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompts = ["ROMEO", "What light through yonder window breaks?", "Ay"]
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert write.model.dtype == torch.float64
    settings = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    alone = [write(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    batched = [out[0]["generated_text"] for out in write(prompts, batch_size=3, **settings)]
    want = [decode(model, tokenizer(p, return_tensors="pt").input_ids)[0] for p in prompts]
    assert alone == batched == [tokenizer.decode(ids, skip_special_tokens=True) for ids in want]
