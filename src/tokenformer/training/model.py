"""The grammar of `model:` in recipes, comparisons and plans: any architecture of transformers, with random weights."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import ConfigDict, Field, model_validator
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import cost
from ..errors import GrowthError
from ..growth.architectures import ARCHITECTURES, check_depth
from ..growth.tokenise import build, put_in_place
from ..models.configuration_tokenformer import TokenformerConfig
from ..sections import Section


class SitesSection(Section):
    """Linear maps of a model, and how many parameter tokens each gets."""

    at: str | dict[str, int] = "all-linear"
    """Which linear maps: a regular expression that matches the end of their names, such as "q_proj|v_proj";
    "all-linear": all but the output head; or several of these with the number of tokens of each map."""
    tokens: int | None = Field(None, gt=0)
    """Parameter tokens of each of these maps. Default, in tokenise: as many as have the map's parameters."""


class ModelSection(Section):
    """A model: the sizes of a TokenFormer, or of another architecture in transformers' names."""

    model_config = ConfigDict(extra="allow")

    architecture: str = "tokenformer"
    """Kind of model, in transformers' word for it: llama, gpt_neox, xlstm, mamba2, any that is a causal language model;
    another than tokenformer takes the fields of its configuration in transformers' names."""
    tokenise: SitesSection | None = None
    """Put parameter tokens in place of linear maps, as `tokenformer.tokenise` does: any architecture a TokenFormer."""
    preset: str | None = None
    """Sizes to start from, such as "1m-modern"; fields below override it. `tokenformer recipe` lists the presets."""
    hidden_size: int | None = Field(None, gt=0)
    """Width of the residual stream."""
    num_hidden_layers: int | None = Field(None, ge=0)
    """Blocks."""
    num_loops: int | None = Field(None, gt=0)
    """How many times the blocks run, one after the other, with the same weights. Default: once."""
    num_attention_heads: int | None = Field(None, gt=0)
    """Attention heads; they divide hidden_size."""
    qkv_param_tokens: int | None = Field(None, ge=0)
    """Parameter tokens of each of the query, key and value projections; 0 makes plain linear maps."""
    output_param_tokens: int | None = Field(None, ge=0)
    """Parameter tokens of the attention's output projection; 0 makes a plain linear map."""
    ffn_param_tokens: int | None = Field(None, ge=0)
    """Parameter tokens of the feed-forward."""
    norm_activation_type: Literal["l2_norm_gelu", "gelu_l2_norm", "gelu_l1_norm", "softmax", "gelu"] | None = None
    """How scores become weights; l2_norm_gelu is the paper's."""
    qkv_tau: float | None = Field(None, gt=0)
    """Constant τ of the query, key and value projections. Default: √n of their parameter tokens. Growth keeps it, so a
    model that will grow does best to begin with √n of those it grows to (docs/compare.md)."""
    output_tau: float | None = Field(None, gt=0)
    """Likewise of the attention's output."""
    ffn_tau: float | None = Field(None, gt=0)
    """Likewise of the feed-forward."""
    weights: Literal["float", "ternary"] | None = None
    """How the maps in the blocks are kept: float, or ternary: {-1, 0, 1} · one scale a map, beside 8-bit inputs. The
    embedding, the head and the norms stay float. New token groups are as these unless their stage says otherwise."""
    elementwise_affine: bool | None = None
    """Give the norms in the blocks weights and biases. Default: no (paper)."""
    use_qk_norm: bool | None = None
    """Divide each head's query and key by their root mean square, before the rotary embedding. Default: no (paper)."""
    use_embedding_norm: bool | None = None
    """Divide each embedding by its root mean square before the first block, so that no block drowns it. Default: no
    (paper)."""
    use_parallel_residual: bool | None = None
    """Let attention and feed-forward both read the block's input, as in GPT-NeoX. Default: no (paper)."""
    value_initializer_range: float | None = Field(None, gt=0)
    """Standard deviation of new values, of the first stage and of growth. Default: 2 / (blocks · √hidden_size)."""
    output_initializer_range: float | None = Field(None, ge=0)
    """Standard deviation in the first stage of all that writes to the residual stream: linear maps and values of the
    attention's output and of the feed-forward. 0: every block begins silent. Default: as for new values (paper)."""

    def config(self, **derived: Any) -> PreTrainedConfig:
        """Return the configuration; `derived` goes before the preset, and what the section says itself before both.

        Raises:
            ValueError: sizes that make no model.
        """
        given = self.model_dump(exclude=self._own(), exclude_none=True, exclude_unset=True)
        kind: Any = CONFIG_MAPPING[self.architecture]
        preset = kind.preset_sizes(self.preset) if self.preset else {}
        derived = {name: value for name, value in derived.items() if kind.attribute_map.get(name, name) not in given}
        try:
            check_depth(ARCHITECTURES.get(self.architecture), given)
            config = kind(**{**preset, **derived, **given})
            cost.parameters(config)
        except (ValueError, TypeError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
            raise ValueError(f"these sizes make no model: {error.__cause__ or error}") from error
        if self.tokenise is None:
            return config
        with torch.device("meta"):
            model = build(config)
        try:
            put_in_place(model, self.tokenise.at, self.tokenise.tokens)
        except GrowthError as error:
            raise ValueError(f"tokenise: {error}") from error
        return model.config

    @model_validator(mode="after")
    def _makes_sense(self) -> ModelSection:
        row = ARCHITECTURES.get(self.architecture)
        if row is None and self.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            near = difflib.get_close_matches(self.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
            raise ValueError(
                f"there is no architecture {self.architecture!r}; there are {', '.join(ARCHITECTURES)}, and what else "
                f"transformers has as a causal language model{', such as ' if near else ''}{', '.join(near)}"
            )
        if self.weights == "ternary" and (row is None or self.tokenise is not None):
            where = "maps that are tokenised" if self.tokenise else f"the maps of a {self.architecture!r} model"
            raise ValueError(f"weights is ternary, but {where} are float; take it out")
        kind: Any = CONFIG_MAPPING[self.architecture]
        if self.preset is not None:
            if row is None or not row.has_pattention:
                raise ValueError(
                    f"presets are sizes of TokenFormers; take out preset or architecture {self.architecture!r}"
                )
            kind.preset_sizes(self.preset)  # or says which there are
        # Without most of what every configuration has: `architectures`, a likely slip, is one of those.
        known = {*kind.attribute_map, *_names(kind), "weights"} - (_names(PreTrainedConfig) - {"tie_word_embeddings"})
        for name in sorted(self.model_fields_set - known - self._own()):
            near = difflib.get_close_matches(name, known | self._own(), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.architecture!r} models have no {name!r}{hint}")
        return self

    @classmethod
    def _own(cls) -> set[str]:
        """Fields that are no field of a configuration."""
        return set(cls.model_fields) - _names(TokenformerConfig)


def _names(config: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}
