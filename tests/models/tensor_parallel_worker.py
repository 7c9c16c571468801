"""One of two processes: load the checkpoint in argv[1] with its tensor-parallel plan, compare with the whole model."""

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import tokenformer  # noqa: F401  (registers the Auto classes)

torch.set_num_threads(1)
dist.init_process_group("gloo")
whole = AutoModelForCausalLM.from_pretrained(sys.argv[1])
sharded = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"))
ids = torch.arange(2 * 12).reshape(2, 12) % whole.config.vocab_size
a, b = whole(ids, labels=ids, use_cache=False), sharded(ids, labels=ids, use_cache=False)
torch.testing.assert_close(b.logits, a.logits, rtol=1e-4, atol=1e-4)
a.loss.backward()
b.loss.backward()
theirs = dict(sharded.named_parameters())
split = 0
for name, parameter in whole.named_parameters():
    grad = theirs[name].grad
    split += theirs[name].to_local().shape != parameter.shape if hasattr(theirs[name], "to_local") else 0
    if hasattr(grad, "full_tensor"):
        grad = grad.full_tensor()
    torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
generated = [m.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (whole, sharded)]
assert torch.equal(*generated)
print(f"rank {dist.get_rank()}: equal, {split} tensors split")
dist.destroy_process_group()
