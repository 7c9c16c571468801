"""Configuration of a TokenFormer language model, and the named sizes of the paper.

No postponed annotations here: `strict` would then leave the types of the fields unchecked.
"""

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from .configuration_blocks import TokenformerBlocksConfig, families, sizes_of
from .names import PROJECTIONS

_LAPTOP = {"vocab_size": 4096, "max_position_embeddings": 1024}
_PAPER_PRESETS = {
    # Growth series: paper, table 5 (PAPER: "1.4B" computes to 1.3B).
    "124m": sizes_of(12, 768, 12, 576, 2304),
    "354m": sizes_of(12, 768, 12, 2140, 8560),
    "757m": sizes_of(12, 768, 12, 4850, 19400),
    "1.4b": sizes_of(12, 768, 12, 8620, 34480),
    # Released on the Pile: official configs/tokenformer/*.yml.
    "150m": sizes_of(12, 768, 12, 768, 3072),
    "450m": sizes_of(24, 1024, 16, 1024, 4096),
    "900m": sizes_of(32, 1280, 16, 1280, 5120),
    "1.5b": sizes_of(40, 1536, 16, 1536, 6144),
    # The repository's own growth run on OpenWebText2.
    "owt2-354m": sizes_of(24, 1024, 16, 768, 3072),
    "owt2-757m": sizes_of(24, 1024, 16, 1792, 7168),
    # For laptops, named after the parameters outside the embedding.
    "1m": sizes_of(4, 128, 4, 128, 512, **_LAPTOP),
    "4m": sizes_of(6, 192, 6, 192, 768, **_LAPTOP),
    "8m": sizes_of(8, 256, 8, 256, 1024, **_LAPTOP),
    "24m": sizes_of(10, 384, 6, 384, 1536, **_LAPTOP),
}
PRESETS = families(_PAPER_PRESETS, tie_word_embeddings=False)


@strict
class TokenformerConfig(TokenformerBlocksConfig):
    """Sizes of a TokenFormer decoder. The defaults are the released 150M model (official code, 150M_eval.yml).

    Args:
        vocab_size: rows of the tied embedding (official: 50277 padded to 50304).
        max_position_embeddings: longest context in text tokens.
        rope_parameters: transformers' rotary settings; default base 10000 on the first quarter of each head.
        use_cache, bos_token_id, eos_token_id, pad_token_id, tie_word_embeddings: as in any transformer.

    All other fields are those of `TokenformerBlocksConfig`.
    """

    model_type = "tokenformer"
    presets: ClassVar[Mapping[str, Mapping[str, float]]] = PRESETS
    auto_classes: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_tokenformer.TokenformerConfig",
        "AutoModel": "modeling_tokenformer.TokenformerModel",
        "AutoModelForCausalLM": "modeling_tokenformer.TokenformerForCausalLM",
    }
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 50304
    max_position_embeddings: int = 2048
    rope_parameters: RopeParameters | dict | None = None
    use_cache: bool = True
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 0
    pad_token_id: int | None = None
    tie_word_embeddings: bool = True

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Fill in TokenFormer's rotary defaults; called by transformers while the configuration is made."""
        self.rope_parameters = dict(self.rope_parameters or {})
        self.rope_parameters.setdefault("rope_theta", kwargs.pop("rope_theta", 10000.0))
        self.rope_parameters.setdefault("partial_rotary_factor", kwargs.pop("partial_rotary_factor", 0.25))
        self.standardize_rope_params()
        return kwargs

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the configuration that transformers makes caches from: with a block for every time that one runs."""
        if self.num_loops == 1 or not kwargs.get("decoder"):
            return self
        unrolled = copy.copy(self)
        unrolled.num_hidden_layers *= self.num_loops
        return unrolled

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor-parallel plan: every process holds a slice of each group's tokens and adds up norms and outputs.

        Heads stay whole, because a Pattention's output is. Empty for L1 norms, which are no sums of squares, where
        groups are routed, whose rows are sorted by gates, and for ternary maps, which have one scale each.
        """
        assert self.token_groups is not None and self.linear_projections is not None
        plan: dict[str, str] = {}
        rounded = {self.weights, *(g.get("weights", "float") for g in self.token_groups)} != {"float"}
        routed = any(g.get("routed") for g in self.token_groups)
        if self.norm_activation_type in ("softmax", "gelu_l1_norm") or routed or rounded:
            return plan
        plan["embed_tokens"] = "embedding_rowwise"
        for projection, modules in PROJECTIONS.items():
            for module in modules:
                prefix = f"layers.*.{module}"
                if projection in self.linear_projections:
                    plan[f"{prefix}.linear"] = "colwise_rep"
                for group in self.token_groups:
                    if group[projection]:
                        plan[f"{prefix}.groups.{group['name']}.keys"] = "colwise"
                        plan[f"{prefix}.groups.{group['name']}.values"] = "rowwise"
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Ignore what transformers 5.19 assigns while the configuration is made: the embedding, in the plan already."""
