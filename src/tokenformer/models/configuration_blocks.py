"""What the configurations of TokenFormers share: sizes of blocks whose projections are token groups, and named sizes.

No postponed annotations here: `strict` would then leave the types of the fields unchecked.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .names import BASE_GROUP, PROJECTIONS
from .pattention import (
    DEFAULT_EPS,
    NORM_ACTIVATION_TYPES,
    TOKEN_GROUP_NORMS,
    check_choice,
)
from .ternary import WEIGHTS
from .token_group import check_group, default_tau

# What an entry of token_groups may say beside its name and counts, where it is so.
_GROUP_NOTES = ("routed", "modality", "tau", "blocks", "weights", "loops")


@strict
class TokenformerBlocksConfig(PreTrainedConfig):
    """Sizes of the blocks of a TokenFormer, whatever it reads.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads: as in any transformer.
        num_loops: how many times the blocks run one after the other, with the same weights (looped, recursive or
            universal transformers); each loop has keys and values of its own in the cache.
        qkv_param_tokens: parameter tokens of each of the query, key and value projections, all groups together; where
            blocks differ, of the block that has most.
        output_param_tokens, ffn_param_tokens: likewise of the attention output and of the feed-forward.
            A projection with 0 is a plain bias-free linear map.
        token_groups: the groups in the order in which they were added, `{"name": …, "qkv": n, "output": n, "ffn": n}`
            each, n being one number or a list with one for every block; `"routed": True` where gates decide for each
            text token whether the group takes part; `"modality"`, in a model that reads text and images, where it
            takes part; `"tau"` a constant τ of its own by projection; `"blocks"` numbers those that were added with it;
            `"weights"` says how its keys and values are kept, where not as `float`; `"loops"` numbers those that came
            with it, from 1 on, in which alone it takes part, and in which a vector of its own scales what blocks add.
            Default: one group "base" with the counts above. Where given it decides; the counts follow from it.
        linear_projections: those of "qkv", "output", "ffn" that hold a linear map, with or without tokens beside it.
            Default: those without tokens.
        qkv_tau, output_tau, ffn_tau: constant τ of the projection. Default: √n (n for L1 norms, 1 for `gelu`) of the
            tokens at creation; None where there are none. Growth never changes it.
        norm_activation_type: `l2_norm_gelu`, `gelu_l2_norm`, `gelu_l1_norm`, `softmax`, or `gelu`: no
            normalisation.
        token_group_norm: `joint` or `per_group`: what the scores of a group are normalised with.
        weights: how the linear maps in the blocks are kept, and keys and values of a group "base" that follows from the
            counts: `float`; `ternary`, {-1, 0, 1} · one scale for each map, beside 8-bit inputs; or `packed`, which are
            ternary ones in 2 bits that no longer train.
        pattention_bias: whether every key and every projection's output has a bias.
        use_parallel_residual: whether attention and feed-forward both read the block's input, as in GPT-NeoX.
        use_qk_norm: whether each head's query and key are divided by their root mean square, without parameters.
        use_embedding_norm: whether embeddings are, before the first block, so that no block drowns them.
        pattention_eps: added to the squared norm of the scores.
        layer_norm_eps: of the norms in the blocks and of the final norm.
        elementwise_affine: whether the norms in the blocks have weights and biases, as the final one has.
        initializer_range: standard deviation of new keys, embeddings and query, key, value linear maps. The other
            linear maps take 2 / (num_hidden_layers · √hidden_size), officially "wang_init".
        value_initializer_range: standard deviation of new values, at creation and by growth. Default: "wang_init", too.
        output_initializer_range: standard deviation at creation of all that writes to the residual stream: linear maps
            and values of the attention output and of the feed-forward. 0: every block begins silent. Default: as above.
        frozen: parts that training leaves alone: token groups, "embedding", "final_norm", "linear_maps".
        auto_map: where Auto classes find the code when this package is not installed; saving a model copies that code
            (the files of this folder) beside its weights.

    Raises:
        ValueError: impossible sizes, names, or counts that contradict `token_groups`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    auto_classes: ClassVar[Mapping[str, str]] = {}
    _auto_class = "AutoConfig"
    # Not `is_causal`: transformers would write that into the configuration in every forward pass.
    attends_both_ways: ClassVar[bool] = False

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_loops: int = 1
    qkv_param_tokens: int | None = None
    output_param_tokens: int | None = None
    ffn_param_tokens: int | None = None
    token_groups: list[dict] | None = None
    linear_projections: list[str] | None = None
    qkv_tau: float | None = None
    output_tau: float | None = None
    ffn_tau: float | None = None
    norm_activation_type: str = "l2_norm_gelu"
    token_group_norm: str = "joint"
    weights: str = "float"
    pattention_bias: bool = False
    use_parallel_residual: bool = False
    use_qk_norm: bool = False
    use_embedding_norm: bool = False
    pattention_eps: float = DEFAULT_EPS
    layer_norm_eps: float = 1e-5
    elementwise_affine: bool = False
    initializer_range: float = 0.02
    value_initializer_range: float | None = None
    output_initializer_range: float | None = None
    frozen: list[str] | None = None
    auto_map: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive what was left out; every derived field is saved, so loading never derives it again."""
        asked = {p: getattr(self, f"{p}_param_tokens") for p in PROJECTIONS}
        if self.token_groups is None:
            sizes = {"qkv": 768, "output": 768, "ffn": 3072}
            self.token_groups = [{"name": BASE_GROUP} | {p: sizes[p] if asked[p] is None else asked[p] for p in sizes}]
            if self.weights != "float":
                self.token_groups[0]["weights"] = self.weights
        self.token_groups = [
            {"name": g["name"], **{p: g.get(p, 0) for p in PROJECTIONS}, **{k: g[k] for k in _GROUP_NOTES if g.get(k)}}
            for g in self.token_groups
        ]
        for projection in PROJECTIONS:
            total = max(self._totals(projection))
            if asked[projection] not in (None, total):
                raise ValueError(
                    f"{projection}_param_tokens is {asked[projection]} but the token groups add up to {total}: "
                    f"{self.token_groups}; change the groups, or leave {projection}_param_tokens out"
                )
            setattr(self, f"{projection}_param_tokens", total)
            if total and getattr(self, f"{projection}_tau") is None:
                together = max(self._totals(projection, always=True)) or total
                setattr(self, f"{projection}_tau", default_tau(together, self.norm_activation_type))
        if self.linear_projections is None:
            self.linear_projections = [p for p in PROJECTIONS if not any(self._totals(p, always=True))]
        if self.auto_map is None:
            self.auto_map = dict(self.auto_classes)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Check what the types cannot."""
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        check_choice("norm_activation_type", self.norm_activation_type, NORM_ACTIVATION_TYPES)
        check_choice("token_group_norm", self.token_group_norm, TOKEN_GROUP_NORMS)
        for group in self.token_groups or []:
            check_choice(f"weights of token group {group['name']!r}", group.get("weights", "float"), WEIGHTS)
        check_choice("weights", self.weights, WEIGHTS)
        if self.value_initializer_range is not None and self.value_initializer_range <= 0:
            raise ValueError(
                f"value_initializer_range is {self.value_initializer_range}; it must be positive, for growth adds zero "
                "keys, and beside zero values they would never learn"
            )
        if self.output_initializer_range is not None and self.output_initializer_range < 0:
            raise ValueError(f"output_initializer_range is {self.output_initializer_range}; it cannot be negative")
        assert self.token_groups is not None and self.linear_projections is not None
        self._check_loops(self.token_groups)
        names = [group["name"] for group in self.token_groups]
        if len(set(names)) < len(names):
            raise ValueError(f"token group names must differ: {names}")
        for projection in PROJECTIONS:
            totals = self._totals(projection, always=True)
            if projection not in self.linear_projections and not all(totals):
                where = f" in block {totals.index(0)}" if any(totals) else ""
                raise ValueError(f"projection {projection!r} has neither parameter tokens nor a linear map{where}")

    def _check_loops(self, groups: list[dict]) -> None:
        if self.num_loops < 1:
            raise ValueError(f"num_loops is {self.num_loops}; the blocks run at least once")
        taken: list[int] = []
        for group in groups:
            for loop in group.get("loops", ()):
                if not 0 < loop < self.num_loops or loop in taken:
                    raise ValueError(
                        f"token group {group['name']!r} has the loops {group['loops']}; num_loops is {self.num_loops}, "
                        f"so loops 1 to {self.num_loops - 1} can each belong to one group"
                    )
                taken.append(loop)

    def _totals(self, projection: str, *, always: bool = False) -> list[int]:
        """Parameter tokens of `projection` in every block, or once for all where all are alike.

        `always`: without groups that take part in some loops alone.
        """
        assert self.token_groups is not None
        groups = [group for group in self.token_groups if not (always and group.get("loops"))]
        counts = [group[projection] for group in groups]
        for group, count in zip(groups, counts, strict=True):
            if isinstance(count, list) and len(count) != self.num_hidden_layers:
                raise ValueError(
                    f"token group {group['name']!r} lists {projection} parameter tokens for {len(count)} blocks, but "
                    f"num_hidden_layers is {self.num_hidden_layers}; give one number for each block, or one for all"
                )
            for n in count if isinstance(count, list) else [count]:
                check_group(group["name"], n)
        blocks = self.num_hidden_layers if any(isinstance(count, list) for count in counts) else 1
        return [sum(count_at(count, block) for count in counts) for block in range(blocks)]

    @property
    def wang_std(self) -> float:
        """Standard deviation of new linear maps whose outputs are added to the residual stream."""
        return 2 / (self.num_hidden_layers * math.sqrt(self.hidden_size))

    @property
    def value_std(self) -> float:
        """Standard deviation of new values."""
        return self.wang_std if self.value_initializer_range is None else self.value_initializer_range

    @classmethod
    def preset_sizes(cls, name: str) -> Mapping[str, float]:
        """Return the fields of a preset.

        Raises:
            ValueError: unknown name; the nearest are named.
        """
        if name not in cls.presets:
            near = difflib.get_close_matches(name, cls.presets, n=3, cutoff=0.5)
            plain = [preset for preset in cls.presets if not preset.endswith(("-ffn", "-modern"))]
            known = f"there are {', '.join(plain)}, and each with -ffn or -modern behind it"
            hint = f"did you mean {' or '.join(near)}?" if near else known
            raise ValueError(f"there is no preset {name!r}; {hint}")
        return cls.presets[name]

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> Self:
        """Return the named size, for example `"150m"`; `presets` has them all.

        Raises:
            ValueError: unknown name.
        """
        return cls(**{**cls.preset_sizes(name), **overrides})


def count_at(count: int | list[int], block: int) -> int:
    """Return the count of one block, of a count that is one number or a list with one for each."""
    return count[block] if isinstance(count, list) else count


def sizes_of(
    layers: int, hidden: int, heads: int, attention_tokens: int, ffn_tokens: int, **more: int
) -> dict[str, int]:
    """Return the fields of a preset in the order in which the paper's tables give them."""
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "qkv_param_tokens": attention_tokens,
        "output_param_tokens": attention_tokens,
        "ffn_param_tokens": ffn_tokens,
        **more,
    }


def families(presets: Mapping[str, Mapping[str, float]], **modern: float) -> dict[str, Mapping[str, float]]:
    """Return presets with two more of each: "-ffn", whose tokens are all in the feed-forward, and "-modern".

    That is "-ffn" by the base recipe of docs/compare.md: sound scales from the first step, and what `modern` says.
    """
    sound = {"use_embedding_norm": True, "output_initializer_range": 0.0, **modern}
    ffn = {name: _ffn_family(preset) for name, preset in presets.items()}
    return {
        **presets,
        **{f"{name}-ffn": preset for name, preset in ffn.items()},
        **{f"{name}-modern": {**preset, **sound} for name, preset in ffn.items()},
    }


def _ffn_family(preset: Mapping[str, float]) -> dict[str, float]:
    """Move attention tokens into the feed-forward, beside plain linear attention, parameter for parameter."""
    attention = 3 * preset["qkv_param_tokens"] + preset["output_param_tokens"]
    return {
        **preset,
        "qkv_param_tokens": 0,
        "output_param_tokens": 0,
        "ffn_param_tokens": preset["ffn_param_tokens"] + attention - 2 * preset["hidden_size"],
    }
